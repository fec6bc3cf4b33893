// Catch2, version 2 or 3: the one header that tests include it by. Tests use what both versions have, and write Approx and SKIP as
// version 3 does.
#pragma once

#if __has_include(<catch2/catch_all.hpp>)

#include <catch2/catch_all.hpp>
using Catch::Approx;

#elif __has_include(<catch2/catch.hpp>)

#include <catch2/catch.hpp>

#else
#error "the tests need Catch2, version 2.13 or later (Debian, Ubuntu: catch2)"
#endif

// SKIP("why"): ends a test case that cannot run here. ctest shows it as skipped, by the word in its output. Under version 2 it is a
// return, so it stands in the body of a TEST_CASE and not in a function that the body calls.
#if !defined(SKIP)
#define SKIP(...)                       \
  do {                                  \
    WARN("SKIPPED: " << __VA_ARGS__);   \
    return;                             \
  } while (false)
#endif
