#include "cuda/attention.test.cpp"
