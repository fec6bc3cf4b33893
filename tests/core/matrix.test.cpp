#include <qdylora/core/matrix.hpp>

#include <cstdint>
#include <new>
#include <type_traits>

#include "support/catch.hpp"
#include "support/files.hpp"

namespace matrix_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;

namespace {

// Ordinary memory that counts its blocks, and fails at will.
struct CountingMemory {
  static constexpr bool host = true;
  static inline int live = 0;
  static inline int total = 0;
  static inline bool fail = false;
  static inline bool sizes_agree = true;

  static void* allocate(std::size_t bytes) {
    if (fail) throw std::bad_alloc();
    ++live;
    ++total;
    auto* block = static_cast<std::byte*>(::operator new(bytes + 64, std::align_val_t{64}));
    *reinterpret_cast<std::size_t*>(block) = bytes;
    return block + 64;
  }
  static void deallocate(void* pointer, std::size_t bytes) noexcept {
    --live;
    auto* block = static_cast<std::byte*>(pointer) - 64;
    sizes_agree = sizes_agree && *reinterpret_cast<std::size_t*>(block) == bytes;
    ::operator delete(block, std::align_val_t{64});
  }
};
static_assert(qd::MemoryResource<CountingMemory>);

}  // namespace

static_assert(std::is_trivially_copyable_v<qd::MatrixView<float>> && std::is_trivially_copyable_v<qd::MatrixView<const float>>);
static_assert(std::is_copy_constructible_v<qd::MatrixView<float>> && std::is_copy_assignable_v<qd::MatrixView<float>>);
static_assert(std::is_convertible_v<qd::MatrixView<float>, qd::MatrixView<const float>>);
static_assert(!std::is_convertible_v<qd::MatrixView<const float>, qd::MatrixView<float>>);
static_assert(!std::is_convertible_v<qd::MatrixView<float>, qd::MatrixView<const double>>);
static_assert(!std::is_copy_constructible_v<qd::Matrix<float>> && std::is_nothrow_move_constructible_v<qd::Matrix<float>>);
static_assert(!std::is_copy_constructible_v<qd::Buffer<float>> && std::is_nothrow_move_assignable_v<qd::Buffer<float>>);

TEST_CASE("a view indexes row-major with its stride") {
  int data[12];
  for (int i = 0; i < 12; ++i) data[i] = i;
  const qd::MatrixView view(data, 3, 2, 4);
  CHECK(view(0, 1) == 1);
  CHECK(view(2, 0) == 8);
  CHECK(view.row(1) == data + 4);
  CHECK(view.size() == 6);
  CHECK_FALSE(view.contiguous());
  CHECK(qd::MatrixView(data, 3, 4).contiguous());
  CHECK(qd::MatrixView(data, 1, 2, 4).contiguous());
  CHECK(qd::MatrixView(data, 0, 2, 4).contiguous());
}

TEST_CASE("parts of a view are views of the same elements") {
  int data[20];
  for (int i = 0; i < 20; ++i) data[i] = i;
  const qd::MatrixView view(data, 4, 5);
  const auto part = view.middle_rows(1, 2).middle_cols(2, 3);
  CHECK(part.rows == 2);
  CHECK(part.cols == 3);
  CHECK(part.stride == 5);
  CHECK(part(0, 0) == 7);
  CHECK(part(1, 2) == 14);
  CHECK(view.top_rows(1).rows == 1);
  CHECK(view.top_rows(0).empty());
  CHECK(view.left_cols(2)(3, 1) == 16);
  part(0, 0) = 99;
  CHECK(data[7] == 99);
  const qd::MatrixView<const int> read_only = part;
  CHECK(read_only(0, 0) == 99);
  CHECK(read_only.stride == 5);
}

TEST_CASE("an empty view has no rows or no columns") {
  CHECK(qd::MatrixView<float>().empty());
  CHECK(qd::MatrixView<float>(nullptr, 3, 0).empty());
  CHECK(qd::MatrixView<float>(nullptr, 0, 3).empty());
  CHECK_FALSE(qd::MatrixView<float>(nullptr, 1, 1).empty());
}

TEST_CASE("expect_shape names the tensor and both shapes") {
  float data[6];
  const qd::MatrixView view(data, 2, 3);
  qd::expect_shape("x", view, 2, 3);
  const auto error = test::error_of([&] { qd::expect_shape("grad", view, 3, 2); });
  REQUIRE(error);
  CHECK(error->code() == Errc::shape_mismatch);
  CHECK(std::string(error->what()).find("grad") != std::string::npos);
  CHECK(std::string(error->what()).find("[3, 2]") != std::string::npos);
  CHECK(std::string(error->what()).find("[2, 3]") != std::string::npos);
  CHECK(qd::shape_text(view) == "[2, 3]");
}

TEST_CASE("expect_shape rejects rows that overlap") {
  float data[6];
  CHECK(test::code_of([&] { qd::expect_shape("x", qd::MatrixView(data, 2, 3, 2), 2, 3); }) == Errc::shape_mismatch);
  qd::expect_shape("x", qd::MatrixView(data, 1, 3, 0), 1, 3);  // one row has no stride
}

TEST_CASE("a matrix starts at zero, and its views read and write it") {
  qd::Matrix<float> a(3, 4);
  CHECK(a.rows() == 3);
  CHECK(a.cols() == 4);
  CHECK(a.size() == 12);
  for (const float x : a.span()) CHECK(x == 0.0f);
  a(2, 3) = 5.0f;
  CHECK(a.view()(2, 3) == 5.0f);
  CHECK(a.data()[11] == 5.0f);
  a.view()(0, 1) = 6.0f;
  CHECK(std::as_const(a)(0, 1) == 6.0f);
  qd::MatrixView<const float> read_only = a;
  CHECK(read_only(0, 1) == 6.0f);
}

