// expect: must not include <qdylora/cpu/good.hpp>
#pragma once

#include <qdylora/cpu/good.hpp>
