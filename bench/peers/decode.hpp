// What the decoding programs share: 128 tokens, greedy, from one token; the fastest of a few runs.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace decode {

inline constexpr std::int32_t first_token = 1;
inline constexpr int count = 128;

/// run(n) decodes n tokens and returns them.
template <class F>
void report(const char* kernel, int threads, F&& run) {
  using clock = std::chrono::steady_clock;
  run(8);
  std::vector<double> seconds;
  std::vector<std::int32_t> ids;
  for (int i = 0; i < 5; ++i) {
    const auto start = clock::now();
    ids = run(count);
    seconds.push_back(std::chrono::duration<double>(clock::now() - start).count());
  }
  std::sort(seconds.begin(), seconds.end());
  if (ids.size() != static_cast<std::size_t>(count)) std::exit(1);
  std::printf(
      "{\"kernel\": \"%s\", \"class\": \"decode\", \"direction\": \"decode\", \"threads\": %d, \"tokens_per_s\": %.4g, "
      "\"tokens_per_s_median\": %.4g, \"first_ids\": [%d, %d, %d, %d]}\n",
      kernel, threads, count / seconds.front(), count / seconds[seconds.size() / 2], ids[0], ids[1], ids[2], ids[3]);
  std::fflush(stdout);
}

}  // namespace decode
