#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include <qdylora/core/matrix.hpp>
#include <qdylora/core/random.hpp>
#include <qdylora/io/safetensors.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"

namespace safetensors_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using test::code_of;
using test::error_of;

namespace {

std::string text_of(const qd::SafetensorsFile& file, std::string_view tensor) {
  const auto bytes = file.bytes(tensor);
  return {reinterpret_cast<const char*>(bytes.data()), static_cast<std::size_t>(bytes.size())};
}

std::span<const std::byte> bytes_of(const auto& container) { return std::as_bytes(std::span(container)); }

bool same_bits(const qd::Matrix<float>& matrix, const std::vector<float>& expected) {
  return static_cast<std::size_t>(matrix.size()) == expected.size() &&
         std::memcmp(matrix.data(), expected.data(), expected.size() * sizeof(float)) == 0;
}

qd::Matrix<float> random_matrix(Index rows, Index cols, std::uint64_t seed) {
  qd::Rng rng(seed);
  qd::Matrix<float> matrix(rows, cols);
  for (float& x : matrix.span()) x = rng.normal();
  return matrix;
}

}  // namespace

TEST_CASE("a file of the reference implementation with every edge is read exactly") {
  const qd::SafetensorsFile file(test::golden("container_edge.safetensors"));
  std::vector<std::string> names;
  for (const auto& tensor : file.tensors()) names.push_back(tensor.name);
  CHECK(std::ranges::is_sorted(names));
  CHECK(names == std::vector<std::string>{"bf16", "bool", "empty", "f16", "f32", "f64", "f8e4m3", "i32", "i64", "i8", "scalar",
                                          "u8", "unicode \xC3\xA9\"\\\n/k"});
  CHECK(file.metadata().size() == 2);
  CHECK(file.metadata().at("n") == "1");
  CHECK(file.metadata().at("note") == "caf\xC3\xA9 \"quoted\" \\ backslash");

  CHECK(file.contains("i8"));
  CHECK_FALSE(file.contains("i9"));
  CHECK_FALSE(file.contains(""));
  CHECK_FALSE(file.contains("zzz"));
  const qd::TensorInfo& f32 = file.info("f32");
  CHECK(f32.dtype == qd::DType::F32);
  CHECK(f32.shape == std::vector<Index>{2, 3});
  CHECK(f32.size() == 24);
  CHECK(file.info("scalar").shape.empty());
  CHECK(file.info("empty").shape == std::vector<Index>{0, 4});
  CHECK(file.bytes("empty").size() == 0);
  CHECK(file.matrix("empty").rows() == 0);
  CHECK(file.matrix("empty").cols() == 4);

  const auto matrix = file.matrix("f32");
  CHECK(matrix.rows() == 2);
  CHECK(matrix.cols() == 3);
  CHECK(same_bits(matrix, test::load<float>(file, "f32")));
  CHECK(file.matrix("f64").rows() == 1);
  CHECK(file.matrix("f64")(0, 0) == static_cast<float>(test::load<double>(file, "f64")[0]));
  const auto half = test::load<qd::half>(file, "f16");
  const auto brain = test::load<qd::bfloat16>(file, "bf16");
  const auto f16 = file.matrix("f16");
  const auto bf16 = file.matrix("bf16");
  REQUIRE(f16.cols() == 4);
  REQUIRE(bf16.cols() == 5);
  for (Index i = 0; i < 4; ++i) {
    CHECK(std::bit_cast<std::uint32_t>(f16(0, i)) ==
          std::bit_cast<std::uint32_t>(static_cast<float>(half[static_cast<std::size_t>(i)])));
  }
  for (Index i = 0; i < 5; ++i) {
    CHECK(std::bit_cast<std::uint32_t>(bf16(0, i)) ==
          std::bit_cast<std::uint32_t>(static_cast<float>(brain[static_cast<std::size_t>(i)])));
  }
}

