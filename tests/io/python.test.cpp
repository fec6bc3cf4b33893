// Files that the library writes, read by the programs they are for. A test whose Python packages are not there is skipped.
#include <algorithm>
#include <cmath>
#include <deque>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/io/bitsandbytes.hpp>
#include <qdylora/io/npy.hpp>
#include <qdylora/io/peft.hpp>
#include <qdylora/model/decoder.hpp>
#include <qdylora/nn/weighted_sum.hpp>
#include <qdylora/quant/quantize.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/python.hpp"
#include "support/random_data.hpp"

namespace python_test {

namespace qd = qdylora;
using qd::Index;

namespace {

qd::LoRAAdapter<float> trained_adapter(Index in, Index out, qd::LoRAOptions options, std::uint64_t seed) {
  options.seed = seed;
  qd::LoRAAdapter<float> adapter(in, out, std::move(options));
  qd::Rng rng(seed);
  test::fill_normal(adapter.b().value.view(), rng, 0.2);
  if (adapter.gated())
    for (float& g : adapter.gates().value.span()) g = rng.uniform(0.5f, 1.5f);
  if (adapter.dora())
    for (float& m : adapter.magnitude().value.span()) m = rng.uniform(0.5f, 1.5f);
  if (adapter.options().train_bias) {
    adapter.add_bias();
    test::fill_normal(adapter.bias().value.view(), rng);
  }
  return adapter;
}

// y = x (W + delta W_rank)^T in double, of rows as long as the magnitude where there is one, and the bias. x [tokens, in], w [out, in].
qd::Matrix<double> linear(const qd::Matrix<double>& x, const qd::Matrix<float>& w, const qd::LoRAAdapter<float>* adapter,
                          Index rank) {
  qd::Matrix<double> y(x.rows(), w.rows());
  std::vector<float> coefficients;
  if (adapter != nullptr) coefficients = adapter->coefficients(rank, rank);
  std::vector<double> row(static_cast<std::size_t>(w.cols()));
  for (Index o = 0; o < w.rows(); ++o) {
    double squares = 0.0;
    for (Index k = 0; k < w.cols(); ++k) {
      auto weight = static_cast<double>(w(o, k));
      for (std::size_t i = 0; i < coefficients.size(); ++i) {
        weight += static_cast<double>(coefficients[i]) * static_cast<double>(adapter->b().value(static_cast<Index>(i), o)) *
                  static_cast<double>(adapter->a().value(static_cast<Index>(i), k));
      }
      squares += weight * weight;
      row[static_cast<std::size_t>(k)] = weight;
    }
    const bool dora = adapter != nullptr && adapter->dora();
    const double factor = dora ? static_cast<double>(adapter->magnitude().value(0, o)) / std::sqrt(squares) : 1.0;
    const bool biased = adapter != nullptr && adapter->biased();
    for (Index t = 0; t < x.rows(); ++t) {
      if (biased) y(t, o) = static_cast<double>(adapter->bias().value(0, o));
      for (Index k = 0; k < w.cols(); ++k) y(t, o) += x(t, k) * factor * row[static_cast<std::size_t>(k)];
    }
  }
  return y;
}

qd::Matrix<double> relu(qd::Matrix<double> x) {
  for (double& v : x.span()) v = std::max(v, 0.0);
  return x;
}

qd::Matrix<float> to_float(const qd::Matrix<double>& x) {
  qd::Matrix<float> y(x.rows(), x.cols());
  for (Index i = 0; i < x.size(); ++i) y.data()[i] = static_cast<float>(x.data()[i]);
  return y;
}

}  // namespace

TEST_CASE("the report of a GPU says which goals are reached, and fails where a result is wrong", "[python]") {
  if (!test::has_python("json")) SKIP("no Python ($QDYLORA_PYTHON)");
  const test::TemporaryFolder folder;
  CHECK(test::run_python("check_gpu_report.py", folder.path()) == 0);
}

TEST_CASE("bitsandbytes decodes 4-bit weights written here to our values, bit for bit", "[python]") {
  if (!test::has_python("torch, bitsandbytes, safetensors.torch"))
    SKIP("no Python with torch, bitsandbytes and safetensors ($QDYLORA_PYTHON)");
  test::TemporaryFolder folder;
  qd::SafetensorsWriter weights, expected;
  qd::BnbStates states;
  std::deque<qd::WeightFor<qd::AnyFormat>> tensors;  // what the writers borrow
  std::deque<qd::Matrix<float>> decoded;
  std::deque<qd::Matrix<qd::bfloat16>> decoded_bfloat16;
  const auto add = [&]<class Format, class Scales>(Index rows, Index cols, Index block, qd::DType dtype) {
    const auto name = "layer." + std::to_string(tensors.size()) + ".weight";
    const qd::Matrix<float> w = test::normal_matrix<float>(rows, cols, tensors.size() + 1, 0.05);
    tensors.emplace_back(qd::quantize<Format, Scales>(w.view(), {.block_size = block}));
    qd::add_bnb_4bit(weights, states, name, tensors.back(), dtype);
    tensors.back().visit([&](const auto& view) {
      if constexpr (requires { view.codes; }) {
        if (dtype == qd::DType::BF16) {
          qd::dequantize(view, decoded_bfloat16.emplace_back(rows, cols).view());
          expected.add(name, std::as_const(decoded_bfloat16.back()).view());
        } else {
          qd::dequantize(view, decoded.emplace_back(rows, cols).view());
          expected.add(name, std::as_const(decoded.back()).view());
        }
      }
    });
  };
  using qd::DType;
  for (const auto& [rows, cols] : {std::pair<Index, Index>{96, 128}, {5, 48}, {7, 101}, {300, 100}}) {
    for (const Index block : {64, 128}) {
      add.operator()<qd::NF4, qd::DoubleQuant<>>(rows, cols, block, DType::F32);
      add.operator()<qd::NF4, qd::Float32Scales>(rows, cols, block, DType::F32);
      add.operator()<qd::FP4, qd::DoubleQuant<>>(rows, cols, block, DType::F32);
      add.operator()<qd::FP4, qd::Float32Scales>(rows, cols, block, DType::BF16);
      add.operator()<qd::NF4, qd::DoubleQuant<>>(rows, cols, block, DType::BF16);
    }
  }
  weights.write(folder / "weights.safetensors");
  expected.write(folder / "expected.safetensors");
  CHECK(test::run_python("check_bitsandbytes.py", folder.path()) == 0);
}

TEST_CASE("PEFT computes with saved adapters what we compute, at every rank, scale, gate, magnitude and bias", "[python]") {
  if (!test::has_python("torch, peft, safetensors.torch, transformers"))
    SKIP("no Python with torch, peft, transformers and safetensors ($QDYLORA_PYTHON)");
  test::TemporaryFolder folder;
  const qd::Matrix<float> up = test::normal_matrix<float>(24, 16, 1, 0.25), block_up = test::normal_matrix<float>(20, 24, 2, 0.25),
                          plain = test::normal_matrix<float>(6, 20, 3, 0.25), x = test::normal_matrix<float>(9, 16, 4);
  qd::SafetensorsWriter model, expected;
  model.add("up", up.view());
  model.add("block.up", block_up.view());
  model.add("plain", plain.view());
  model.add("x", x.view());
  model.write(folder / "model.safetensors");
  qd::Matrix<double> input(x.rows(), x.cols());
  for (Index i = 0; i < x.size(); ++i) input.data()[i] = static_cast<double>(x.data()[i]);

  std::deque<qd::Matrix<float>> outputs;
  int number = 0;
  for (const auto policy : {qd::ScalePolicy::constant, qd::ScalePolicy::over_rank, qd::ScalePolicy::over_sqrt_rank}) {
    for (const auto& [gated, dora] : {std::pair(false, false), std::pair(true, false), std::pair(false, true), std::pair(true, true)}) {
      const auto ranks = gated ? std::vector<Index>{1, 8, 16} : std::vector<Index>{};
      const auto first = trained_adapter(16, 24, {.max_rank = 16, .alpha = 11.0f, .scale = policy, .gated_ranks = ranks, .dora = dora}, 5);
      const auto second =
          trained_adapter(24, 20, {.max_rank = gated ? 16 : 4, .alpha = 7.0f, .scale = policy, .gated_ranks = ranks, .dora = dora}, 6);
      for (const Index rank : {1, 3, 8, 16}) {
        const std::string name = "adapter" + std::to_string(number++);
        qd::save_peft_adapter(folder / name, {{"up", &first}, {"block.up", &second}}, {.rank = rank, .task_type = ""});
        const auto hidden = relu(linear(input, up, &first, rank));
        const auto last = relu(linear(hidden, block_up, &second, std::min(rank, second.max_rank())));
        expected.add(name, std::as_const(outputs.emplace_back(to_float(linear(last, plain, nullptr, 0)))).view());
      }
    }
  }
  // A rank of its own for each module.
  const auto first = trained_adapter(16, 24, {.max_rank = 16, .alpha = 11.0f}, 5), second = trained_adapter(24, 20, {.max_rank = 16}, 6);
  for (const auto& [one, two] : {std::pair<Index, Index>{2, 9}, {16, 1}}) {
    const std::string name = "ranks" + std::to_string(one);
    qd::save_peft_adapter(folder / name, {{"up", &first, 0, one}, {"block.up", &second, 0, two}}, {.task_type = ""});
    const auto last = relu(linear(relu(linear(input, up, &first, one)), block_up, &second, two));
    expected.add(name, std::as_const(outputs.emplace_back(to_float(linear(last, plain, nullptr, 0)))).view());
  }
  // Biases that trained, in the place of a layer's own.
  for (const bool dora : {false, true}) {
    const std::string name = dora ? "bias_dora" : "bias";
    const auto biased = trained_adapter(16, 24, {.max_rank = 8, .alpha = 11.0f, .dora = dora, .train_bias = true}, 9);
    const auto other = trained_adapter(24, 20, {.max_rank = 8, .alpha = 11.0f, .dora = dora}, 10);
    qd::save_peft_adapter(folder / name, {{"up", &biased}, {"block.up", &other}}, {.rank = 3, .task_type = ""});
    const auto last = relu(linear(relu(linear(input, up, &biased, 3)), block_up, &other, 3));
    expected.add(name, std::as_const(outputs.emplace_back(to_float(linear(last, plain, nullptr, 0)))).view());
  }
  // On modules that store their weights [in, out]; PEFT takes the magnitude of their columns.
  for (const bool dora : {false, true}) {
    const std::string name = dora ? "conv1d_dora" : "conv1d";
    const auto one = trained_adapter(16, 24, {.max_rank = 8, .alpha = 11.0f, .dora = dora}, 11);
    const auto two = trained_adapter(24, 20, {.max_rank = 8, .alpha = 11.0f, .dora = dora}, 12);
    qd::save_peft_adapter(folder / name, {{"up", &one}, {"block.up", &two}}, {.rank = 5, .task_type = "", .fan_in_fan_out = true});
    const auto last = relu(linear(relu(linear(input, up, &one, 5)), block_up, &two, 5));
    expected.add(name, std::as_const(outputs.emplace_back(to_float(linear(last, plain, nullptr, 0)))).view());
  }
  // Weighted sums.
  const auto third = trained_adapter(16, 24, {.max_rank = 4, .alpha = 3.0f, .scale = qd::ScalePolicy::over_rank, .gated_ranks = {3}}, 7);
  const auto fourth = trained_adapter(24, 20, {.max_rank = 5}, 8);
  using Terms = std::vector<qd::WeightedAdapter<float>>;
  const Terms of_up = {{&first, 0.75f, 6}, {&third, -0.5f, 3}}, of_block = {{&second, 0.75f}, {&fourth, -0.5f}};
  const auto up_sum = qd::weighted_sum<float>(of_up), block_sum = qd::weighted_sum<float>(of_block);
  qd::save_peft_adapter(folder / "sum", {{"up", &up_sum}, {"block.up", &block_sum}}, {.task_type = ""});
  const auto summed = [](const qd::Matrix<double>& in, const qd::Matrix<float>& weight, const Terms& terms) {
    auto total = linear(in, weight, nullptr, 0);
    const auto base = linear(in, weight, nullptr, 0);
    for (const auto& term : terms) {
      const auto part = linear(in, weight, term.adapter, term.rank == 0 ? term.adapter->max_rank() : term.rank);
      for (Index i = 0; i < total.size(); ++i) total.data()[i] += static_cast<double>(term.weight) * (part.data()[i] - base.data()[i]);
    }
    return relu(std::move(total));
  };
  const auto last = summed(summed(input, up, of_up), block_up, of_block);
  expected.add("sum", std::as_const(outputs.emplace_back(to_float(linear(last, plain, nullptr, 0)))).view());
  expected.write(folder / "expected.safetensors");
  CHECK(test::run_python("check_peft.py", folder.path()) == 0);
}

TEST_CASE("transformers and PEFT compute our logits from saved adapters, whichever rotary layout they were trained in",
          "[python]") {
  if (!test::has_python("torch, peft, transformers, safetensors.torch")) {
    SKIP("no Python with torch, peft, transformers and safetensors ($QDYLORA_PYTHON)");
  }
  test::TemporaryFolder folder;
  qd::DecoderConfig config;
  config.vocab = 64;
  config.width = 32;
  config.mlp_width = 48;
  config.layers = 2;
  config.heads = {.heads = 4, .kv_heads = 2, .head_dim = 10};
  config.context = 64;
  config.norm_epsilon = 1e-6f;
  config.tied_head = false;

  // The model as a Hugging Face folder, and in our two layouts: q and k rows of a head are stored (i, i + d / 2) or (2i, 2i + 1).
  qd::SafetensorsWriter base;
  std::deque<qd::Matrix<float>> kept;
  std::uint64_t seed = 1;
  const auto random = [&](const std::string& name, Index rows, Index cols, double deviation, float mean = 0.0f) {
    qd::Matrix<float> values = test::normal_matrix<float>(rows, cols, seed++, deviation);
    for (float& v : values.span()) v += mean;
    kept.push_back(qd::clone(values.view()));
    if (rows == 1) base.add(name, qd::DType::F32, {cols}, std::as_bytes(std::as_const(kept.back()).span()));
    else base.add(name, std::as_const(kept.back()).view());
    return values;
  };
  const auto models = std::array{std::make_shared<qd::DecoderWeights<float>>(), std::make_shared<qd::DecoderWeights<float>>()};
  models[0]->embedding = random("model.embed_tokens.weight", 64, 32, 1.0);
  models[0]->head = random("lm_head.weight", 64, 32, 0.2);
  models[0]->final_norm = random("model.norm.weight", 1, 32, 0.1, 1.0f);
  models[0]->config = config;
  models[1]->embedding = qd::clone(models[0]->embedding.get<qd::Matrix<float>>().view());
  models[1]->head = qd::clone(models[0]->head.get<qd::Matrix<float>>().view());
  models[1]->final_norm = qd::clone(models[0]->final_norm.weight.view());
  models[1]->config = config;
  models[1]->config.rope_layout = qd::RopeLayout::interleaved;
  const std::pair<Index, Index> shapes[7] = {{40, 32}, {20, 32}, {20, 32}, {32, 40}, {48, 32}, {48, 32}, {32, 48}};
  for (Index layer = 0; layer < config.layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const auto blocks = std::array{std::make_shared<qd::BlockWeights<float>>(config), std::make_shared<qd::BlockWeights<float>>(config)};
    const auto input_norm = random(prefix + "input_layernorm.weight", 1, 32, 0.1, 1.0f);
    const auto mlp_norm = random(prefix + "post_attention_layernorm.weight", 1, 32, 0.1, 1.0f);
    for (const auto& block : blocks) {
      block->attention_norm = qd::clone(input_norm.view());
      block->mlp_norm = qd::clone(mlp_norm.view());
    }
    for (std::size_t p = 0; p < 7; ++p) {
      auto weight = random(prefix + std::string(config.linears()[p].name) + ".weight", shapes[p].first, shapes[p].second, 0.2);
      auto other = qd::clone(weight.view());
      if (p < 2) {
        const Index d = config.heads.head_dim;
        for (Index i = 0; i < weight.rows(); ++i) {
          const Index source = i / d * d + i % d / 2 + i % 2 * (d / 2);
          qd::copy(std::as_const(weight).view().middle_rows(source, 1), other.view().middle_rows(i, 1));
        }
      }
      blocks[0]->linear[p] = std::make_shared<const qd::WeightFor<qd::AnyFormat>>(std::move(weight));
      blocks[1]->linear[p] = std::make_shared<const qd::WeightFor<qd::AnyFormat>>(std::move(other));
    }
    for (std::size_t i = 0; i < 2; ++i) models[i]->blocks.push_back(blocks[i]);
  }
  std::filesystem::create_directory(folder / "base");
  base.metadata("format", "pt");
  base.write(folder / "base" / "model.safetensors");
  test::write_file(folder / "base" / "config.json",
                   R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 32,
                       "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                       "head_dim": 10, "max_position_embeddings": 64, "rms_norm_eps": 1e-06, "hidden_act": "silu",
                       "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "tie_word_embeddings": false,
                       "attention_bias": false, "mlp_bias": false, "bos_token_id": 1, "eos_token_id": 2, "dtype": "float32"})");

