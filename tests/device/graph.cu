#include "cuda/graph.test.cpp"
