#pragma once

#include <qdylora/nn/good.hpp>
#include <qdylora/optim/good.hpp>
