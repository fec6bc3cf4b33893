// expect: must not include <qdylora/model/good.hpp>
#pragma once

#include <qdylora/model/good.hpp>
