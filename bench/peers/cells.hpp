// What the C++ programs here share: arguments, data, the clock, the reference in double, and the line of JSON that a cell becomes.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <unistd.h>

namespace cells {

using Index = std::int64_t;

inline std::size_t size(Index n) { return static_cast<std::size_t>(n); }

/// PROGRAM OUT IN THREADS TOKENS[,TOKENS...] MEGABYTES SECONDS; for ours, 0 tokens mean quantizing and decoding.
struct Task {
  Index out = 0, in = 0;
  int threads = 1;
  std::vector<Index> tokens;
  double bytes = 0.0;    // weights are cycled over at least so many
  double seconds = 0.2;  // least time of a cell

  Task(int argc, char** argv) {
    if (argc != 7) {
      std::fprintf(stderr, "usage: %s OUT IN THREADS TOKENS[,TOKENS...] MEGABYTES SECONDS\n", argv[0]);
      std::exit(2);
    }
    out = std::atol(argv[1]);
    in = std::atol(argv[2]);
    threads = std::atoi(argv[3]);
    for (const char* at = argv[4]; *at != '\0';) {
      char* end = nullptr;
      tokens.push_back(std::strtol(at, &end, 10));
      at = *end == ',' ? end + 1 : end;
      if (tokens.back() < 0 || (*end != ',' && *end != '\0')) std::exit(2);
    }
    bytes = 1e6 * std::atof(argv[5]);
    seconds = std::atof(argv[6]);
  }

  Index most_tokens() const { return *std::max_element(tokens.begin(), tokens.end()); }
  Index copies(double bytes_of_one) const { return std::clamp<Index>(static_cast<Index>(std::ceil(bytes / bytes_of_one)), 2, 512); }
  /// Products timed together: a single small one is mostly the clock and, for peers that run graphs, the graph's start.
  Index group(Index tokens_now) const { return out * in > 2'000'000 ? 1 : std::clamp<Index>(256 / tokens_now, 1, 16); }
};

/// Nearly normal numbers; rows repeat after 512, since making more takes longer than timing them.
inline std::vector<float> random_matrix(Index rows, Index cols, float deviation, std::uint64_t seed) {
  std::vector<float> m(size(rows * cols));
  const auto fresh = size(std::min<Index>(rows, 512) * cols);
  for (std::size_t i = 0; i < fresh; ++i) {
    seed += 0x9e3779b97f4a7c15u;
    std::uint64_t z = seed;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    double sum = -2.0;
    for (int part = 0; part < 4; ++part) sum += static_cast<double>((z >> (16 * part)) & 0xffff) / 65536.0;
    m[i] = deviation * static_cast<float>(sum * std::sqrt(3.0));
  }
  for (std::size_t i = fresh; i < m.size(); ++i) m[i] = m[i - fresh];
  return m;
}

/// Rows of a batch whose results are compared.
inline std::set<Index> probes(Index tokens) { return {0, tokens / 3, 2 * tokens / 3, tokens - 1}; }

/// Products of the probed rows in double arithmetic.
class Reference {
 public:
  /// x [most tokens, in] or dy [most tokens, out]; w [out, in], decoded.
  Reference(const Task& task, bool backward, const std::vector<float>& x, const std::vector<float>& w)
      : cols_(backward ? task.in : task.out) {
    std::set<Index> rows;
    for (const Index tokens : task.tokens) rows.merge(probes(tokens));
    const std::vector<Index> order(rows.begin(), rows.end());
    const Index count = static_cast<Index>(order.size()), depth = backward ? task.out : task.in;
    if (backward) {
      std::vector<double> y(size(count * cols_));
      for (Index n = 0; n < depth; ++n)
        for (Index t = 0; t < count; ++t) {
          const double factor = static_cast<double>(x[size(order[size(t)] * depth + n)]);
          for (Index k = 0; k < cols_; ++k) y[size(t * cols_ + k)] += factor * static_cast<double>(w[size(n * cols_ + k)]);
        }
      for (Index t = 0; t < count; ++t) rows_[order[size(t)]].assign(y.begin() + t * cols_, y.begin() + (t + 1) * cols_);
    } else {
      std::vector<double> turned(size(depth * count)), sums(size(count));  // tokens innermost: sums in registers, no reduction
      for (Index t = 0; t < count; ++t)
        for (Index k = 0; k < depth; ++k) turned[size(k * count + t)] = static_cast<double>(x[size(order[size(t)] * depth + k)]);
      for (const Index row : order) rows_[row].resize(size(cols_));
      for (Index n = 0; n < cols_; ++n) {
        std::fill(sums.begin(), sums.end(), 0.0);
        for (Index k = 0; k < depth; ++k) {
          const double factor = static_cast<double>(w[size(n * depth + k)]);
          for (Index t = 0; t < count; ++t) sums[size(t)] += factor * turned[size(k * count + t)];
        }
        for (Index t = 0; t < count; ++t) rows_[order[size(t)]][size(n)] = sums[size(t)];
      }
    }
  }

