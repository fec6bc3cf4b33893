// The state of a training run between two steps, in one file: what it takes to go on as if it had never stopped.
//
// A TrainState is a set of named sections: matrices, 64-bit integers, doubles and texts, all kept to the bit. What adapters, optimizers,
// samplers and generators put there is in io/collect.hpp; a trainer adds what is its own (step, place in the data, phase of its recipe).
// The file is safetensors, F32 [rows, cols], I64 [n], F64 [n] and U8 [n], replaced as a whole. Its metadata has "format", "version" and for
// each section "xxh64.<name>", the checksum of "<dtype> <shape>" and the data: a torn or damaged file is refused.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <qdylora/core/matrix.hpp>
#include <qdylora/io/checksum.hpp>
#include <qdylora/io/safetensors.hpp>

namespace qdylora {

class TrainState {
 public:
  using Integers = std::vector<std::int64_t>;
  using Numbers = std::vector<double>;

  TrainState() = default;

  // Adding a section. A matrix is borrowed: it must live until save_train_state, which calls `read` each time that it has gone through it,
  // so that its owner may put it out of memory again. Errc::duplicate.
  using Read = std::function<void()>;
  void add_matrix(std::string name, MatrixView<const float> matrix, Read read = {}) { insert(std::move(name), matrix, std::move(read)); }
  void add_matrix(std::string name, Matrix<float>&& matrix) { insert(std::move(name), std::move(matrix)); }
  void add_integers(std::string name, Integers values) { insert(std::move(name), std::move(values)); }
  void add_integer(std::string name, std::int64_t value) { insert(std::move(name), Integers{value}); }
  void add_numbers(std::string name, Numbers values) { insert(std::move(name), std::move(values)); }
  void add_number(std::string name, double value) { insert(std::move(name), Numbers{value}); }
  void add_text(std::string name, std::string text) { insert(std::move(name), std::move(text)); }
  void add_text_view(std::string name, std::string_view text, Read read = {}) {  // borrowed, as a matrix is
    insert(std::move(name), text, std::move(read));
  }

  // Reading one, valid as long as this lives. Errc::missing_tensor, dtype (a section of another kind), shape_mismatch.
  MatrixView<const float> matrix(std::string_view name, Index rows, Index cols) {
    const Value& value = use(name);
    MatrixView<const float> view;
    if (const auto* owned = std::get_if<Matrix<float>>(&value)) view = owned->view();
    else view = expect<MatrixView<const float>>(name, value);
    if (view.rows != rows || view.cols != cols) {
      throw Error(Errc::shape_mismatch, "expected " + detail::shape_text(rows, cols) + ", found " + shape_text(view), place(name));
    }
    return view;
  }
  const Integers& integers(std::string_view name) { return expect<Integers>(name, use(name)); }
  const Integers& integers(std::string_view name, std::size_t count) { return sized(name, integers(name), count); }
  std::int64_t integer(std::string_view name) { return integers(name, 1).front(); }
  const Numbers& numbers(std::string_view name) { return expect<Numbers>(name, use(name)); }
  const Numbers& numbers(std::string_view name, std::size_t count) { return sized(name, numbers(name), count); }
  double number(std::string_view name) { return numbers(name, 1).front(); }
  std::string_view text(std::string_view name) {
    const Value& value = use(name);
    if (const auto* view = std::get_if<std::string_view>(&value)) return *view;
    return expect<std::string>(name, value);
  }
  std::string_view text(std::string_view name, std::size_t size) { return sized(name, text(name), size); }

  bool contains(std::string_view name) const noexcept { return sections_.find(name) != sections_.end(); }
  std::size_t size() const noexcept { return sections_.size(); }
  /// After restoring: Errc::unexpected_tensor naming a section that nothing has asked for.
  void expect_all_used() const {
    for (const auto& [name, section] : sections_) {
      if (!section.used) throw Error(Errc::unexpected_tensor, "nothing in this run takes this section", place(name));
    }
  }

