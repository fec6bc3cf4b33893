// Multiple-choice questions as MMLU has them (Hendrycks et al. 2021): reads them, and writes the prompts of MMLU's own program,
// hendrycks/test's evaluate.py, which shows examples of the same subject first.
//   JSON lines (.jsonl, .ndjson, .json; a .json file may also be one array): question, choices (a list), answer (a number from 0, or a
//     letter), and optionally subject
//   MMLU's CSV (.csv): rows "question,A,B,C,D,answer" without a head; SUBJECT_test.csv, _dev.csv and _val.csv are of SUBJECT
#pragma once

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/core/error.hpp>
#include <qdylora/model/score.hpp>
#include <qdylora/model/tokenizer.hpp>

#include "dataset.hpp"
#include "json_lines.hpp"
#include "sample_questions.hpp"

namespace qdylora::examples {

struct ChoiceQuestion {
  std::string question;
  std::vector<std::string> choices;
  std::size_t answer = 0;  // position in choices
  std::string subject;     // "": of none
  std::string where;       // its line, for errors
};

struct ChoiceFile {
  std::string file;
  std::vector<ChoiceQuestion> questions;
};

/// What of a question is scored: the letter before each choice, as MMLU does it; or the choices themselves, which the prompt does not list,
/// their log-likelihood divided by their characters.
enum class ChoiceScore { letters, answers };

namespace detail {

inline std::string choice_letter(std::size_t i) { return std::string(1, static_cast<char>('A' + i)); }

class ChoiceReader : public ObjectReader {
 public:
  using ObjectReader::ObjectReader;

  ChoiceQuestion read(const Json& object, const std::string& where) const {
    ChoiceQuestion q{text(object, "question", where), texts(object, "choices", where), 0, "", where};
    if (object.contains("subject")) q.subject = text(object, "subject", where);
    const Json& answer = field(object, "answer", where);
    if (answer.is_string()) {
      finish(q, answer.get_ref<const std::string&>());
    } else if (answer.is_number_integer()) {
      const bool known = answer.is_number_unsigned() && answer.get<std::uint64_t>() < q.choices.size();
      finish(q, known ? choice_letter(answer.get<std::size_t>()) : answer.dump());
    } else {
      fail(where, "expected field 'answer' to be a number or a letter, found " + std::string(answer.type_name()));
    }
    return q;
  }

  ChoiceQuestion read(std::vector<std::string> row, const std::string& subject, const std::string& where) const {
    if (row.size() < 4)
      bad(where, "expected a question, two choices or more and a letter, found " + std::to_string(row.size()) + " fields");
    ChoiceQuestion q{std::move(row.front()), {row.begin() + 1, row.end() - 1}, 0, subject, where};
    finish(q, row.back());
    return q;
  }

 private:
  [[noreturn]] void bad(const std::string& where, const std::string& message) const {
    throw Error(Errc::bad_config, where + ": " + message, {.file = file_});
  }

  void finish(ChoiceQuestion& q, const std::string& answer) const {
    const std::size_t count = q.choices.size();
    if (trim(q.question).empty()) bad(q.where, "expected text in the question, found none");
    if (count < 2 || count > 26) bad(q.where, "expected 2 ... 26 choices, found " + std::to_string(count));
    for (std::size_t i = 0; i < count; ++i)
      if (trim(q.choices[i]).empty()) bad(q.where, "expected text in choice " + choice_letter(i) + ", found none");
    q.answer = answer.size() == 1 ? static_cast<std::size_t>(static_cast<unsigned char>(answer[0])) - 'A' : count;
    if (q.answer >= count)
      bad(q.where, "expected an answer of A ... " + choice_letter(count - 1) + " or 0 ... " + std::to_string(count - 1) + ", found '" +
                       printable(answer, 40) + "'");
  }
};

/// f(fields, where) for each row of comma-separated values (RFC 4180): a field in quotes may hold commas, line feeds and, doubled, quotes.
/// Empty lines are skipped. Errors: bad_config (text behind a closing quote, a quote that is never closed), with file and line.
template <class F>
void for_each_row(const std::string& file, std::string_view text, F&& f) {
  std::vector<std::string> row;
  std::string field;
  Index line = 1, first = 1;
  bool quoted = false, closed = false;  // within quotes; behind them
  const auto fail = [&](Index at, const char* message) {
    throw Error(Errc::bad_config, "line " + std::to_string(at) + ": " + message, {.file = file});
  };
  const auto end_row = [&] {
    if (!row.empty() || !field.empty() || closed) {
      row.push_back(std::exchange(field, {}));
      f(std::exchange(row, {}), "line " + std::to_string(first));
    }
    closed = false;
  };
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    line += c == '\n' ? 1 : 0;
    if (quoted) {
      if (c != '"') field += c;
      else if (i + 1 < text.size() && text[i + 1] == '"') field += text[++i];
      else quoted = false, closed = true;
    } else if (c == '\n') {
      end_row();
      first = line;
    } else if (c == ',') {
      row.push_back(std::exchange(field, {}));
      closed = false;
    } else if (c == '"' && field.empty() && !closed) {
      quoted = true;
    } else if (c != '\r' || (i + 1 < text.size() && text[i + 1] != '\n')) {
      if (closed) fail(line, "expected a comma behind a closing quote");
      field += c;
    }
  }
  if (quoted) fail(first, "expected a closing quote, found none");
  end_row();
}

}  // namespace detail

