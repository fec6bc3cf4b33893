#include <qdylora/core/error.hpp>

#include <set>
#include <string>

#include "support/catch.hpp"

namespace error_test {

namespace qd = qdylora;
using qd::Errc;

TEST_CASE("every error code has a name of its own") {
  std::set<std::string_view> names;
  int count = 0;
  for (int code = 0; code <= static_cast<int>(Errc::device); ++code, ++count) names.insert(qd::name(static_cast<Errc>(code)));
  CHECK(names.size() == static_cast<std::size_t>(count));
  CHECK_FALSE(names.contains("unknown"));
  CHECK(qd::name(Errc::shape_mismatch) == "shape_mismatch");
  CHECK(qd::name(static_cast<Errc>(10000)) == "unknown");
}

TEST_CASE("printable passes ASCII text and escapes every other byte") {
  CHECK(qd::printable("model.layers.0 ~") == "model.layers.0 ~");
  CHECK(qd::printable("a\nb\tc") == "a\\x0ab\\x09c");
  CHECK(qd::printable(std::string_view("\0", 1)) == "\\x00");
  CHECK(qd::printable("\x1b[2J") == "\\x1b[2J");
  CHECK(qd::printable("\x7f\x80\xff") == "\\x7f\\x80\\xff");
  CHECK(qd::printable("") == "");
}

TEST_CASE("printable cuts long text and says so") {
  const std::string text(121, 'x');
  CHECK(qd::printable(text) == std::string(120, 'x') + "...");
  CHECK(qd::printable(text.substr(1)) == text.substr(1));
  CHECK(qd::printable("abcdef", 3) == "abc...");
  CHECK(qd::printable("\n\n\n", 2) == "\\x0a\\x0a...");
}

TEST_CASE("an error tells its code, and where") {
  const qd::Error error(Errc::hole, "expected data", {.file = "a.bin", .tensor = "w\n", .offset = 17});
  CHECK(error.code() == Errc::hole);
  CHECK(error.file() == "a.bin");
  CHECK(error.tensor() == "w\n");
  CHECK(error.offset() == 17u);
  CHECK(std::string(error.what()) == "a.bin: tensor 'w\\x0a': expected data (at byte 17)");
  const qd::Error bare(Errc::memory, "none");
  CHECK(std::string(bare.what()) == "none");
  CHECK_FALSE(bare.offset());
}

TEST_CASE("EXPECTS throws only when its condition fails, and only then makes its message") {
  int made = 0;
  const auto message = [&] {
    ++made;
    return std::string("why");
  };
  QDYLORA_EXPECTS(1 < 2, bad_argument, message());
  CHECK(made == 0);
  CHECK_THROWS_WITH([&] { QDYLORA_EXPECTS(2 < 1, bad_argument, message()); }(), "why");
  CHECK(made == 1);
}

}  // namespace error_test