  qd::Batch batch;
  qd::Rng rng(9);
  std::vector<std::int32_t> text(30);
  for (auto& id : text) id = static_cast<std::int32_t>(rng.below(64));
  batch.add(text);
  qd::SafetensorsWriter expected;
  expected.add("ids", qd::DType::I32, {batch.tokens()}, std::as_bytes(std::span(batch.ids)));
  std::deque<qd::Matrix<float>> logits;
  for (const auto& [weights, dora] : {std::pair(models[0], false), std::pair(models[1], false), std::pair(models[1], true)}) {
    const bool interleaved = weights->config.rope_layout == qd::RopeLayout::interleaved;
    qd::DecoderOptions options;
    options.lora = {.max_rank = 16, .alpha = 16.0f, .scale = interleaved ? qd::ScalePolicy::constant : qd::ScalePolicy::over_rank};
    options.lora.dora = dora;
    qd::Decoder<float> decoder(weights, options);
    std::vector<qd::NamedAdapter> adapters;
    decoder.for_each_linear([&](auto& layer) {
      test::fill_normal(layer.adapter().b().value.view(), rng, 0.1);
      if (layer.adapter().dora())
        for (float& m : layer.adapter().magnitude().value.span()) m *= rng.uniform(0.7f, 1.3f);
      const std::string& name = layer.adapter().options().name;
      const Index heads = name.ends_with("q_proj") ? 4 : name.ends_with("k_proj") ? 2 : 0;
      adapters.push_back({name, &layer.adapter(), interleaved ? heads : 0});
    });
    for (const Index rank : {1, 8, 16}) {
      const std::string name = (interleaved ? "interleaved" : "half_split") + std::to_string(rank) + (dora ? "_dora" : "");
      qd::save_peft_adapter(folder / name, adapters, rank);
      decoder.set_ranks(qd::RankPlan::uniform(rank));
      expected.add(name, std::as_const(logits.emplace_back(decoder.logits(batch))).view());
    }
  }
  expected.write(folder / "expected.safetensors");
  CHECK(test::run_python("check_llama.py", folder.path()) == 0);
}

