// expect: must not include <qdylora/nn/good.hpp>
#pragma once

#include <qdylora/nn/good.hpp>
