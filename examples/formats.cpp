// What the format of frozen weights costs (QLoRA's Table 2): the error of the weights, bits per weight, and a model's loss on texts, for
// each format and block size, with float32 scales and with double-quantized ones.
//
//   formats                                                        normal weights alone
//   formats --model FILE --data A.txt --data B.jsonl               those of a model, with its losses on the texts
//
// Weights are decoded to float32 before the products, so that all formats run through the same arithmetic. Differences of losses are over
// the same examples, with the 95 % interval of a paired bootstrap. --own-text has the model write texts, sampled from its distribution: what a
// format's loss is above the model's own there is, in the mean, their Kullback-Leibler divergence. The tables are printed in Markdown.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <string>
#include <variant>
#include <vector>

#include <qdylora/io.hpp>
#include <qdylora/model.hpp>

#include "common/dataset.hpp"
#include "common/evaluation.hpp"
#include "common/model.hpp"
#include "common/other_formats.hpp"
#include "common/program.hpp"
#include "common/weight_error.hpp"

namespace {

using namespace qdylora;
using namespace qdylora::examples;
using Linear = WeightFor<AnyFormat>;
using Linears = std::vector<std::shared_ptr<const Linear>>;

struct Options {
  std::string model, tokenizer, chat = "model", formats = "nf4,af4,fp4,e2m1,e3m0,int4,int4_16,fp8_e4m3,fp8_e5m2,int8", block_sizes = "64,128";
  std::vector<std::string> data;
  Index examples = 32, seq_len = 256, own = 0;
  int threads = 0;
  std::uint64_t seed = 0;
};

void declare(CLI::App& app, Options& o) {
  auto* model =
      app.add_option("--model", o.model, "a .gguf file, a Hugging Face folder, or a llama2.c .bin file; default: normal weights alone")
          ->check(not_empty());
  app.add_option("--tokenizer", o.tokenizer, "a .gguf file, or a folder with tokenizer.json; of a .bin model llama2.c's")
      ->check(not_empty())
      ->needs(model);
  app.add_option("--data", o.data, "JSON lines or plain text, as for finetune; once for each text")->check(not_empty())->needs(model);
  app.add_option("--formats", o.formats,
                 "nf4, af4 (AbnormalFloat), fp4 (bitsandbytes'), e2m1, e3m0, int4 (-7 ... 7), int4_16 (-8 ... 7), "
                 "fp8_e4m3, fp8_e5m2 and int8")
      ->capture_default_str();
  app.add_option("--block-sizes", o.block_sizes, "weights that share a scale: powers of two in 32 ... 4096")->capture_default_str();
  add_number(app, "--examples", o.examples, "of each text at most, from all over it", 1, most_examples);
  add_number(app, "--own-text", o.own, "texts of --seq-len tokens that the model itself writes, as one more text", 0, most_batch);
  add_number(app, "--seq-len", o.seq_len, "tokens of an example at most", 2, most_tokens);
  add_number(app, "--threads", o.threads, "0: one for each processor", 0, most_threads);
  add_number(app, "--seed", o.seed, "of the normal weights, and of --own-text", 0, std::uint64_t{1} << 62);
  add_chat_template(app, o.chat);
}

/// f(Format{}) of the format of a name. Errc::bad_argument lists them if there is none such.
template <class F>
void with_format(const std::string& name, F&& f) {
  std::string known;
  bool found = false;
  const auto one = [&]<class Format>(Format format) {
    known += (known.empty() ? "" : ", ") + std::string(Format::name);
    if (name != Format::name) return;
    found = true;
    f(format);
  };
  const auto all = [&]<class... Formats>(Formats... formats) { (one(formats), ...); };
  all(NF4{}, AF4{}, FP4{}, E2M1{}, E3M0{}, INT4{}, INT4Of16{}, FP8E4M3{}, FP8E5M2{}, INT8{});
  QDYLORA_EXPECTS(found, bad_argument, "--formats: no format '" + printable(name) + "'; there are " + known);
}

struct Variant {
  std::string format;
  Index block_size;
};

/// What a variant takes and changes.
struct Cost {
  WeightError error;
  std::size_t bytes = 0;
  Index count = 0;

