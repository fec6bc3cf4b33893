// What every reader of a file needs before it may trust a number or a text in it: bounds (Limits), arithmetic that cannot wrap, and
// a UTF-8 check. In io/ no value that came from a file meets a raw +, * or <<; ranges are compared by subtraction
// (`length > size - offset` once `offset <= size`), which cannot wrap either.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include <qdylora/core/error.hpp>

namespace qdylora {

static_assert(std::endian::native == std::endian::little, "the file formats of io/ are little-endian and are read in place");

/// What a reader accepts, all in one place. The defaults hold for every published model known to us; lower them where files are
/// trusted less.
struct Limits {
  std::uint64_t header_bytes = 100'000'000;       // the part of a container before its tensor data; safetensors' own bound
  std::uint64_t tensors = 1'000'000;              // per file
  std::uint64_t metadata_entries = 65'536;        // key-value pairs per file
  std::uint64_t dimensions = 8;                   // per tensor
  std::uint64_t name_bytes = 1'024;               // a tensor's name or a metadata key
  std::uint64_t string_bytes = 16ull << 20;       // one metadata string
  std::uint64_t array_elements = 64ull << 20;     // one metadata array
  std::uint64_t alignment = 1ull << 20;           // of tensor data
  std::uint64_t json_bytes = 64ull << 20;         // one JSON document
  std::uint64_t json_values = 4ull << 20;         // in one JSON document
  std::uint64_t json_depth = 8;                   // nested objects and arrays; at most json_depth_most
  std::uint64_t ranks = 65'535;                   // of an adapter
  std::uint64_t vocabulary = 4'000'000;           // tokens

  static constexpr std::uint64_t json_depth_most = 64;
};

namespace detail {

[[noreturn]] inline void raise_overflow(const char* operation, std::uint64_t a, std::uint64_t b, const ErrorPlace& place) {
  throw Error(Errc::overflow, std::to_string(a) + operation + std::to_string(b) + " does not fit in 64 bits", place);
}

}  // namespace detail

/// a + b; Errc::overflow at `place` when it does not fit.
constexpr std::uint64_t checked_add(std::uint64_t a, std::uint64_t b, const ErrorPlace& place) {
  if (b > std::numeric_limits<std::uint64_t>::max() - a) detail::raise_overflow(" + ", a, b, place);
  return a + b;
}

/// a * b; Errc::overflow at `place` when it does not fit.
constexpr std::uint64_t checked_mul(std::uint64_t a, std::uint64_t b, const ErrorPlace& place) {
  if (a != 0 && b > std::numeric_limits<std::uint64_t>::max() / a) detail::raise_overflow(" * ", a, b, place);
  return a * b;
}

/// `value` rounded up to a multiple of `alignment`, a power of two; Errc::overflow at `place` when it does not fit.
constexpr std::uint64_t checked_pad_up(std::uint64_t value, std::uint64_t alignment, const ErrorPlace& place) {
  if (!std::has_single_bit(alignment)) {
    throw Error(Errc::alignment, "alignment must be a power of two, found " + std::to_string(alignment), place);
  }
  return checked_add(value, alignment - 1, place) & ~(alignment - 1);
}

/// `value` as a To; Errc::overflow at `place` unless it is representable.
template <std::integral To, std::integral From>
constexpr To checked_narrow(From value, const ErrorPlace& place) {
  if (!std::in_range<To>(value)) {
    throw Error(Errc::overflow,
                std::to_string(value) + " is not in [" + std::to_string(std::numeric_limits<To>::min()) + ", " +
                    std::to_string(std::numeric_limits<To>::max()) + "]",
                place);
  }
  return static_cast<To>(value);
}

/// Where `text` stops being UTF-8 (RFC 3629: shortest forms, no surrogates, at most U+10FFFF); nothing when all of it is.
constexpr std::optional<std::size_t> utf8_error(std::string_view text) noexcept {
  const std::size_t size = text.size();
  std::size_t i = 0;
  while (i < size) {
    const auto lead = static_cast<unsigned char>(text[i]);
    std::size_t tail = 0;                     // continuation bytes; the first of them is in [low, high]
    unsigned char low = 0x80, high = 0xBF;
    if (lead < 0x80) {
    } else if (lead >= 0xC2 && lead <= 0xDF) {
      tail = 1;
    } else if (lead >= 0xE0 && lead <= 0xEF) {
      tail = 2;
      if (lead == 0xE0) low = 0xA0;           // below: a shorter form exists
      if (lead == 0xED) high = 0x9F;          // above: surrogates
    } else if (lead >= 0xF0 && lead <= 0xF4) {
      tail = 3;
      if (lead == 0xF0) low = 0x90;
      if (lead == 0xF4) high = 0x8F;          // above: beyond U+10FFFF
    } else {
      return i;
    }
    if (tail > size - i - 1) return i;
    for (std::size_t k = 1; k <= tail; ++k) {
      const auto byte = static_cast<unsigned char>(text[i + k]);
      if (byte < low || byte > high) return i;
      low = 0x80;
      high = 0xBF;
    }
    i += 1 + tail;
  }
  return std::nullopt;
}

namespace detail {

/// A T from its bytes in a file, at any alignment.
template <class T>
  requires std::is_trivially_copyable_v<T>
T from_bytes(const std::byte* source) noexcept {
  T value;
  std::memcpy(&value, source, sizeof(T));
  return value;
}

}  // namespace detail
}  // namespace qdylora
