// Rows of tokens that training runs share: windows of a plain text, or examples of JSON lines.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/core/random.hpp>

#include "dataset.hpp"
#include "evaluation.hpp"
#include "open_model.hpp"

namespace qdylora::examples {

struct RowOptions {
  std::string data;  // plain text where it ends with .txt, else JSON lines
  Index seq_len = 128;
  Index eval_rows = 64;  // held out, at most
  Index answers = 0;     // held-out examples that are asked for answers
};

inline bool plain_text(const std::string& data) { return data.ends_with(".txt"); }

/// Throws Errc::bad_argument for JSON lines with a llama2.c model, whose tokenizer has no end of an answer.
inline void expect_rows_fit(const std::string& data, bool llama2c) {
  QDYLORA_EXPECTS(plain_text(data) || !llama2c, bad_argument, "--data: a llama2.c model is trained on plain text (.txt)");
}

/// The tokens of a text; of a llama2.c model's word by word, for its tokenizer puts a space before each.
inline std::vector<std::int32_t> text_stream(const std::string& data, const OpenModel& model) {
  const auto content = read_text(data);
  if (!model.llama2c) return model.need_tokenizer().encode(content, {.parse_special = false});
  std::vector<std::int32_t> stream;
  for (std::size_t begin = 0; begin < content.size();) {
    const auto end = std::min(content.find(' ', begin), content.size());
    const auto ids = model.need_tokenizer().encode(content.substr(begin, end - begin), {.parse_special = false});
    stream.insert(stream.end(), ids.begin(), ids.end());
    begin = end + 1;
  }
  return stream;
}

/// Rows to train on and to test on. Of plain text, a row is a window of seq_len tokens at a random place, and the last tenth of the text is
/// held out.
class Rows {
 public:
  /// Errc::bad_argument where nothing is left to train on or to hold out.
  Rows(RowOptions options, const OpenModel& model) : options_(std::move(options)) {
    const auto& o = options_;
    if (plain_text(o.data)) {
      const auto stream = text_stream(o.data, model);
      const auto split = static_cast<std::ptrdiff_t>(stream.size() * 9 / 10);
      stream_.assign(stream.begin(), stream.begin() + split);
      const auto window = static_cast<std::size_t>(o.seq_len) + 1;
      QDYLORA_EXPECTS(stream_.size() > 4 * window, bad_argument, "--data: the text is shorter than a row");
      for (Index i = 0; i < o.eval_rows; ++i) {
        const auto begin = static_cast<std::size_t>(split + i * o.seq_len);
        if (begin + window > stream.size()) break;
        test_.push_back(
            {{stream.begin() + static_cast<std::ptrdiff_t>(begin), stream.begin() + static_cast<std::ptrdiff_t>(begin + window)}, 1});
      }
    } else {
      const auto& tokenizer = model.need_tokenizer();
      std::vector<Sample> samples;
      std::vector<Example> examples;  // of each
      for (auto& example : load_examples(o.data))
        if (auto sample = tokenize(example, tokenizer, {.chat = model.chat_template(), .max_length = o.seq_len})) {
          samples.push_back(*std::move(sample));
          examples.push_back(std::move(example));
        }
      const auto count = std::min<std::size_t>(samples.size() / 5, static_cast<std::size_t>(o.eval_rows));
      test_.assign(samples.end() - static_cast<std::ptrdiff_t>(count), samples.end());
      samples.resize(samples.size() - count);
      train_ = std::move(samples);
      questions_ = questions(std::span(examples).last(count), tokenizer, model.chat_template(), o.seq_len, o.answers);
    }
    QDYLORA_EXPECTS(!test_.empty(), bad_argument, "--data: nothing is left to hold out");
    QDYLORA_EXPECTS(o.answers == 0 || !questions_.empty(), bad_argument, "--answers: no held-out example asks something");
  }

  const std::vector<Sample>& test() const noexcept { return test_; }
  const std::vector<Example>& to_answer() const noexcept { return questions_; }  // held out too

  /// Row n of a seed's training data; rows below 0 are held back from it.
  Sample row(std::uint64_t seed, std::int64_t n) const {
    Rng rng(seed, Purpose::data, n < 0 ? 1 : 0, static_cast<std::uint32_t>(n < 0 ? -n : n));
    if (train_.empty()) {  // held-back windows lie in the first 64th of the text, which other rows never reach
      const auto window = static_cast<std::size_t>(options_.seq_len) + 1;
      const std::size_t back = std::max(window + 1, stream_.size() / 64), front = stream_.size() - back;
      const auto begin = static_cast<std::ptrdiff_t>(n < 0 ? rng.below(back - window) : back + rng.below(front - window));
      return {{stream_.begin() + begin, stream_.begin() + begin + static_cast<std::ptrdiff_t>(window)}, 1};
    }
    // Examples: held-back rows are the last 64th of the training set, which other rows never draw.
    const std::uint64_t back = std::max<std::uint64_t>(1, train_.size() / 64), front = train_.size() - back;
    return train_[n < 0 ? front + rng.below(back) : rng.below(front)];
  }

  /// The `count` rows of a seed's step, in batches.
  std::vector<Batch> step(std::uint64_t seed, std::int64_t step, Index count) const {
    std::vector<Sample> samples;
    for (Index i = 0; i < count; ++i) samples.push_back(row(seed, step * count + i));
    return to_batches(samples, 2048);
  }

 private:
  RowOptions options_;
  std::vector<std::int32_t> stream_;
  std::vector<Sample> train_, test_;
  std::vector<Example> questions_;
};

}  // namespace qdylora::examples