TEST_CASE("asking for what a file does not have is a typed error that names the tensor") {
  const qd::SafetensorsFile file(test::golden("container_edge.safetensors"));
  const auto missing = error_of([&] { file.info("absent"); });
  REQUIRE(missing);
  CHECK(missing->code() == Errc::missing_tensor);
  CHECK(missing->tensor() == "absent");
  CHECK(missing->file() == file.name());
  CHECK(code_of([&] { file.bytes("absent"); }) == Errc::missing_tensor);
  CHECK(code_of([&] { file.matrix("absent"); }) == Errc::missing_tensor);
  CHECK(code_of([&] { file.matrix("i32"); }) == Errc::dtype);
  CHECK(code_of([&] { file.matrix("f8e4m3"); }) == Errc::dtype);
  CHECK(code_of([&] { file.matrix("scalar"); }) == Errc::shape);
  std::byte room[25];
  CHECK(code_of([&] { file.read("f32", room); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { file.read("f32", std::span(room).first(23)); }) == Errc::shape_mismatch);
  CHECK_FALSE(code_of([&] { file.read("f32", std::span(room).first(24)); }));
}

TEST_CASE("rows are read alone, into targets of any stride, and only rows that exist") {
  const test::TemporaryFolder folder;
  const auto source = random_matrix(70, 3001, 1);  // longer than the reader's buffer in all three ways
  qd::SafetensorsWriter writer;
  writer.add("w", source.view());
  writer.write(folder / "f");
  const qd::SafetensorsFile file(folder / "f");
  CHECK(same_bits(file.matrix("w"), {source.span().begin(), source.span().end()}));

  for (const Index stride : {Index{3001}, Index{3010}}) {
    std::vector<float> room(static_cast<std::size_t>(10 * stride), -1.0f);
    const qd::MatrixView<float> out(room.data(), 10, 3001, stride);
    file.read_rows("w", 60, out);
    bool equal = true;
    for (Index i = 0; i < 10; ++i) {
      for (Index j = 0; j < 3001; ++j) equal = equal && out(i, j) == source(60 + i, j);
      for (Index j = 3001; j < stride; ++j) equal = equal && out.data[i * stride + j] == -1.0f;  // gaps stay untouched
    }
    CHECK(equal);
  }
  qd::Matrix<float> rows(2, 3001);
  CHECK(code_of([&] { file.read_rows("w", 69, rows.view()); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { file.read_rows("w", -1, rows.view()); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { file.read_rows("w", std::numeric_limits<Index>::max(), rows.view()); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { file.read_rows("w", 0, rows.view().left_cols(3000)); }) == Errc::shape_mismatch);
  CHECK_FALSE(code_of([&] { file.read_rows("w", 70, rows.view().top_rows(0)); }));
}

TEST_CASE("what is written is read again: every type, shape, name and stride") {
  const test::TemporaryFolder folder;
  const auto matrix = random_matrix(5, 7, 2);
  const std::vector<std::uint8_t> packed{1, 2, 3, 4, 5, 6};
  const std::vector<std::int64_t> integers{-1, std::numeric_limits<std::int64_t>::max()};
  const std::vector<qd::bfloat16> brains(12, qd::bfloat16(1.5f));
  const std::string odd_name = "\"quoted\" \\ \n\t\x01 \xE2\x82\xAC";
  qd::SafetensorsWriter writer;
  writer.add("matrix", matrix.view());
  writer.add("columns", matrix.view().middle_cols(2, 3));
  writer.add("no.rows", qd::MatrixView<const float>(nullptr, 0, 4));
  writer.add("no.cols", qd::MatrixView<const float>(nullptr, 4, 0));
  writer.add("fp4", qd::DType::F4, {3, 4}, bytes_of(packed));
  writer.add(odd_name, qd::DType::I64, {2, 1, 1}, bytes_of(integers));
  writer.add("brain", qd::MatrixView<const qd::bfloat16>(brains.data(), 3, 4));
  writer.add("", qd::DType::U8, {}, bytes_of(packed).first(1));
  writer.metadata("b", "2");
  writer.metadata("format", "pt");
  writer.metadata("b", "\"3\"");
  writer.write(folder / "f");
  writer.write(folder / "g");
  CHECK(test::read_file(folder / "f") == test::read_file(folder / "g"));
  CHECK(folder.count() == 2);

  const qd::SafetensorsFile file(folder / "f");
  CHECK(file.tensors().size() == 8);
  CHECK(file.metadata() == std::map<std::string, std::string, std::less<>>{{"b", "\"3\""}, {"format", "pt"}});
  CHECK(same_bits(file.matrix("matrix"), {matrix.span().begin(), matrix.span().end()}));
  const auto columns = file.matrix("columns");
  REQUIRE(columns.cols() == 3);
  for (Index i = 0; i < 5; ++i) {
    for (Index j = 0; j < 3; ++j) CHECK(columns(i, j) == matrix(i, j + 2));
  }
  CHECK(file.info("no.rows").shape == std::vector<Index>{0, 4});
  CHECK(file.info("no.cols").shape == std::vector<Index>{4, 0});
  CHECK(file.matrix("no.cols").rows() == 4);
  CHECK(file.info("fp4").size() == 6);
  CHECK(text_of(file, "fp4") == "\1\2\3\4\5\6");
  CHECK(test::load<std::int64_t>(file, odd_name) == integers);
  CHECK(file.info(odd_name).shape == std::vector<Index>{2, 1, 1});
  CHECK(file.matrix("brain")(2, 3) == 1.5f);
  CHECK(file.info("").shape.empty());
  for (const auto& tensor : file.tensors()) {  // data starts at a multiple of 8 and wide types come first
    if (qd::bits(tensor.dtype) >= 16) CHECK(tensor.begin % (qd::bits(tensor.dtype) / 8) == 0);
  }
  CHECK(test::read_file(folder / "f").find("{\"__metadata__\":{\"b\":\"\\\"3\\\"\",\"format\":\"pt\"},\"") == 8);
}

TEST_CASE("a file without tensors is a file") {
  const test::TemporaryFolder folder;
  qd::SafetensorsWriter().write(folder / "f");
  CHECK(test::read_file(folder / "f") == std::string("\x08\0\0\0\0\0\0\0{}      ", 16));
  CHECK(qd::SafetensorsFile(folder / "f").tensors().empty());
}

TEST_CASE("files of the reference implementation are written again to the same bytes") {
  const test::TemporaryFolder folder;
  for (const std::string name : {"codes", "linear4bit_nf4_dq", "linear4bit_nf4_dq_bf16", "lora", "nested", "kquants"}) {
    CAPTURE(name);
    const auto path = test::golden(name + ".safetensors");
    const qd::SafetensorsFile file(path);
    std::vector<qd::Buffer<std::byte>> data;
    qd::SafetensorsWriter writer;
    for (const auto& tensor : file.tensors()) {
      data.push_back(file.bytes(tensor.name));
      writer.add(tensor.name, tensor.dtype, tensor.shape, data.back().span());
    }
    for (const auto& [key, value] : file.metadata()) writer.metadata(key, value);
    writer.write(folder / name);
    const std::string expected = test::read_file(path);
    // The reference writes an empty __metadata__ where it was given one.
    if (expected.find("\"__metadata__\":{}") != std::string::npos) {
      CHECK(expected.substr(expected.size() - 1000) ==
            test::read_file(folder / name).substr(test::read_file(folder / name).size() - 1000));
    } else {
      CHECK((expected == test::read_file(folder / name)));
    }
  }
}

TEST_CASE("the writer refuses what no reader would take") {
  const test::TemporaryFolder folder;
  const std::vector<float> data(6);
  qd::SafetensorsWriter writer;
  writer.add("w", qd::DType::F32, {2, 3}, bytes_of(data));
  const auto add = [&](const std::string& name, qd::DType dtype, std::vector<Index> shape) {
    return code_of([&] { writer.add(name, dtype, std::move(shape), bytes_of(data)); });
  };
  CHECK(add("w", qd::DType::F32, {6}) == Errc::duplicate);
  CHECK(add("a", qd::DType::F32, {7}) == Errc::shape_mismatch);
  CHECK(add("a", qd::DType::F64, {6}) == Errc::shape_mismatch);
  CHECK(add("a", qd::DType::F32, {-6}) == Errc::overflow);
  CHECK(add("a", qd::DType::F32, {Index{1} << 62, Index{1} << 62}) == Errc::overflow);
  CHECK(add("a", qd::DType::F4, {3}) == Errc::shape);
  CHECK(add("\xFF", qd::DType::F32, {6}) == Errc::utf8);
  CHECK(add("__metadata__", qd::DType::F32, {6}) == Errc::bad_argument);
  CHECK(code_of([&] { writer.metadata("k", "\xC3"); }) == Errc::utf8);
  CHECK(code_of([&] { writer.metadata("\xC3", "v"); }) == Errc::utf8);
  CHECK(code_of([&] { writer.add("a", qd::MatrixView<const float>(data.data(), 2, 3, 2)); }) == Errc::shape_mismatch);
  writer.write(folder / "f");
  CHECK(qd::SafetensorsFile(folder / "f").tensors().size() == 1);
}

TEST_CASE("a failed write leaves the old file") {
  const test::TemporaryFolder folder;
  test::write_file(folder / "f", "old");
  qd::SafetensorsWriter writer;
  writer.metadata("k", std::string(100'000'001, 'x'));
  CHECK(code_of([&] { writer.write(folder / "f"); }) == Errc::header_size);
  CHECK(test::read_file(folder / "f") == "old");
  CHECK(code_of([&] { qd::SafetensorsWriter().write(folder / "absent" / "f"); }) == Errc::open);
  CHECK(folder.count() == 1);
}

}  // namespace safetensors_test
