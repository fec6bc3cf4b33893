// XXH64 (Yann Collet's xxHash, 64 bits, seed 0): a checksum against torn and damaged files, about as fast as memory. Not a
// signature: who means to can make files of equal checksums.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

#include <qdylora/io/checked.hpp>

namespace qdylora {

/// Takes bytes in pieces of any size; digest() is that of all so far.
class Xxh64 {
 public:
  Xxh64& update(std::span<const std::byte> bytes) noexcept {
    length_ += bytes.size();
    if (held_ > 0 || bytes.size() < block) {
      const std::size_t count = std::min(bytes.size(), block - held_);
      if (count > 0) std::memcpy(buffer_.data() + held_, bytes.data(), count);
      held_ += count;
      bytes = bytes.subspan(count);
      if (held_ < block) return *this;
      consume(buffer_.data());
      held_ = 0;
    }
    for (; bytes.size() >= block; bytes = bytes.subspan(block)) consume(bytes.data());
    held_ = bytes.size();
    if (held_ > 0) std::memcpy(buffer_.data(), bytes.data(), held_);
    return *this;
  }
  Xxh64& update(std::string_view text) noexcept { return update(std::as_bytes(std::span(text))); }

  std::uint64_t digest() const noexcept {
    std::uint64_t h = prime5;
    if (length_ >= block) {
      h = std::rotl(lanes_[0], 1) + std::rotl(lanes_[1], 7) + std::rotl(lanes_[2], 12) + std::rotl(lanes_[3], 18);
      for (const std::uint64_t lane : lanes_) h = (h ^ round(0, lane)) * prime1 + prime4;
    }
    h += length_;
    const std::byte* at = buffer_.data();
    std::size_t left = held_;
    for (; left >= 8; left -= 8, at += 8) {
      h = std::rotl(h ^ round(0, detail::from_bytes<std::uint64_t>(at)), 27) * prime1 + prime4;
    }
    for (; left >= 4; left -= 4, at += 4) h = std::rotl(h ^ (detail::from_bytes<std::uint32_t>(at) * prime1), 23) * prime2 + prime3;
    for (; left > 0; --left, ++at) h = std::rotl(h ^ (std::to_integer<std::uint64_t>(*at) * prime5), 11) * prime1;
    h = (h ^ (h >> 33)) * prime2;
    h = (h ^ (h >> 29)) * prime3;
    return h ^ (h >> 32);
  }
  /// The digest in 16 lower-case hexadecimal digits.
  std::string hex() const {
    constexpr char digits[] = "0123456789abcdef";
    std::string text(16, '0');
    for (std::uint64_t rest = digest(), i = 16; i > 0; rest >>= 4) text[--i] = digits[rest & 15];
    return text;
  }

 private:
  static constexpr std::size_t block = 32;
  static constexpr std::uint64_t prime1 = 0x9E3779B185EBCA87u, prime2 = 0xC2B2AE3D27D4EB4Fu, prime3 = 0x165667B19E3779F9u,
                                 prime4 = 0x85EBCA77C2B2AE63u, prime5 = 0x27D4EB2F165667C5u;

  static constexpr std::uint64_t round(std::uint64_t lane, std::uint64_t word) noexcept {
    return std::rotl(lane + word * prime2, 31) * prime1;
  }
  void consume(const std::byte* at) noexcept {
    for (std::size_t i = 0; i < 4; ++i) lanes_[i] = round(lanes_[i], detail::from_bytes<std::uint64_t>(at + 8 * i));
  }

  std::array<std::uint64_t, 4> lanes_{prime1 + prime2, prime2, 0, 0 - prime1};
  std::array<std::byte, block> buffer_{};
  std::size_t held_ = 0;
  std::uint64_t length_ = 0;
};

}  // namespace qdylora
