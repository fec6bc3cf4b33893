// expect: must not include <qdylora/backend.hpp>
#pragma once

#include <qdylora/backend.hpp>
