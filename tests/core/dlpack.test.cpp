#include <qdylora/core/dlpack.hpp>

#include <cstddef>
#include <vector>

#if __has_include(<dlpack/dlpack.h>)
#include <dlpack/dlpack.h>
#endif

#include "support/catch.hpp"
#include "support/files.hpp"

namespace dlpack_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;

namespace {

// What the library reads of dlpack.h, in its layout.
struct Tensor {
  void* data;
  struct {
    std::int32_t device_type, device_id;
  } device;
  std::int32_t ndim;
  struct {
    std::uint8_t code, bits;
    std::uint16_t lanes;
  } dtype;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};
struct Managed {
  Tensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(Managed*);
};
struct Versioned {
  struct {
    std::uint32_t major, minor;
  } version;
  void* manager_ctx;
  void (*deleter)(Versioned*);
  std::uint64_t flags;
  Tensor dl_tensor;
};
struct DeviceMemory : qd::HostMemory {
  static constexpr bool host = false;
};

// A tensor with its shape and strides: float32 on the CPU unless changed.
struct TestTensor {
  std::vector<std::int64_t> shape, strides;
  Tensor tensor;

  TestTensor(float* data, std::vector<std::int64_t> shape_, std::vector<std::int64_t> strides_)
      : shape(std::move(shape_)),
        strides(std::move(strides_)),
        tensor{data, {1, 0}, static_cast<std::int32_t>(shape.size()), {2, 32, 1}, shape.data(), strides.data(), 0} {
    if (strides.empty()) tensor.strides = nullptr;
  }
  TestTensor(const TestTensor&) = delete;
  TestTensor& operator=(const TestTensor&) = delete;
};

bool views(qd::MatrixView<const float> view, const float* data, Index rows, Index cols, Index stride) {
  return view.data == data && view.rows == rows && view.cols == cols && view.stride == stride;
}

}  // namespace

static_assert(qd::DLPackTensor<Tensor> && qd::DLPackManaged<Managed> && qd::DLPackManaged<Versioned> && !qd::DLPackTensor<Managed>);

#if __has_include(<dlpack/dlpack.h>)
static_assert(sizeof(DLTensor) == sizeof(Tensor) && offsetof(DLTensor, dtype) == offsetof(Tensor, dtype) &&
              offsetof(DLTensor, byte_offset) == offsetof(Tensor, byte_offset) && sizeof(DLManagedTensor) == sizeof(Managed));

TEST_CASE("the tensors of dlpack.h are these") {
  float data[12] = {};
  const auto exported = qd::to_dlpack<DLManagedTensor>(qd::MatrixView(data, 3, 2, 4));
  CHECK(exported->dl_tensor.device.device_type == kDLCPU);
  CHECK(exported->dl_tensor.dtype.code == kDLFloat);
  CHECK(views(qd::from_dlpack<float>(exported->dl_tensor), data, 3, 2, 4));
  data[0] = 0.0f;
  qd::bfloat16 shorts[4] = {};
  CHECK(qd::to_dlpack<DLManagedTensor>(qd::MatrixView(shorts, 2, 2))->dl_tensor.dtype.code == kDLBfloat);
}
#endif

TEST_CASE("a DLPack tensor is a view of its own elements, rows of any stride") {
  float data[64] = {};
  TestTensor t(data, {3, 4}, {6, 1});
  CHECK(views(qd::from_dlpack<float>(t.tensor), data, 3, 4, 6));
  t.tensor.byte_offset = 8;
  const auto view = qd::from_dlpack<float>(t.tensor);
  view(2, 1) = 7.0f;
  CHECK(data[2 + 2 * 6 + 1] == 7.0f);
  CHECK(views(qd::from_dlpack<const float>(t.tensor), data + 2, 3, 4, 6));
}

TEST_CASE("dimensions before a DLPack tensor's last are flattened") {
  float data[64] = {};
  CHECK(views(qd::from_dlpack<float>(TestTensor(data, {2, 3, 4}, {12, 4, 1}).tensor), data, 6, 4, 4));
  CHECK(views(qd::from_dlpack<float>(TestTensor(data, {2, 3, 4}, {}).tensor), data, 6, 4, 4));
  CHECK(views(qd::from_dlpack<float>(TestTensor(data, {2, 3, 4}, {27, 9, 1}).tensor), data, 6, 4, 9));
  CHECK(views(qd::from_dlpack<float>(TestTensor(data, {4}, {1}).tensor), data, 1, 4, 4));
  // What is one long has no stride.
  CHECK(views(qd::from_dlpack<float>(TestTensor(data, {1, 4}, {0, 1}).tensor), data, 1, 4, 4));
  CHECK(views(qd::from_dlpack<float>(TestTensor(data, {1, 2, 1, 3, 1, 4}, {-1, 15, 99, 5, 0, 1}).tensor), data, 6, 4, 5));
  CHECK(views(qd::from_dlpack<float>(TestTensor(data, {5, 1}, {3, 7}).tensor), data, 5, 1, 3));
}

TEST_CASE("an empty DLPack tensor is an empty view of its shape") {
  for (const std::vector<std::int64_t>& shape : {std::vector<std::int64_t>{0, 4}, {3, 0}, {2, 0, 4}}) {
    TestTensor t(nullptr, shape, std::vector<std::int64_t>(shape.size(), 9));
    const auto view = qd::from_dlpack<float>(t.tensor);
    CHECK(view.rows * view.cols == 0);
    CHECK(view.cols == shape.back());
  }
}

