// Writes GGUF, version 3; <qdylora/io/gguf.hpp> has the format.
#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/core/matrix.hpp>
#include <qdylora/io/file.hpp>
#include <qdylora/io/gguf.hpp>

namespace qdylora {

/// Collects metadata and float32 matrices, then writes one file. Matrices are borrowed until write().
class GgufWriter {
 public:
  /// A single value. Errc::duplicate; bad_argument for general.alignment.
  template <GgufScalar T>
  void metadata(const std::string& key, const T& value) {
    QDYLORA_EXPECTS(key != "general.alignment", bad_argument, "GgufWriter: tensors are aligned to 32 bytes, the default");
    expect_new(key, {});
    put_string(metadata_, key);
    put(metadata_, static_cast<std::uint32_t>(detail::gguf_type_of<T>()));
    if constexpr (std::same_as<T, std::string>) put_string(metadata_, value);
    else put(metadata_, value);
    ++pairs_;
  }
  void metadata(const std::string& key, const char* value) { metadata(key, std::string(value)); }

  /// A matrix [rows, cols], rows of any stride. Errc::duplicate.
  void add(std::string tensor, MatrixView<const float> matrix) {
    expect_shape("GgufWriter::add", matrix, matrix.rows, matrix.cols);
    expect_new("tensor " + tensor, {.tensor = tensor});
    tensors_.push_back({std::move(tensor), matrix});
  }
  template <class Memory>
  void add(std::string tensor, Matrix<float, Memory>&& matrix) = delete;  // its data would be gone before write()

  /// Writes the file, all or nothing (see AtomicFile).
  void write(const std::filesystem::path& path) const {
    std::string head = "GGUF";
    put(head, std::uint32_t{3});
    put(head, static_cast<std::uint64_t>(tensors_.size()));
    put(head, pairs_);
    head += metadata_;
    std::uint64_t offset = 0;
    for (const Tensor& tensor : tensors_) {
      put_string(head, tensor.name);
      put(head, std::uint32_t{2});
      put(head, static_cast<std::uint64_t>(tensor.matrix.cols));  // ne[0] runs fastest
      put(head, static_cast<std::uint64_t>(tensor.matrix.rows));
      put(head, std::uint32_t{0});  // F32
      put(head, offset);
      offset += padded(tensor.bytes());
    }
    head.resize(padded(head.size()));
    AtomicFile file(path);
    file.write(head);
    for (const Tensor& tensor : tensors_) {
      const auto run = [](const float* first, Index count) { return std::as_bytes(std::span(first, static_cast<std::size_t>(count))); };
      const auto& m = tensor.matrix;
      if (m.contiguous()) file.write(run(m.data, m.size()));
      else
        for (Index i = 0; i < m.rows; ++i) file.write(run(m.row(i), m.cols));
      file.write(std::string(padded(tensor.bytes()) - tensor.bytes(), '\0'));
    }
    file.commit();
  }

 private:
  struct Tensor {
    std::string name;
    MatrixView<const float> matrix;
    std::uint64_t bytes() const noexcept { return static_cast<std::uint64_t>(matrix.rows * matrix.cols) * sizeof(float); }
  };

  static constexpr std::uint64_t padded(std::uint64_t size) noexcept { return (size + 31) / 32 * 32; }  // the default alignment
  template <class T>
  static void put(std::string& out, T value) {
    char bytes[sizeof(T)];
    std::memcpy(bytes, &value, sizeof(T));
    out.append(bytes, sizeof(T));
  }
  static void put_string(std::string& out, std::string_view text) {
    put(out, static_cast<std::uint64_t>(text.size()));
    out += text;
  }
  void expect_new(const std::string& name, const ErrorPlace& place) {
    if (!names_.insert(name).second) throw Error(Errc::duplicate, "'" + printable(name) + "' is already there", place);
  }

  std::string metadata_;
  std::uint64_t pairs_ = 0;
  std::vector<Tensor> tensors_;
  std::set<std::string> names_;
};

}  // namespace qdylora