 private:
  using Value = std::variant<MatrixView<const float>, Matrix<float>, Integers, Numbers, std::string, std::string_view>;
  struct Section {
    Value value;
    Read read = {};
    bool used = false;
  };

  ErrorPlace place(std::string_view name) const { return {.file = file_, .tensor = std::string(name)}; }

  void insert(std::string name, Value value, Read read = {}) {
    const auto [at, is_new] = sections_.try_emplace(std::move(name), Section{std::move(value), std::move(read)});
    if (!is_new) throw Error(Errc::duplicate, "is already there", place(at->first));
  }
  const Value& use(std::string_view name) {
    const auto at = sections_.find(name);
    if (at == sections_.end()) throw Error(Errc::missing_tensor, "the state has no such section", place(name));
    at->second.used = true;
    return at->second.value;
  }
  template <class T>
  const T& expect(std::string_view name, const Value& value) const {
    if (const T* held = std::get_if<T>(&value)) return *held;
    throw Error(Errc::dtype, "the section holds another kind of value", place(name));
  }
  template <class T>
  const T& sized(std::string_view name, const T& values, std::size_t count) const {
    if (values.size() == count) return values;
    throw Error(Errc::shape_mismatch, "expected " + std::to_string(count) + " values, found " + std::to_string(values.size()), place(name));
  }

  std::map<std::string, Section, std::less<>> sections_;
  std::string file_;  // it was loaded from; for errors

