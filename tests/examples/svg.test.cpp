#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "../../examples/common/heat_map.hpp"
#include "../../examples/common/svg.hpp"
#include "support/catch.hpp"

namespace svg_test {

namespace qd = qdylora;
namespace ex = qdylora::examples;

namespace {

ex::LineChart rank_chart() {
  const ex::Series one_run{"one run", {{1, 1.5}, {4, 1.1}, {64, 0.7}}}, odd_name{"a < b & \"c\"", {{1, 1.6}, {64, 0.9}}};
  return {"Loss by rank", "rank", "loss", {one_run, odd_name}, 2.0};
}

std::size_t count(std::string_view text, std::string_view part) {
  std::size_t n = 0;
  for (std::size_t at = text.find(part); at != text.npos; at = text.find(part, at + part.size())) ++n;
  return n;
}

}  // namespace

TEST_CASE("a chart is one well-formed document without scripts or outside references", "[svg]") {
  const std::string text = ex::svg(std::vector{rank_chart(), rank_chart()});
  CHECK(text.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\""));
  CHECK(text.ends_with("</svg>\n"));
  CHECK(count(text, "<svg") == 1);
  CHECK(count(text, "<text") == count(text, "</text>"));
  CHECK(text.find("<script") == text.npos);
  CHECK(text.find("href") == text.npos);
  CHECK(text.find("@import") == text.npos);
  CHECK(count(text, "http") == 1);  // the name space
  CHECK(text.find("prefers-color-scheme: dark") != text.npos);
  // Every tag is closed: '<' opens as many elements as end.
  CHECK(count(text, "<") - count(text, "</") == count(text, "/>") + count(text, "</"));
}

TEST_CASE("names are escaped, series and base stand in the legend", "[svg]") {
  const std::string text = ex::svg(std::vector{rank_chart()});
  CHECK(count(text, ">one run<") == 1);
  CHECK(count(text, ">a &lt; b &amp; &quot;c&quot;<") == 1);
  CHECK(count(text, ">base model<") == 1);
  CHECK(count(text, "class=\"base\"") == 2);  // its line and its key
  for (const char* tick : {">1<", ">4<", ">64<"}) CHECK(count(text, tick) == 1);
}

TEST_CASE("ranks are spaced by their logarithm, larger values stand higher", "[svg]") {
  ex::LineChart chart{"t", "x", "y", {{"s", {{1, 1}, {8, 2}, {64, 4}}}}};
  const std::string text = ex::svg(std::vector{chart});
  const std::string from = "<path class=\"line c0\" d=\"M";
  const std::size_t begin = text.find(from) + from.size();
  double x[3], y[3];
  const std::string path = text.substr(begin, text.find('"', begin) - begin);
  REQUIRE(std::sscanf(path.c_str(), "%lf %lfL%lf %lfL%lf %lf", &x[0], &y[0], &x[1], &y[1], &x[2], &y[2]) == 6);
  CHECK(std::abs((x[1] - x[0]) - (x[2] - x[1])) < 0.21);  // coordinates have one decimal
  CHECK(std::abs(2 * (y[0] - y[1]) - (y[1] - y[2])) < 0.41);
  CHECK(y[0] > y[1]);
  CHECK(x[0] > 60);
  CHECK(x[2] < ex::detail::ChartWriter::width);
}

TEST_CASE("values that are not finite are gaps", "[svg]") {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  ex::LineChart chart{"t", "x", "y", {{"s", {{1, 1}, {2, nan}, {4, 2}, {8, infinity}, {16, 3}, {32, 4}}}}};
  const std::string text = ex::svg(std::vector{chart});
  CHECK(text.find("nan") == text.npos);
  CHECK(text.find("inf") == text.npos);
  const std::size_t begin = text.find("<path class=\"line c0\"");
  const std::string path = text.substr(begin, text.find("/>", begin) - begin);
  CHECK(count(path, "M") == 3);
  CHECK(count(path, "L") == 1);
}

