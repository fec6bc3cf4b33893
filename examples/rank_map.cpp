// Chooses a rank for each linear layer of a trained adapter, so that a budget of parameters goes where it lowers the loss most.
//
//   rank_map --model FILE.gguf|DIR --adapter DIR --data FILE --rank b OUT
//
// The budget is what rank b takes on all layers, magnitudes (DoRA) not counted. OUT gets the adapter cut to the map (PEFT, with
// rank_pattern), rank_map.json and rank_map.svg. The map is chosen on part of the data and compared with rank b everywhere on the rest,
// which had no part in the choice.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <qdylora/io.hpp>
#include <qdylora/model.hpp>

#include "common/adapters.hpp"
#include "common/dataset.hpp"
#include "common/evaluation.hpp"
#include "common/heat_map.hpp"
#include "common/model.hpp"
#include "common/program.hpp"

namespace {

using namespace qdylora;
using namespace qdylora::examples;

struct Options {
  std::string model, tokenizer, adapter, data, chat = "model", base = "nf4", out;
  Index rank = 8, examples = 16, held_out = 16, seq_len = 256;
  int threads = 0;
};

void declare(CLI::App& app, Options& o) {
  app.add_option("--model", o.model, "a .gguf file, or a Hugging Face folder")->required()->check(not_empty());
  app.add_option("--tokenizer", o.tokenizer, "a .gguf file, or a folder with tokenizer.json, whose tokenizer to use")->check(not_empty());
  app.add_option("--adapter", o.adapter, "a PEFT adapter folder")->required()->check(not_empty());
  app.add_option("--data", o.data, "JSON lines or plain text, as for finetune")->required()->check(not_empty());
  add_number(
      app, "--rank", o.rank,
      "the budget: as many parameters as this rank takes on all layers; magnitudes (DoRA), which are the same at every rank, not counted",
      1, most_rank);
  add_number(app, "--examples", o.examples, "examples of the data to choose on; each costs two forward passes a layer", 1, most_examples);
  add_number(app, "--held-out", o.held_out, "examples after those to compare on", 1, most_examples);
  add_number(app, "--seq-len", o.seq_len, "tokens of a sequence at most", 2, most_tokens);
  app.add_option("--base-format", o.base, "base weights: nf4, fp4, int4, fp8, bfloat16 or float32")->capture_default_str();
  add_number(app, "--threads", o.threads, "0: one for each processor", 0, most_threads);
  add_chat_template(app, o.chat);
  app.add_option("OUT", o.out, "folder to write")->required()->check(not_empty());
}

std::vector<HeatMap> heat_maps(const DecoderConfig& config, const RankMap& map, std::span<const std::vector<double>> cut,
                               std::span<const Index> ranks) {
  auto chosen = heat_map_of(config, "Rank"), kept = heat_map_of(config, "Energy kept, %");
  auto worth = heat_map_of(config, "What the layer's adapter lowers the loss by, 1/1000");
  for (std::size_t l = 0; l < map.ranks.size(); ++l) {
    const auto at = static_cast<std::size_t>(std::ranges::find(ranks, map.ranks[l]) - ranks.begin());
    put(chosen, static_cast<double>(map.ranks[l]), 0);
    put(kept, 100.0 * std::clamp(1.0 - cut[l][at], 0.0, 1.0), 0);
    put(worth, 1000.0 * map.worth[l], 1);
  }
  return {std::move(chosen), std::move(kept), std::move(worth)};
}

int choose(const Options& o) {
  for (const auto& in : {o.model, o.tokenizer, o.adapter, o.data}) expect_no_overwrite(in, o.out);
  const auto adapter = load_peft_adapter(o.adapter, {.changed_base = true});
  const Index max_rank = adapter.max_rank();
  QDYLORA_EXPECTS(o.rank < max_rank, rank_range,
                  "--rank " + std::to_string(o.rank) + ": the adapter has ranks up to " + std::to_string(max_rank));
  const auto examples = load_examples(o.data);
  const Cpu cpu(o.threads);
  auto model = open_model(o.model, o.tokenizer, base_of(adapter, o.adapter, o.base), cpu);
  choose_chat_template(model, o.chat);
  expect_seq_len(o.seq_len, model.config);
  auto samples = tokenize(examples, model.need_tokenizer(), {.chat = model.chat_template(), .max_length = o.seq_len}).samples;
  const auto few = std::min<std::size_t>(samples.size() / 2, static_cast<std::size_t>(o.examples));
  QDYLORA_EXPECTS(few > 0, bad_argument,
                  "--data: fewer than two examples have a scored token within --seq-len " + std::to_string(o.seq_len));
  const std::vector<Sample> chosen_on(samples.begin(), samples.begin() + static_cast<std::ptrdiff_t>(few));
  samples.erase(samples.begin(), samples.begin() + static_cast<std::ptrdiff_t>(few));
  samples.resize(std::min<std::size_t>(samples.size(), static_cast<std::size_t>(o.held_out)));

  Decoder<float> decoder(model.read(model.base), {.lora = lora_options(adapter)}, cpu);
  assign_adapter(adapter, o.adapter, decoder);
  auto ranks = adapter.ranks.empty() ? std::vector<Index>{} : adapter.ranks;
  if (ranks.empty() || ranks.back() != max_rank) {
    const auto powers = RankSet::powers_of_two(max_rank);
    ranks.assign(powers.begin(), powers.end());
  }
  if (!std::ranges::binary_search(ranks, o.rank)) ranks.insert(std::ranges::upper_bound(ranks, o.rank), o.rank);
  ranks.insert(ranks.begin(), 0);
  std::vector<Index> costs;
  std::vector<std::vector<double>> cut;
  std::vector<std::string> modules;
  decoder.for_each_linear([&](const auto& linear) {
    costs.push_back(linear.in() + linear.out());
    cut.push_back(cut_energy(linear.adapter(), ranks));
    modules.push_back(linear.adapter().options().name);
  });
  Index budget = 0;
  for (const Index cost : costs) budget += o.rank * cost;

  const std::size_t most_calls = 2 * costs.size() + 2;
  std::size_t calls = 0;
  const auto loss = [&](std::span<const Sample> on, std::span<const Index> map) {
    std::size_t l = 0;
    decoder.for_each_linear([&](auto& linear) { linear.limit_rank(map[l++]); });
    const std::vector<Index> all = {max_rank};
    return evaluate_losses(decoder, on, std::span<const Index>(all)).front().loss;
  };
  const auto map = rank_map(costs, cut, ranks, budget, [&](std::span<const Index> m) {
    if (++calls % 10 == 0) std::fprintf(stderr, "%zu of at most %zu losses\n", calls, most_calls);
    return loss(chosen_on, m);
  });
  QDYLORA_EXPECTS(map.parameters > 0, bad_argument, "no layer's adapter lowers the loss of --data: nothing is left to save");
  const double uniform_loss = loss(samples, std::vector<Index>(costs.size(), map.uniform_rank));
  const double held_out_loss = loss(samples, map.ranks);  // leaves the limits at the map

  save_adapters(o.out, decoder,
                {.base_model = adapter.config.base_model,
                 .task_type = adapter.config.task_type,
                 .init = adapter.init,
                 .base_format = adapter.base_format});
  Json json = {{"adapter", printable_utf8(o.adapter)},
               {"budget", budget},
               {"parameters", map.parameters},
               {"uniform_rank", map.uniform_rank},
               {"chosen_on", {{"examples", few}, {"loss", map.loss}, {"uniform_loss", map.uniform_loss}}},
               {"held_out", {{"examples", samples.size()}, {"loss", held_out_loss}, {"uniform_loss", uniform_loss}}},
               {"ranks", Json::object()},
               {"worth", Json::object()}};
  for (std::size_t l = 0; l < modules.size(); ++l) {
    json["ranks"][modules[l]] = map.ranks[l];
    json["worth"][modules[l]] = map.worth[l];
  }
  replace_file(std::filesystem::path(o.out) / "rank_map.json", json.dump(1) + "\n");
  write_svg(std::filesystem::path(o.out) / "rank_map.svg", heat_maps(decoder.config(), map, cut, ranks));

  std::printf("%-22s %12s %14s %14s\n", "", "parameters", "chosen on", "held out");
  std::printf("%-22s %12lld %14.4f %14.4f\n", ("rank " + std::to_string(map.uniform_rank) + " everywhere").c_str(),
              static_cast<long long>(budget), map.uniform_loss, uniform_loss);
  std::printf("%-22s %12lld %14.4f %14.4f\n", "the map", static_cast<long long>(map.parameters), map.loss, held_out_loss);
  std::printf("wrote %s: the adapter at the map's ranks, rank_map.json, rank_map.svg\n", o.out.c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Chooses a rank for each layer of an adapter, by measured losses, within a budget of parameters.", "rank_map"};
  Options options;
  declare(app, options);
  return run_program(app, argc, argv, [&] { return choose(options); });
}
