#include "cuda/finetune.test.cpp"
