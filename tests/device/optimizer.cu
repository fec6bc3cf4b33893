#include "cuda/optimizer.test.cpp"
