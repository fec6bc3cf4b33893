// expect: write <qdylora/...>
#pragma once

#include "good.hpp"
