// Binary codes and trained scales through files: the same bits, a run that goes on as if it had not stopped, and files that lie.
#include <array>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/io/binary_code.hpp>
#include <qdylora/io/collect.hpp>
#include <qdylora/optim/adamw.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"

namespace binary_code_test {

namespace qd = qdylora;
using BinaryCodedTensor = qd::BinaryCodedTensor<>;
using qd::DType;
using qd::Errc;
using qd::Index;
using Layer = qd::AlphaLinear<float>;

namespace {

BinaryCodedTensor code(Index rows, Index cols, Index planes, Index group_size) {
  return qd::binary_quantize(test::normal_matrix<float>(rows, cols, 1).view(), {.planes = planes, .group_size = group_size});
}

void save(const std::filesystem::path& path, const std::string& name, const BinaryCodedTensor& tensor) {
  qd::SafetensorsWriter writer;
  qd::add_binary_code(writer, name, tensor);
  writer.write(path);
}
BinaryCodedTensor load(const std::filesystem::path& path, const std::string& name) {
  return qd::load_binary_code(qd::SafetensorsFile(path), name);
}

// A step on data of its own.
void train(Layer& layer, qd::AdamW<float>& optimizer, int step) {
  const auto x = test::normal_matrix<float>(9, layer.in(), 100 + static_cast<std::uint64_t>(step));
  const auto dy = test::normal_matrix<float>(9, layer.out(), 200 + static_cast<std::uint64_t>(step));
  layer.forward(x);
  optimizer.zero_grad();
  layer.backward(dy.view());
  optimizer.step();
}

}  // namespace

TEST_CASE("binary codes come back from a file with the same bits") {
  const test::TemporaryFolder folder;
  for (const auto& tensor : {code(5, 20, 3, 8), code(1, 1, 1, 0), code(4, 64, 8, 0), code(0, 8, 2, 8), code(3, 0, 2, 0)}) {
    save(folder / "codes", "layers.0.up", tensor);
    const auto loaded = load(folder / "codes", "layers.0.up");
    CHECK(loaded.shape() == tensor.shape());
    CHECK(std::equal(loaded.bits().span().begin(), loaded.bits().span().end(), tensor.bits().span().begin(), tensor.bits().span().end()));
    CHECK(test::same_bits(loaded.scales(), tensor.scales()));
  }
}

TEST_CASE("training goes on from files as if it had not stopped") {
  const test::TemporaryFolder folder;
  const qd::AlphaOptions options{.trained_planes = 2, .name = "up"};
  Layer layer(std::make_shared<const BinaryCodedTensor>(code(6, 40, 3, 16)), options);
  qd::AdamW<float> optimizer(layer.parameters(), {.lr = 1e-2});
  for (int step = 0; step < 3; ++step) train(layer, optimizer, step);
  {
    save(folder / "codes", "up", *layer.codes());
    qd::TrainState state;
    collect(state, "up", layer.parameters());
    collect(state, "adamw", optimizer);
    qd::save_train_state(folder / "state", state);
  }
  Layer again(std::make_shared<const BinaryCodedTensor>(load(folder / "codes", "up")), options);
  qd::AdamW<float> optimizer_again(again.parameters(), {.lr = 1e-2});
  {
    auto state = qd::load_train_state(folder / "state");
    restore(state, "up", again.parameters());
    restore(state, "adamw", optimizer_again);
    state.expect_all_used();
  }
  for (int step = 3; step < 6; ++step) {
    train(layer, optimizer, step);
    train(again, optimizer_again, step);
  }
  CHECK(test::same_bits(again.alpha().value.view(), layer.alpha().value.view()));
  CHECK_FALSE(test::same_bits(std::as_const(layer.alpha().value).view(), layer.codes()->scales().top_rows(12)));
}

TEST_CASE("a task's scales go into a file of their own and come back into a layer on the same codes") {
  const test::TemporaryFolder folder;
  const auto codes = std::make_shared<const BinaryCodedTensor>(code(6, 40, 3, 16));
  Layer one(codes, {.trained_planes = 2, .name = "up"}), other(codes, {.trained_planes = 2, .name = "up"});
  for (float& a : one.alpha().value.span()) a *= 0.75f;
  qd::SafetensorsWriter writer;
  add_alpha(writer, one);
  writer.write(folder / "task");
  const qd::SafetensorsFile file(folder / "task");
  CHECK(file.info("up.alpha").shape == std::vector<Index>{2, 6, 3});
  load_alpha(file, other);
  CHECK(test::same_bits(other.alpha().value.view(), one.alpha().value.view()));

  Layer fewer(codes, {.trained_planes = 1, .name = "up"}), stranger(codes, {.trained_planes = 2, .name = "down"});
  CHECK(test::code_of([&] { load_alpha(file, fewer); }) == Errc::shape_mismatch);
  CHECK(test::code_of([&] { load_alpha(file, stranger); }) == Errc::missing_tensor);
}

TEST_CASE("files that are no binary code are refused") {
  const test::TemporaryFolder folder;
  const auto shape_bytes = [](const std::array<Index, 4>& shape) { return std::as_bytes(std::span(shape)); };
  const std::array<Index, 4> good{2, 16, 3, 8};
  const std::vector<std::byte> bits(12);
  std::vector<float> scales(12, 1.0f);
  struct Parts {
    std::array<Index, 4> shape;
    DType shape_type = DType::I64;
    std::vector<Index> bits_shape = {3, 2, 2}, scales_shape = {3, 2, 2};
    bool with_scales = true;
  };
  const auto error = [&](const Parts& parts) {
    qd::SafetensorsWriter writer;
    writer.add("w.binary_shape", parts.shape_type, {4}, shape_bytes(parts.shape));
    writer.add("w.binary_bits", DType::U8, parts.bits_shape, bits);
    if (parts.with_scales) writer.add("w.binary_scales", DType::F32, parts.scales_shape, std::as_bytes(std::span(scales)));
    writer.write(folder / "file");
    return test::error_of([&] { load(folder / "file", "w"); });
  };
  CHECK_FALSE(error({good}));
  const auto fails = [&](const Parts& parts, Errc errc, const std::string& tensor) {
    const auto found = error(parts);
    REQUIRE(found);
    CAPTURE(std::string(found->what()));
    CHECK(name(found->code()) == name(errc));
    CHECK(found->tensor() == tensor);
  };
  constexpr Index most = std::numeric_limits<Index>::max();
  fails({{2, 16, 9, 8}}, Errc::bad_argument, "w.binary_shape");
  fails({{-2, 16, 3, 8}}, Errc::bad_argument, "w.binary_shape");
  fails({{most, most, 3, 8}}, Errc::bad_argument, "w.binary_shape");
  fails({{most, 0, 3, 8}}, Errc::bad_argument, "w.binary_shape");
  fails({{2, 16, 3, 9}}, Errc::block_size, "w.binary_shape");
  fails({good, DType::U64}, Errc::dtype, "w.binary_shape");
  fails({{2, 24, 3, 8}}, Errc::shape_mismatch, "w.binary_bits");
  fails({{2, 16, 3, 16}}, Errc::shape_mismatch, "w.binary_scales");
  fails({good, DType::I64, {2, 3, 2}}, Errc::shape_mismatch, "w.binary_bits");
  fails({good, DType::I64, {3, 2, 2}, {3, 4}}, Errc::shape_mismatch, "w.binary_scales");
  fails({good, DType::I64, {3, 2, 2}, {3, 2, 2}, false}, Errc::missing_tensor, "w.binary_scales");
  scales[7] = std::numeric_limits<float>::infinity();
  fails({good}, Errc::non_finite, "w.binary_scales");
}

}  // namespace binary_code_test
