// expect: must not include <qdylora/quant/good.hpp>
#pragma once

#include <qdylora/quant/good.hpp>
