#include "cuda/fused_products.test.cpp"