  /// Root-mean-square error of y [tokens, cols] relative to the root-mean-square size of what is right.
  double error(const float* y, Index tokens) const {
    double wrong = 0.0, all = 0.0;
    for (const Index row : probes(tokens)) {
      const auto& right = rows_.at(row);
      for (Index n = 0; n < cols_; ++n) {
        wrong += std::pow(static_cast<double>(y[row * cols_ + n]) - right[size(n)], 2);
        all += right[size(n)] * right[size(n)];
      }
    }
    return std::sqrt(wrong / all);
  }

 private:
  Index cols_;
  std::map<Index, std::vector<double>> rows_;
};

struct Time {
  double least = 0.0, median = 0.0;  // seconds of one product
};

/// Runs sample(0), sample(1), ... each of `products` products: at least 5 of them and `seconds`, but little more than a second.
template <class F>
Time measure(double seconds, Index products, F&& sample) {
  using clock = std::chrono::steady_clock;
  sample(0);
  std::vector<double> times;
  const auto start = clock::now();
  for (Index i = 1;; ++i) {
    const auto before = clock::now();
    sample(i);
    const auto after = clock::now();
    times.push_back(std::chrono::duration<double>(after - before).count() / static_cast<double>(products));
    const double spent = std::chrono::duration<double>(after - start).count();
    if ((times.size() >= 5 && spent >= seconds) || (times.size() >= 3 && spent >= 1.0)) break;
  }
  std::sort(times.begin(), times.end());
  return {times.front(), times[times.size() / 2]};
}

inline void print_version(const char* what, const std::string& version) {
  std::printf("{\"version_of\": \"%s\", \"version\": \"%s\"}\n", what, version.c_str());
}

/// What other programs took of the processors since this was made, which says how far its times are to be trusted.
class Others {
 public:
  /// Percent; negative where the system does not say.
  double percent() const {
    const double others = busy() - busy_ - (own() - own_), wall = std::chrono::duration<double>(clock::now() - start_).count();
    return busy_ < 0.0 ? -1.0 : 100.0 * std::max(0.0, others) / (wall * std::max(1u, std::thread::hardware_concurrency()));
  }

 private:
  using clock = std::chrono::steady_clock;
  static double own() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }
  // Seconds of all processors that were not idle.
  static double busy() {
    long user = 0, nice = 0, system = 0, idle = 0, wait = 0, hard = 0, soft = 0, stolen = 0;
    std::FILE* const file = std::fopen("/proc/stat", "r");
    if (file == nullptr) return -1.0;
    const int found = std::fscanf(file, "cpu %ld %ld %ld %ld %ld %ld %ld %ld", &user, &nice, &system, &idle, &wait, &hard, &soft, &stolen);
    std::fclose(file);
    return found == 8 ? static_cast<double>(user + nice + system + hard + soft + stolen) / static_cast<double>(sysconf(_SC_CLK_TCK)) : -1.0;
  }
  clock::time_point start_ = clock::now();
  double busy_ = busy(), own_ = own();
};

inline void print_others(const Others& others) { std::printf("{\"others_percent\": %.1f}\n", others.percent()); }

/// A negative error is one the program does not know.
inline void print_cell(const Task& task, const char* kernel, const char* kind, const char* direction, Index tokens, Time time,
                       double error) {
  std::printf(
      "{\"kernel\": \"%s\", \"class\": \"%s\", \"direction\": \"%s\", \"out\": %ld, \"in\": %ld, \"tokens\": %ld, \"threads\": %d, "
      "\"us_min\": %.5g, \"us_median\": %.5g, \"error\": ",
      kernel, kind, direction, static_cast<long>(task.out), static_cast<long>(task.in), static_cast<long>(tokens), task.threads,
      1e6 * time.least, 1e6 * time.median);
  if (error < 0.0) std::printf("null}\n");
  else std::printf("%.3g}\n", error);
  std::fflush(stdout);
}

}  // namespace cells
