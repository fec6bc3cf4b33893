// What an optimizer keeps of a parameter: AdamW its first and second moment, in full or in 8 bits, Lion one moment.
#pragma once

#include <algorithm>
#include <cstdint>

#include <qdylora/backend.hpp>

namespace qdylora {
namespace detail {

/// Whether moments are the host's and the arithmetic is not: paged. (Memory of both is worked on in place.)
template <class Memory, class Backend>
inline constexpr bool paged = Memory::host && !Backend::Memory::host && !requires {
  Memory::device;
};

template <class Backend, class T, class Memory>
void clear(const Backend& backend, Matrix<T, Memory>& x) {
  if constexpr (paged<Memory, Backend>) {
    backend.synchronize();  // copies may still be on their way
    std::fill(x.span().begin(), x.span().end(), T{});
  } else {
    backend.fill(x.view(), T{});
  }
}

}  // namespace detail

/// Moments [rows, cols] as numbers.
template <class S, MemoryResource Memory>
struct FloatMoments {
  Matrix<S, Memory> m, v;

  FloatMoments(Index rows, Index cols, Memory memory) : m(rows, cols, memory), v(rows, cols, memory) {}

  /// Of the rows from `first` on that `value` and `gradient` are.
  template <class Backend>
  void update(const Backend& backend, MatrixView<S> value, MatrixView<const S> gradient, Index first, const AdamWUpdate& numbers) {
    const auto m_rows = m.view().middle_rows(first, value.rows), v_rows = v.view().middle_rows(first, value.rows);
    if constexpr (detail::paged<Memory, Backend>) backend.adamw_paged(value, gradient, m_rows, v_rows, numbers);
    else backend.adamw(value, gradient, m_rows, v_rows, numbers);
  }
  template <class Backend>
  void clear(const Backend& backend) {
    detail::clear(backend, m);
    detail::clear(backend, v);
  }
  std::size_t bytes() const noexcept { return m.capacity_bytes() + v.capacity_bytes(); }

  /// f(name, matrix) of all that a checkpoint holds.
  template <class Self, class F>
  static void for_each_part(Self& self, F&& f) {
    f("m", self.m);
    f("v", self.v);
  }
};

/// Lion's moment [rows, cols] as numbers.
template <class S, MemoryResource Memory>
struct FloatMoment {
  Matrix<S, Memory> m;

  FloatMoment(Index rows, Index cols, Memory memory) : m(rows, cols, memory) {}

  template <class Backend>
  void update(const Backend& backend, MatrixView<S> value, MatrixView<const S> gradient, Index first, const LionUpdate& numbers) {
    static_assert(HasLion<Backend, S>, "Lion needs a backend with lion(value, gradient, moment, update)");
    const auto m_rows = m.view().middle_rows(first, value.rows);
    if constexpr (detail::paged<Memory, Backend>) backend.lion_paged(value, gradient, m_rows, numbers);
    else backend.lion(value, gradient, m_rows, numbers);
  }
  template <class Backend>
  void clear(const Backend& backend) {
    detail::clear(backend, m);
  }
  std::size_t bytes() const noexcept { return m.capacity_bytes(); }

  template <class Self, class F>
  static void for_each_part(Self& self, F&& f) {
    f("m", self.m);
  }
};

/// Moments in 8 bits, in blocks of 256 (quant/moments8.hpp). Of a parameter of less than 4096 elements they stay floats: there is little
/// to save, and such parameters (biases, norms) suffer most from rounding. bitsandbytes' rule (min_8bit_size).
template <MemoryResource Memory>
struct BlockwiseMoments {
  static constexpr Index least_elements = 4096;

  Matrix<std::uint8_t, Memory> m, v;
  Matrix<float, Memory> m_absmax, v_absmax;
  FloatMoments<float, Memory> floats;  // in their stead, or empty

  BlockwiseMoments(Index rows, Index cols, Memory memory)
      : m(0, 0, memory), v(0, 0, memory), m_absmax(0, 0, memory), v_absmax(0, 0, memory), floats(0, 0, memory) {
    if (rows * cols < least_elements) {
      floats = FloatMoments<float, Memory>(rows, cols, memory);
    } else {
      m = Matrix<std::uint8_t, Memory>(rows, cols, memory);
      v = Matrix<std::uint8_t, Memory>(rows, cols, memory);
      m_absmax = Matrix<float, Memory>(rows, Moments8View::blocks(cols), memory);
      v_absmax = Matrix<float, Memory>(rows, Moments8View::blocks(cols), memory);
    }
  }

  bool in_floats() const noexcept { return m.size() == 0; }
  Moments8View view() noexcept { return {m, v, m_absmax, v_absmax}; }

  template <class Backend>
  void update(const Backend& backend, MatrixView<float> value, MatrixView<const float> gradient, Index first, const AdamWUpdate& numbers) {
    static_assert(HasAdamW8<Backend>, "AdamW8bit needs a backend with adamw(value, gradient, Moments8View, update)");
    if (in_floats()) return floats.update(backend, value, gradient, first, numbers);
    const Moments8View rows = view().middle_rows(first, value.rows);
    if constexpr (detail::paged<Memory, Backend>) backend.adamw_paged(value, gradient, rows, numbers);
    else backend.adamw(value, gradient, rows, numbers);
  }
  template <class Backend>
  void clear(const Backend& backend) {
    floats.clear(backend);
    detail::clear(backend, m);
    detail::clear(backend, v);
    detail::clear(backend, m_absmax);
    detail::clear(backend, v_absmax);
  }
  std::size_t bytes() const noexcept {
    return m.capacity_bytes() + v.capacity_bytes() + m_absmax.capacity_bytes() + v_absmax.capacity_bytes() + floats.bytes();
  }

  /// f(name, matrix) of all that a checkpoint holds: codes and absmax, or floats under FloatMoments' names.
  template <class Self, class F>
  static void for_each_part(Self& self, F&& f) {
    if (self.in_floats()) return FloatMoments<float, Memory>::for_each_part(self.floats, f);
    f("m8", self.m);
    f("v8", self.v);
    f("m8.absmax", self.m_absmax);
    f("v8.absmax", self.v_absmax);
  }
};

}  // namespace qdylora
