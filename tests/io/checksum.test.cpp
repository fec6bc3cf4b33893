#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include <qdylora/io/checksum.hpp>

#include "support/catch.hpp"

namespace checksum_test {

namespace qd = qdylora;

TEST_CASE("checksums are XXH64's") {
  // Of the xxhash package for Python, seed 0.
  CHECK(qd::Xxh64().digest() == 0xEF46DB3751D8E999u);
  CHECK(qd::Xxh64().update("a").digest() == 0xD24EC4F1A98C6E5Bu);
  CHECK(qd::Xxh64().update("abcd").digest() == 0xDE0327B0D25D92CCu);
  CHECK(qd::Xxh64().update("message digest").digest() == 0x066ED728FCEEB3BEu);
  CHECK(qd::Xxh64().update("abc").digest() == 0x44BC2CF5AD770999u);
  CHECK(qd::Xxh64().update("Nobody inspects the spammish repetition").digest() == 0xFBCEA83C8A378BF1u);
}

TEST_CASE("a checksum does not depend on how the bytes are cut, and changes with every bit") {
  std::string text;
  for (int i = 0; i < 150; ++i) text += static_cast<char>(i * 37 + 11);
  for (std::size_t size = 0; size <= text.size(); ++size) {
    const std::string_view part = std::string_view(text).substr(0, size);
    const auto whole = qd::Xxh64().update(part).digest();
    for (std::size_t cut = 0; cut <= size; cut += 7) {
      qd::Xxh64 pieces;
      pieces.update(part.substr(0, cut)).update(part.substr(cut, 1)).update(part.substr(std::min(size, cut + 1)));
      CHECK(pieces.digest() == whole);
    }
  }
  const auto whole = qd::Xxh64().update(text).digest();
  for (std::size_t bit = 0; bit < 8 * text.size(); ++bit) {
    std::string flipped = text;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
    CHECK(qd::Xxh64().update(flipped).digest() != whole);
  }
}

}  // namespace checksum_test
