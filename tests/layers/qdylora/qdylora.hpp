// expect: must not include <qdylora/model/good.hpp>
#pragma once

#include <qdylora/cpu/good.hpp>
#include <qdylora/model/good.hpp>
