// expect: must not include <qdylora/io.hpp>
#pragma once

#include <qdylora/io.hpp>
