#include "cuda/quantize.test.cpp"
