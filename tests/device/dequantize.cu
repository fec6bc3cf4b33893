#include "cuda/dequantize.test.cpp"
