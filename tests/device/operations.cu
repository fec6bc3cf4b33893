#include "cuda/operations.test.cpp"
