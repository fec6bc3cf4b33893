// What stands between the commas of compare's --recipes: a method, how a run of it spends its steps on ranks, and what it does otherwise.
//
//   [METHOD:]RECIPE[+CHANGE]...[@FORMAT][*FACTOR]     such as auto, parallel:qdylora, qlora+alpha/sqrt(b), auto+dora@bfloat16, alpha*10
//
//   METHOD    of nn/adapter_method.hpp; lora where none stands. A method alone is METHOD:auto
//   RECIPE    of model/recipe.hpp; or separate: as many runs of qlora as there are ranks, each with an adapter of that rank alone
//   CHANGE    of a recipe; or dora, or lora-plus=RATIO, B's learning rate relative to A's
//   FORMAT    of a base of its own, in place of those of --base-format. Those of alpha are binary1 ... binary8, of as many planes of signs,
//             binary3 where none stands; full has bfloat16, where none stands, or float32
//   FACTOR    its learning rate is this times --lr; 1 where none stands, of full 0.1
#pragma once

#include <algorithm>
#include <charconv>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>

#include <qdylora/core/error.hpp>
#include <qdylora/model/base_weight.hpp>
#include <qdylora/model/recipe.hpp>
#include <qdylora/nn/adapter_method.hpp>

namespace qdylora::examples {

struct ComparedMethod {
  std::string name;  // as it was written
  AdapterMethod method = AdapterMethod::lora;
  Recipe recipe = {};
  bool separate = false;  // a run for each rank
  bool dora = false;
  double lora_plus = 1.0;
  std::optional<BaseOptions> base = {};  // its own, and the only one
  double lr = 1.0;                       // relative to --lr
};

namespace detail {

inline constexpr std::string_view separate_runs = "separate";
inline constexpr double full_lr = 0.1;

/// Whether a text is a method's name.
inline bool is_method(std::string_view text) {
  return std::ranges::any_of(adapter_methods, [&](AdapterMethod method) { return text == name(method); });
}

/// Cuts what stands behind the last `mark` off a text; nothing where there is no mark.
inline std::optional<std::string_view> cut_off(std::string_view& text, char mark) {
  const auto at = text.rfind(mark);
  if (at == text.npos) return std::nullopt;
  const auto part = text.substr(at + 1);
  text = text.substr(0, at);
  return part;
}

/// Errc::bad_argument, with what it is of, for what is no number from 0.001 to 1000.
inline double ratio(std::string_view of, std::string_view text) {
  double value = 0.0;
  const auto [end, status] = std::from_chars(text.data(), text.data() + text.size(), value);
  QDYLORA_EXPECTS(status == std::errc{} && end == text.data() + text.size() && value >= 1e-3 && value <= 1e3, bad_argument,
                  "'" + std::string(of) + "' expects a number, 0.001 ... 1000, found '" + printable(text) + "'");
  return value;
}

/// The base of a method's own. Errors: bad_argument for a format that the method cannot have.
inline BaseOptions own_base(AdapterMethod method, std::string_view format) {
  if (method == AdapterMethod::alpha) {
    constexpr std::string_view binary = "binary";
    QDYLORA_EXPECTS(format.size() == binary.size() + 1 && format.starts_with(binary) && format.back() >= '1' && format.back() <= '8',
                    bad_argument, "the weights of alpha are planes of signs, binary1 ... binary8, not '" + printable(format) + "'");
    return {.binary = BinaryCodeOptions{.planes = format.back() - '0'}};
  }
  const BaseFormat found = base_format(format);
  QDYLORA_EXPECTS(method != AdapterMethod::full || found == BaseFormat::bfloat16 || found == BaseFormat::float32, bad_argument,
                  "full trains the weights themselves, in bfloat16 or float32, not in " + std::string(format));
  return {.format = found};
}

inline ComparedMethod parse_method(std::string_view text) {
  ComparedMethod m{.name = std::string(text)};
  const auto factor = cut_off(text, '*'), format = cut_off(text, '@');
  std::string_view head = text.substr(0, text.find('+')), changes = text.substr(head.size());
  if (const auto colon = head.find(':'); colon != head.npos) {
    m.method = adapter_method(head.substr(0, colon));
    head = head.substr(colon + 1);
  } else if (is_method(head)) {
    m.method = adapter_method(head);
    head = "auto";
  }
  m.separate = head == separate_runs;
  std::string name(m.separate ? "qlora" : head);
  while (!changes.empty()) {
    const auto change = changes.substr(0, changes.find('+', 1));
    changes = changes.substr(change.size());
    const bool dora = change == "+dora", plus = change.starts_with("+lora-plus=");
    QDYLORA_EXPECTS(!(dora && m.dora) && !(plus && m.lora_plus != 1.0), bad_argument,
                    "'" + printable(change) + "' is a second of its kind");
    if (dora) m.dora = true;
    else if (plus) m.lora_plus = ratio("+lora-plus=", change.substr(change.find('=') + 1));
    else name += change;
  }
  m.recipe = recipe(name, m.method);

  const std::string method(qdylora::name(m.method));
  QDYLORA_EXPECTS(has_ranks(m.method) || !m.separate, unsupported, method + " has no ranks to train separately");
  QDYLORA_EXPECTS(has_ranks(m.method) || m.lora_plus == 1.0, unsupported, method + " has no B for +lora-plus");
  QDYLORA_EXPECTS(m.method == AdapterMethod::lora || !m.dora, unsupported, "+dora is for low-rank updates, not " + method);
  const bool whole = m.method == AdapterMethod::full;
  if (format || !has_ranks(m.method)) m.base = own_base(m.method, format.value_or(whole ? "bfloat16" : "binary3"));
  m.lr = factor ? ratio("*", *factor) : whole ? full_lr : 1.0;
  return m;
}

}  // namespace detail

/// One of what `option` lists. Errors, with the option, the text and what it may be: bad_argument for what is not known or written
/// otherwise, unsupported for what does not go together.
inline ComparedMethod compared_method(const std::string& option, const std::string& text) {
  try {
    return detail::parse_method(text);
  } catch (const Error& error) {
    throw Error(error.code(), option + " " + printable(text) + ": " + error.what() +
                                  "; expected [METHOD:]RECIPE[+CHANGE]...[@FORMAT][*FACTOR] with a METHOD of lora, houlsby, parallel, alpha "
                                  "and full, a RECIPE or separate, and a CHANGE of it or dora or lora-plus=RATIO");
  }
}

}  // namespace qdylora::examples
