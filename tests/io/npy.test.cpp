// .npy files: what NumPy has documented of them, and files that lie. tests/io/python.test.cpp has NumPy itself read and write them.
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include <qdylora/io/npy.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"

namespace npy_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;

namespace {

/// A file with this header, of version 1.0 unless said otherwise, and `data` bytes of elements.
std::string npy(const std::string& header, std::size_t data, std::string_view magic = std::string_view("\x93NUMPY\x01\x00", 8)) {
  std::string bytes(magic);
  bytes += static_cast<char>(header.size() % 256);
  bytes += static_cast<char>(header.size() / 256);
  return bytes + header + std::string(data, '\0');
}

std::string with(const std::string& descr, const std::string& order, const std::string& shape) {
  return "{'descr': " + descr + ", 'fortran_order': " + order + ", 'shape': " + shape + ", }\n";
}

Errc error_of(const std::string& bytes) {
  const test::TemporaryFolder folder;
  test::write_file(folder / "a.npy", bytes);
  try {
    const qd::NpyFile file(folder / "a.npy");
    (void)file.bytes();
  } catch (const qd::Error& error) {
    CHECK(error.file() == (folder / "a.npy").string());
    return error.code();
  }
  FAIL("no error for " << qd::printable(bytes));
  return {};
}

}  // namespace

TEST_CASE("a matrix is written as the format says, to the byte", "[npy]") {
  const test::TemporaryFolder folder;
  qd::Matrix<float> m(2, 3);
  for (Index i = 0; i < m.size(); ++i) m.data()[i] = static_cast<float>(i) - 2.5f;
  qd::write_npy<float>(folder / "m.npy", m.view());
  const std::string bytes = test::read_file(folder / "m.npy");
  const std::string dict = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }";
  REQUIRE(bytes.size() == 128 + 24);
  CHECK(bytes.substr(0, 10) == std::string("\x93NUMPY\x01\x00\x76\x00", 10));
  CHECK(bytes.substr(10, dict.size()) == dict);
  CHECK(bytes.substr(10 + dict.size(), 117 - dict.size()) == std::string(117 - dict.size(), ' '));
  CHECK(bytes[127] == '\n');
  CHECK(std::memcmp(bytes.data() + 128, m.data(), 24) == 0);
}

TEST_CASE("every type comes back, and so do rows with gaps between them", "[npy]") {
  const test::TemporaryFolder folder;
  const auto path = folder / "a.npy";
  std::array<std::byte, 48> bytes{};
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 7);
  for (const auto& [type, size] : {std::pair{qd::DType::F16, 2},
                                   {qd::DType::F32, 4},
                                   {qd::DType::F64, 8},
                                   {qd::DType::I32, 4},
                                   {qd::DType::I64, 8},
                                   {qd::DType::U8, 1}}) {
    for (const std::vector<Index>& shape : {std::vector<Index>{}, {48 / size}, {2, 3, 0}, {2, 24 / size}, {1, 1, 48 / size, 1}}) {
      Index count = 1;
      for (const Index n : shape) count *= n;
      const auto data = std::span<const std::byte>(bytes).first(static_cast<std::size_t>(count * size));
      qd::write_npy(path, type, shape, data);
      const qd::NpyFile file(path);
      CHECK(file.dtype() == type);
      CHECK(file.shape() == shape);
      const auto back = file.bytes();
      CHECK(std::equal(data.begin(), data.end(), back.span().begin(), back.span().end()));
      CHECK(test::read_file(path).size() % 64 == static_cast<std::size_t>(count * size) % 64);
    }
  }
  qd::Matrix<double> wide(3, 5);
  for (Index i = 0; i < wide.size(); ++i) wide.data()[i] = static_cast<double>(i);
  qd::write_npy<double>(path, wide.view().left_cols(2));
  const auto read = qd::NpyFile(path).matrix();
  REQUIRE(read.rows() == 3);
  REQUIRE(read.cols() == 2);
  for (Index i = 0; i < 3; ++i)
    for (Index j = 0; j < 2; ++j) CHECK(read(i, j) == static_cast<float>(5 * i + j));
}

TEST_CASE("what NumPy's files cannot hold is refused, and leaves the old file", "[npy]") {
  const test::TemporaryFolder folder;
  const auto path = folder / "a.npy";
  test::write_file(path, "old");
  const qd::Matrix<qd::bfloat16> m(2, 2);
  const auto code = [&](auto&& f) {
    try {
      f();
    } catch (const qd::Error& error) {
      return error.code();
    }
    return Errc::open;
  };
  CHECK(code([&] { qd::write_npy<qd::bfloat16>(path, m.view()); }) == Errc::dtype);
  const std::array<std::byte, 8> bytes{};
  const std::vector<Index> three{3}, negative{-1}, huge{std::numeric_limits<Index>::max(), 16};
  CHECK(code([&] { qd::write_npy(path, qd::DType::F32, three, bytes); }) == Errc::shape_mismatch);
  CHECK(code([&] { qd::write_npy(path, qd::DType::F32, negative, bytes); }) == Errc::overflow);
  CHECK(code([&] { qd::write_npy(path, qd::DType::F32, huge, bytes); }) == Errc::overflow);
  CHECK(code([&] { qd::write_npy(path, qd::DType::U8, std::vector<Index>(60000, 1), std::span(bytes).first(1)); }) == Errc::header_size);
  CHECK(test::read_file(path) == "old");
  CHECK(folder.count() == 1);
  qd::write_npy(path, qd::DType::I32, std::vector<Index>{2}, bytes);
  CHECK(code([&] { (void)qd::NpyFile(path).matrix(); }) == Errc::dtype);
  qd::write_npy(path, qd::DType::F32, std::vector<Index>{1, 1, 2}, bytes);
  CHECK(code([&] { (void)qd::NpyFile(path).matrix(); }) == Errc::shape);
}

