// What products promise besides accuracy, in every arithmetic class: rows that do not know of each other, numbers that are not finite,
// zeros, sums of extremes, operands at the edge of memory, and a backward product that is the adjoint of the forward one.
#include <thread>

#include "backend/classes.inc"

namespace class_guarantees_test {

namespace qd = qdylora;
using namespace test;

namespace {

constexpr double not_finite[] = {std::numeric_limits<double>::quiet_NaN(), INFINITY, -INFINITY};
constexpr Direction both_directions[] = {Direction::forward, Direction::backward};
const std::vector exact_only = {Compute::exact};

// Whether the class has a product in this direction with weights W.
template <class T, class W>
bool has_product(const qd::Cpu& cpu, Direction direction, const W&) {
  return qd::detail::is_dense<W> || direction == Direction::forward || effective<T>(cpu.compute()) != Compute::int8;
}

template <class T>
ClassBounds upper_bounds(const qd::Cpu& cpu) {
  return {class_bounds<T>(cpu).upper, 0.0};
}

template <class Format, class Scales>
auto normal_weight(Index out, Index in, Index block_size, std::uint64_t seed = 5) {
  const auto dense = normal_matrix<float>(out, in, seed, 0.2);
  return qd::quantize<Format, Scales>(dense.view(), {.block_size = block_size});
}

}  // namespace

// ---- rows ----------------------------------------------------------------------------------------------------------------------

namespace {

template <class T, class W>
void check_rows_do_not_know_their_batch(const W& w) {
  for (const Direction direction : both_directions) {
    const Index tokens = 150, depth = direction == Direction::forward ? w.cols : w.rows;
    const auto x = normal_matrix<T>(tokens, depth, 8);
    each_class(
        [&](const qd::Cpu& cpu) {
          const auto all = multiplied(cpu, direction, x.view(), w);
          for (const auto& [first, count] : {std::pair<Index, Index>{0, 32}, {1, 32}, {37, 33}, {86, 64}, {3, 147}, {118, 32}, {11, 95}}) {
            CAPTURE(static_cast<int>(direction), first, count);
            const auto part = multiplied(cpu, direction, x.view().middle_rows(first, count), w);
            CHECK(same_bits(part.view(), all.view().middle_rows(first, count)));
          }
          // The same rows in another order, beside others, and beside large ones.
          Matrix<T> mixed(41, depth);
          for (Index i = 0; i < 41; ++i)
            for (Index k = 0; k < depth; ++k) mixed(i, k) = i % 3 == 0 ? scalar<T>(1000.0 * static_cast<double>(i)) : x(i * 53 % tokens, k);
          const auto beside = multiplied(cpu, direction, mixed.view(), w);
          for (Index i = 0; i < 41; ++i)
            if (i % 3 != 0) {
              CAPTURE(i);
              CHECK(same_bits(beside.view().middle_rows(i, 1), all.view().middle_rows(i * 53 % tokens, 1)));
            }
        },
        exact_only);
  }
}

}  // namespace

TEMPLATE_TEST_CASE("a row of an exact product has the same bits in every batch of 32 tokens and more", "[cpu][classes]", float, double,
                   qd::half) {
  check_rows_do_not_know_their_batch<TestType>(normal_weight<qd::NF4, qd::DoubleQuant<>>(97, 131, 64).view());
  check_rows_do_not_know_their_batch<TestType>(normal_weight<qd::INT4, qd::Float32Scales>(49, 1100, 256).view());
  check_rows_do_not_know_their_batch<TestType>(normal_weight<qd::FP8E4M3, qd::DoubleQuant<>>(130, 65, 32).view());
  const auto dense = normal_matrix<Accumulator<TestType>>(33, 131, 6);
  check_rows_do_not_know_their_batch<TestType>(dense.view());
}

TEST_CASE("a row has the same bits among so many tokens that tasks become wider, and then shared", "[cpu][classes]") {
  constexpr Index out = 2192, in = 64;  // the last wide task is no whole panel
  const auto x = normal_matrix<float>(530, in, 21);
  const auto before = normal_matrix<float>(530, out, 22);
  const auto check = [&](const auto& w) {
    each_class(
        [&](const qd::Cpu& cpu) {
          Matrix<float> few, many;
          const auto multiply = [&](Index tokens, Matrix<float>& y) {
            y = qd::clone(before.view().middle_rows(0, tokens));
            cpu.matmul(x.view().middle_rows(0, tokens), w, y.view(), qd::Update::accumulate);
          };
          multiply(120, few);
          for (const Index tokens : {129, 530}) {
            CAPTURE(tokens);
            multiply(tokens, many);
            CHECK(same_bits(many.view().middle_rows(0, 120), few.view()));
          }
        },
        std::vector{Compute::exact, Compute::bits16});
  };
  check(normal_weight<qd::NF4, qd::DoubleQuant<>>(out, in, 64).view());
  check(normal_weight<qd::INT8, qd::Float32Scales>(out, in, 64).view());
}

TEST_CASE("a row has the same bits among so many long ones that what is next of them is fetched", "[cpu][classes]") {
  constexpr Index depth = 7232, outputs = 80, tokens = 310;  // 4 MiB in 16 bits; the last panels are no whole ones
  const auto x = normal_matrix<float>(tokens, depth, 23);
  const auto check = [&](const auto& w, Direction direction) {
    each_class(
        [&](const qd::Cpu& cpu) {
          const auto all = multiplied(cpu, direction, x.view(), w);
          for (const auto& [first, count] : {std::pair<Index, Index>{0, 112}, {112, 112}, {224, 86}}) {
            CAPTURE(static_cast<int>(direction), first);
            const auto part = multiplied(cpu, direction, x.view().middle_rows(first, count), w);
            CHECK(same_bits(part.view(), all.view().middle_rows(first, count)));
          }
        },
        std::vector{Compute::exact, Compute::bits16});
  };
  check(normal_weight<qd::NF4, qd::DoubleQuant<>>(outputs, depth, 64).view(), Direction::forward);
  check(normal_weight<qd::NF4, qd::DoubleQuant<>>(depth, 96, 32).view(), Direction::backward);
}

TEMPLATE_TEST_CASE("rows of zeros give zeros, beside any other rows", "[cpu][classes]", float, double, qd::bfloat16, qd::half) {
  const auto check = [](const auto& w) {
    for (const Direction direction : both_directions)
      for (const Index tokens : {1, 2, 7, 8, 31, 40}) {
        CAPTURE(static_cast<int>(direction), tokens);
        auto x = qd::clone(normal_matrix<TestType>(tokens, direction == Direction::forward ? w.cols : w.rows, 9).view());
        for (Index i = 0; i < tokens; i += 3)
          for (Index k = 0; k < x.cols(); ++k) x(i, k) = scalar<TestType>(k % 5 == 1 ? -0.0 : 0.0);
        const auto before = normal_matrix<TestType>(tokens, direction == Direction::forward ? w.rows : w.cols, 10);
        each_class([&](const qd::Cpu& cpu) {
          if (!has_product<TestType>(cpu, direction, w)) return;
          const auto y = multiplied(cpu, direction, x.view(), w);
          auto sum = qd::clone(before.view());
          multiply(cpu, direction, std::as_const(x).view(), w, sum.view(), Update::accumulate);
          Index wrong = 0, changed = 0;
          for (Index i = 0; i < tokens; i += 3)
            for (Index j = 0; j < y.cols(); ++j) {
              wrong += static_cast<double>(y(i, j)) != 0.0;
              changed += static_cast<double>(sum(i, j)) != static_cast<double>(before(i, j));
            }
          CHECK(wrong == 0);
          CHECK(changed == 0);
        });
      }
  };
  check(normal_weight<qd::NF4, qd::DoubleQuant<>>(70, 131, 64).view());
  check(normal_weight<qd::FP8E5M2, qd::Float32Scales>(33, 65, 32).view());
  const auto dense = normal_matrix<Accumulator<TestType>>(16, 65, 6);
  check(dense.view());
}

TEST_CASE("weights of zeros give zeros", "[cpu][classes]") {
  const Matrix<float> zeros(45, 99);
  const auto check = [&](const auto& tensor) {
    for (const Direction direction : both_directions)
      for (const Index tokens : {1, 9, 34}) {
        const auto x = normal_matrix<float>(tokens, direction == Direction::forward ? 99 : 45, 11);
        each_class([&](const qd::Cpu& cpu) {
          if (!has_product<float>(cpu, direction, tensor.view())) return;
          const auto y = multiplied(cpu, direction, x.view(), tensor.view());
          CHECK(std::count(y.data(), y.data() + y.size(), 0.0f) == y.size());
        });
      }
  };
  check(qd::quantize<qd::NF4, qd::DoubleQuant<>>(zeros.view()));
  check(qd::quantize<qd::FP8E4M3, qd::Float32Scales>(zeros.view()));
  // INT4 has a code for zero too; FP4 has two.
  check(qd::quantize<qd::INT4, qd::Float32Scales>(zeros.view()));
  check(qd::quantize<qd::FP4, qd::DoubleQuant<>>(zeros.view()));
}

TEMPLATE_TEST_CASE("each row of a product is as accurate as its own size asks for", "[cpu][classes]", (Storage<qd::NF4, DynamicScales>),
                   (Storage<qd::INT4, PlainScales>), (Storage<qd::FP8E4M3, DynamicScales>)) {
  const auto tensor = normal_weight<typename TestType::Format, typename TestType::Scales>(90, 131, 64);
  const DecodedWeight decoded = decoded_weight(tensor.view());
  for (const Direction direction : both_directions)
    for (const Index tokens : {1, 4, 9, 40}) {
      const auto p = normal_problem<float>(direction, tokens, decoded, 12);
      // A factor for each row, a power of two, taken out of the result again: sizes far apart, then all near an end of float's range.
      for (const auto& [first, step] : {std::pair<int, int>{-20, 40}, {110, 10}, {-110, 10}}) {
        CAPTURE(static_cast<int>(direction), tokens, first);
        const auto exponent = [first = first, step = step](Index i) { return first + static_cast<int>(i * 7 % 11) * step / 10; };
        auto x = qd::clone(p.x.view());
        for (Index i = 0; i < tokens; ++i)
          for (Index k = 0; k < x.cols(); ++k) x(i, k) = std::ldexp(x(i, k), exponent(i));
        each_class([&](const qd::Cpu& cpu) {
          if (!has_product<float>(cpu, direction, tensor.view())) return;
          auto y = multiplied(cpu, direction, x.view(), tensor.view());
          for (Index i = 0; i < tokens; ++i)
            for (Index j = 0; j < y.cols(); ++j) y(i, j) = std::ldexp(y(i, j), -exponent(i));
          CHECK(judged(p, std::as_const(y).view(), Update::overwrite, upper_bounds<float>(cpu)) == "");
        });
      }
    }
}

TEST_CASE("subnormal activations give finite products, and exact ones in the exact class", "[cpu][classes]") {
  const auto check = [](const auto& tensor) {
    const DecodedWeight decoded = decoded_weight(tensor.view());
    for (const Direction direction : both_directions)
      for (const Index tokens : {1, 9, 34})
        for (const int exponent : {-126, -133, -140, -149}) {
          CAPTURE(static_cast<int>(direction), tokens, exponent);
          auto x = qd::clone(normal_matrix<float>(tokens, direction == Direction::forward ? 131 : 50, 13).view());
          for (float& v : x.span()) v = std::ldexp(v, exponent);
          for (Index i = 0; i < x.size(); i += 7) x.data()[i] = 0.0f;  // times the reciprocal of a subnormal scale this may be NaN
          const auto p = problem_of(direction, qd::clone(x.view()), decoded);
          each_class([&](const qd::Cpu& cpu) {
            if (!has_product<float>(cpu, direction, tensor.view())) return;
            const auto y = multiplied(cpu, direction, x.view(), tensor.view());
            Index wrong = 0;
            for (Index i = 0; i < p.rows(); ++i)
              for (Index j = 0; j < p.cols(); ++j) {
                const double error = std::fabs(static_cast<double>(y(i, j)) - p.product(i, j));
                const double allowed =
                    cpu.compute() == Compute::exact ? 0x1p-149 * static_cast<double>(p.depth) + 1e-6 * p.size(i, j) : 1e-30;
                wrong += !(error <= allowed);
              }
            CHECK(wrong == 0);
          });
        }
  };
  check(normal_weight<qd::NF4, qd::DoubleQuant<>>(50, 131, 64));
  check(normal_weight<qd::FP8E4M3, qd::Float32Scales>(50, 131, 64));
}

// ---- numbers that are not finite -----------------------------------------------------------------------------------------------

namespace {

// One bad activation: its row is not finite, and all other rows are what they would be without it.
template <class T, class W>
void check_bad_activations(const W& w) {
  const DecodedWeight decoded = decoded_weight(w);
  for (const Direction direction : both_directions)
    for (const Index tokens : {1, 2, 7, 8, 17, 33, 40}) {
      const auto clean = normal_problem<T>(direction, tokens, decoded, 14);
      for (const double bad : not_finite)
        for (const Index row : {Index{0}, tokens / 2, tokens - 1})
          for (const Index k : {Index{0}, clean.depth / 2, clean.depth - 1}) {
            CAPTURE(static_cast<int>(direction), tokens, bad, row, k);
            auto x = qd::clone(clean.x.view());
            x(row, k) = scalar<T>(bad);
            each_class([&](const qd::Cpu& cpu) {
              if (!has_product<T>(cpu, direction, w)) return;
              auto y = multiplied(cpu, direction, x.view(), w);
              Index finite = 0;
              for (Index j = 0; j < y.cols(); ++j) {
                finite += std::isfinite(static_cast<double>(y(row, j)));
                y(row, j) = scalar<T>(clean.product(row, j));
              }
              CHECK(finite == 0);
              CHECK(judged(clean, std::as_const(y).view(), Update::overwrite, upper_bounds<T>(cpu)) == "");
            });
          }
    }
}

// One block of scales that is bad: products with its elements are not finite, all others are right. `first` and `count` are elements.
template <class W>
void check_bad_elements(const W& w, const DecodedWeight& clean_weight, Index first, Index count, std::span<const Compute> classes) {
  for (const Direction direction : both_directions)
    for (const Index tokens : {1, 5, 8, 33}) {
      const auto clean = normal_problem<float>(direction, tokens, clean_weight, 15);
      std::vector<bool> affected(static_cast<std::size_t>(clean.cols()));
      for (Index flat = first; flat < std::min(first + count, w.rows * w.cols); ++flat)
        affected[static_cast<std::size_t>(direction == Direction::forward ? flat / w.cols : flat % w.cols)] = true;
      CAPTURE(static_cast<int>(direction), tokens, first);
      each_class(
          [&](const qd::Cpu& cpu) {
            if (!has_product<float>(cpu, direction, w)) return;
            auto y = multiplied(cpu, direction, clean.x.view(), w);
            Index finite = 0;
            for (Index i = 0; i < y.rows(); ++i)
              for (Index j = 0; j < y.cols(); ++j)
                if (affected[static_cast<std::size_t>(j)]) {
                  finite += std::isfinite(y(i, j));
                  y(i, j) = static_cast<float>(clean.product(i, j));
                }
            CHECK(finite == 0);
            CHECK(judged(clean, std::as_const(y).view(), Update::overwrite, upper_bounds<float>(cpu)) == "");
          },
          classes);
    }
}

template <class Format>
void check_bad_scales(std::span<const Compute> classes) {
  CAPTURE(Format::name);
  const auto tensor = normal_weight<Format, qd::Float32Scales>(21, 77, 64);
  const DecodedWeight clean = decoded_weight(tensor.view());
  for (const double bad : not_finite)
    for (const Index block : {Index{0}, Index{7}, tensor.blocks() - 1}) {
      CAPTURE(bad, block);
      PlacedWeight<Format, qd::Float32Scales> w(tensor, 1);
      w.scales()[static_cast<std::size_t>(block)] = static_cast<float>(bad);
      check_bad_elements(w.view(), clean, 64 * block, 64, classes);
    }
  // Rows that end within a vector's scales, so that the next row's stand behind.
  for (const auto& [rows, cols, block_size] : {std::tuple<Index, Index, Index>{40, 96, 32}, {21, 576, 64}}) {
    const auto short_rows = normal_weight<Format, qd::Float32Scales>(rows, cols, block_size);
    const DecodedWeight clean_rows = decoded_weight(short_rows.view());
    for (const Index block : {5 * cols / block_size, 6 * cols / block_size - 1, short_rows.blocks() - cols / block_size}) {
      CAPTURE(rows, cols, block);
      PlacedWeight<Format, qd::Float32Scales> w(short_rows, 1);
      w.scales()[static_cast<std::size_t>(block)] = std::numeric_limits<float>::infinity();
      check_bad_elements(w.view(), clean_rows, block_size * block, block_size, classes);
    }
  }
  // The second block of scales of scales, which holds for 44 of 300 blocks.
  const auto nested = normal_weight<Format, qd::DoubleQuant<>>(30, 640, 64);
  const DecodedWeight clean_nested = decoded_weight(nested.view());
  for (const double bad : not_finite) {
    CAPTURE(bad);
    PlacedWeight<Format, qd::DoubleQuant<>> w(nested, 1);
    w.scales()[1] = static_cast<float>(bad);
    check_bad_elements(w.view(), clean_nested, 64 * 256, 64 * 256, classes);
  }
}

}  // namespace

TEMPLATE_TEST_CASE("NaN and infinity among activations spoil their own row, all of it and no other", "[cpu][classes]", float, qd::bfloat16,
                   qd::half) {
  check_bad_activations<TestType>(normal_weight<qd::NF4, qd::DoubleQuant<>>(37, 75, 64).view());
  check_bad_activations<TestType>(normal_weight<qd::INT4, qd::Float32Scales>(20, 130, 32).view());
  check_bad_activations<TestType>(normal_weight<qd::FP8E4M3, qd::Float32Scales>(18, 66, 32).view());
  const auto dense = normal_matrix<float>(17, 67, 6);
  check_bad_activations<TestType>(dense.view());
}

TEST_CASE("NaN and infinity in a scale spoil the products with its block and no other, in float", "[cpu][classes]") {
  check_bad_scales<qd::NF4>(exact_only);
  check_bad_scales<qd::FP8E5M2>(exact_only);
}

TEST_CASE("NaN and infinity in a scale spoil the products with its block and no other, in integers and 16 bits", "[cpu][classes]") {
  const std::vector lossy = {Compute::bits16, Compute::int8};
  check_bad_scales<qd::NF4>(lossy);
  check_bad_scales<qd::FP8E5M2>(lossy);
}

TEST_CASE("NaN that an earlier product left in scratch memory reaches no other product", "[cpu][classes]") {
  const auto tensor = normal_weight<qd::NF4, qd::Float32Scales>(64, 96, 32), few_rows = normal_weight<qd::NF4, qd::Float32Scales>(17, 96, 32);
  PlacedWeight<qd::NF4, qd::Float32Scales> spoilt(tensor, 1);
  for (float& scale : spoilt.scales()) scale = std::numeric_limits<float>::quiet_NaN();
  const DecodedWeight clean = decoded_weight(few_rows.view());
  for (const Direction direction : both_directions)
    for (const Index tokens : {1, 4, 16, 40}) {
      const auto before = normal_problem<float>(direction, tokens, decoded_weight(tensor.view()), 3);
      const auto p = normal_problem<float>(direction, tokens, clean, 4);
      CAPTURE(static_cast<int>(direction), tokens);
      each_class([&](const qd::Cpu& cpu) {
        if (!has_product<float>(cpu, direction, few_rows.view())) return;
        multiplied(cpu, direction, before.x.view(), spoilt.view());
        const auto y = multiplied(cpu, direction, p.x.view(), few_rows.view());
        CHECK(judged(p, y.view(), Update::overwrite, upper_bounds<float>(cpu)) == "");
      });
    }
}

TEST_CASE("INT4's code 0, beyond -1, overflows no sum of integers", "[cpu][classes]") {
  const Index out = 40, in = 256;
  qd::Buffer<std::uint8_t> codes(qd::code_bytes<qd::INT4>(out * in));
  std::fill(codes.span().begin(), codes.span().end(), std::uint8_t{0});
  qd::Float32Scales::Storage<qd::HostMemory> scales{qd::Buffer<float>(out * in / 64)};
  for (auto& scale : scales.absmax.span()) scale = 1.0f;
  const qd::QuantizedTensor<qd::INT4, qd::Float32Scales> tensor(out, in, 64, std::move(codes), std::move(scales));
  const DecodedWeight decoded = decoded_weight(tensor.view());
  CHECK(decoded.values(0, 0) == Approx(-8.0 / 7.0));
  for (const Direction direction : both_directions)
    for (const Index tokens : {1, 4, 16, 40}) {
      Matrix<float> ones(tokens, direction == Direction::forward ? in : out);
      for (float& x : ones.span()) x = 1.0f;
      const auto p = problem_of(direction, std::move(ones), decoded);
      CAPTURE(static_cast<int>(direction), tokens);
      each_class([&](const qd::Cpu& cpu) {
        if (!has_product<float>(cpu, direction, tensor.view())) return;
        const auto y = multiplied(cpu, direction, p.x.view(), tensor.view());
        for (const float v : y.span()) CHECK(v == Approx(p.product(0, 0)).epsilon(0.02));
      });
    }
}

// ---- sums whose result is known ------------------------------------------------------------------------------------------------

namespace {

// Weights 0, +-1, +-2, +-4 times a power of two for each block: with small integers as activations every term and every sum is exact in
// float and in bfloat16, so the order of a sum does not matter and every bit of the result is known.
qd::QuantizedTensor<qd::FP4, qd::Float32Scales> integer_weight(Index out, Index in, Index block_size, Rng& rng) {
  constexpr std::uint8_t exact_codes[] = {0, 3, 5, 7, 11, 13, 15};
  qd::Buffer<std::uint8_t> codes(qd::code_bytes<qd::FP4>(out * in));
  for (auto& code : codes.span()) code = static_cast<std::uint8_t>(16 * exact_codes[rng.below(7)] + exact_codes[rng.below(7)]);
  qd::Float32Scales::Storage<qd::HostMemory> scales{qd::Buffer<float>((out * in + block_size - 1) / block_size)};
  for (auto& scale : scales.absmax.span()) scale = std::ldexp(4.0f, static_cast<int>(rng.below(3)));
  return {out, in, block_size, std::move(codes), std::move(scales)};
}

template <class T>
Matrix<T> integers(Index rows, Index cols, Rng& rng) {
  Matrix<T> x(rows, cols);
  for (T& v : x.span()) v = scalar<T>(static_cast<double>(rng.below(17)) - 8.0);
  return x;
}

// Elements that are not the oracle's, rounded to T.
template <class T, class W>
Index wrong_integers(const qd::Cpu& cpu, Direction direction, MatrixView<const T> x, const W& w, const Problem<T>& p,
                     MatrixView<const T> before) {
  Index wrong = 0;
  for (const Update update : both_updates) {
    auto y = qd::clone(before);
    multiply(cpu, direction, x, w, y.view(), update);
    for (Index i = 0; i < p.rows(); ++i)
      for (Index j = 0; j < p.cols(); ++j) {
        auto expected = before(i, j);
        reference::put(expected, p.product(i, j), update);
        wrong += static_cast<double>(y(i, j)) != static_cast<double>(expected);
      }
  }
  return wrong;
}

}  // namespace

TEMPLATE_TEST_CASE("products of small integers are exact in float and in bfloat16", "[cpu][classes]", float, qd::bfloat16) {
  Rng rng(16, qd::Purpose::data);
  for (auto shape : shuffled_shapes(rng, 3)) {
    const auto [tokens, out, in] = shape;
    const Index block_size = drawn_block(rng);
    CAPTURE(tokens, out, in, block_size);
    const auto tensor = integer_weight(out, in, block_size, rng);
    const PlacedWeight<qd::FP4, qd::Float32Scales> w(tensor, drawn(rng, 64));
    const DecodedWeight decoded = decoded_weight(tensor.view());
    auto dense = integers<float>(out, in, rng);
    const DecodedWeight decoded_dense = decoded_weight(MatrixView<const float>(dense.view()));
    for (const Direction direction : both_directions) {
      const bool forward = direction == Direction::forward;
      const auto p = problem_of(direction, integers<TestType>(tokens, forward ? in : out, rng), decoded);
      const auto p_dense = problem_of(direction, qd::clone(p.x.view()), decoded_dense);
      const auto before = integers<TestType>(tokens, forward ? out : in, rng);
      const Placed<TestType> x(p.x.view(), drawn(rng, 17), drawn(rng, 8));
      each_class(
          [&, tokens = tokens](const qd::Cpu& cpu) {
            // Fixed point has scales of its own, which need not be powers of two.
            if (cpu.compute() == Compute::bits16 && (cpu.isa() < Isa::avx512_bf16 || (cpu.isa() == Isa::amx && tokens <= 4))) return;
            CHECK(wrong_integers<TestType>(cpu, direction, x.in(), w.view(), p, before.view()) == 0);
            CHECK(wrong_integers<TestType>(cpu, direction, x.in(), MatrixView<const float>(dense.view()), p_dense, before.view()) == 0);
          },
          std::vector{Compute::exact, Compute::bits16});
    }
  }
}

namespace {

template <class Format>
constexpr std::uint8_t code_of_one(bool negative) {
  if constexpr (std::is_same_v<Format, qd::NF4>) return negative ? 0 : 15;
  else if constexpr (std::is_same_v<Format, qd::FP4>) return negative ? 11 : 3;
  else if constexpr (std::is_same_v<Format, qd::INT4>) return negative ? 1 : 15;
  else return static_cast<std::uint8_t>(Format::Ocp::max_code | (negative ? 0x80 : 0));
}

}  // namespace

TEMPLATE_TEST_CASE("sums of the largest terms, all of one sign, do not overflow", "[cpu][classes]", qd::NF4, qd::FP4, qd::INT4, qd::FP8E4M3,
                   qd::FP8E5M2) {
  // Integer kernels add pairs of products before they widen them, and the largest pairs are the ones that may not fit.
  for (const Index depth : {1, 2, 31, 64, 65, 128, 255, 1000, 4097}) {
    const Index outs = 19;
    qd::Buffer<std::uint8_t> codes(qd::code_bytes<TestType>(outs * depth));
    std::fill(codes.data(), codes.data() + codes.size(), std::uint8_t{0});
    // Rows of weights: all +1, all -1, and signs in two patterns.
    const auto negative = [](Index n, Index k) { return n % 4 == 0 ? false : n % 4 == 1 ? true : n % 4 == 2 ? k % 2 == 1 : k % 3 == 0; };
    for (Index n = 0; n < outs; ++n)
      for (Index k = 0; k < depth; ++k) {
        const Index flat = n * depth + k;
        const auto code = code_of_one<TestType>(negative(n, k));
        if constexpr (TestType::bits == 8) codes[flat] = code;
        else codes[flat / 2] = static_cast<std::uint8_t>(codes[flat / 2] | (flat % 2 == 0 ? code << 4 : code));
      }
    qd::Float32Scales::Storage<qd::HostMemory> scales{qd::Buffer<float>((outs * depth + 63) / 64)};
    for (auto& scale : scales.absmax.span()) scale = 1.5f;
    const qd::QuantizedTensor<TestType, qd::Float32Scales> tensor(outs, depth, 64, std::move(codes), std::move(scales));
    for (const Index tokens : {1, 8, 33}) {
      CAPTURE(TestType::name, depth, tokens);
      Matrix<float> x(tokens, depth);  // each row with the signs of one of the weights, or their opposite
      for (Index i = 0; i < tokens; ++i)
        for (Index k = 0; k < depth; ++k) x(i, k) = (negative(i, k) != (i % 8 >= 4)) ? -0.75f : 0.75f;
      each_class([&](const qd::Cpu& cpu) {
        const auto y = multiplied(cpu, Direction::forward, x.view(), tensor.view());
        const double upper = std::max(class_bounds<float>(cpu).upper, 1e-5);  // equal terms round all to one side
        Index wrong = 0;
        for (Index i = 0; i < tokens; ++i)
          for (Index n = i % 4; n < outs; n += 4) {
            const double expected = (i % 8 >= 4 ? -1.0 : 1.0) * 0.75 * 1.5 * static_cast<double>(depth);
            wrong += !(std::fabs(static_cast<double>(y(i, n)) - expected) <= upper * std::fabs(expected));
          }
        CHECK(wrong == 0);
      });
    }
  }
}

// ---- memory --------------------------------------------------------------------------------------------------------------------

namespace {

template <class T, class Weight>
void check_at_page_edges(const Weight& make, const DecodedWeight& decoded, Index tokens, PageEdge edge) {
  const auto w = make(edge);
  for (const Direction direction : both_directions) {
    const auto p = normal_problem<T>(direction, tokens, decoded, 17);
    for (const Index padding : {0, 3}) {
      CAPTURE(static_cast<int>(direction), padding);
      const FencedMatrix<T> x(p.x.view(), padding, edge);
      each_class([&](const qd::Cpu& cpu) {
        if (!has_product<T>(cpu, direction, w->view())) return;
        FencedMatrix<T> y(p.rows(), p.cols(), padding, edge);
        multiply(cpu, direction, x.in(), w->view(), y.view(), Update::overwrite);
        CHECK(judged(p, y.in(), Update::overwrite, upper_bounds<T>(cpu)) == "");
      });
    }
  }
}

template <class T, class Format, class Scales>
void check_weights_at_page_edges() {
  const std::vector<ProductShape> shapes = {{1, 3, 5},    {1, 33, 67},  {3, 64, 64},  {7, 17, 129}, {9, 5, 31},
                                            {34, 50, 77}, {9, 33, 96}, {34, 31, 32}, {40, 2, 320}, {37, 40, 352}};
  for (const auto& [tokens, out, in] : shapes)
    for (const PageEdge edge : {PageEdge::start, PageEdge::end}) {
      CAPTURE(Format::name, tokens, out, in, static_cast<int>(edge));
      const auto tensor = normal_weight<Format, Scales>(out, in, 32);
      const auto make = [&](PageEdge at) { return std::make_unique<FencedWeight<Format, Scales>>(tensor, at); };
      check_at_page_edges<T>(make, decoded_weight(tensor.view()), tokens, edge);
    }
}

}  // namespace

TEMPLATE_TEST_CASE("products read and write their operands and not one element beside them", "[cpu][classes]", float, qd::bfloat16) {
  check_weights_at_page_edges<TestType, qd::NF4, qd::DoubleQuant<>>();
  check_weights_at_page_edges<TestType, qd::INT4, qd::Float32Scales>();
  check_weights_at_page_edges<TestType, qd::FP8E4M3, qd::DoubleQuant<qd::FP8E4M3>>();
  check_weights_at_page_edges<TestType, qd::FP8E5M2, qd::Float32Scales>();
  for (const auto& [tokens, out, in] : {ProductShape{1, 3, 5}, {3, 16, 67}, {9, 5, 31}, {34, 17, 77}})
    for (const PageEdge edge : {PageEdge::start, PageEdge::end})
      for (const Index padding : {0, 1}) {
        CAPTURE(tokens, out, in, static_cast<int>(edge), padding);
        const auto dense = normal_matrix<float>(out, in, 6);
        const auto make = [&, padding = padding](PageEdge at) { return std::make_unique<FencedMatrix<float>>(dense.view(), padding, at); };
        check_at_page_edges<TestType>(make, decoded_weight(dense.view()), tokens, edge);
      }
}

TEST_CASE("what a thread computed before changes no bit of a product", "[cpu][classes]") {
  const auto [cols, large_cols] = GENERATE(std::pair<Index, Index>{75, 515}, std::pair<Index, Index>{96, 512});  // of whole blocks too
  const auto small = normal_weight<qd::NF4, qd::DoubleQuant<>>(33, cols, 32);
  const auto large = normal_weight<qd::NF4, qd::DoubleQuant<>>(200, large_cols, 32);
  auto spoiling = qd::clone(normal_matrix<float>(70, large_cols, 18).view());
  for (Index i = 0; i < 70; ++i) spoiling(i, 7 * i) = std::numeric_limits<float>::quiet_NaN();
  for (const Direction direction : both_directions)
    for (const Index tokens : {1, 9, 34}) {
      const auto x = normal_matrix<float>(tokens, direction == Direction::forward ? cols : 33, 19);
      each_class([&](const qd::Cpu& cpu) {
        if (!has_product<float>(cpu, direction, small.view())) return;
        Matrix<float> fresh;
        std::thread([&] { fresh = multiplied(cpu, direction, x.view(), small.view()); }).join();
        multiplied(cpu, Direction::forward, spoiling.view(), large.view());
        if (has_product<float>(cpu, Direction::backward, large.view()))
          multiplied(cpu, Direction::backward, spoiling.view().left_cols(200), large.view());
        CHECK(same_bits(multiplied(cpu, direction, x.view(), small.view()).view(), fresh.view()));
      });
    }
}

// ---- the adjoint ---------------------------------------------------------------------------------------------------------------

namespace {

double inner_product(MatrixView<const double> a, MatrixView<const double> b) {
  double sum = 0.0;
  for (Index i = 0; i < a.rows; ++i)
    for (Index j = 0; j < a.cols; ++j) sum += a(i, j) * b(i, j);
  return sum;
}

// <x w^T, g> = <x, g w>. The errors of a product have nothing to do with g, so they cancel in the sum but for the square root of their
// number.
template <class T, class W>
void check_adjoint(const qd::Cpu& cpu, const W& w, Index tokens) {
  const auto x = normal_matrix<T>(tokens, w.cols, 20), g = normal_matrix<T>(tokens, w.rows, 21);
  const auto y = in_double(multiplied(cpu, Direction::forward, x.view(), w).view());
  const auto dx = in_double(multiplied(cpu, Direction::backward, g.view(), w).view());
  const auto x_double = in_double(x.view()), g_double = in_double(g.view());
  const auto norm = [](const Matrix<double>& m) { return std::sqrt(inner_product(m.view(), m.view())); };
  const double forward = inner_product(y.view(), g_double.view()), backward = inner_product(x_double.view(), dx.view());
  const double size = norm(y) * norm(g_double) + norm(x_double) * norm(dx);
  const double bound = std::hypot(class_bounds<T>(cpu).upper, rounding<T>());
  const double count = static_cast<double>(std::min({tokens * w.rows, tokens * w.cols, w.rows * w.cols}));
  CAPTURE(w.rows, w.cols, tokens, forward, backward, size);
  CHECK(std::fabs(forward - backward) <= bound * size * std::min(1.0, 6.0 / std::sqrt(count)));
}

}  // namespace

TEMPLATE_TEST_CASE("the backward product is the adjoint of the forward one", "[cpu][classes]", float, double, qd::bfloat16, qd::half) {
  const std::vector both_ways = {Compute::automatic, Compute::exact, Compute::bits16};
  const auto check = [&](const auto& w) {
    each_class(
        [&](const qd::Cpu& cpu) {
          for (const Index tokens : {1, 2, 7, 8, 33, 65}) check_adjoint<TestType>(cpu, w, tokens);
        },
        both_ways);
  };
  const auto check_storage = [&]<class Format, class Scales>(Format, Scales) {
    CAPTURE(Format::name, Scales::nested);
    for (const auto& [out, in] : {std::pair<Index, Index>{1, 1}, {1, 97}, {97, 1}, {64, 64}, {75, 131}, {257, 127}})
      check(normal_weight<Format, Scales>(out, in, 64).view());
  };
  check_storage(qd::NF4{}, qd::DoubleQuant<>{});
  check_storage(qd::FP4{}, qd::Float32Scales{});
  check_storage(qd::INT4{}, qd::DoubleQuant<qd::FP8E4M3>{});
  check_storage(qd::FP8E4M3{}, qd::Float32Scales{});
  check_storage(qd::FP8E5M2{}, qd::DoubleQuant<>{});
  for (const auto& [out, in] : {std::pair<Index, Index>{1, 97}, {16, 131}, {64, 64}}) {
    const auto dense = normal_matrix<Accumulator<TestType>>(out, in, 6);
    check(dense.view());
  }
}

}  // namespace class_guarantees_test
