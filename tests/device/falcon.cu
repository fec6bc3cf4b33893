#include "cuda/falcon.test.cpp"