TEST_CASE("headers are read as Python writes them, in any order and spacing", "[npy]") {
  const test::TemporaryFolder folder;
  for (const std::string header :
       {"{'shape':(2,3),'descr':'<f4','fortran_order':False}", "{ \"descr\" : \"<f4\" , 'shape': ( 2 , 3, ), 'fortran_order': False }  \n",
        "\n{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }   \n\n"}) {
    test::write_file(folder / "a.npy", npy(header, 24));
    CHECK(qd::NpyFile(folder / "a.npy").shape() == std::vector<Index>{2, 3});
  }
}

TEST_CASE("a damaged .npy file is a typed error", "[npy]") {
  CHECK(error_of("") == Errc::truncated);
  CHECK(error_of("\x93NUMPY") == Errc::truncated);
  CHECK(error_of(npy(with("'<f4'", "False", "(1,)"), 4, "\x93NUMPX\x01\x01")) == Errc::magic);
  CHECK(error_of(npy(with("'<f4'", "False", "(1,)"), 4, std::string_view("\x93NUMPY\x02\x00", 8))) == Errc::version);
  CHECK(error_of(npy(with("'<f4'", "False", "(1,)"), 4, std::string_view("\x93NUMPY\x01\x01", 8))) == Errc::version);
  CHECK(error_of(npy(with("'<f4'", "False", "(2,)"), 4)) == Errc::truncated);
  CHECK(error_of(npy(with("'<f4'", "False", "(1,)"), 5)) == Errc::trailing);
  CHECK(error_of(npy(with("'<f4'", "False", "(0, 7)"), 1)) == Errc::trailing);
  CHECK(error_of(npy(with("'<f4'", "False", "(1,)"), 4).substr(0, 30)) == Errc::truncated);
  CHECK(error_of(npy(with("'>f4'", "False", "(1,)"), 4)) == Errc::dtype);
  CHECK(error_of(npy(with("'<V2'", "False", "(1,)"), 2)) == Errc::dtype);
  CHECK(error_of(npy(with("'|O'", "False", "(1,)"), 8)) == Errc::dtype);
  CHECK(error_of(npy(with("[('a', '<f4')]", "False", "(1,)"), 4)) == Errc::unsupported);
  CHECK(error_of(npy(with("'<f4'", "True", "(2, 2)"), 16)) == Errc::unsupported);
  CHECK(error_of(npy(with("'<f4'", "None", "(2, 2)"), 16)) == Errc::bad_config);
  CHECK(error_of(npy(with("'<f4'", "False", "(4)"), 16)) == Errc::bad_config);
  CHECK(error_of(npy(with("'<f4'", "False", "(-4,)"), 16)) == Errc::shape);
  CHECK(error_of(npy(with("'<f4'", "False", "(4.0,)"), 16)) == Errc::bad_config);
  CHECK(error_of(npy(with("'<f4'", "False", "(4L,)"), 16)) == Errc::bad_config);
  CHECK(error_of(npy(with("'<f4'", "False", "(,)"), 4)) == Errc::shape);
  CHECK(error_of(npy(with("'<f4'", "False", "(99999999999999999999,)"), 4)) == Errc::overflow);
  CHECK(error_of(npy(with("'<f4'", "False", "(9223372036854775807, 9223372036854775807)"), 4)) == Errc::overflow);
  CHECK(error_of(npy(with("'<f4'", "False", "(4611686018427387904, 4)"), 0)) == Errc::overflow);
  CHECK(error_of(npy(with("'|u1'", "False", "(1, 1, 1, 1, 1, 1, 1, 1, 1)"), 1)) == Errc::limit);
  CHECK(error_of(npy("{'descr': '<f4', 'fortran_order': False}", 4)) == Errc::bad_config);
  CHECK(error_of(npy("{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': ()}", 4)) == Errc::duplicate);
  CHECK(error_of(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (), 'more': 1}", 4)) == Errc::bad_config);
  CHECK(error_of(npy(with("'<f4'", "False", "()") + "x", 4)) == Errc::trailing);
  CHECK(error_of(npy("", 4)) == Errc::bad_config);
  // Every beginning of a good file, and every byte of its header replaced: an error or the same array.
  const std::string good = npy(with("'<i8'", "False", "(2, 1)"), 16);
  for (std::size_t size = 0; size < good.size(); ++size) CHECK_NOTHROW(error_of(good.substr(0, size)));
  const test::TemporaryFolder folder;
  for (std::size_t at = 0; at < good.size() - 16; ++at)
    for (const char c : {'\0', '\'', '(', ',', '9', '}', '\xFF'}) {
      std::string bytes = good;
      bytes[at] = c;
      test::write_file(folder / "a.npy", bytes);
      try {
        const qd::NpyFile file(folder / "a.npy");
        CHECK(file.bytes().span().size() == 16);
      } catch (const qd::Error&) {
      }
    }
}

}  // namespace npy_test
