// Heat maps as SVG: a table of numbers whose cells are the darker the larger they are. Self-contained, as the charts of svg.hpp. Here most
// have a row for each block of a model and a column for each of its linear layers.
#pragma once

#include <algorithm>
#include <filesystem>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/io/file.hpp>
#include <qdylora/model/config.hpp>

#include "svg.hpp"

namespace qdylora::examples {

struct HeatMap {
  std::string title, row_label;
  std::vector<std::string> rows, columns;
  std::vector<std::vector<double>> values;      // [rows][columns], from 0; darkest at the largest
  std::vector<std::vector<std::string>> texts;  // of the same shape
  double least = 0.0;                           // palest at it and below
};

/// A map without values of a model's linear layers.
inline HeatMap heat_map_of(const DecoderConfig& config, std::string title) {
  HeatMap map{std::move(title), "block", {}, {}, {}, {}};
  for (Index block = 0; block < config.layers; ++block) map.rows.push_back(std::to_string(block));
  for (const auto& linear : config.linears()) {
    const std::string name(linear.name.substr(linear.name.rfind('.') + 1));
    map.columns.push_back(name.ends_with("_proj") ? name.substr(0, name.size() - 5) : name);
  }
  return map;
}

/// Puts the next value, row after row, with so many decimals.
inline void put(HeatMap& map, double value, int decimals) {
  if (map.values.empty() || map.values.back().size() == map.columns.size()) {
    map.values.emplace_back();
    map.texts.emplace_back();
  }
  map.values.back().push_back(value);
  map.texts.back().push_back(detail::ChartWriter::number(value, decimals));
}

/// Tables side by side as one SVG document. Errors: bad_argument (no map, an empty one, a shape that is not rows x columns, a negative
/// value).
inline std::string svg(std::span<const HeatMap> maps) {
  using Writer = detail::ChartWriter;
  constexpr double cell_width = 58, cell_height = 20, left = 64, top = 66, gap = 28;
  const auto number = [](double x) { return Writer::number(x); };
  double width = 0, height = 0;
  std::string body;
  for (const HeatMap& map : maps) {
    double most = 0.0;
    bool fits = !map.rows.empty() && !map.columns.empty() && map.values.size() == map.rows.size() && map.texts.size() == map.rows.size();
    for (std::size_t i = 0; fits && i < map.rows.size(); ++i) {
      fits = map.values[i].size() == map.columns.size() && map.texts[i].size() == map.columns.size();
      for (const double value : map.values[i]) {
        fits &= value >= 0.0 && value <= std::numeric_limits<double>::max();
        most = std::max(most, value);
      }
    }
    QDYLORA_EXPECTS(fits, bad_argument, "svg: '" + map.title + "' is no table of numbers from 0");
    const auto text = [&](double x, double y, const char* style, const char* anchor, const std::string& content) {
      body += "<text class=\"" + std::string(style) + "\" x=\"" + number(x) + "\" y=\"" + number(y) + "\" text-anchor=\"" + anchor + "\">" +
              Writer::escape(content) + "</text>\n";
    };
    const double x0 = width + left;
    text(width + 20, 28, "title", "start", map.title);
    text(x0 - 8, top - 8, "tick", "end", map.row_label);
    for (std::size_t j = 0; j < map.columns.size(); ++j)
      text(x0 + cell_width * (static_cast<double>(j) + 0.5), top - 8, "tick", "middle", map.columns[j]);
    for (std::size_t i = 0; i < map.rows.size(); ++i) {
      const double y = top + cell_height * static_cast<double>(i);
      text(x0 - 8, y + 14, "tick", "end", map.rows[i]);
      for (std::size_t j = 0; j < map.columns.size(); ++j) {
        const double x = x0 + cell_width * static_cast<double>(j), above = std::max(0.0, map.values[i][j] - map.least);
        const double share = most > map.least ? above / (most - map.least) : 0.0;
        body += "<rect class=\"cell\" x=\"" + number(x + 1) + "\" y=\"" + number(y + 1) + "\" width=\"" + number(cell_width - 2) +
                "\" height=\"" + number(cell_height - 2) + "\" rx=\"3\" fill-opacity=\"" + Writer::number(0.06 + 0.94 * share, 3) +
                "\"/>\n";
        text(x + cell_width / 2, y + 14, share > 0.5 ? "tick dark" : "tick", "middle", map.texts[i][j]);
      }
    }
    width = x0 + cell_width * static_cast<double>(map.columns.size()) + gap;
    height = std::max(height, top + cell_height * static_cast<double>(map.rows.size()) + gap);
  }
  QDYLORA_EXPECTS(!maps.empty(), bad_argument, "svg: expected a heat map, found none");
  const std::string size = "width=\"" + number(width) + "\" height=\"" + number(height) + "\"";
  return "<svg xmlns=\"http://www.w3.org/2000/svg\" " + size + " viewBox=\"0 0 " + number(width) + " " + number(height) +
         "\" role=\"img\">\n<title>" + Writer::escape(maps.front().title) + R"(</title>
<style>
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: #1f2733 }
.title { font-size: 16px; font-weight: 600 } .tick { font-size: 12px; fill: #5a6473 } .dark { fill: #ffffff }
.card { fill: #ffffff; stroke: #d9dee5 } .cell { fill: #2f74d0 }
@media (prefers-color-scheme: dark) { text { fill: #e6eaf0 } .tick { fill: #c3cad4 } .card { fill: #14181f; stroke: #2c333d } }
</style>
<rect class="card" )" +
         size + " rx=\"8\"/>\n" + body + "</svg>\n";
}

inline void write_svg(const std::filesystem::path& path, std::span<const HeatMap> maps) { replace_file(path, svg(maps)); }

}  // namespace qdylora::examples
