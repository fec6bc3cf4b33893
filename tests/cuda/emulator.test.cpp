// The emulator itself: what it computes, and the mistakes it must not let pass.
#include <qdylora/cuda/launch.cuh>
#include <qdylora/cuda/warpgroup.cuh>

#include <cmath>
#include <numeric>
#include <vector>

#include "support/catch.hpp"
#include "support/cuda_emulator/device_array.hpp"
#include "support/random_data.hpp"

namespace emulator_test {

namespace qd = qdylora;
namespace device = qd::device;
using device::Shared, device::SharedMemory;
using test::emulator::Fault;

namespace {

template <int Threads, class F>
struct Lambda {
  static constexpr int threads = Threads;
  F f;
  __device__ void operator()(SharedMemory shared) const { f(shared); }
};

template <int Threads, class F>
void run(F f, int shared_bytes = 4096, dim3 blocks = {}) {
  device::launch({nullptr, blocks, shared_bytes}, Lambda<Threads, F>{f});
}

/// What the Fault says that the kernel ends in; empty when there is none.
template <int Threads, class F>
std::string fault(F f, int shared_bytes = 4096, dim3 blocks = {}) {
  try {
    run<Threads>(f, shared_bytes, blocks);
  } catch (const Fault& fault) {
    return fault.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("every thread of every block runs once") {
  test::DeviceArray<int> count(3 * 2 * 2 * 64);
  int* const out = count.data();
  run<64>(
      [out](SharedMemory) {
        const auto b = device::block();
        const auto n = device::grid();
        const auto flat = (b.z * n.y + b.y) * n.x + b.x;
        device::store(out + flat * 64 + static_cast<unsigned>(device::warp() * 32 + device::lane()), static_cast<int>(flat));
      },
      0, {3, 2, 2});
  for (std::size_t i = 0; i < 12 * 64; ++i) REQUIRE(count.host()[i] == static_cast<int>(i / 64));
}

TEST_CASE("threads exchange through shared memory behind a barrier") {
  test::DeviceArray<int> result(128);
  int* const out = result.data();
  const auto reverse = [out](SharedMemory memory) {
    const auto numbers = memory.take<int>(128);
    numbers.store(device::thread(), device::thread());
    device::sync_block();
    device::store(out + device::thread(), numbers.load(127 - device::thread()));
  };
  run<128>(reverse);
  for (int i = 0; i < 128; ++i) REQUIRE(result.host()[static_cast<std::size_t>(i)] == 127 - i);
}

TEST_CASE("a missing barrier is a race") {
  CHECK(contains(fault<64>([](SharedMemory memory) {
                   const auto numbers = memory.take<int>(64);
                   numbers.store(device::thread(), 1);
                   numbers.load(device::thread() % 32);
                 }),
                 "with no barrier between"));
  // Write after read: the second round overtakes the first.
  CHECK(contains(fault<64>([](SharedMemory memory) {
                   const auto numbers = memory.take<int>(64);
                   for (int round = 0; round < 2; ++round) {
                     numbers.store(device::thread(), round);
                     device::sync_block();
                     numbers.load(device::thread() % 32 + 32);
                   }
                 }),
                 "which warp 0 has read, with no barrier between"));
  CHECK(contains(fault<64>([](SharedMemory memory) { memory.take<int>(1).store(0, device::thread()); }), "with no barrier between"));
  CHECK(fault<64>([](SharedMemory memory) {
          const auto numbers = memory.take<int>(64);
          for (int round = 0; round < 2; ++round) {
            numbers.store(device::thread(), round);
            device::sync_block();
            numbers.load(63 - device::thread());
            device::sync_block();
          }
        }) == "");
}

TEST_CASE("within a warp, sync_warp makes the order and a shuffle does not") {
  CHECK(fault<32>([](SharedMemory memory) {
          const auto numbers = memory.take<int>(32);
          numbers.store(device::lane(), 1);
          device::sync_warp();
          numbers.load(31 - device::lane());
          device::sync_warp();
          numbers.store(31 - device::lane(), 1);
        }) == "");
  CHECK(contains(fault<32>([](SharedMemory memory) {
                   const auto numbers = memory.take<int>(32);
                   numbers.store(device::lane(), 1);
                   device::shuffle(0, 0);
                   numbers.load(31 - device::lane());
                 }),
                 "with no barrier between"));
  CHECK(contains(fault<32>([](SharedMemory memory) {
                   const auto numbers = memory.take<int>(32);
                   numbers.store(device::lane(), 1);
                   device::sync_warp();
                   numbers.load(31 - device::lane());
                   device::shuffle(0, 0);
                   numbers.store(device::lane(), 1);
                 }),
                 "with no sync_warp between"));
  // Halves of a warp that synchronize apart: what the other half did is not seen.
  const auto halves = [](bool across) {
    return [across](SharedMemory memory) {
      const auto numbers = memory.take<int>(32);
      const unsigned half = device::lane() < 16 ? 0xFFFFu : 0xFFFF0000u;
      numbers.store(device::lane(), 0);
      device::sync_block();
      numbers.store(device::lane(), 1);
      device::sync_warp(half);
      numbers.load(device::lane() ^ (across ? 16 : 1));
    };
  };
  CHECK(fault<32>(halves(false)) == "");
  CHECK(contains(fault<32>(halves(true)), "between"));
}

TEST_CASE("atomic additions race with no one but reads") {
  test::DeviceArray<int> result(1);
  int* const out = result.data();
  CHECK(fault<256>([out](SharedMemory memory) {
          const auto sum = memory.take<int>(1);
          if (device::thread() == 0) sum.store(0, 0);
          device::sync_block();
          sum.atomic_add(0, device::thread());
          device::sync_block();
          if (device::thread() == 0) device::store(out, sum.load(0));
        }) == "");
  CHECK(result.host()[0] == 255 * 128);
  CHECK(contains(fault<64>([](SharedMemory memory) {
                   const auto sum = memory.take<int>(1);
                   if (device::thread() == 0) sum.store(0, 0);
                   device::sync_block();
                   sum.atomic_add(0, 1);
                   sum.load(0);
                 }),
                 "between"));
}

TEST_CASE("shared memory has bounds, alignment and no contents of its own") {
  const auto loads = [](int i) { return [i](SharedMemory memory) { memory.take<int>(4).load(i); }; };
  CHECK(contains(fault<32>(loads(1024)), "reads 4 bytes at 4096 of 4096 bytes"));
  CHECK(contains(fault<32>(loads(-1)), "reads 4 bytes at -4 of 4096 bytes"));
  CHECK(contains(fault<32>(loads(0)), "which nobody has written"));
  CHECK(contains(fault<32>([](SharedMemory memory) { memory.take<char>(8).from<int>(2).load(0); }), "not aligned to 4 bytes"));
  CHECK(contains(fault<32>([](SharedMemory memory) { memory.take<int>(1025); }), "takes 4100 bytes of shared memory"));
  CHECK(fault<32>([](SharedMemory memory) {
          const auto halves = memory.take<std::uint16_t>(64).from<std::uint32_t>(0);
          halves.store(device::lane(), 7u);
          halves.load(device::lane());
        }) == "");
}

TEST_CASE("global memory has bounds") {
  test::DeviceArray<float> array(5);
  float* const x = array.data();
  CHECK(fault<32>([x](SharedMemory) { device::load(x + 4); }) == "");
  CHECK(contains(fault<32>([x](SharedMemory) { device::load(x + 5); }), "ends 4 bytes behind an allocation of 20"));
  CHECK(contains(fault<32>([x](SharedMemory) { device::store(x - 64, 1.0f); }), "global memory"));
  CHECK(contains(fault<32>([x](SharedMemory) { device::load_once(reinterpret_cast<device::Words<4>*>(x + 1)); }), "not aligned to 16"));
  float host = 0.0f;
  float* const h = &host;
  CHECK(contains(fault<32>([h](SharedMemory) { device::store(h, 1.0f); }), "outside of every allocation"));
}

TEST_CASE("a block may wait for what earlier ones make, and for no other") {
  test::DeviceArray<std::uint32_t> count(1);
  test::DeviceArray<int> made(4);
  std::uint32_t* const signals = count.data();
  int* const out = made.data();
  const auto kernel = [signals, out](std::uint32_t least) {
    return [signals, out, least](SharedMemory) {
      const auto own = device::block().x;
      if (own < 2) {
        if (device::thread() != 0) return;
        device::store(out + own, static_cast<int>(10 + own));
        device::signal(signals);
        return;
      }
      if (device::thread() == 0) {
        device::await(signals, least);
        if (device::count_up(signals) == device::grid().x - 1) device::set_count(signals, 0);
      }
      device::sync_block();
      if (device::thread() == 0) device::store(out + own, device::load(out) + device::load(out + 1));
    };
  };
  run<32>([signals](SharedMemory) {
    if (device::thread() == 0) device::store(signals, 0u);
  });
  run<32>(kernel(2), 0, {4});
  CHECK(made.host() == std::vector<int>{10, 11, 21, 21});
  CHECK(count.host()[0] == 0);
  CHECK_THROWS_AS((run<32>(kernel(3), 0, {4})), Fault);
}

TEST_CASE("what a block does to global memory, others touch after its signal alone") {
  test::DeviceArray<std::uint32_t> count(1);
  test::DeviceArray<int> made(64);
  std::uint32_t* const signals = count.data();
  int* const out = made.data();
  enum Order { whole, no_signal, early_signal, no_await, early_use };
  // The last warp of block 0 writes what the last one of block 1 uses.
  const auto outcome = [&](Order order, auto&& write, auto&& use) {
    run<32>([signals](SharedMemory) {
      if (device::thread() == 0) device::store(signals, 0u);
    });
    return fault<64>(
        [=](SharedMemory) {
          if (device::block().x == 0) {
            if (order == early_signal && device::thread() == 0) device::signal(signals);
            if (device::warp() == 1) write(out + device::lane());
            device::sync_block();
            if (order != early_signal && order != no_signal && device::thread() == 0) device::signal(signals);
          } else {
            if (order != no_await && order != no_signal && device::thread() == 0) device::await(signals, 1);
            if (order != early_use) device::sync_block();
            if (device::warp() == 1) use(out + device::lane());
          }
        },
        0, {2, 1, 1});
  };
  const auto read = [](int* p) { device::load(p); };
  const auto write = [](int* p) { device::store(p, 1); };
  const auto add = [](int* p) { device::atomic_add(p, 1); };
  for (const Order order : {whole, no_signal, early_signal, no_await, early_use}) {
    CAPTURE(order);
    CHECK((outcome(order, write, read) == "") == (order == whole));
    CHECK((outcome(order, read, write) == "") == (order == whole));
    CHECK((outcome(order, write, write) == "") == (order == whole));
    CHECK((outcome(order, write, add) == "") == (order == whole));
    CHECK(outcome(order, add, add) == "");
    CHECK(outcome(order, read, read) == "");
  }
  CHECK(contains(outcome(no_await, write, read), "that thread 32 of the grid's block 0 has written, with no signal between"));
  CHECK(contains(outcome(no_await, read, write), "block 0 has read, with no signal between"));
}

TEST_CASE("what a thread does to global memory, others of its block touch after a barrier alone") {
  test::DeviceArray<int> made(64);
  int* const out = made.data();
  const auto outcome = [&](auto&& order) {
    return fault<64>([=](SharedMemory) {
      device::store(out + device::thread(), device::thread());
      order();
      device::load(out + (device::thread() ^ 1));
    });
  };
  CHECK(outcome([] { device::sync_block(); }) == "");
  CHECK(outcome([] { device::sync_warp(); }) == "");
  CHECK(contains(outcome([] {}), "with no barrier between"));
  CHECK(contains(fault<64>([=](SharedMemory) {
                   device::store(out + device::thread(), 1);
                   device::sync_warp();
                   device::load(out + (device::thread() ^ 32));
                 }),
                 "with no barrier between"));
  CHECK(contains(fault<64>([=](SharedMemory) { device::store(out, 1); }), "has written, with no barrier between"));
}

TEST_CASE("a fault names the kernel, the block and the thread") {
  try {
    run<64>(
        [](SharedMemory memory) {
          if (device::block().x == 2 && device::thread() == 33) memory.take<int>(1).load(0);
        },
        4096, {4, 1, 1});
    FAIL("no fault");
  } catch (const Fault& fault) {
    CHECK(fault.place().block[0] == 2);
    CHECK(fault.place().thread == 33);
    CHECK(contains(fault.place().kernel, "Lambda<64"));
  }
}

TEST_CASE("a barrier that not all threads reach is an error") {
  CHECK(contains(fault<64>([](SharedMemory) {
                   if (device::thread() < 40) device::sync_block();
                 }),
                 "has not reached before it ended"));
  const auto two_places = [](SharedMemory) {
    if (device::thread() < 40)
      device::sync_block();
    else
      device::sync_block();
  };
  CHECK(contains(fault<64>(two_places), "others at sync_block"));
  CHECK(contains(fault<64>([](SharedMemory) {
                   if (device::lane() != 7) device::sync_warp();
                   device::sync_block();
                 }),
                 "for lanes 7, which do not come"));
}

TEST_CASE("the four shuffles, in groups of any width") {
  // By the pseudocode of shfl.sync in the PTX ISA: lanes outside the group leave the value as it is.
  for (const int width : {32, 16, 8, 4, 2, 1})
    for (const int b : {0, 1, 3, 7, 19}) {
      test::DeviceArray<int> result(4 * 32);
      int* const out = result.data();
      run<32>([=](SharedMemory) {
        const int l = device::lane();
        device::store(out + l, device::shuffle(l, b, width));
        device::store(out + 32 + l, device::shuffle_up(l, static_cast<unsigned>(b), width));
        device::store(out + 64 + l, device::shuffle_down(l, static_cast<unsigned>(b), width));
        device::store(out + 96 + l, device::shuffle_xor(l, b, width));
      });
      for (int l = 0; l < 32; ++l) {
        CAPTURE(width, b, l);
        const int first = l & ~(width - 1), last = first + width - 1;
        const auto got = [&](int i) { return result.host()[static_cast<std::size_t>(32 * i + l)]; };
        CHECK(got(0) == (first | (b & (width - 1))));
        CHECK(got(1) == (l - b < first ? l : l - b));
        CHECK(got(2) == (l + b > last ? l : l + b));
        CHECK(got(3) == ((l ^ b) > last ? l : l ^ b));
      }
    }
}

TEST_CASE("exchanges between lanes keep to their masks") {
  CHECK(contains(fault<32>([](SharedMemory) {
                   if (device::lane() < 16) device::shuffle(1, 20, 32, 0xFFFFu);
                 }),
                 "reads lane 20, which is not in its mask"));
  CHECK(contains(fault<32>([](SharedMemory) { device::shuffle(1, 0, 32, 0xFFFFu); }), "by a lane that is not in its mask"));
  CHECK(contains(fault<32>([](SharedMemory) {
                   if (device::lane() > 0) device::ballot(true);
                 }),
                 "waits for lane 0, which has ended"));
  CHECK(contains(fault<32>([](SharedMemory) {
                   if (device::lane() < 31) device::ballot(true);
                 }),
                 "for lanes 31, which do not come"));
  CHECK(contains(fault<32>([](SharedMemory) {
                   if (device::lane() % 2 == 0) device::ballot(true);
                   else device::shuffle(1, 0);
                 }),
                 "another exchange or another mask"));
  CHECK(fault<32>([](SharedMemory) {  // quarters apart, then together
          const unsigned quarter = 0xFFu << (device::lane() / 8 * 8);
          if (device::lane() < 16) device::shuffle_xor(1, 4, 8, quarter);
          device::ballot(true, quarter);
          device::ballot(true);
        }) == "");
}

TEST_CASE("votes and reductions") {
  test::DeviceArray<unsigned> result(6);
  unsigned* const out = result.data();
  run<32>([out](SharedMemory) {
    const auto l = static_cast<unsigned>(device::lane());
    const unsigned odd = device::ballot(l % 2 == 1);
    const bool none = device::any(l > 40), every = device::all(l < 32), some = device::all(l < 31);
    const unsigned sum = device::reduce_add(l), most = device::reduce_max(l ^ 5u);
    if (l == 9) {
      const unsigned found[] = {odd, none, every, some, sum, most};
      for (int i = 0; i < 6; ++i) device::store(out + i, found[i]);
    }
  });
  CHECK(result.host() == std::vector<unsigned>{0xAAAAAAAAu, 0, 1, 0, 496, 31});
}

TEST_CASE("an asynchronous copy is there after the wait, for other threads after a barrier") {
  test::DeviceArray<int> source(128), result(128);
  std::vector<int> numbers(128);
  std::iota(numbers.begin(), numbers.end(), 5);
  source.set(numbers);
  const int* const from = source.data();
  int* const out = result.data();
  const auto copy = [=](bool wait, bool barrier, int valid) {
    return [=](SharedMemory memory) {
      const auto there = memory.take<int>(128);
      const int t = device::thread();
      if (t < 32) device::copy_async<16>(there.from(4 * t), from + 4 * t, valid);
      device::commit_copies();
      if (wait) device::wait_copies<0>();
      if (barrier) device::sync_block();
      device::store(out + t, there.load(127 - t));
    };
  };
  CHECK(fault<128>(copy(true, true, 16)) == "");
  for (std::size_t i = 0; i < 128; ++i) REQUIRE(result.host()[i] == numbers[127 - i]);
  CHECK(fault<128>(copy(true, true, 4)) == "");
  for (std::size_t i = 0; i < 128; ++i) REQUIRE(result.host()[i] == (i % 4 == 3 ? numbers[127 - i] : 0));
  CHECK(contains(fault<128>(copy(false, true, 16)), "no wait_copies"));
  CHECK(fault<128>(copy(true, false, 16)) != "");  // read before it is written, or with no barrier between

  // Groups: waiting for all but the newest leaves that one untouchable.
  const auto groups = [=](int read) {
    return [=](SharedMemory memory) {
      const auto there = memory.take<int>(8);
      for (int group = 0; group < 2; ++group) {
        if (device::lane() == 0) device::copy_async<16>(there.from(4 * group), from + 4 * group);
        device::commit_copies();
      }
      device::wait_copies<1>();
      device::sync_warp();
      device::store(out + device::lane(), there.load(read));
    };
  };
  CHECK(fault<32>(groups(3)) == "");
  CHECK(contains(fault<32>(groups(4)), "no wait_copies"));
  CHECK(contains(fault<32>([=](SharedMemory memory) { device::copy_async<16>(memory.take<int>(4), from + 126); }), "not aligned"));
  CHECK(contains(fault<32>([=](SharedMemory memory) { device::copy_async<16>(memory.take<int>(4), from + 128); }), "behind an allocation"));
}

// d = a . b by fragments that ldmatrix deals out, a [16, 16] row-major, b [16, 8] row-major (transposed on the way) or column-major.
TEMPLATE_TEST_CASE("ldmatrix and mma make a matrix product", "", qd::bfloat16, qd::half) {
  using T = TestType;
  const auto a = test::normal_matrix<T>(16, 16, 1), b = test::normal_matrix<T>(16, 8, 2);
  for (const bool row_major : {true, false}) {
    test::DeviceArray<T> left(256), right(128);
    test::DeviceArray<float> result(128);
    left.set(a.span());
    std::vector<T> right_values(b.span().begin(), b.span().end());
    if (!row_major)
      for (qd::Index k = 0; k < 16; ++k)
        for (qd::Index n = 0; n < 8; ++n) right_values[static_cast<std::size_t>(n * 16 + k)] = b(k, n);
    right.set(right_values);
    const T* const left_data = left.data();
    const T* const right_data = right.data();
    float* const out = result.data();
    run<32>([=](SharedMemory memory) {
      const auto x = memory.take<T>(256), y = memory.take<T>(128);
      const int l = device::lane();
      for (int i = l; i < 256; i += 32) x.store(i, device::load(left_data + i));
      for (int i = l; i < 128; i += 32) y.store(i, device::load(right_data + i));
      device::sync_warp();
      const auto fragment_a = device::load_matrices<4>(x.from(l % 16 * 16 + l / 16 * 8));
      const auto fragment_b = row_major ? device::load_matrices<2, true>(y.from(l % 16 * 8))
                                        : device::load_matrices<2>(y.from(l % 8 * 16 + l / 8 % 2 * 8));
      float d[4] = {1.0f, 2.0f, 3.0f, 4.0f};
      device::multiply_add<T>(d, fragment_a, fragment_b);
      for (int i = 0; i < 4; ++i)
        device::store(out + (l / 4 + i / 2 * 8) * 8 + l % 4 * 2 + i % 2, d[i] - static_cast<float>(i + 1));
    });
    for (qd::Index i = 0; i < 16; ++i)
      for (qd::Index j = 0; j < 8; ++j) {
        double sum = 0.0;
        for (qd::Index k = 0; k < 16; ++k) sum += static_cast<double>(a(i, k)) * static_cast<double>(b(k, j));
        CHECK(static_cast<double>(result.host()[static_cast<std::size_t>(i * 8 + j)]) == Approx(sum).margin(1e-5));
      }
  }
}

TEST_CASE("products of warpgroups are published to, begun and waited for, and nobody touches what they use") {
  using T = qd::bfloat16;
  using device::Words;
  enum class Mistake { none, unpublished, unbegun, unbegun_again, unwaited, overwritten, changed, read, unordered, unfinished };
  const auto product = [](Mistake mistake, float* out) {
    return [=](SharedMemory memory) {
      const auto tile = memory.take<device::SwizzledRows>(4);
      const auto words = tile.from<std::uint32_t>(0);
      const device::ProductRows rows(tile);
      const auto write = [&] {
        for (int i = device::thread(); i < 1024; i += 128) words.store(i, device::pack<T>(1.0f, 1.0f));
      };
      write();
      if (mistake != Mistake::unpublished) device::publish_to_products();
      if (mistake != Mistake::unordered) device::sync_block();
      Words<4> left[1] = {{{device::pack<T>(1, 2), device::pack<T>(3, 4), device::pack<T>(5, 6), device::pack<T>(7, 8)}}};
      float sums[16];
      if (mistake != Mistake::unbegun) device::begin_products(left);
      device::multiply_async<T, false>(sums, left[0], rows, 1);
      if (mistake == Mistake::overwritten) device::multiply_async<T, false>(sums, left[0], rows, 2);
      device::multiply_async<T, true>(sums, left[0], rows, 2);
      device::commit_products();
      if (mistake == Mistake::unbegun_again) device::multiply_async<T, true>(sums, left[0], rows, 3);
      if (mistake == Mistake::changed) left[0].word[3] = 0;
      if (mistake == Mistake::unwaited) write();
      if (mistake == Mistake::read) device::store(out + device::thread(), sums[15]);
      if (mistake != Mistake::unfinished) device::wait_products<0>(sums);
      if (mistake == Mistake::none) device::store(out + device::thread(), sums[15]);
    };
  };
  test::DeviceArray<float> result(128);
  const auto end = [&](Mistake mistake) { return fault<128>(product(mistake, result.data())); };
  CHECK(end(Mistake::none) == "");
  for (const float sum : result.host()) CHECK(sum == 2 * 4 * (3 + 4 + 7 + 8));
  CHECK(end(Mistake::read) == "");
  for (const float sum : result.host()) CHECK(std::isnan(sum));
  CHECK(contains(end(Mistake::unpublished), "has written and not published"));
  CHECK(contains(end(Mistake::unordered), "with no barrier between"));
  CHECK(contains(end(Mistake::unbegun), "no begin_products"));
  CHECK(contains(end(Mistake::unbegun_again), "no begin_products"));
  CHECK(contains(end(Mistake::overwritten), "have not been waited for"));
  CHECK(contains(end(Mistake::changed), "left operand of a product was changed"));
  CHECK(contains(end(Mistake::unwaited), "which a product is reading"));
  CHECK(contains(end(Mistake::unfinished), "no wait_products"));
}

TEST_CASE("ldmatrix: one matrix and its transpose") {
  test::DeviceArray<unsigned> result(64);
  unsigned* const out = result.data();
  run<32>([out](SharedMemory memory) {
    const auto m = memory.take<std::uint16_t>(64);
    const int l = device::lane();
    for (int i = l; i < 64; i += 32) m.store(i, static_cast<std::uint16_t>(i));
    device::sync_warp();
    device::store(out + l, device::load_matrices<1>(m.from(l % 8 * 8)).word[0]);
    device::store(out + 32 + l, device::load_matrices<1, true>(m.from(l % 8 * 8)).word[0]);
  });
  for (unsigned l = 0; l < 32; ++l) {
    const unsigned row = l / 4, col = l % 4 * 2;
    CHECK(result.host()[l] == ((row * 8 + col) | (row * 8 + col + 1) << 16));
    CHECK(result.host()[32 + l] == ((col * 8 + row) | ((col + 1) * 8 + row) << 16));
  }
  CHECK(contains(fault<32>([](SharedMemory memory) {
                   const auto m = memory.take<std::uint16_t>(64);
                   for (int i = device::lane(); i < 64; i += 32) m.store(i, std::uint16_t{});
                   device::sync_warp();
                   device::load_matrices<1>(m.from(device::lane() % 8 * 4));
                 }),
                 "not aligned to 16"));
}

}  // namespace emulator_test