  double bits() const noexcept { return 8.0 * static_cast<double>(bytes) / static_cast<double>(count); }
};

/// The weight as a format leaves it.
template <class Scales>
Matrix<float> rounded(MatrixView<const float> weight, const Variant& variant, const Cpu& cpu, Cost& cost) {
  Matrix<float> decoded(weight.rows, weight.cols);
  with_format(variant.format, [&]<class Format>(Format) {
    const auto tensor = cpu.quantize<Format, Scales>(weight, {.block_size = variant.block_size});
    cpu.dequantize(tensor.view(), decoded.view());
    cost.bytes += tensor.bytes();
  });
  cost.error.add(decoded.view(), weight);
  cost.count += weight.rows * weight.cols;
  return decoded;
}

/// One variant with scales of either kind.
struct Row {
  Variant variant;
  Cost plain, nested;
  std::vector<RankResult> plain_losses, nested_losses;  // of each text
};

std::string number(const char* pattern, double value) {
  char text[64];
  std::snprintf(text, sizeof text, pattern, value);
  return text;
}

std::string difference(const RankResult& a, const RankResult& b) {
  const auto d = paired_difference(a.example_losses, b.example_losses, a.example_tokens);
  return number("%+.4f", d.value) + " [" + number("%+.4f", d.low) + ", " + number("%+.4f", d.high) + "]";
}

void print_errors(const std::string& of, const std::vector<Row>& rows) {
  std::printf("\n| %s | block | bits | mean abs. error | SQNR, dB | bits, DQ | mean abs. error, DQ | SQNR, dB, DQ |\n", of.c_str());
  std::printf("|---|---|---|---|---|---|---|---|\n");
  for (const auto& row : rows) {
    std::printf("| %s | %lld |", row.variant.format.c_str(), static_cast<long long>(row.variant.block_size));
    for (const auto* cost : {&row.plain, &row.nested})
      std::printf(" %.3f | %.3f %% | %.3f |", cost->bits(), 100.0 * cost->error.absolute(), cost->error.signal_to_noise());
    std::printf("\n");
  }
}

void print_losses(const std::string& text, std::size_t at, const RankResult& whole, const std::vector<Row>& rows) {
  double scored = 0.0;
  for (const double tokens : whole.example_tokens) scored += tokens;
  std::printf(
      "\n| %s | block | bits | loss | perplexity | bits, DQ | loss, DQ | perplexity, DQ | DQ above float32 weights | DQ above nf4's "
      "| DQ above float32 scales |\n|---|---|---|---|---|---|---|---|---|---|---|\n",
      text.c_str());
  std::printf("| float32 | – | 32 | %.4f | %.3f | – | – | – | – | – | – |\n", whole.loss, std::exp(whole.loss));
  for (const auto& row : rows) {
    const auto &plain = row.plain_losses[at], &nested = row.nested_losses[at];
    const auto nf4 = std::find_if(rows.begin(), rows.end(), [&](const Row& other) {
      return other.variant.format == NF4::name && other.variant.block_size == row.variant.block_size && &other != &row;
    });
    std::printf("| %s | %lld | %.3f | %.4f | %.3f | %.3f | %.4f | %.3f | %s | %s | %s |\n", row.variant.format.c_str(),
                static_cast<long long>(row.variant.block_size), row.plain.bits(), plain.loss, std::exp(plain.loss), row.nested.bits(),
                nested.loss, std::exp(nested.loss), difference(nested, whole).c_str(),
                nf4 == rows.end() ? "–" : difference(nested, nf4->nested_losses[at]).c_str(), difference(nested, plain).c_str());
  }
  std::printf("\n%.0f tokens scored in %zu examples.\n", scored, whole.example_losses.size());
}

/// `count` examples from all over a text.
std::vector<Sample> samples_of(const std::string& file, const Options& o, const OpenModel& model) {
  const auto examples = load_examples(file);
  const auto size = examples.size(), count = std::min(size, static_cast<std::size_t>(o.examples));
  std::vector<Example> chosen;
  for (std::size_t i = 0; i < count; ++i) chosen.push_back(examples[i * size / count]);
  auto samples = tokenize(chosen, model.need_tokenizer(), {.chat = model.chat_template(), .max_length = o.seq_len}).samples;
  if (samples.empty())
    throw Error(Errc::bad_argument, "no example has a scored token within --seq-len " + std::to_string(o.seq_len), {.file = file});
  return samples;
}

/// Texts that the model writes on the token that begins a text, with its weights as they are now.
std::vector<Sample> own_text(Decoder<float>& decoder, const Options& o, const Tokenizer& tokenizer) {
  const std::int32_t first = tokenizer.bos() >= 0 ? tokenizer.bos() : tokenizer.eos();
  QDYLORA_EXPECTS(first >= 0, unsupported, "--own-text: the tokenizer has no token that begins or ends a text");
  const std::vector<std::vector<std::int32_t>> prompts(static_cast<std::size_t>(o.own), {first});
  const auto texts =
      generate(decoder, std::span(prompts), RankPlan::uniform(0), {.max_tokens = o.seq_len - 1, .temperature = 1.0f, .seed = o.seed});
  std::vector<Sample> samples;
  for (const auto& text : texts) {
    samples.push_back({{first}, 1});
    samples.back().ids.insert(samples.back().ids.end(), text.begin(), text.end());
  }
  return samples;
}

/// The linear weights of all blocks in float32; a checkpoint that is in 4 bits is decoded.
Linears float_linears(const DecoderWeights<float>& weights, const Cpu& cpu) {
  Linears linears;
  for (const auto& block : weights.blocks)
    for (const auto& weight : block->linear) {
      if (std::holds_alternative<Matrix<float>>(weight->storage())) {
        linears.push_back(weight);
      } else {
        Matrix<float> dense(weight->rows(), weight->cols());
        decode(*weight, dense.view(), cpu);
        linears.push_back(std::make_shared<const Linear>(std::move(dense)));
      }
    }
  return linears;
}

void measure_normal(std::vector<Row> rows, std::uint64_t seed, const Cpu& cpu) {
  Matrix<float> weight(1024, 1024);
  Rng rng(seed, Purpose::data);
  for (float& w : weight.span()) w = rng.normal();
  for (auto& row : rows) {
    rounded<Float32Scales>(weight.view(), row.variant, cpu, row.plain);
    rounded<DoubleQuant<>>(weight.view(), row.variant, cpu, row.nested);
  }
  print_errors("normal weights", rows);
}

void measure_model(std::vector<Row> rows, const Options& o, OpenModel& model, const Cpu& cpu) {
  std::vector<std::vector<Sample>> texts;
  std::vector<std::string> names;
  for (const auto& file : o.data) {
    texts.push_back(samples_of(file, o, model));
    names.push_back(printable_utf8(std::filesystem::path(file).filename().string()));
  }
  const auto weights = model.read(model.base);
  const Linears linears = float_linears(*weights, cpu);
  Decoder<float> decoder(weights, {.lora = {.max_rank = 1}}, cpu);
  const std::vector<Index> base_alone = {0};
  const auto losses = [&] {
    std::vector<RankResult> results;
    for (const auto& text : texts) results.push_back(evaluate_losses(decoder, text, base_alone).front());
    return results;
  };
  std::size_t next = 0;
  decoder.for_each_linear([&](auto& linear) { linear.set_base(linears[next++]); });
  if (o.own > 0) {
    texts.push_back(own_text(decoder, o, model.need_tokenizer()));
    names.push_back("the model's own text");
  }
  const auto whole = losses();
  const auto measure = [&]<class Scales>(Scales, const Variant& variant, Cost& cost) {
    next = 0;
    decoder.for_each_linear([&](auto& linear) {
      const auto weight = linears[next++]->template get<Matrix<float>>().view();
      linear.set_base(std::make_shared<const Linear>(rounded<Scales>(weight, variant, cpu, cost)));
    });
    return losses();
  };
  for (auto& row : rows) {
    std::fprintf(stderr, "%s, blocks of %lld\n", row.variant.format.c_str(), static_cast<long long>(row.variant.block_size));
    row.plain_losses = measure(Float32Scales{}, row.variant, row.plain);
    row.nested_losses = measure(DoubleQuant<>{}, row.variant, row.nested);
  }
  print_errors(model.name, rows);
  for (std::size_t i = 0; i < texts.size(); ++i) print_losses(names[i], i, whole[i], rows);
}

int formats(const Options& o) {
  std::vector<Row> rows;
  const auto names = parse_list("--formats", o.formats);
  for (const auto& name : names) with_format(name, [](auto) {});
  for (const Index size : parse_numbers<Index>("--block-sizes", o.block_sizes)) {
    QDYLORA_EXPECTS(is_block_size(size), block_size, "--block-sizes: expected powers of two in 32 ... 4096, found " + std::to_string(size));
    for (const auto& name : names) rows.push_back({{name, size}, {}, {}, {}, {}});
  }
  const Cpu cpu(o.threads);
  if (o.model.empty()) {
    measure_normal(std::move(rows), o.seed, cpu);
    return 0;
  }
  auto model = open_model(o.model, o.tokenizer, {.format = BaseFormat::float32}, cpu);
  choose_chat_template(model, o.chat);
  expect_seq_len(o.seq_len, model.config);
  measure_model(std::move(rows), o, model, cpu);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"What the format of frozen weights costs: bits, error of the weights, loss of a model.", "formats"};
  Options options;
  declare(app, options);
  return run_program(app, argc, argv, [&] { return formats(options); });
}
