// Moments in a file: the same bits as in memory, and of memory a small part.
#include <algorithm>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/core/paged_memory.hpp>
#include <qdylora/cpu/cpu.hpp>
#include <qdylora/optim/adamw.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/paged_pages.hpp"
#include "support/random_data.hpp"

namespace paged_test {

namespace qd = qdylora;
using qd::Index;
using qd::PagedMemory;
using Parameter = qd::Parameter<float>;

namespace {

/// Parameters of several shapes: of less than a page, of a few, of odd ones.
qd::Parameters<float> some_parameters() {
  qd::Parameters<float> all;
  for (const auto& [rows, cols] : {std::pair<Index, Index>{1, 3}, {16, 700}, {7, 4100}}) {
    const auto seed = static_cast<std::uint64_t>(rows);
    all.push_back(std::make_shared<Parameter>("p" + std::to_string(rows), rows, cols));
    qd::copy(test::normal_matrix<float>(rows, cols, seed).view(), all.back()->value.view());
  }
  return all;
}

/// Steps with clipping, decay, rows without gradient and a reset in between; values at the end.
template <class Optimizer>
std::vector<float> trained(typename Optimizer::Memory memory) {
  const auto parameters = some_parameters();
  const qd::AdamWOptions options{
      .lr = 0.01, .weight_decay = 0.1, .max_gradient_norm = 1.0, .untouched_rows = qd::AdamWOptions::UntouchedRows::strict};
  Optimizer optimizer(parameters, options, qd::Cpu(2), memory);
  for (std::uint64_t step = 0; step < 6; ++step) {
    optimizer.zero_grad();
    for (const auto& p : parameters) {
      const Index rows = (p->value.rows() + static_cast<Index>(step % 2)) / (step % 2 == 0 ? 1 : 2);
      qd::copy(test::normal_matrix<float>(rows, p->value.cols(), 10 + step).view(), p->gradient.view().top_rows(rows));
      p->touch(0, rows);
    }
    optimizer.step();
    if (step == 2) optimizer.reset_state();
  }
  std::vector<float> values;
  for (const auto& p : parameters) values.insert(values.end(), p->value.span().begin(), p->value.span().end());
  return values;
}

/// The CPU, and the most pages of moments that were in memory when it had updated some.
struct WatchedCpu : qd::Cpu {
  std::shared_ptr<std::size_t> most = std::make_shared<std::size_t>();

  template <class... Arguments>
  void adamw(const Arguments&... arguments) const {
    Cpu::adamw(arguments...);
    *most = std::max(*most, test::paged_pages().resident);
  }
};

template <class Optimizer>
void expect_small(const std::filesystem::path& folder, std::size_t parameters) {
  qd::Parameters<float> all;
  for (std::size_t i = 0; i < parameters; ++i) all.push_back(std::make_shared<Parameter>("p", 64, 4096));
  const WatchedCpu cpu;
  Optimizer optimizer(all, {}, cpu, PagedMemory(folder));
  CHECK(test::paged_pages().mapped >= optimizer.bytes());
  for (int step = 0; step < 2; ++step) {
    for (const auto& p : all) std::fill(p->gradient.span().begin(), p->gradient.span().end(), 0.5f);
    optimizer.step();
    CHECK(test::paged_pages().resident == 0);
    if (step == 0) optimizer.reset_state();
    CHECK(test::paged_pages().resident == 0);
  }
  CHECK(*cpu.most > 0);
  CHECK(static_cast<double>(*cpu.most) < 0.3 * static_cast<double>(optimizer.bytes()));
}

}  // namespace

TEST_CASE("moments in a file are those in memory, bit for bit") {
  const test::TemporaryFolder folder;
  const PagedMemory memory(folder.path());
  const auto in_floats = trained<qd::AdamW<float>>({}), in_8_bits = trained<qd::AdamW8bit<float>>({});
  CHECK(in_floats != in_8_bits);
  CHECK(trained<qd::AdamW<float, qd::Cpu, PagedMemory>>(memory) == in_floats);
  CHECK(trained<qd::AdamW<float, qd::Cpu, PagedMemory>>({}) == in_floats);
  CHECK(trained<qd::AdamW8bit<float, qd::Cpu, PagedMemory>>(memory) == in_8_bits);
  CHECK(folder.count() == 0);
}

TEST_CASE("of moments in a file less than a third is in memory at any time of a step") {
  if (!std::filesystem::exists("/proc/self/smaps")) SKIP("this system has no /proc/self/smaps");
  const test::TemporaryFolder folder;
  expect_small<qd::AdamW<float, WatchedCpu, PagedMemory>>(folder.path(), 32);      // 64 MiB of moments
  expect_small<qd::AdamW8bit<float, WatchedCpu, PagedMemory>>(folder.path(), 32);  // 16.5
}

TEST_CASE("an optimizer whose moments find no room does not come to be") {
  using Paged = qd::AdamW<float, qd::Cpu, PagedMemory>;
  const auto error = test::error_of([] { Paged(some_parameters(), {}, {}, PagedMemory("/no/such/folder")); });
  REQUIRE(error);
  CHECK(error->code() == qd::Errc::open);
  CHECK(error->file() == "/no/such/folder");
}

}  // namespace paged_test
