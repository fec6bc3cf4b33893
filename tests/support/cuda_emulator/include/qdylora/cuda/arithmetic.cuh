// The names of the library's <qdylora/cuda/arithmetic.cuh> with their meaning on a CPU.
#pragma once

#include <cmath>
#include <cstdint>

#include <qdylora/core/scalar.hpp>

namespace qdylora::device {

// ---- bits ------------------------------------------------------------------------------------------------------------------------

inline unsigned byte_of(std::uint32_t word, int i) { return word >> (8 * i) & 255u; }
inline std::uint32_t select_bytes(std::uint32_t first, std::uint32_t second, unsigned which) {
  const std::uint64_t bytes = first | std::uint64_t{second} << 32;
  std::uint32_t selected = 0;
  for (unsigned i = 0; i < 4; ++i) selected |= static_cast<std::uint32_t>(bytes >> (8 * (which >> (4 * i) & 7u)) & 255u) << (8 * i);
  return selected;
}

// ---- arithmetic ------------------------------------------------------------------------------------------------------------------

inline float multiply(float a, float b) { return detail::rounded(a * b); }
inline double multiply(double a, double b) {
  volatile double product = a * b;  // rounded here
  return product;
}
inline float add(float a, float b) { return detail::rounded(a + b); }
inline float divide(float a, float b) { return a / b; }

inline float exp2(float x) { return std::exp2(x); }
inline double exp2(double x) { return std::exp2(x); }

template <Scalar T>
Accumulator<T> widen(T value) {
  return static_cast<Accumulator<T>>(value);
}
template <Scalar T>
T narrow(Accumulator<T> value) {
  return static_cast<T>(value);
}

template <class T>
std::uint32_t pack(float first, float second) {
  return T(first).bits | static_cast<std::uint32_t>(T(second).bits) << 16;
}

}  // namespace qdylora::device
