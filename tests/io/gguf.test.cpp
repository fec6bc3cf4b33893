#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include <qdylora/io/gguf.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"

namespace gguf_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using test::code_of;
using test::error_of;

namespace {

bool same_bits(const qd::Matrix<float>& matrix, const std::vector<float>& expected) {
  return static_cast<std::size_t>(matrix.size()) == expected.size() &&
         std::memcmp(matrix.data(), expected.data(), expected.size() * sizeof(float)) == 0;
}

}  // namespace

TEST_CASE("every kind of GGUF metadata is read, as the type it has") {
  const qd::GgufFile file(test::golden("tiny.gguf"));
  const qd::GgufMetadata& m = file.metadata();
  CHECK(m.get<std::uint8_t>("t.u8") == 200);
  CHECK(m.get<std::int8_t>("t.i8") == -5);
  CHECK(m.get<std::uint16_t>("t.u16") == 60000);
  CHECK(m.get<std::int16_t>("t.i16") == -300);
  CHECK(m.get<std::uint32_t>("t.u32") == 4000000000u);
  CHECK(m.get<std::int32_t>("t.i32") == -7);
  CHECK(m.get<float>("t.f32") == 0.5f);
  CHECK(m.get<bool>("t.bool"));
  CHECK(m.get<std::string>("t.str") == "h\xC3\xA9llo");
  CHECK(m.get<std::uint64_t>("t.u64") == std::uint64_t{1} << 40);
  CHECK(m.get<std::int64_t>("t.i64") == -(std::int64_t{1} << 40));
  CHECK(m.get<double>("t.f64") == 0.25);
  CHECK(m.array<std::int32_t>("t.arr_i32") == std::vector<std::int32_t>{1, 2, 3});
  CHECK(m.array<std::string>("t.arr_str") == std::vector<std::string>{"a", "bc"});
  CHECK(m.get<std::string>("general.architecture") == "llama");
  CHECK(m.entries().size() == 15);
  CHECK(m.contains("t.u8"));
  CHECK(m.find("t.arr_str")->count == 2u);
  CHECK(m.find("absent") == nullptr);
  CHECK(m.get_or<std::uint32_t>("absent", 9) == 9);
  CHECK(m.get_or<std::uint32_t>("t.u32", 9) == 4000000000u);
  CHECK(m.get_or<std::string>("absent", "x") == "x");

  const auto refused = [&](auto access) {
    const auto error = error_of(access);
    REQUIRE(error);
    CHECK(error->code() == Errc::bad_config);
    CHECK(error->file() == file.name());
  };
  refused([&] { m.get<std::uint32_t>("absent"); });
  refused([&] { m.get<std::int32_t>("t.u32"); });
  refused([&] { m.get<std::uint32_t>("t.u8"); });
  refused([&] { m.get_or<std::uint32_t>("t.str", 0); });
  refused([&] { m.get<std::string>("t.u8"); });
  refused([&] { m.get<std::int32_t>("t.arr_i32"); });
  refused([&] { m.array<std::uint32_t>("t.arr_i32"); });
  refused([&] { m.array<float>("t.arr_i32"); });
  refused([&] { m.array<std::string>("t.arr_i32"); });
  refused([&] { m.array<std::int32_t>("t.arr_str"); });
  refused([&] { m.array<std::int32_t>("t.i32"); });
  refused([&] { m.array<std::string>("t.str"); });
}

TEST_CASE("tensors of a GGUF file are decoded to the very values of the reference") {
  const qd::GgufFile file(test::golden("tiny.gguf"));
  const qd::SafetensorsFile expected(test::golden("tiny_gguf_expected.safetensors"));
  REQUIRE(file.tensors().size() == 6);
  for (const qd::GgufTensor& tensor : file.tensors()) {
    CAPTURE(tensor.name);
    CHECK(tensor.shape == std::vector<Index>{4, 64});
    const auto values = test::load<float>(expected, tensor.name.substr(2));  // "t.q4_0" there is "q4_0" here
    const auto matrix = file.matrix(tensor.name);
    CHECK(matrix.rows() == 4);
    CHECK(matrix.cols() == 64);
    CHECK(same_bits(matrix, values));

    std::vector<float> room(2 * 70, -1.0f);
    const qd::MatrixView<float> rows(room.data(), 2, 64, 70);
    file.read_rows(tensor.name, 1, rows);
    CHECK(std::memcmp(rows.row(0), values.data() + 64, 64 * sizeof(float)) == 0);
    CHECK(std::memcmp(rows.row(1), values.data() + 128, 64 * sizeof(float)) == 0);
    CHECK(rows.row(0)[64] == -1.0f);

    qd::Buffer<std::byte> raw(static_cast<Index>(tensor.size));
    file.read(tensor.name, raw.span());
    std::vector<float> decoded(256);
    qd::dequantize(*tensor.type, raw.span(), decoded);
    CHECK(decoded == values);
    CHECK(code_of([&] { file.read(tensor.name, raw.span().first(1)); }) == Errc::shape_mismatch);
    CHECK(code_of([&] { file.read_rows(tensor.name, 3, rows); }) == Errc::shape_mismatch);
  }
  CHECK(file.info("t.q4_0").type->name == "Q4_0");
  CHECK(file.contains("t.f32"));
  const auto missing = error_of([&] { file.info("t.absent"); });
  REQUIRE(missing);
  CHECK(missing->code() == Errc::missing_tensor);
  CHECK(missing->tensor() == "t.absent");
}