/// The questions of a text; `extension` is .csv or one of JSON lines, `subject` that of a CSV's rows. Errors, with file and line: json (fields
/// absent or of other types, syntax), bad_config (no text, fewer than two choices or more than 26, an answer that is none of them; no
/// questions at all), those of parse_json.
inline ChoiceFile read_choices(const std::string& file, std::string_view text, const std::string& extension,
                               const std::string& subject = "") {
  const detail::ChoiceReader reader(file);
  ChoiceFile result{file, {}};
  if (extension == ".csv") {
    if (utf8_error(text)) throw Error(Errc::utf8, "is not UTF-8", {.file = file, .tensor = {}, .offset = *utf8_error(text)});
    detail::for_each_row(file, text, [&](std::vector<std::string> row, const std::string& where) {
      result.questions.push_back(reader.read(std::move(row), subject, where));
    });
  } else {
    detail::for_each_object(file, text, extension == ".json",
                            [&](const Json& object, const std::string& where) { result.questions.push_back(reader.read(object, where)); });
  }
  if (result.questions.empty()) throw Error(Errc::bad_config, "expected questions, found an empty file", {.file = file});
  return result;
}

/// The questions of a file. Errors: open, read, and those of read_choices.
inline ChoiceFile load_choices(const std::filesystem::path& path) {
  std::string subject;
  if (path.extension() == ".csv") {
    subject = path.stem().string();
    for (const std::string_view part : {"_test", "_dev", "_val"})
      if (subject.ends_with(part)) {
        subject.resize(subject.size() - part.size());
        break;
      }
  }
  return read_choices(path.string(), detail::read_data(path), path.extension().string(), subject);
}

/// What is asked: a prompt, and what may follow it.
struct ChoicePrompt {
  std::string text;
  std::vector<std::string> choices;  // of which one is to follow, behind a space
  std::size_t answer = 0;
  std::string subject, where;
};

namespace detail {

inline std::string choice_block(const ChoiceQuestion& q, ChoiceScore score, bool answered) {
  std::string text = q.question;
  if (score == ChoiceScore::letters)
    for (std::size_t i = 0; i < q.choices.size(); ++i) text += "\n" + choice_letter(i) + ". " + q.choices[i];
  text += "\nAnswer:";
  if (answered) text += " " + (score == ChoiceScore::letters ? choice_letter(q.answer) : q.choices[q.answer]) + "\n\n";
  return text;
}

/// Two spaces stand before the subject, as in the prompts of MMLU's program.
inline std::string choice_head(const std::string& subject, ChoiceScore score) {
  std::string text = score == ChoiceScore::letters ? "The following are multiple choice questions (with answers)"
                                                   : "The following are questions (with answers)";
  if (!subject.empty()) text += " about  " + subject;
  std::replace(text.begin(), text.end(), '_', ' ');
  return text + ".\n\n";
}

}  // namespace detail

