// Line charts as SVG: a measure over ranks (log2 axis), one line per series and a dashed one for the base model. Self-contained: no
// script and no font file; the card brings its own background and follows the reader's light or dark scheme.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include <qdylora/core/error.hpp>

namespace qdylora::examples {

struct Series {
  std::string name;
  std::vector<std::pair<double, double>> points;  // (x, y) by ascending x; a point that is not finite is a gap in the line
};

struct LineChart {
  std::string title;
  std::string x_label;
  std::string y_label;
  std::vector<Series> series;           // at most 8 differ in colour and mark
  std::optional<double> base = {};      // a dashed line at this height
  std::string base_name = "base model";
  bool log2_x = true;                   // x > 0, ticks at the points; false: linear
  bool percent = false;                 // y is a fraction, shown as per cent
};

namespace detail {

class ChartWriter {
 public:
  static constexpr double width = 560, height = 380;  // of one chart

  ChartWriter(const LineChart& chart, double left) : chart_(chart), left_(left + 68), right_(left + width - 22) {
    measure();
  }

  std::string svg() {
    const double middle = (left_ + right_) / 2;
    text(left_, 30, "title", "start", chart_.title);
    const double legend_rows = legend();
    top_ = 48 + 20 * legend_rows;
    bottom_ = height - 56;
    std::size_t longest = 0;
    for (const double y : y_ticks_) {
      const std::string tick = chart_.percent ? number(100 * y, y_decimals_) + "%" : number(y, y_decimals_);
      line(left_, y_at(y), right_, y_at(y), "grid");
      text(left_ - 10, y_at(y) + 4, "tick", "end", tick);
      longest = std::max(longest, tick.size());
    }
    line(left_, bottom_, right_, bottom_, "axis");
    for (double last = left_ - width; const double x : x_ticks_) {
      if (x_at(x) < last + 28) continue;  // no room for another number
      last = x_at(x);
      line(x_at(x), bottom_, x_at(x), bottom_ + 5, "axis");
      text(x_at(x), bottom_ + 20, "tick", "middle", number(x, chart_.log2_x ? 0 : x_decimals_));
    }
    text(middle, height - 14, "label", "middle", chart_.x_label);
    out_ += "<text class=\"label\" text-anchor=\"middle\" transform=\"translate(" +
            number(left_ - 22 - 7.2 * static_cast<double>(longest)) + " " + number((top_ + bottom_) / 2) + ") rotate(-90)\">" +
            escape(chart_.y_label) + "</text>\n";
    if (chart_.base) line(left_, y_at(*chart_.base), right_, y_at(*chart_.base), "base");
    for (std::size_t i = chart_.series.size(); i-- > 0;) draw(i);  // the first on top
    return std::move(out_);
  }

  static std::string number(double value, int decimals = 1) {
    std::array<char, 64> buffer;  // std::to_chars knows no locale; a value that does not fit is no number a chart can show
    const auto result = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value, std::chars_format::fixed, decimals);
    if (result.ec != std::errc{}) return "?";
    const std::string text(buffer.data(), result.ptr);
    return text.find_first_not_of("-0.") == text.npos && text.front() == '-' ? text.substr(1) : text;
  }

  static std::string escape(std::string_view text) {
    std::string out;
    for (const char c : text) {
      switch (c) {
        case '&': out += "&amp;"; break;
        case '<': out += "&lt;"; break;
        case '>': out += "&gt;"; break;
        case '"': out += "&quot;"; break;
        default: out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
      }
    }
    return out;
  }

 private:
  static bool finite(const std::pair<double, double>& point) { return std::isfinite(point.first) && std::isfinite(point.second); }