TEST_CASE("a DLPack tensor of another type, place or layout is an error that says what was expected and found") {
  alignas(16) float data[64] = {};
  const auto refused = [&](Errc code, const std::string& words, std::vector<std::int64_t> shape, std::vector<std::int64_t> strides,
                           auto&& change) {
    TestTensor t(data, std::move(shape), std::move(strides));
    change(t.tensor);
    const auto error = test::error_of([&] { qd::from_dlpack<float>(t.tensor, "x"); });
    REQUIRE(error);
    INFO(error->what());
    CHECK(error->code() == code);
    CHECK(std::string(error->what()).substr(0, 3) == "x: ");
    CHECK(std::string(error->what()).find(words) != std::string::npos);
  };
  const auto same = [](Tensor&) {};
  refused(Errc::dtype, "expected float32, found float64", {2, 3}, {3, 1}, [](Tensor& t) { t.dtype.bits = 64; });
  refused(Errc::dtype, "found int32", {2, 3}, {3, 1}, [](Tensor& t) { t.dtype.code = 0; });
  refused(Errc::dtype, "found float32x4", {2, 3}, {3, 1}, [](Tensor& t) { t.dtype.lanes = 4; });
  refused(Errc::dtype, "type 10", {2, 3}, {3, 1}, [](Tensor& t) { t.dtype = {10, 8, 1}; });
  refused(Errc::device, "expected memory of the host, found DLPack's device type 2", {2, 3}, {3, 1},
          [](Tensor& t) { t.device.device_type = 2; });
  refused(Errc::shape, "no dimensions", {}, {}, same);
  refused(Errc::alignment, "multiple of 4", {2, 3}, {3, 1}, [](Tensor& t) { t.byte_offset = 2; });
  refused(Errc::bad_argument, "[2, 3]", {2, 3}, {3, 1}, [](Tensor& t) { t.data = nullptr; });
  refused(Errc::unsupported, "2 elements apart", {2, 3}, {6, 2}, same);      // x[:, ::2]
  refused(Errc::unsupported, "2 elements apart", {2, 3}, {1, 2}, same);      // x.t()
  refused(Errc::unsupported, "2 elements apart", {3}, {2}, same);            // x[::2]
  refused(Errc::unsupported, "overlap", {2, 3}, {0, 1}, same);               // x.expand(2, 3)
  refused(Errc::unsupported, "overlap", {2, 3}, {-3, 1}, same);              // x.flip(0) where that is a view
  refused(Errc::unsupported, "dimension 0", {2, 3, 4}, {4, 8, 1}, same);     // x.transpose(0, 1)
  refused(Errc::unsupported, "dimension 0", {2, 3, 4}, {24, 4, 1}, same);    // x[:, :3]
}

TEST_CASE("a view's memory decides which devices' tensors it takes") {
  float data[6] = {};
  TestTensor t(data, {2, 3}, {3, 1});
  for (int type = 1; type <= 18; ++type) {
    t.tensor.device.device_type = type;
    const bool host = type == 1 || type == 3 || type == 11 || type == 13;
    const bool device = type == 2 || type == 13;
    CHECK(test::code_of([&] { qd::from_dlpack<float>(t.tensor); }) == (host ? std::nullopt : std::optional(Errc::device)));
    CHECK(test::code_of([&] { qd::from_dlpack<float, DeviceMemory>(t.tensor); }) == (device ? std::nullopt : std::optional(Errc::device)));
  }
  CHECK(qd::to_dlpack<Managed, DeviceMemory>(qd::MatrixView(data, 2, 3), nullptr, 1)->dl_tensor.device.device_type == 2);
  CHECK(qd::to_dlpack<Managed, DeviceMemory>(qd::MatrixView(data, 2, 3), nullptr, 1)->dl_tensor.device.device_id == 1);
}

TEMPLATE_TEST_CASE("a view goes out as a DLPack tensor and comes back", "", float, double, qd::bfloat16, qd::half) {
  TestType data[12] = {};
  const auto exported = qd::to_dlpack<Versioned>(qd::MatrixView(data, 3, 2, 4));
  CHECK(exported->version.major == 1);
  CHECK(exported->flags == 0);
  const Tensor& t = exported->dl_tensor;
  CHECK(t.dtype.bits == 8 * sizeof(TestType));
  CHECK(t.dtype.code == (std::is_same_v<TestType, qd::bfloat16> ? 4 : 2));
  const auto view = qd::from_dlpack<TestType>(t);
  CHECK(view.data == data);
  CHECK((view.rows == 3 && view.cols == 2 && view.stride == 4));
  CHECK(qd::to_dlpack<Versioned>(qd::MatrixView<const TestType>(view))->flags == 1);  // read-only
}

TEST_CASE("a DLPack tensor keeps the owner of its elements until it is deleted") {
  auto matrix = std::make_shared<std::vector<float>>(6);
  auto exported = qd::to_dlpack<Managed>(qd::MatrixView(matrix->data(), 2, 3), matrix);
  CHECK(matrix.use_count() == 2);
  Managed* other_library = exported.release();
  CHECK(matrix.use_count() == 2);
  other_library->deleter(other_library);
  CHECK(matrix.use_count() == 1);
}

}  // namespace dlpack_test