TEST_CASE("a matrix is aligned to 64 bytes, a large one to a huge page") {
  CHECK(reinterpret_cast<std::uintptr_t>(qd::Matrix<float>(1, 1).data()) % 64 == 0);
  const qd::Matrix<float> large(1024, 1025);
  CHECK(reinterpret_cast<std::uintptr_t>(large.data()) % (1u << 21) == 0);
}

TEST_CASE("moving a matrix moves its elements and leaves nothing behind") {
  qd::Matrix<float> a(2, 2);
  a(1, 1) = 7.0f;
  const float* data = a.data();
  qd::Matrix<float> b(std::move(a));
  CHECK(b.data() == data);
  CHECK(b(1, 1) == 7.0f);
  qd::Matrix<float> c(5, 5);
  c = std::move(b);
  CHECK(c.data() == data);
  CHECK(c.rows() == 2);
}

TEST_CASE("a moved-from matrix is empty") {
  qd::Matrix<float> a(2, 2);
  const qd::Matrix<float> b(std::move(a));
  CHECK(a.data() == nullptr);  // NOLINT: the state after the move is the subject
  CHECK(a.size() == 0);
  CHECK(a.view().empty());
}

TEST_CASE("resize keeps storage that is large enough, and the shape is always the new one") {
  CountingMemory::total = 0;
  {
    qd::Matrix<float, CountingMemory> a(4, 4);
    CHECK(CountingMemory::total == 1);
    const float* data = a.data();
    a.resize(2, 8);
    a.resize(1, 3);
    CHECK(a.data() == data);
    CHECK(a.size() == 3);
    CHECK(a.capacity_bytes() == 64);
    CHECK(CountingMemory::total == 1);
    a.resize(5, 5);
    CHECK(CountingMemory::total == 2);
    CHECK(CountingMemory::live == 1);
    a.resize(0, 7);
    CHECK(a.cols() == 7);
    CHECK(a.view().empty());
  }
  CHECK(CountingMemory::live == 0);
  CHECK(CountingMemory::sizes_agree);
}

TEST_CASE("a resize that runs out of memory leaves a matrix that can be used and freed") {
  qd::Matrix<float, CountingMemory> a(2, 2);
  CountingMemory::fail = true;
  CHECK_THROWS_AS(a.resize(10, 10), std::bad_alloc);
  CountingMemory::fail = false;
  // What is left must not claim elements that it does not have.
  CHECK(static_cast<std::size_t>(a.size()) * sizeof(float) <= a.capacity_bytes());
  a.resize(3, 3);
  a(2, 2) = 1.0f;
  CHECK(a(2, 2) == 1.0f);
}

TEST_CASE("shapes that are none are errors, before any memory is asked for") {
  constexpr Index huge = Index{1} << 62;
  CHECK(test::code_of([] { qd::Matrix<float>(-1, 2); }) == Errc::bad_argument);
  CHECK(test::code_of([] { qd::Matrix<float>(2, -1); }) == Errc::bad_argument);
  CHECK(test::code_of([] { qd::Matrix<float>(huge, 2); }) == Errc::bad_argument);   // rows * cols
  CHECK(test::code_of([] { qd::Matrix<float>(huge, 1); }) == Errc::bad_argument);   // bytes
  CHECK(test::code_of([] { qd::Buffer<double>(-1); }) == Errc::bad_argument);
  CHECK(test::code_of([] { qd::Buffer<double> none(huge); }) == Errc::bad_argument);
}

TEST_CASE("an empty matrix allocates nothing") {
  CountingMemory::total = 0;
  const qd::Matrix<float, CountingMemory> a(0, 5), b(5, 0);
  const qd::Buffer<int, CountingMemory> c(0);
  CHECK(CountingMemory::total == 0);
  CHECK(b.rows() == 5);
  CHECK(c.size() == 0);
  CHECK(c.bytes() == 0);
  CHECK(c.span().empty());
}

TEST_CASE("a buffer frees its block once, with its own size, when assigned over and at the end") {
  CountingMemory::live = 0;
  {
    qd::Buffer<int, CountingMemory> a(3), b(5);
    a[2] = 42;
    CHECK(a.bytes() == 12);
    CHECK(CountingMemory::live == 2);
    b = std::move(a);
    CHECK(CountingMemory::live == 1);
    CHECK(b.size() == 3);
    CHECK(b[2] == 42);
    qd::Buffer<int, CountingMemory>& alias = b;
    b = std::move(alias);
    CHECK(b.size() == 3);
  }
  CHECK(CountingMemory::live == 0);
  CHECK(CountingMemory::sizes_agree);
}

TEST_CASE("copy honours both strides and clone gathers") {
  float source[6] = {1, 2, -1, 3, 4, -1};
  float target[8] = {9, 9, 9, 9, 9, 9, 9, 9};
  qd::copy(qd::MatrixView<const float>(source, 2, 2, 3), qd::MatrixView(target, 2, 2, 4));
  CHECK(target[0] == 1.0f);
  CHECK(target[1] == 2.0f);
  CHECK(target[2] == 9.0f);
  CHECK(target[4] == 3.0f);
  CHECK(target[5] == 4.0f);
  CHECK(target[6] == 9.0f);
  const auto gathered = qd::clone(qd::MatrixView(source, 2, 2, 3));
  CHECK(gathered.rows() == 2);
  CHECK(gathered(1, 0) == 3.0f);
  CHECK(gathered.view().contiguous());
  CHECK(test::code_of([&] { qd::copy(qd::MatrixView<const float>(source, 2, 3), qd::MatrixView(target, 3, 2)); }) ==
        Errc::shape_mismatch);
}

}  // namespace matrix_test