  /// Ranges and ticks of both axes.
  void measure() {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    double x_low = infinity, x_high = -infinity, y_low = infinity, y_high = -infinity;
    const auto cover_y = [&](double y) { y_low = std::min(y_low, y), y_high = std::max(y_high, y); };
    for (const Series& series : chart_.series) {
      for (const auto& point : series.points) {
        if (!finite(point)) continue;
        QDYLORA_EXPECTS(!chart_.log2_x || point.first > 0, bad_argument,
                        "chart: expected x > 0 on a log axis, found " + std::to_string(point.first) + " in '" + series.name + "'");
        x_low = std::min(x_low, point.first), x_high = std::max(x_high, point.first);
        if (chart_.log2_x) x_ticks_.push_back(point.first);
        cover_y(point.second);
      }
    }
    QDYLORA_EXPECTS(x_low <= x_high, bad_argument, "chart: expected a point, found none in '" + chart_.title + "'");
    if (chart_.base) {
      QDYLORA_EXPECTS(std::isfinite(*chart_.base), bad_argument, "chart: expected a finite base in '" + chart_.title + "'");
      cover_y(*chart_.base);
    }
    const double margin = y_high > y_low ? 0.06 * (y_high - y_low) : std::max(0.05 * std::abs(y_high), 1e-3);
    y_low_ = y_low - margin;
    y_high_ = y_high + margin;
    if (chart_.percent) y_low_ = std::max(y_low_, std::min(0.0, y_low)), y_high_ = std::min(y_high_, std::max(1.0, y_high));
    const double scale = chart_.percent ? 100 : 1;
    std::tie(y_ticks_, y_decimals_) = nice_ticks(scale * y_low_, scale * y_high_);
    for (double& tick : y_ticks_) tick /= scale;
    if (chart_.log2_x) {
      std::sort(x_ticks_.begin(), x_ticks_.end());
      x_ticks_.erase(std::unique(x_ticks_.begin(), x_ticks_.end()), x_ticks_.end());
    } else {
      std::tie(x_ticks_, x_decimals_) = nice_ticks(x_low, x_high > x_low ? x_high : x_low + 1);
    }
    x_low_ = scaled(x_low);
    x_high_ = scaled(x_high);
    if (x_high_ == x_low_) x_low_ -= 1, x_high_ += 1;
    const double x_margin = 0.03 * (x_high_ - x_low_);
    x_low_ -= x_margin, x_high_ += x_margin;
  }

  /// About five ticks at multiples of 1, 2 or 5 times a power of ten, and the decimals that they need.
  static std::pair<std::vector<double>, int> nice_ticks(double low, double high) {
    const double raw = (high - low) / 5;
    const double power = std::pow(10.0, std::floor(std::log10(raw)));
    const double step = power * (raw <= 1.5 * power ? 1 : raw <= 3.5 * power ? 2 : raw <= 7.5 * power ? 5 : 10);
    std::vector<double> ticks;
    for (double i = std::ceil(low / step); i <= std::floor(high / step) && ticks.size() < 16; ++i) ticks.push_back(i * step);
    const int decimals = static_cast<int>(std::clamp(-std::floor(std::log10(step) + 1e-9), 0.0, 12.0));
    return {std::move(ticks), decimals};
  }

  double scaled(double x) const { return chart_.log2_x ? std::log2(x) : x; }
  double x_at(double x) const { return left_ + (scaled(x) - x_low_) / (x_high_ - x_low_) * (right_ - left_); }
  double y_at(double y) const { return bottom_ - (y - y_low_) / (y_high_ - y_low_) * (bottom_ - top_); }

  void text(double x, double y, std::string_view style, std::string_view anchor, std::string_view content) {
    out_ += "<text class=\"" + std::string(style) + "\" x=\"" + number(x) + "\" y=\"" + number(y) + "\" text-anchor=\"" +
            std::string(anchor) + "\">" + escape(content) + "</text>\n";
  }
  void line(double x1, double y1, double x2, double y2, std::string_view style) {
    out_ += "<line class=\"" + std::string(style) + "\" x1=\"" + number(x1) + "\" y1=\"" + number(y1) + "\" x2=\"" + number(x2) +
            "\" y2=\"" + number(y2) + "\"/>\n";
  }
  /// Shape and colour both tell the series, for readers who see colours differently.
  void mark(std::size_t series, double x, double y) {
    constexpr std::array<std::string_view, 4> shapes{"<circle r=\"4\"", "<rect x=\"-3.6\" y=\"-3.6\" width=\"7.2\" height=\"7.2\"",
                                                     "<path d=\"M0-5 4.6 3.6-4.6 3.6Z\"", "<path d=\"M0-5 5 0 0 5-5 0Z\""};
    out_ += std::string(shapes[series % shapes.size()]) + " class=\"mark c" + std::to_string(series % 8) +
            "\" transform=\"translate(" + number(x) + " " + number(y) + ")\"/>\n";
  }

  void draw(std::size_t series) {
    const auto& points = chart_.series[series].points;
    std::string path;
    bool pen_down = false;
    for (const auto& point : points) {
      const bool draws = finite(point);
      if (draws) path += (pen_down ? "L" : "M") + number(x_at(point.first)) + " " + number(y_at(point.second));
      pen_down = draws;
    }
    out_ += "<path class=\"line c" + std::to_string(series % 8) + "\" d=\"" + path + "\"/>\n";
    if (points.size() > 32) return;  // a curve: marks would hide it
    for (const auto& point : points) {
      if (finite(point)) mark(series, x_at(point.first), y_at(point.second));
    }
  }

