#pragma once

#include <qdylora/nn/parameter.hpp>
