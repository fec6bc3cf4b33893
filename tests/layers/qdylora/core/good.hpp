#pragma once

// A mention of std::cout, <<< or __global__ in a comment is no violation; nor is std::snprintf(text, size, format).
#include <cstdio>

#include <qdylora/config.hpp>

inline int text_length() { return std::snprintf(nullptr, 0, "%d", 7); }
