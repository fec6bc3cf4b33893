// Catch2's main, compiled once and linked into every test program. Version 3 brings its own, and this file is then empty.
#define CATCH_CONFIG_MAIN
#include "support/catch.hpp"
