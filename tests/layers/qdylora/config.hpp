#pragma once

#define QDYLORA_GOOD 1
