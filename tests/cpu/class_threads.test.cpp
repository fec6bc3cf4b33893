// In every arithmetic class, the number of threads, the executor and repetition change no bit of a product.
#include <thread>

#include "backend/product_trace.inc"

namespace class_threads_test {

namespace qd = qdylora;
using namespace test;

namespace {

// f(isa, compute) for all there are. The automatic class is one of the others, which cpu/classes.test.cpp sees to.
template <class F>
void each_isa_and_class(F f) {
  for (const Isa isa : all_isas)
    if (qd::supported(isa))
      for (const Compute compute : all_classes) {
        CAPTURE(qd::name(isa), class_name(compute));
        f(isa, compute);
      }
}

}  // namespace

TEMPLATE_TEST_CASE("products of every class have the same bits on 1, 2, 3 and 8 threads", "[cpu][classes]", float, qd::bfloat16) {
  const TracedOperands<TestType> operands;
  const qd::Cpu one(1), two(2), three(3), eight(8);
  each_isa_and_class([&](Isa isa, Compute compute) {
    const auto expected = product_trace(one.with_isa(isa).with_compute(compute), operands);
    for (const qd::Cpu& cpu : {two, three, eight}) {
      CAPTURE(cpu.threads());
      CHECK(differing(expected, product_trace(cpu.with_isa(isa).with_compute(compute), operands)) == "");
    }
  });
}

TEMPLATE_TEST_CASE("products of every class have the same bits when an executor runs the tasks, in whatever order", "[cpu][classes]", float,
                   qd::half) {
  const TracedOperands<TestType> operands;
  const qd::Cpu one(1);
  const qd::Cpu reversed(qd::Executor([](Index count, const std::function<void(Index)>& f) {
    for (Index i = count; i > 0; --i) f(i - 1);
  }));
  const qd::Cpu interleaved(qd::Executor([](Index count, const std::function<void(Index)>& f) {
    for (Index i = 1; i < count; i += 2) f(i);
    for (Index i = 0; i < count; i += 2) f(i);
  }));
  each_isa_and_class([&](Isa isa, Compute compute) {
    const auto expected = product_trace(one.with_isa(isa).with_compute(compute), operands);
    CHECK(differing(expected, product_trace(reversed.with_isa(isa).with_compute(compute), operands)) == "");
    CHECK(differing(expected, product_trace(interleaved.with_isa(isa).with_compute(compute), operands)) == "");
  });
}

TEST_CASE("products of every class repeat bit for bit", "[cpu][classes]") {
  const TracedOperands<float> operands;
  const qd::Cpu three(3);
  for (const Compute compute : {Compute::automatic, Compute::exact, Compute::bits16, Compute::int8}) {
    CAPTURE(class_name(compute));
    const auto first = product_trace(three.with_compute(compute), operands);
    for (int i = 0; i < 3; ++i) CHECK(differing(first, product_trace(three.with_compute(compute), operands)) == "");
  }
}

TEST_CASE("threads that share a pool compute in different classes and get their own results", "[cpu][classes]") {
  const TracedOperands<float> operands;
  const qd::Cpu shared(2);
  Trace alone[3], together[3];
  for (std::size_t i = 0; i < 3; ++i) alone[i] = product_trace(shared.with_compute(all_classes[i]), operands);
  std::vector<std::thread> callers;
  for (std::size_t i = 0; i < 3; ++i)
    callers.emplace_back([&, i] { together[i] = product_trace(shared.with_compute(all_classes[i]), operands); });
  for (auto& caller : callers) caller.join();
  for (std::size_t i = 0; i < 3; ++i) {
    CAPTURE(class_name(all_classes[i]));
    CHECK(differing(alone[i], together[i]) == "");
  }
}

}  // namespace class_threads_test
