// Products in every arithmetic class, with every instruction set, on every kind of weight: as close to the exact result as the class
// promises, and no closer than its arithmetic can be.
#include "backend/classes.inc"

namespace classes_test {

namespace qd = qdylora;
using namespace test;

// ---- the switch ----------------------------------------------------------------------------------------------------------------

TEST_CASE("a backend computes in the class it is told to, whatever else it is told", "[cpu][classes]") {
  const qd::Cpu cpu(3);
  CHECK(cpu.compute() == Compute::automatic);
  CHECK(qd::Cpu().compute() == Compute::automatic);
  for (const Compute compute : {Compute::automatic, Compute::exact, Compute::bits16, Compute::int8}) {
    CHECK(cpu.with_compute(compute).compute() == compute);
    CHECK(cpu.with_compute(compute).threads() == 3);
    CHECK(cpu.with_compute(compute).isa() == cpu.isa());
    CHECK(cpu.with_compute(compute).with_isa(Isa::generic).compute() == compute);
    CHECK(cpu.with_isa(Isa::generic).with_compute(compute).isa() == Isa::generic);
  }
  CHECK(cpu.compute() == Compute::automatic);  // the original is as it was
}

TEST_CASE("instruction sets have names of their own, and the best one is supported", "[cpu][classes]") {
  std::vector<std::string> names;
  for (const Isa isa : all_isas) {
    names.emplace_back(qd::name(isa));
    CHECK(names.back() != "unknown");
    if (qd::supported(isa)) CHECK(qd::Cpu(1).with_isa(isa).isa() == isa);
    else CHECK(code_of([&] { qd::Cpu(1).with_isa(isa); }) == Errc::unsupported);
  }
  std::sort(names.begin(), names.end());
  CHECK(std::adjacent_find(names.begin(), names.end()) == names.end());
  CHECK(qd::supported(qd::best_isa()));
  CHECK(qd::supported(Isa::generic));
  CHECK(qd::Cpu(1).isa() == qd::best_isa());
}

TEMPLATE_TEST_CASE("the automatic class is that of the compute type", "[cpu][classes]", float, qd::bfloat16, qd::half) {
  const auto dense = normal_matrix<float>(70, 129, 1, 0.2);
  const auto tensor = qd::quantize<qd::NF4>(dense.view());
  const auto adapter = normal_matrix<float>(16, 129, 2);
  const Compute same = std::is_same_v<TestType, qd::bfloat16> ? Compute::bits16 : Compute::exact;
  each_class(
      [&](const qd::Cpu& cpu) {
        const qd::Cpu chosen = cpu.with_compute(same);
        for (const Index tokens : {1, 6, 40}) {
          CAPTURE(tokens);
          const auto x = normal_matrix<TestType>(tokens, 129, 3), dy = normal_matrix<TestType>(tokens, 70, 4);
          CHECK(same_bits(multiplied(cpu, Direction::forward, x.view(), tensor.view()).view(),
                          multiplied(chosen, Direction::forward, x.view(), tensor.view()).view()));
          CHECK(same_bits(multiplied(cpu, Direction::backward, dy.view(), tensor.view()).view(),
                          multiplied(chosen, Direction::backward, dy.view(), tensor.view()).view()));
          Matrix<float> h(tokens, 16), h_chosen(tokens, 16);
          cpu.matmul(x.view(), adapter.view(), h.view(), Update::overwrite);
          chosen.matmul(x.view(), adapter.view(), h_chosen.view(), Update::overwrite);
          CHECK(same_bits(h.view(), h_chosen.view()));
        }
      },
      std::vector{Compute::automatic});
}

TEST_CASE("products in double have the same bits in every class", "[cpu][classes]") {
  const auto dense = normal_matrix<float>(70, 129, 1, 0.2);
  const auto tensor = qd::quantize<qd::NF4>(dense.view());
  const auto w = normal_matrix<double>(70, 129, 2, 0.2);
  const auto x = normal_matrix<double>(40, 129, 3), dy = normal_matrix<double>(40, 70, 4);
  each_class([&](const qd::Cpu& cpu) {
    const qd::Cpu exact = cpu.with_compute(Compute::exact);
    for (const Index tokens : {1, 40}) {
      const auto part = x.view().top_rows(tokens), dy_part = dy.view().top_rows(tokens);
      CHECK(same_bits(multiplied(cpu, Direction::forward, part, tensor.view()).view(),
                      multiplied(exact, Direction::forward, part, tensor.view()).view()));
      CHECK(same_bits(multiplied(cpu, Direction::backward, dy_part, tensor.view()).view(),
                      multiplied(exact, Direction::backward, dy_part, tensor.view()).view()));
      CHECK(same_bits(multiplied(cpu, Direction::forward, part, w.view()).view(),
                      multiplied(exact, Direction::forward, part, w.view()).view()));
      CHECK(same_bits(multiplied(cpu, Direction::backward, dy_part, w.view()).view(),
                      multiplied(exact, Direction::backward, dy_part, w.view()).view()));
    }
  });
}

TEMPLATE_TEST_CASE("int8 has no product with a transposed quantized weight, and leaves the output alone", "[cpu][classes]", float,
                   qd::bfloat16, qd::half) {
  const auto dense = normal_matrix<float>(70, 129, 1, 0.2);
  const auto nf4 = qd::quantize<qd::NF4>(dense.view());
  const auto fp8 = qd::quantize<qd::FP8E4M3, qd::Float32Scales>(dense.view());
  each_class(
      [&](const qd::Cpu& cpu) {
        for (const Index tokens : {1, 7, 40})
          for (const Update update : both_updates) {
            CAPTURE(tokens, static_cast<int>(update));
            const auto dy = normal_matrix<TestType>(tokens, 70, 4), before = normal_matrix<TestType>(tokens, 129, 5);
            auto y = qd::clone(before.view());
            CHECK(code_of([&] { cpu.matmul_transposed(dy.view(), nf4.view(), y.view(), update); }) == Errc::unsupported);
            CHECK(code_of([&] { cpu.matmul_transposed(dy.view(), fp8.view(), y.view(), update); }) == Errc::unsupported);
            CHECK(same_bits(y.view(), before.view()));
          }
      },
      std::vector{Compute::int8});
}

// ---- accuracy ------------------------------------------------------------------------------------------------------------------

TEMPLATE_TEST_CASE("products with quantized weights are within the bounds of their class", "[cpu][classes]", QDYLORA_TEST_STORAGES,
                   QDYLORA_TEST_STORAGES_OF(INT8)) {
  Rng rng(seed_of<typename TestType::Format, typename TestType::Scales>(), qd::Purpose::data);
  const auto shapes = shuffled_shapes(rng, 2);
  const Index cases = quantized_products_by_class<float, typename TestType::Format, typename TestType::Scales>(shapes, rng);
  CHECK(cases >= 3 * 2 * std::ssize(edge_sizes));  // on a machine without vector instructions; five times as many on others
}

TEMPLATE_TEST_CASE("codes that no quantizer writes are within the bounds of their class too", "[cpu][classes]", qd::NF4, qd::FP4, qd::INT4) {
  Rng rng(11, qd::Purpose::data);
  const ProductShape shapes[] = {{1, 33, 64}, {4, 40, 128}, {7, 65, 96}, {16, 67, 192}, {35, 64, 256}, {70, 37, 512}};
  for (const auto& [tokens, out, in] : shapes) {
    const Index block_size = in % 64 == 0 ? 64 : 32;
    CAPTURE(tokens, out, in, block_size);
    qd::Buffer<std::uint8_t> codes(qd::code_bytes<TestType>(out * in));
    for (auto& code : codes.span()) code = static_cast<std::uint8_t>(rng.next());  // INT4: -8, which stands for less than -absmax
    qd::Float32Scales::Storage<qd::HostMemory> scales{qd::Buffer<float>(out * in / block_size)};
    for (auto& scale : scales.absmax.span()) scale = 0.1f + static_cast<float>(rng.uniform());
    const qd::QuantizedTensor<TestType, qd::Float32Scales> tensor{out, in, block_size, std::move(codes), std::move(scales)};
    const DecodedWeight decoded = decoded_weight(tensor.view());
    const auto forward = normal_problem<float>(Direction::forward, tokens, decoded, rng.next());
    const auto backward = normal_problem<float>(Direction::backward, tokens, decoded, rng.next());
    Index cases = 0;
    each_class([&](const qd::Cpu& cpu) { check_products(cpu, forward, backward, tensor.view(), Place{}, cases); });
    CHECK(cases >= 3);
  }
}

TEST_CASE("the named shapes are within the bounds of their class", "[cpu][classes]") {
  Rng rng(1, qd::Purpose::data);
  quantized_products_by_class<float, qd::NF4, qd::DoubleQuant<>>(product_shapes, rng);
  quantized_products_by_class<float, qd::INT4, qd::Float32Scales>(product_shapes, rng);
  quantized_products_by_class<float, qd::FP8E4M3, qd::Float32Scales>(product_shapes, rng);
  quantized_products_by_class<float, qd::INT8, qd::Float32Scales>(product_shapes, rng);
}

TEST_CASE("every number of tokens, of outputs and of inputs around the sizes of tiles is within the bounds of its class",
          "[cpu][classes]") {
  std::vector<ProductShape> shapes;
  for (Index tokens = 1; tokens <= 70; ++tokens) shapes.push_back({tokens, 37, 75});
  for (Index out = 1; out <= 70; ++out) shapes.push_back({out % 2 == 0 ? Index{5} : Index{35}, out, 75});
  for (Index in = 1; in <= 140; ++in) shapes.push_back({in % 2 == 0 ? Index{5} : Index{35}, 19, in});
  Rng rng(2, qd::Purpose::data);
  quantized_products_by_class<float, qd::NF4, qd::DoubleQuant<>>(shapes, rng);
}

TEST_CASE("inputs around the sizes of blocks are within the bounds of their class", "[cpu][classes]") {
  std::vector<ProductShape> shapes;
  for (const Index block : block_sizes)
    for (const Index in : {block - 1, block, block + 1})
      shapes.push_back({in % 2 == 0 ? Index{3} : Index{34}, block < 1000 ? Index{67} : Index{9}, in});
  Rng rng(3, qd::Purpose::data);
  quantized_products_by_class<float, qd::NF4, qd::DoubleQuant<>>(shapes, rng);
  quantized_products_by_class<float, qd::INT4, qd::DoubleQuant<qd::FP8E4M3>>(shapes, rng);
  quantized_products_by_class<float, qd::FP8E5M2, qd::Float32Scales>(shapes, rng);
  quantized_products_by_class<float, qd::INT8, qd::DoubleQuant<>>(shapes, rng);
}

TEST_CASE("few tokens with long rows and with many rows are within the bounds of their class", "[cpu][classes]") {
  // Rows of a kilobyte and more, whose codes kernels copy; rows that tasks share, their sums added at the end.
  const ProductShape shapes[] = {{1, 67, 2112}, {2, 129, 4160}, {9, 64, 2048}, {16, 63, 4672},
                                 {1, 4097, 64}, {3, 4100, 128}, {16, 6200, 96}};
  Rng rng(7, qd::Purpose::data);
  quantized_products_by_class<float, qd::NF4, qd::DoubleQuant<>>(shapes, rng);
  quantized_products_by_class<float, qd::FP4, qd::Float32Scales>(shapes, rng);
}

TEMPLATE_TEST_CASE("exact products are exact to 1e-13 in long sums too", "[cpu][classes]", (Storage<qd::NF4, DynamicScales>),
                   (Storage<qd::FP8E4M3, PlainScales>)) {
  const ProductShape shapes[] = {{3, 40, 1023}, {34, 40, 1025}, {2, 33, 4096}, {33, 33, 4097}, {3, 1023, 40}, {34, 2049, 33}};
  for (const auto& [tokens, out, in] : shapes) {
    CAPTURE(tokens, out, in);
    const auto dense = normal_matrix<float>(out, in, 4, 0.2);
    const auto tensor = qd::quantize<typename TestType::Format, typename TestType::Scales>(dense.view());
    const DecodedWeight decoded = decoded_weight(tensor.view());
    for (const Direction direction : {Direction::forward, Direction::backward}) {
      const auto p = normal_problem<float>(direction, tokens, decoded, 5);
      CAPTURE(p.depth);
      each_class(
          [&](const qd::Cpu& cpu) {
            const auto y = multiplied(cpu, direction, p.x.view(), tensor.view());
            CHECK(normalised_squared_error(y.view(), p.product.view()) / 1e-13 <= 1.0);
          },
          std::vector{Compute::exact});
    }
  }
}

TEMPLATE_TEST_CASE("activations of 16 bits and of double are within the bounds of every class too", "[cpu][classes]", double, qd::bfloat16,
                   qd::half) {
  Rng rng(5, qd::Purpose::data);
  const ProductShape shapes[] = {{0, 8, 8},    {3, 0, 8},    {3, 8, 0},      {1, 1, 1},     {1, 64, 65},   {1, 200, 129}, {2, 33, 257},
                                 {4, 31, 80},  {5, 97, 101}, {7, 47, 48},    {8, 48, 47},   {13, 11, 13},  {16, 16, 16},  {17, 65, 33},
                                 {31, 47, 63}, {32, 48, 64}, {33, 128, 256}, {65, 95, 127}, {130, 37, 259}};
  const Compute classes[] = {Compute::automatic, Compute::exact, Compute::bits16, Compute::int8};
  quantized_products_by_class<TestType, qd::NF4, qd::DoubleQuant<>>(shapes, rng, classes);
  quantized_products_by_class<TestType, qd::INT4, qd::Float32Scales>(shapes, rng, classes);
  quantized_products_by_class<TestType, qd::FP8E4M3, qd::DoubleQuant<>>(shapes, rng, classes);
}

namespace {

/// Dense weights of S. The lower bound of bits16 is not asked for: few rows may well be multiplied in float.
template <class T, class S>
void dense_products_by_class(std::span<const ProductShape> shapes, Rng& rng) {
  for (const auto& [tokens, out, in] : shapes) {
    const Place place = drawn_place(rng);
    CAPTURE(tokens, out, in);
    const auto dense = normal_matrix<S>(out, in, rng.next(), 0.2);
    const Placed<S> w(dense.view(), drawn(rng, 17), drawn(rng, 8));
    const DecodedWeight decoded = decoded_weight(dense.view());
    const auto forward = normal_problem<T>(Direction::forward, tokens, decoded, rng.next());
    const auto backward = normal_problem<T>(Direction::backward, tokens, decoded, rng.next());
    each_class([&](const qd::Cpu& cpu) {
      const bool exact = cpu.compute() == Compute::int8;
      const ClassBounds bounds{class_bounds<T>(exact ? cpu.with_compute(Compute::exact) : cpu).upper, 0.0};
      CHECK(product_faults(cpu, forward, w.in(), place, bounds) == "");
      CHECK(product_faults(cpu, backward, w.in(), place, bounds) == "");
      if (exact)
        for (const auto* p : {&forward, &backward})
          CHECK(same_bits(multiplied(cpu, p->direction, p->x.view(), w.in()).view(),
                          multiplied(cpu.with_compute(Compute::exact), p->direction, p->x.view(), w.in()).view()));
    });
  }
}

}  // namespace

TEMPLATE_TEST_CASE("products with dense weights are within the bounds of their class, and under int8 exact", "[cpu][classes]", float,
                   double, qd::bfloat16, qd::half) {
  Rng rng(6, qd::Purpose::data);
  const auto shapes = shuffled_shapes(rng);
  dense_products_by_class<TestType, Accumulator<TestType>>(shapes, rng);
  // Adapters: few rows, and the weights of heads in the type of their file.
  const ProductShape adapters[] = {{1, 8, 257}, {3, 16, 129}, {33, 1, 97}, {40, 8, 255}, {64, 64, 128}, {130, 16, 65}};
  dense_products_by_class<TestType, Accumulator<TestType>>(adapters, rng);
  dense_products_by_class<TestType, qd::bfloat16>(adapters, rng);
  dense_products_by_class<TestType, qd::half>(adapters, rng);
}

TEMPLATE_TEST_CASE("gradients of weights are no worse than products of their class, in 16 bits from 64 rows and tokens on", "[cpu][classes]", float,
                   qd::bfloat16) {
  using T = TestType;
  const ProductShape shapes[] = {{0, 8, 9},     {1, 16, 33},   {7, 1, 65},    {33, 8, 129},  {100, 16, 97}, {257, 3, 64},
                                 {63, 64, 128}, {64, 63, 128}, {64, 64, 128}, {65, 71, 31},  {300, 257, 65}, {129, 300, 1}};
  for (const ProductShape& shape : shapes) {
    const Index tokens = shape.tokens, rank = shape.out, features = shape.in;
    CAPTURE(tokens, rank, features);
    const auto h = normal_matrix<float>(tokens, rank, 1);
    const auto x = normal_matrix<T>(tokens, features, 2);
    each_class([&](const qd::Cpu& cpu) {
      const qd::Cpu exact = cpu.exact();
      const bool has_rows = tokens >= 64 && rank >= 64, bits16 = cpu.compute() == Compute::bits16;
      const double limit = class_bounds<float>(bits16 && tokens >= 64 ? cpu : exact).upper;
      for (const Update update : both_updates) {
        Output<qd::Cpu, float> g(cpu, rank, features, update);
        cpu.weight_gradient(h.view(), x.view(), g.view(), update);
        reference::weight_gradient(h.view(), x.view(), g.expected(), update);
        g.check(limit * limit);
      }
      if (has_rows || !bits16 || tokens < 64) {
        qd::Matrix<float> here(rank, features), there(rank, features);
        cpu.weight_gradient(h.view(), x.view(), here.view());
        exact.weight_gradient(h.view(), x.view(), there.view());
        const bool in_float32 = !bits16 || tokens < 64 || cpu.isa() == qd::Isa::generic || cpu.isa() == qd::Isa::avx512;
        CHECK(same_bits(here.view(), there.view()) == in_float32);
      }
    });
  }
}

TEST_CASE("every code of a file has its value, the one that quantization never writes too", "[cpu][classes]") {
  // Codes as they come from a file, all sixteen of them, with scales of both signs and a block of zeros.
  Rng rng(7, qd::Purpose::data);
  const auto check = [&]<class Format>(Format) {
    for (const auto& [tokens, out, in] : {ProductShape{1, 30, 77}, {5, 30, 77}, {40, 33, 129}}) {
      CAPTURE(Format::name, tokens, out, in);
      qd::Buffer<std::uint8_t> codes(qd::code_bytes<Format>(out * in));
      for (auto& code : codes.span()) code = static_cast<std::uint8_t>(rng.next());
      qd::Float32Scales::Storage<qd::HostMemory> scales{qd::Buffer<float>((out * in + 31) / 32)};
      for (auto& scale : scales.absmax.span()) scale = rng.normal();
      scales.absmax[2] = 0.0f;
      const qd::QuantizedTensor<Format, qd::Float32Scales> tensor(out, in, 32, std::move(codes), std::move(scales));
      const DecodedWeight decoded = decoded_weight(tensor.view());
      const auto forward = normal_problem<float>(Direction::forward, tokens, decoded, rng.next());
      const auto backward = normal_problem<float>(Direction::backward, tokens, decoded, rng.next());
      Index cases = 0;
      each_class([&](const qd::Cpu& cpu) { check_products(cpu, forward, backward, tensor.view(), {}, cases); });
    }
  };
  check(qd::NF4{});
  check(qd::FP4{});
  check(qd::INT4{});
}

}  // namespace classes_test
