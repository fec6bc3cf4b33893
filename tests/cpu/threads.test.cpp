// The number of threads, the executor and repetition change no bit of any result.
#include <thread>

#include "backend/each_isa.inc"
#include "backend/trace.inc"

namespace threads_test {

namespace qd = qdylora;

TEMPLATE_TEST_CASE("every operation gives the same bits on 1, 2, 3 and 8 threads", "[cpu]", float, double, qd::bfloat16, qd::half) {
  for (const qd::Isa isa : {qd::Isa::generic, qd::Isa::avx2, qd::Isa::avx512}) {
    if (!qd::supported(isa)) continue;
    CAPTURE(qd::name(isa));
    const auto one = test::trace<qd::Cpu, TestType>(qd::Cpu(1).with_isa(isa));
    for (const int threads : {2, 3, 8}) {
      CAPTURE(threads);
      CHECK(test::differing(one, test::trace<qd::Cpu, TestType>(qd::Cpu(threads).with_isa(isa))) == "");
    }
  }
}

TEST_CASE("runs repeat bit for bit, and an executor that runs tasks in reverse gives the pool's bits", "[cpu]") {
  const auto first = test::trace<qd::Cpu, float>(qd::Cpu(3));
  for (int i = 0; i < 5; ++i) CHECK(test::differing(first, test::trace<qd::Cpu, float>(qd::Cpu(3))) == "");
  const qd::Cpu reversed(qd::Executor([](qd::Index count, const std::function<void(qd::Index)>& f) {
    for (qd::Index i = count; i > 0; --i) f(i - 1);
  }));
  CHECK(test::differing(first, test::trace<qd::Cpu, float>(reversed)) == "");
}

TEST_CASE("two threads that share a backend get their own results", "[cpu]") {
  const qd::Cpu cpu(2);
  const auto alone = test::trace<qd::Cpu, float>(cpu);
  test::Trace traces[2];
  std::thread other([&] { traces[0] = test::trace<qd::Cpu, float>(cpu); });
  traces[1] = test::trace<qd::Cpu, float>(cpu);
  other.join();
  for (const auto& found : traces) CHECK(test::differing(alone, found) == "");
}

TEST_CASE("a backend can be forced to any supported instruction set and to no other", "[cpu]") {
  for (const qd::Isa isa : {qd::Isa::generic, qd::Isa::avx2, qd::Isa::avx512}) {
    if (qd::supported(isa)) CHECK(qd::Cpu(1).with_isa(isa).isa() == isa);
    else CHECK(test::code_of([&] { qd::Cpu(1).with_isa(isa); }) == qd::Errc::unsupported);
  }
  CHECK(qd::Cpu(1).isa() == qd::best_isa());
  CHECK(qd::Cpu(3).threads() == 3);
  CHECK(qd::Cpu().threads() >= 1);
  CHECK(qd::Cpu(0).threads() == qd::Cpu().threads());
}

}  // namespace threads_test
