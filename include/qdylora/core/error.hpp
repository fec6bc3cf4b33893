// Errors: one exception type that carries what went wrong (a code to branch on), where (file, byte offset, tensor),
// and what was expected and found. The library never prints and never aborts.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include <qdylora/config.hpp>

namespace qdylora {

enum class Errc {
  // files
  open, read, write, sync, no_space, truncated,
  // formats
  magic, version, header_size, utf8, json, duplicate, dtype, shape, overflow, offset, overlap, hole, alignment, trailing, limit,
  // models and adapters
  missing_tensor, unexpected_tensor, shape_mismatch, unsupported, bad_config,
  // quantization
  non_finite, block_size, code_range,
  // training and calls
  rank_range, state_order, non_finite_step, bad_argument,
  // resources
  memory, peer, device,
};

/// The code's name, e.g. "shape_mismatch"; stable, for logs and tests.
constexpr std::string_view name(Errc code) noexcept {
  switch (code) {
    case Errc::open: return "open";
    case Errc::read: return "read";
    case Errc::write: return "write";
    case Errc::sync: return "sync";
    case Errc::no_space: return "no_space";
    case Errc::truncated: return "truncated";
    case Errc::magic: return "magic";
    case Errc::version: return "version";
    case Errc::header_size: return "header_size";
    case Errc::utf8: return "utf8";
    case Errc::json: return "json";
    case Errc::duplicate: return "duplicate";
    case Errc::dtype: return "dtype";
    case Errc::shape: return "shape";
    case Errc::overflow: return "overflow";
    case Errc::offset: return "offset";
    case Errc::overlap: return "overlap";
    case Errc::hole: return "hole";
    case Errc::alignment: return "alignment";
    case Errc::trailing: return "trailing";
    case Errc::limit: return "limit";
    case Errc::missing_tensor: return "missing_tensor";
    case Errc::unexpected_tensor: return "unexpected_tensor";
    case Errc::shape_mismatch: return "shape_mismatch";
    case Errc::unsupported: return "unsupported";
    case Errc::bad_config: return "bad_config";
    case Errc::non_finite: return "non_finite";
    case Errc::block_size: return "block_size";
    case Errc::code_range: return "code_range";
    case Errc::rank_range: return "rank_range";
    case Errc::state_order: return "state_order";
    case Errc::non_finite_step: return "non_finite_step";
    case Errc::bad_argument: return "bad_argument";
    case Errc::memory: return "memory";
    case Errc::peer: return "peer";
    case Errc::device: return "device";
  }
  return "unknown";
}

/// Text from a file, made safe to show on a terminal: control characters and bytes >= 0x7F become \xNN, long text is cut.
inline std::string printable(std::string_view text, std::size_t limit = 120) {
  constexpr char digits[] = "0123456789abcdef";
  std::string out;
  for (const char c : text.substr(0, limit)) {
    const auto u = static_cast<unsigned char>(c);
    if (u >= 0x20 && u < 0x7F) {
      out += c;
    } else {
      out += "\\x";
      out += digits[u >> 4];
      out += digits[u & 15];
    }
  }
  return text.size() > limit ? out + "..." : out;
}

/// What a failing operation knows about the place of the failure; every part may stay empty.
struct ErrorPlace {
  std::string file = {};
  std::string tensor = {};
  std::optional<std::uint64_t> offset = {};  // bytes from the start of the file
};

class Error : public std::runtime_error {
 public:
  Error(Errc code, const std::string& message, ErrorPlace place = {})
      : std::runtime_error(format(message, place)), code_(code), place_(std::move(place)) {}

  Errc code() const noexcept { return code_; }
  const std::string& file() const noexcept { return place_.file; }
  const std::string& tensor() const noexcept { return place_.tensor; }
  std::optional<std::uint64_t> offset() const noexcept { return place_.offset; }

 private:
  static std::string format(const std::string& message, const ErrorPlace& place) {
    std::string text;
    if (!place.file.empty()) text += place.file + ": ";
    if (!place.tensor.empty()) text += "tensor '" + printable(place.tensor) + "': ";
    text += message;
    if (place.offset) text += " (at byte " + std::to_string(*place.offset) + ")";
    return text;
  }

  Errc code_;
  ErrorPlace place_;
};

namespace detail {

// Out of line of the check, so that a hot caller carries only a compare and a jump.
#if defined(QDYLORA_DEVICE_ONLY)
[[noreturn]] inline void raise(Errc, const std::string&) { __trap(); }
#else
[[noreturn]] inline void raise(Errc code, const std::string& message) { throw Error(code, message); }
#endif

inline std::string shape_text(std::int64_t rows, std::int64_t cols) {
  std::string text = "[";  // not "[" + string: g++ 12 warns of an overlap there
  return text.append(std::to_string(rows)).append(", ").append(std::to_string(cols)).append("]");
}

}  // namespace detail
}  // namespace qdylora

// Precondition of a call, always on. `message` is an expression that makes a std::string; it is evaluated only on failure.
#define QDYLORA_EXPECTS(condition, code, message)                 \
  do {                                                            \
    if (!(condition)) [[unlikely]]                                \
      ::qdylora::detail::raise(::qdylora::Errc::code, (message)); \
  } while (false)
