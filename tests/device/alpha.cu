#include "cuda/alpha.test.cpp"
