#include "cuda/products.test.cpp"
