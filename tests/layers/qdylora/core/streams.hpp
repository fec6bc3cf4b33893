// expect: the library prints nothing
#pragma once

#include <iostream>

inline void greet() { std::cerr << "hello\n"; }
