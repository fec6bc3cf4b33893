#include "cuda/decoder.test.cpp"
