// expect: the library prints nothing
#pragma once

#include <cstdio>

inline void greet() { std::printf("hello\n"); }
