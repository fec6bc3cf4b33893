#pragma once

#include <qdylora/backend.hpp>
#include <qdylora/nn/parameter.hpp>
