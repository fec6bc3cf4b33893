// expect: must not include <qdylora/nn/parameter.hpp>
#pragma once

#include <qdylora/core/good.hpp>
#include <qdylora/nn/parameter.hpp>
