// expect: a macro's name starts with QDYLORA_
#pragma once

#define SQUARE(x) ((x) * (x))
