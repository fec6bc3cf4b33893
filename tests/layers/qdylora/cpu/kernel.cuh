// expect: is a .cuh outside of cuda/
#pragma once

struct Kernel {};
