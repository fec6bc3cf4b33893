#include "cuda/layers.test.cpp"