  /// Draws the legend under the title; returns its number of rows.
  double legend() {
    double x = left_, y = 54, rows = 1;
    const auto place = [&](std::string_view name) {  // where an entry goes, by an estimate of its width
      const double needed = 34 + 7.0 * static_cast<double>(name.size());
      if (x > left_ && x + needed > right_) x = left_, y += 20, ++rows;
      return std::exchange(x, x + needed + 14);
    };
    for (std::size_t i = 0; i < chart_.series.size(); ++i) {
      const double at = place(chart_.series[i].name);
      line(at, y - 4, at + 24, y - 4, "line c" + std::to_string(i % 8));
      mark(i, at + 12, y - 4);
      text(at + 31, y, "key", "start", chart_.series[i].name);
    }
    if (chart_.base) {
      const double at = place(chart_.base_name);
      line(at, y - 4, at + 24, y - 4, "base");
      text(at + 31, y, "key", "start", chart_.base_name);
    }
    return rows;
  }

  const LineChart& chart_;
  double left_, right_, top_ = 0, bottom_ = 0;  // of the plot, in pixels
  double x_low_ = 0, x_high_ = 0, y_low_ = 0, y_high_ = 0;
  std::vector<double> x_ticks_, y_ticks_;
  int x_decimals_ = 0, y_decimals_ = 0;
  std::string out_;
};

}  // namespace detail

/// The charts side by side as one SVG document. Errors: bad_argument (no chart, a chart without points, x <= 0 on a log axis).
inline std::string svg(std::span<const LineChart> charts) {
  QDYLORA_EXPECTS(!charts.empty(), bad_argument, "svg: expected a chart, found none");
  const std::string width = detail::ChartWriter::number(detail::ChartWriter::width * static_cast<double>(charts.size()), 0);
  const std::string height = detail::ChartWriter::number(detail::ChartWriter::height, 0);
  std::string out = "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" + width + "\" height=\"" + height + "\" viewBox=\"0 0 " +
                    width + " " + height + "\" role=\"img\">\n<title>" + detail::ChartWriter::escape(charts.front().title) +
                    "</title>\n";
  out += R"(<style>
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: #1f2733 }
.title { font-size: 16px; font-weight: 600 }
.key, .label { font-size: 12.5px; fill: #3d4755 }
.tick { font-size: 12px; fill: #5a6473 }
.card { fill: #ffffff; stroke: #d9dee5 }
.grid { stroke: #e8ebef; stroke-width: 1 }
.axis { stroke: #98a1ae; stroke-width: 1 }
.base { stroke: #5a6473; stroke-width: 1.6; stroke-dasharray: 6 4 }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round }
.mark { stroke: #ffffff; stroke-width: 1.2 }
)";
  constexpr std::array<std::string_view, 8> colours{"#2f74d0", "#e0702b", "#1f9d78", "#a355c0",
                                                    "#d1495b", "#9a8a1c", "#2aa3b8", "#7d6b5d"};
  for (std::size_t i = 0; i < colours.size(); ++i) {
    const std::string name = ".c" + std::to_string(i), colour(colours[i]);
    out += ".line" + name + " { stroke: " + colour + " } .mark" + name + " { fill: " + colour + " }\n";
  }
  out += R"(@media (prefers-color-scheme: dark) {
text { fill: #e6eaf0 } .key, .label { fill: #c3cad4 } .tick { fill: #98a3b3 }
.card { fill: #14181f; stroke: #2c333d } .grid { stroke: #252b34 } .axis { stroke: #5c6674 } .base { stroke: #98a3b3 }
.mark { stroke: #14181f }
}
</style>
)";
  out += "<rect class=\"card\" x=\"0.5\" y=\"0.5\" width=\"" +
         detail::ChartWriter::number(detail::ChartWriter::width * static_cast<double>(charts.size()) - 1, 0) + "\" height=\"" +
         detail::ChartWriter::number(detail::ChartWriter::height - 1, 0) + "\" rx=\"8\"/>\n";
  for (std::size_t i = 0; i < charts.size(); ++i) {
    out += detail::ChartWriter(charts[i], detail::ChartWriter::width * static_cast<double>(i)).svg();
  }
  return out + "</svg>\n";
}

/// Writes the charts side by side to a file. Errors: open, write, and those of svg().
inline void write_svg(const std::filesystem::path& path, std::span<const LineChart> charts) {
  const std::string text = svg(charts);
  std::ofstream file(path, std::ios::binary);
  if (!file) throw Error(Errc::open, "cannot create the chart", {.file = path.string()});
  file << text;
  file.close();
  if (!file) throw Error(Errc::write, "cannot write the chart", {.file = path.string()});
}

}  // namespace qdylora::examples