TEST_CASE("random blocks are decoded to the very values of the reference") {
  const qd::SafetensorsFile golden(test::golden("kquants.safetensors"));
  for (const std::uint32_t id : {2u, 3u, 8u, 12u, 14u}) {
    const qd::GgmlType& type = qd::ggml_type(id);
    CAPTURE(std::string(type.name));
    const auto raw = test::load<std::uint8_t>(golden, std::string(type.name) + "/raw");
    const auto expected = test::load<float>(golden, std::string(type.name) + "/expected");
    std::vector<float> decoded(expected.size());
    qd::dequantize(type, std::as_bytes(std::span(raw)), decoded);
    CHECK(decoded == expected);  // -0 == 0: the reference keeps no sign where a code is an unsigned zero
  }
}

TEST_CASE("types are found by their number, and what is not known is not guessed") {
  for (const auto& type : qd::detail::ggml_types) CHECK(&qd::ggml_type(type.id) == &type);
  for (const std::uint32_t id : {4u, 5u, 9u, 15u, 31u, 33u, 36u, 99u, 0xFFFFFFFFu}) {
    CHECK(code_of([&] { qd::ggml_type(id); }) == Errc::unsupported);
  }
  CHECK_FALSE(qd::ggml_type(13).decodable());
  std::vector<std::byte> bytes(176);
  std::vector<float> values(256);
  CHECK(code_of([&] { qd::dequantize(qd::ggml_type(13), bytes, values); }) == Errc::unsupported);
  CHECK(code_of([&] { qd::dequantize(qd::ggml_type(12), bytes, values); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { qd::dequantize(qd::ggml_type(12), std::span(bytes).first(144), std::span(values).first(255)); }) ==
        Errc::shape_mismatch);
  CHECK_FALSE(code_of([&] { qd::dequantize(qd::ggml_type(12), std::span(bytes).first(144), values); }));
}

TEST_CASE("an alignment other than 32, vectors, scalars, empty tensors and undecodable types are read") {
  const test::TemporaryFolder folder;
  test::Bytes bytes;
  bytes.raw("GGUF").u32(3).u64(5).u64(2);
  bytes.text("general.alignment").u32(4).u32(64);
  bytes.text("none").u32(9).u32(8).u64(0);  // an empty array of strings
  bytes.text("vector").u32(1).u64(3).u32(0).u64(0);
  bytes.text("empty").u32(2).u64(32).u64(0).u32(2).u64(64);
  bytes.text("scalar").u32(0).u32(0).u64(64);
  bytes.text("q5").u32(2).u64(32).u64(2).u32(6).u64(128);
  bytes.text("cube").u32(3).u64(1).u64(2).u64(2).u32(24).u64(192);
  bytes.pad(64).number(1.0f).number(2.0f).number(-3.0f).pad(64).number(7.0f).pad(64).append(44, '\x11');
  bytes.pad(64).raw("abcd");  // the last tensor is not padded
  test::write_file(folder / "f", bytes);

  const qd::GgufFile file(folder / "f");
  CHECK(file.metadata().array<std::string>("none").empty());
  CHECK(same_bits(file.matrix("vector"), {1.0f, 2.0f, -3.0f}));
  CHECK(file.matrix("empty").rows() == 0);
  CHECK(file.matrix("empty").cols() == 32);
  CHECK(file.info("scalar").shape.empty());
  CHECK(code_of([&] { file.matrix("scalar"); }) == Errc::shape);
  CHECK(code_of([&] { file.matrix("q5"); }) == Errc::unsupported);
  CHECK(file.info("q5").size == 44);
  CHECK(file.info("cube").shape == std::vector<Index>{2, 2, 1});
  CHECK(code_of([&] { file.matrix("cube"); }) == Errc::shape);
  std::string cube(4, '?');
  file.read("cube", std::as_writable_bytes(std::span(cube)));
  CHECK(cube == "abcd");
}

TEST_CASE("a long array of strings and a version 2 file are read") {
  const test::TemporaryFolder folder;
  test::Bytes bytes;
  bytes.raw("GGUF").u32(2).u64(0).u64(1).text("tokens").u32(9).u32(8).u64(30'000);
  std::vector<std::string> tokens;
  for (int i = 0; i < 30'000; ++i) {
    tokens.push_back("token " + std::to_string(i));
    bytes.text(tokens.back());
  }
  test::write_file(folder / "f", bytes);
  CHECK(qd::GgufFile(folder / "f").metadata().array<std::string>("tokens") == tokens);
}

}  // namespace gguf_test