  friend void save_train_state(const std::filesystem::path& path, const TrainState& state);
  friend TrainState load_train_state(const std::filesystem::path& path, const Limits& limits);
};

namespace detail {

inline constexpr std::string_view train_state_format = "qdylora.train_state";
inline constexpr std::string_view train_state_checksum = "xxh64.";

inline std::string section_checksum(DType dtype, std::span<const Index> shape, MatrixView<const std::byte> data) {
  Xxh64 hash;
  hash.update(name(dtype)).update(" ").update(shape_text(shape));
  for (Index i = 0; i < data.rows; ++i) hash.update({data.row(i), static_cast<std::size_t>(data.cols)});
  return hash.hex();
}

template <class T>
MatrixView<const std::byte> byte_view(MatrixView<const T> view) noexcept {
  constexpr auto size = static_cast<Index>(sizeof(T));
  return {reinterpret_cast<const std::byte*>(view.data), view.rows, view.cols * size, view.stride * size};
}

}  // namespace detail

/// Writes the file, all or nothing. Errors of SafetensorsWriter; Errc::limit for more sections than a reader takes.
inline void save_train_state(const std::filesystem::path& path, const TrainState& state) {
  QDYLORA_EXPECTS(state.sections_.size() + 2 <= Limits{}.metadata_entries, limit,
                  "save_train_state: " + std::to_string(state.sections_.size()) + " sections");
  SafetensorsWriter writer;
  writer.metadata("format", std::string(detail::train_state_format));
  writer.metadata("version", "1");
  for (const auto& [name, section] : state.sections_) {
    const auto checksum = [&, &key = name, &section = section](DType dtype, std::span<const Index> shape, MatrixView<const std::byte> data) {
      writer.metadata(std::string(detail::train_state_checksum) + key, detail::section_checksum(dtype, shape, data));
      if (section.read) section.read();
    };
    const auto add_matrix = [&, &key = name](MatrixView<const float> view) {
      checksum(DType::F32, std::array{view.rows, view.cols}, detail::byte_view(view));
      writer.add(key, view);
    };
    const auto add_run = [&, &key = name](DType dtype, const auto& values) {
      const auto bytes = std::as_bytes(std::span(values));
      const std::vector<Index> shape{static_cast<Index>(values.size())};
      checksum(dtype, shape, {bytes.data(), 1, static_cast<Index>(bytes.size())});
      writer.add(key, dtype, shape, bytes);
    };
    if (const auto* view = std::get_if<MatrixView<const float>>(&section.value)) add_matrix(*view);
    else if (const auto* matrix = std::get_if<Matrix<float>>(&section.value)) add_matrix(matrix->view());
    else if (const auto* integers = std::get_if<TrainState::Integers>(&section.value)) add_run(DType::I64, *integers);
    else if (const auto* numbers = std::get_if<TrainState::Numbers>(&section.value)) add_run(DType::F64, *numbers);
    else if (const auto* text = std::get_if<std::string>(&section.value)) add_run(DType::U8, *text);
    else add_run(DType::U8, std::get<std::string_view>(section.value));
    if (section.read) writer.when_written(section.read);
  }
  writer.write(path);
}

/// Reads a file of save_train_state. Errc::magic (another kind of file), version, dtype, missing_tensor (a section without
/// checksum or the reverse), read (a checksum that does not agree: the file is damaged), and those of SafetensorsFile.
inline TrainState load_train_state(const std::filesystem::path& path, const Limits& limits = {}) {
  const SafetensorsFile file(path, limits);
  const auto& metadata = file.metadata();
  const auto entry = [&](std::string_view key) {
    const auto at = metadata.find(key);
    return at == metadata.end() ? std::string() : at->second;
  };
  if (entry("format") != detail::train_state_format) throw Error(Errc::magic, "is not a training state", {.file = file.name()});
  if (entry("version") != "1") {
    throw Error(Errc::version, "expected version 1, found '" + printable(entry("version"), 32) + "'", {.file = file.name()});
  }
  for (const auto& [key, value] : metadata) {
    if (key == "format" || key == "version") continue;
    const std::string_view prefix = detail::train_state_checksum;
    const std::string section = key.starts_with(prefix) ? key.substr(prefix.size()) : key;
    if (section.size() == key.size() || !file.contains(section)) {
      throw Error(Errc::missing_tensor, "metadata '" + printable(key) + "' is the checksum of no section", {.file = file.name()});
    }
  }

  TrainState state;
  state.file_ = file.name();
  for (const TensorInfo& tensor : file.tensors()) {
    const ErrorPlace place{.file = file.name(), .tensor = tensor.name};
    const auto verified = [&](std::span<const std::byte> data) {
      const std::string expected = entry(std::string(detail::train_state_checksum) + tensor.name);
      if (expected.empty()) throw Error(Errc::missing_tensor, "the section has no checksum", place);
      const std::string found = detail::section_checksum(tensor.dtype, tensor.shape, {data.data(), 1, static_cast<Index>(data.size())});
      if (found != expected) {
        throw Error(Errc::read, "the section is damaged: expected checksum " + printable(expected, 32) + ", found " + found, place);
      }
    };
    const auto run = [&](auto values) {
      values.resize(static_cast<std::size_t>(tensor.shape[0]));
      file.read(tensor.name, std::as_writable_bytes(std::span(values)));
      verified(std::as_bytes(std::span(values)));
      return values;
    };
    const std::size_t dimensions = tensor.shape.size();
    if (tensor.dtype == DType::F32 && dimensions == 2) {
      Matrix<float> matrix(tensor.shape[0], tensor.shape[1]);
      file.read(tensor.name, std::as_writable_bytes(matrix.span()));
      verified(std::as_bytes(matrix.span()));
      state.add_matrix(tensor.name, std::move(matrix));
    } else if (tensor.dtype == DType::I64 && dimensions == 1) {
      state.add_integers(tensor.name, run(TrainState::Integers()));
    } else if (tensor.dtype == DType::F64 && dimensions == 1) {
      state.add_numbers(tensor.name, run(TrainState::Numbers()));
    } else if (tensor.dtype == DType::U8 && dimensions == 1) {
      state.add_text(tensor.name, run(std::string()));
    } else {
      throw Error(Errc::dtype,
                  "no section of a training state is " + detail::shape_text(tensor.shape) + " of " + std::string(name(tensor.dtype)),
                  place);
    }
  }
  return state;
}

}  // namespace qdylora
