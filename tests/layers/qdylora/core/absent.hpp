// expect: which does not exist
#pragma once

#include <qdylora/core/nowhere.hpp>