TEST_CASE("NumPy reads the arrays written here, and they are read as it writes them", "[python]") {
  if (!test::has_python("numpy")) SKIP("no Python with numpy ($QDYLORA_PYTHON)");
  test::TemporaryFolder folder;
  std::vector<std::string> names;
  const auto write = [&]<class T>(const std::string& type, qd::DType dtype, T, const std::vector<Index>& shape) {
    std::string dims;
    Index count = 1;
    for (const Index n : shape) {
      dims += (dims.empty() ? "" : "x") + std::to_string(n);
      count *= n;
    }
    std::vector<T> values;
    for (Index i = 0; i < count; ++i) values.push_back(static_cast<T>(static_cast<float>(qd::Scalar<T> ? i - 5 : 3 * i)));
    names.push_back(type + "_" + dims);
    qd::write_npy(folder / ("ours_" + names.back() + ".npy"), dtype, shape, std::as_bytes(std::span(values)));
  };
  for (const std::vector<Index>& shape : {std::vector<Index>{}, {7}, {3, 5}, {2, 0, 4}}) {
    write("f2", qd::DType::F16, qd::half{}, shape);
    write("f4", qd::DType::F32, float{}, shape);
    write("f8", qd::DType::F64, double{}, shape);
    write("i4", qd::DType::I32, std::int32_t{}, shape);
    write("i8", qd::DType::I64, std::int64_t{}, shape);
    write("u1", qd::DType::U8, std::uint8_t{}, shape);
  }
  REQUIRE(test::run_python("check_npy.py", folder.path()) == 0);
  for (const std::string& name : names) {
    INFO(name);
    const qd::NpyFile ours(folder / ("ours_" + name + ".npy")), theirs(folder / ("theirs_" + name + ".npy"));
    CHECK(theirs.dtype() == ours.dtype());
    CHECK(theirs.shape() == ours.shape());
    const auto expected = ours.bytes(), found = theirs.bytes();
    CHECK(std::equal(expected.span().begin(), expected.span().end(), found.span().begin(), found.span().end()));
  }
}

}  // namespace python_test
