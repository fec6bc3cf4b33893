// Data that tests compare with: golden files beside the tests, and large reference data that may be absent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <qdylora/io/safetensors.hpp>

namespace test {

/// The path of a golden file, e.g. golden("codes.safetensors").
inline std::filesystem::path golden(const std::string& name) { return std::filesystem::path(QDYLORA_GOLDEN_DIR) / name; }

/// The path of a file of the large reference data, from the folder the environment variable QDYLORA_REFERENCE or the build names;
/// nothing where it is absent: then the test skips.
inline std::optional<std::filesystem::path> shared(const std::string& name) {
  std::filesystem::path folder;
#if defined(QDYLORA_REFERENCE_DIR)
  folder = QDYLORA_REFERENCE_DIR;
#endif
  if (const char* set = std::getenv("QDYLORA_REFERENCE")) folder = set;
  if (folder.empty() || !std::filesystem::exists(folder / name)) return std::nullopt;
  return folder / name;
}

/// A tensor's elements, flattened. T must be the stored type exactly: float F32, double F64, std::uint8_t U8, std::int32_t I32 ...
template <class T>
std::vector<T> load(const qdylora::SafetensorsFile& file, std::string_view tensor) {
  using qdylora::DType;
  constexpr DType expected = [] {
    if constexpr (qdylora::Scalar<T>) return qdylora::dtype_of<T>();
    else if constexpr (std::is_same_v<T, std::uint8_t>) return DType::U8;
    else if constexpr (std::is_same_v<T, std::int8_t>) return DType::I8;
    else if constexpr (std::is_same_v<T, std::int32_t>) return DType::I32;
    else if constexpr (std::is_same_v<T, std::uint32_t>) return DType::U32;
    else return DType::I64;
  }();
  static_assert(qdylora::Scalar<T> || std::is_integral_v<T>);
  const qdylora::TensorInfo& info = file.info(tensor);
  if (info.dtype != expected) {
    throw std::logic_error("golden tensor '" + info.name + "' is " + std::string(qdylora::name(info.dtype)) + ", not " +
                           std::string(qdylora::name(expected)));
  }
  std::vector<T> values(static_cast<std::size_t>(info.size()) / sizeof(T));
  file.read(tensor, std::as_writable_bytes(std::span(values)));
  return values;
}

/// The same, from a golden file.
template <class T>
std::vector<T> load(const std::string& file, std::string_view tensor) {
  return load<T>(qdylora::SafetensorsFile(golden(file)), tensor);
}

}  // namespace test