TEST_CASE("charts of odd data are drawn all the same", "[svg]") {
  CHECK_NOTHROW(ex::svg(std::vector{ex::LineChart{"one point", "x", "y", {{"s", {{8, 0.0}}}}}}));
  CHECK_NOTHROW(ex::svg(std::vector{ex::LineChart{"flat", "x", "y", {{"s", {{1, -3}, {2, -3}}}}}}));
  CHECK_NOTHROW(ex::svg(std::vector{ex::LineChart{"huge", "x", "y", {{"s", {{1, 1e30}, {2, 3e30}}}}}}));
  CHECK_NOTHROW(ex::svg(std::vector{ex::LineChart{"tiny", "x", "y", {{"s", {{1, 1e-30}, {2, 3e-30}}}}}}));
  ex::LineChart percent{"match", "rank", "exact match", {{"s", {{1, 0.0}, {2, 0.5}, {4, 1.0}}}}};
  percent.percent = true;
  const std::string text = ex::svg(std::vector{percent});
  CHECK(text.find(">100%<") != text.npos);
  CHECK(text.find(">-") == text.npos);  // no tick below zero
}

TEST_CASE("charts that cannot be drawn are refused", "[svg]") {
  CHECK_THROWS_AS(ex::svg(std::vector<ex::LineChart>{}), qd::Error);
  CHECK_THROWS_AS(ex::svg(std::vector{ex::LineChart{"none", "x", "y", {}}}), qd::Error);
  CHECK_THROWS_AS(ex::svg(std::vector{ex::LineChart{"zero", "x", "y", {{"s", {{0, 1}}}}}}), qd::Error);
}

TEST_CASE("a chart is written to a file, or the error names it", "[svg]") {
  const auto path = std::filesystem::temp_directory_path() / ("qdylora-chart-" + std::to_string(::getpid()) + ".svg");
  const std::vector charts{rank_chart()};
  ex::write_svg(path, charts);
  std::ifstream file(path);
  CHECK(std::string(std::istreambuf_iterator<char>(file), {}) == ex::svg(charts));
  std::filesystem::remove(path);
  try {
    ex::write_svg(path / "no-folder" / "chart.svg", charts);
    FAIL("no error");
  } catch (const qd::Error& error) {
    CHECK(error.code() == qd::Errc::open);
    CHECK(error.file().find("chart.svg") != std::string::npos);
  }
}

TEST_CASE("a heat map has a cell for each number, the darker the larger", "[svg]") {
  const ex::HeatMap map{"a < b", "block", {"0", "1"}, {"q", "up"}, {{0, 4}, {2, 8}}, {{"none", "4"}, {"2", "8"}}};
  const std::string text = ex::svg(std::vector{map, map});
  CHECK(text.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\""));
  CHECK(text.ends_with("</svg>\n"));
  CHECK(count(text, "<text") == count(text, "</text>"));
  CHECK(count(text, "class=\"cell\"") == 8);
  CHECK(count(text, ">a &lt; b<") == 3);  // and the document's title
  for (const char* share : {"0.060", "0.295", "0.530", "1.000"}) CHECK(count(text, "fill-opacity=\"" + std::string(share) + "\"") == 2);
  CHECK(count(text, ">none<") == 2);
  // A row lies below the one before, a column to the right.
  CHECK(text.find(">none<") < text.find(">4<"));
  CHECK(text.find(">4<") < text.find(">8<"));

  auto from_two = map;  // palest at 2 and below
  from_two.least = 2.0;
  const std::string shades = ex::svg(std::vector{from_two});
  for (const auto& [share, cells] : {std::pair("0.060", 2u), std::pair("0.373", 1u), std::pair("1.000", 1u)})
    CHECK(count(shades, "fill-opacity=\"" + std::string(share) + "\"") == cells);

  auto bad = map;
  bad.values[1].pop_back();
  CHECK_THROWS_AS(ex::svg(std::vector{bad}), qd::Error);
  bad = map;
  bad.values[0][0] = std::nan("");
  CHECK_THROWS_AS(ex::svg(std::vector{bad}), qd::Error);
  CHECK_THROWS_AS(ex::svg(std::vector<ex::HeatMap>{}), qd::Error);
}

}  // namespace svg_test