/// The prompts of all questions with `shots` answered ones of the same subject before each: the first of `dev`; without it (null), the first
/// of the file itself, which are then not asked. Errors: bad_argument, with file and line, for a subject of too few.
inline std::vector<ChoicePrompt> choice_prompts(const ChoiceFile& asked, const ChoiceFile* dev, Index shots, ChoiceScore score) {
  QDYLORA_EXPECTS(shots >= 0, bad_argument, "choice_prompts: expected a number of shots, found " + std::to_string(shots));
  std::map<std::string, std::vector<const ChoiceQuestion*>> of_subject;
  for (const auto& q : (dev != nullptr ? *dev : asked).questions) of_subject[q.subject].push_back(&q);
  std::vector<ChoicePrompt> prompts;
  for (const auto& q : asked.questions) {
    auto& all = of_subject[q.subject];
    const auto found = static_cast<Index>(all.size());
    if (found < shots + (dev != nullptr ? 0 : 1))
      throw Error(Errc::bad_argument,
                  q.where + ": expected " + std::to_string(shots) + " questions of the subject '" + printable(q.subject, 80) + "' in " +
                      (dev != nullptr ? dev->file : "the file, and others to ask") + ", found " + std::to_string(found),
                  {.file = asked.file});
    const auto shown = std::span(all).first(static_cast<std::size_t>(shots));
    if (dev == nullptr && std::find(shown.begin(), shown.end(), &q) != shown.end()) continue;
    ChoicePrompt prompt{detail::choice_head(q.subject, score), {}, q.answer, q.subject, q.where};
    for (const auto* shot : shown) prompt.text += detail::choice_block(*shot, score, true);
    prompt.text += detail::choice_block(q, score, false);
    for (std::size_t i = 0; i < q.choices.size(); ++i)
      prompt.choices.push_back(score == ChoiceScore::letters ? detail::choice_letter(i) : q.choices[i]);
    prompts.push_back(std::move(prompt));
  }
  return prompts;
}

/// Token ids of a prompt and its choices. Plain: those of the prompt, a space and the choice, encoded together; what all choices share counts
/// as prompt. With the chat template: the prompt is the user's, and the assistant's turn begins with the choice. Errors:
/// bad_argument, with file and line, where they do not fit a context of so many tokens; unsupported as encode.
inline Continuations choice_ids(const ChoicePrompt& prompt, const Tokenizer& tokenizer, const ChatTemplate* chat, Index context,
                                const std::string& file) {
  Continuations result;
  if (chat != nullptr) {
    result.prompt = prompt_ids({prompt.text, ""}, tokenizer, chat);
    for (const auto& choice : prompt.choices) result.texts.push_back(encode_answer_start(tokenizer, *chat, result.prompt, choice));
  } else {
    for (const auto& choice : prompt.choices) {
      result.texts.emplace_back();
      if (tokenizer.adds_bos()) result.texts.back().push_back(tokenizer.bos());
      const auto ids = tokenizer.encode(prompt.text + " " + choice, {.parse_special = false});
      result.texts.back().insert(result.texts.back().end(), ids.begin(), ids.end());
    }
    std::size_t shared = result.texts.front().size() - 1;  // a token at least is left of each
    for (const auto& ids : result.texts) {
      const auto [at, end] = std::mismatch(result.texts.front().begin(), result.texts.front().end(), ids.begin(), ids.end());
      shared = std::min({shared, static_cast<std::size_t>(at - result.texts.front().begin()), ids.size() - 1});
    }
    const auto cut = static_cast<std::ptrdiff_t>(shared);
    result.prompt.assign(result.texts.front().begin(), result.texts.front().begin() + cut);
    for (auto& ids : result.texts) ids.erase(ids.begin(), ids.begin() + cut);
  }
  std::size_t longest = 0;
  for (const auto& ids : result.texts) longest = std::max(longest, ids.size());
  const auto length = static_cast<Index>(result.prompt.size() + longest) - 1;  // the last is no input
  if (length > context)
    throw Error(Errc::bad_argument,
                prompt.where + ": the prompt and its longest choice have " + std::to_string(length) + " tokens, the model's context is " +
                    std::to_string(context),
                {.file = file});
  return result;
}

}  // namespace qdylora::examples
