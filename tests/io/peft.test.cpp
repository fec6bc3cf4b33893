#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/core/random.hpp>
#include <qdylora/io/peft.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"

namespace peft_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using test::code_of;
using test::error_of;

namespace {

qd::LoRAAdapter<float> make_adapter(Index in, Index out, qd::LoRAOptions options, std::uint64_t seed = 1) {
  qd::LoRAAdapter<float> adapter(in, out, std::move(options));
  qd::Rng rng(seed);
  for (float& x : adapter.b().value.span()) x = 0.1f * rng.normal();
  if (adapter.gated())
    for (float& x : adapter.gates().value.span()) x = rng.uniform(0.5f, 1.5f);
  if (adapter.dora())
    for (float& x : adapter.magnitude().value.span()) x = rng.uniform(0.5f, 1.5f);
  return adapter;
}

bool same_bits(const qd::Matrix<float>& x, const qd::Matrix<float>& y) {
  return x.rows() == y.rows() && x.cols() == y.cols() &&
         std::memcmp(x.data(), y.data(), static_cast<std::size_t>(x.size()) * sizeof(float)) == 0;
}

// delta W [out, in] of an adapter at a rank, in double.
std::vector<double> delta(const qd::LoRAAdapter<float>& adapter, Index rank) {
  std::vector<double> result(static_cast<std::size_t>(adapter.out() * adapter.in()));
  const auto coefficients = adapter.coefficients(rank, rank);
  for (Index i = 0; i < rank; ++i)
    for (Index o = 0; o < adapter.out(); ++o)
      for (Index k = 0; k < adapter.in(); ++k)
        result[static_cast<std::size_t>(o * adapter.in() + k)] += static_cast<double>(coefficients[static_cast<std::size_t>(i)]) *
                                                                  static_cast<double>(adapter.b().value(i, o)) *
                                                                  static_cast<double>(adapter.a().value(i, k));
  return result;
}

// What a reader that knows nothing of us computes: (lora_alpha / r) B A from the two files, with the patterns' values.
std::vector<double> foreign_delta(const std::filesystem::path& folder, const std::string& module) {
  const qd::SafetensorsFile file(folder / "adapter_model.safetensors");
  const auto config = qd::read_json(folder / "adapter_config.json");
  const auto a = file.matrix("base_model.model." + module + ".lora_A.weight");
  const auto b = file.matrix("base_model.model." + module + ".lora_B.weight");
  std::string pattern = "^" + module;
  for (std::size_t at = 0; (at = pattern.find('.', at)) != std::string::npos; at += 2) pattern.insert(at, "\\");
  const double r = config["rank_pattern"].value(pattern, config["r"].get<double>());
  const double alpha = config["alpha_pattern"].value(pattern, config["lora_alpha"].get<double>());
  REQUIRE(a.rows() == static_cast<Index>(r));
  std::vector<double> result(static_cast<std::size_t>(b.rows() * a.cols()));
  for (Index o = 0; o < b.rows(); ++o)
    for (Index i = 0; i < a.rows(); ++i)
      for (Index k = 0; k < a.cols(); ++k)
        result[static_cast<std::size_t>(o * a.cols() + k)] +=
            alpha / r * static_cast<double>(b(o, i)) * static_cast<double>(a(i, k));
  return result;
}

double relative_difference(const std::vector<double>& x, const std::vector<double>& y) {
  REQUIRE(x.size() == y.size());
  double difference = 0.0, size = 0.0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    difference += (x[i] - y[i]) * (x[i] - y[i]);
    size += x[i] * x[i];
  }
  return std::sqrt(difference / size);
}

constexpr qd::ScalePolicy policies[] = {qd::ScalePolicy::constant, qd::ScalePolicy::over_rank, qd::ScalePolicy::over_sqrt_rank};

// A folder with one small adapter, to be damaged.
struct Damaged {
  test::TemporaryFolder folder;
  qd::Json config;
  struct Tensor {
    std::vector<Index> shape;
    std::vector<float> values;
  };
  std::map<std::string, Tensor> tensors;
  std::map<std::string, std::string> metadata = {{"format", "pt"}};

  Damaged() {
    config = {{"peft_type", "LORA"}, {"r", 2}, {"lora_alpha", 4}, {"target_modules", {"up", "down"}}};
    tensors["base_model.model.up.lora_A.weight"] = {{2, 3}, {1, 2, 3, 4, 5, 6}};
    tensors["base_model.model.up.lora_B.weight"] = {{4, 2}, {1, 2, 3, 4, 5, 6, 7, 8}};
    tensors["base_model.model.x.down.lora_A.weight"] = {{2, 4}, {1, 2, 3, 4, 5, 6, 7, 8}};
    tensors["base_model.model.x.down.lora_B.weight"] = {{3, 2}, {1, 2, 3, 4, 5, 6}};
  }
  std::vector<float>& up_a() { return tensors["base_model.model.up.lora_A.weight"].values; }
  /// up's, and one of x.down.
  Tensor& magnitude() {
    tensors["base_model.model.x.down.lora_magnitude_vector"] = {{3}, {1, 2, 3}};
    return tensors["base_model.model.up.lora_magnitude_vector"] = {{4}, {1, 2, 3, 4}};
  }
  /// Up's.
  Tensor& bias() { return tensors["base_model.model.up.base_layer.bias"] = {{4}, {1, 2, 3, 4}}; }
  void zero_b() {
    for (auto& [name, tensor] : tensors)
      if (name.find("lora_B") != std::string::npos) std::ranges::fill(tensor.values, 0.0f);
  }
  void write() const {
    qd::SafetensorsWriter writer;
    for (const auto& [name, t] : tensors) writer.add(name, qd::DType::F32, t.shape, std::as_bytes(std::span(t.values)));
    for (const auto& [key, value] : metadata) writer.metadata(key, value);
    writer.write(folder / "adapter_model.safetensors");
    test::write_file(folder / "adapter_config.json", config.dump());
  }
  auto load(bool force = false) const {
    write();
    return qd::load_peft_adapter(folder.path(), {.force = force});
  }
};

}  // namespace

TEST_CASE("adapters that PEFT saved are read") {
  const auto one = qd::load_peft_adapter(test::golden("peft_linear"));
  REQUIRE(one.modules.size() == 1);
  const auto& lin = one.modules[0];
  CHECK(lin.name == "lin");
  CHECK(lin.rank() == 8);
  CHECK(lin.in() == 128);
  CHECK(lin.out() == 96);
  CHECK(lin.alpha / 8.0 == static_cast<double>(test::load<float>("peft_linear/io.safetensors", "scaling")[0]));
  CHECK(one.config.target_modules == std::vector<std::string>{"lin"});
  CHECK(one.metadata.at("format") == "pt");
  CHECK(one.ranks.empty());
  const auto b = test::load<float>("peft_linear/adapter_model.safetensors", "base_model.model.lin.lora_B.weight");
  CHECK(lin.b(3, 50) == b[50 * 8 + 3]);

  const auto llama = qd::load_peft_adapter(test::golden("llama_tiny_adapter"));
  CHECK(llama.modules.size() == 14);
  CHECK(llama.max_rank() == 8);
  CHECK(llama.config.task_type == "CAUSAL_LM");
  REQUIRE(llama.find("model.layers.1.self_attn.k_proj") != nullptr);
  CHECK(llama.find("model.layers.1.self_attn.k_proj")->out() == 32);
  CHECK(llama.find("k_proj") == nullptr);

  // And saved again, they are the same bytes.
  std::vector<qd::LoRAAdapter<float>> adapters;
  for (const auto& module : llama.modules) adapters.push_back(qd::to_adapter(module));
  std::vector<qd::NamedAdapter> list;
  for (const auto& adapter : adapters) list.push_back({adapter.options().name, &adapter});
  test::TemporaryFolder folder;
  qd::save_peft_adapter(folder / "again", list);
  const qd::SafetensorsFile old_file(test::golden("llama_tiny_adapter/adapter_model.safetensors"));
  const qd::SafetensorsFile new_file(folder / "again" / "adapter_model.safetensors");
  REQUIRE(new_file.tensors().size() == old_file.tensors().size());
  for (const auto& tensor : old_file.tensors())
    CHECK(test::load<float>(new_file, tensor.name) == test::load<float>(old_file, tensor.name));
  const auto config = qd::read_json(folder / "again" / "adapter_config.json");
  CHECK(config["r"] == 8);
  CHECK(config["lora_alpha"].dump() == "16");
  CHECK(config["rank_pattern"].empty());
  CHECK(config["alpha_pattern"].empty());
}

TEST_CASE("an adapter saved at any rank is the same function to a plain reader, whatever scale and gates it has") {
  test::TemporaryFolder folder;
  for (const auto policy : policies) {
    for (const bool gated : {false, true}) {
      CAPTURE(qd::name(policy), gated);
      qd::LoRAOptions options{.max_rank = 64, .alpha = 23.0f, .scale = policy};
      if (gated) options.gated_ranks = {1, 8, 64};
      const auto adapter = make_adapter(40, 24, options);
      for (const Index rank : {1, 5, 8, 48, 64}) {
        CAPTURE(rank);
        qd::save_peft_adapter(folder / "a", {{"m.lin", &adapter}}, {.rank = rank, .ranks = {1, 8, 64}, .recipe = "qdylora"});
        CHECK(relative_difference(delta(adapter, rank), foreign_delta(folder / "a", "m.lin")) <= 1e-6);
        const auto loaded = qd::load_peft_adapter(folder / "a");
        CHECK(loaded.metadata.at("qdylora.recipe") == "qdylora");
        CHECK(loaded.ranks.back() == (rank < 8 ? 1 : rank < 64 ? 8 : 64));
        const auto again = qd::to_adapter(loaded.modules.at(0));
        CHECK(again.options().scale == policy);
        CHECK(relative_difference(delta(adapter, rank), delta(again, rank)) <= 1e-6);
        // Without gates lower ranks are what they were, too.
        if (!gated && rank > 1) CHECK(relative_difference(delta(adapter, rank / 2), delta(again, rank / 2)) <= 1e-6);
        CHECK(std::filesystem::exists(folder / "a" / "qdylora_gates.safetensors") == (gated && rank == 64));
      }
    }
  }
}

TEST_CASE("an adapter saved whole comes back to the bit, with scale, alpha and gates") {
  test::TemporaryFolder folder;
  for (const auto policy : policies) {
    for (const auto& gated_ranks : {std::vector<Index>{}, std::vector<Index>{2, 6}, std::vector<Index>{3}}) {
      const auto adapter =
          make_adapter(10, 14, {.max_rank = 6, .alpha = 0.3f, .scale = policy, .name = "q", .gated_ranks = gated_ranks});
      qd::save_peft_adapter(folder / "a", {{"q", &adapter, 1}}, {.rank = 6, .ranks = {2, 6}});
      const auto loaded = qd::load_peft_adapter(folder / "a");
      CHECK(loaded.ranks == std::vector<Index>{2, 6});
      auto again = qd::LoRAAdapter<float>(10, 14, {.max_rank = 6, .gated_ranks = gated_ranks});
      qd::assign(loaded.modules.at(0), again, 1);
      CHECK(same_bits(again.a().value, adapter.a().value));
      CHECK(same_bits(again.b().value, adapter.b().value));
      CHECK(again.options().scale == policy);
      CHECK(again.options().alpha == adapter.options().alpha);
      REQUIRE(again.gated() == adapter.gated());
      if (again.gated()) CHECK(same_bits(again.gates().value, adapter.gates().value));
    }
  }
}

TEST_CASE("query and key rows are moved from interleaved pairs to halves and back") {
  // Two heads of six outputs: [2, 3, 2] -> [2, 2, 3]
  auto adapter = make_adapter(2, 12, {.max_rank = 1});
  for (Index o = 0; o < 12; ++o) adapter.b().value(0, o) = static_cast<float>(o + 1);
  test::TemporaryFolder folder;
  qd::save_peft_adapter(folder.path(), {{"q", &adapter, 2}});
  const auto stored =
      test::load<float>(qd::SafetensorsFile(folder / "adapter_model.safetensors"), "base_model.model.q.lora_B.weight");
  CHECK(stored == std::vector<float>{1, 3, 5, 2, 4, 6, 7, 9, 11, 8, 10, 12});
  const auto loaded = qd::load_peft_adapter(folder.path());
  qd::LoRAAdapter<float> again(2, 12, {.max_rank = 1});
  qd::assign(loaded.modules[0], again, 2);
  CHECK(same_bits(again.b().value, adapter.b().value));
  qd::assign(loaded.modules[0], again);
  CHECK(again.b().value(0, 1) == 3.0f);

  CHECK(code_of([&] { qd::save_peft_adapter(folder.path(), {{"q", &adapter, 5}}); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { qd::save_peft_adapter(folder.path(), {{"q", &adapter, 4}}); }) == Errc::shape_mismatch);  // heads of size 3
  CHECK(code_of([&] { qd::assign(loaded.modules[0], again, 4); }) == Errc::shape_mismatch);
}

TEST_CASE("an adapter with magnitudes keeps them at any rank, moved with its rows") {
  test::TemporaryFolder folder;
  const auto adapter = make_adapter(10, 12, {.max_rank = 6, .name = "q", .gated_ranks = {2, 6}, .dora = true});
  for (const Index rank : {2, 6}) {
    qd::save_peft_adapter(folder / "a", {{"q", &adapter, 2}}, {.rank = rank});
    CHECK(qd::read_json(folder / "a" / "adapter_config.json")["use_dora"] == true);
    const qd::SafetensorsFile file(folder / "a" / "adapter_model.safetensors");
    const auto stored = test::load<float>(file, "base_model.model.q.lora_magnitude_vector");
    CHECK(file.info("base_model.model.q.lora_magnitude_vector").shape == std::vector<Index>{12});
    const auto& m = adapter.magnitude().value;  // [2, 3, 2] -> [2, 2, 3]
    CHECK(stored == std::vector<float>{m(0, 0), m(0, 2), m(0, 4), m(0, 1), m(0, 3), m(0, 5), m(0, 6), m(0, 8), m(0, 10), m(0, 7), m(0, 9),
                                       m(0, 11)});
    const auto loaded = qd::load_peft_adapter(folder / "a");
    CHECK(loaded.config.use_dora);
    const auto gates = rank == 6 ? std::vector<Index>{2, 6} : std::vector<Index>{};
    qd::LoRAAdapter<float> again(10, 12, {.max_rank = 6, .gated_ranks = gates, .dora = true});
    qd::assign(loaded.modules.at(0), again, 2);
    CHECK(same_bits(again.magnitude().value, adapter.magnitude().value));
    CHECK(qd::to_adapter(loaded.modules.at(0)).dora());

    const auto plain = make_adapter(10, 12, {.max_rank = 6, .gated_ranks = gates});
    qd::LoRAAdapter<float> without(10, 12, {.max_rank = 6, .gated_ranks = gates});
    CHECK(code_of([&] { qd::assign(loaded.modules.at(0), without, 2); }) == Errc::bad_config);
    qd::save_peft_adapter(folder / "plain", {{"q", &plain}});
    CHECK(code_of([&] { qd::assign(qd::load_peft_adapter(folder / "plain").modules.at(0), again); }) == Errc::bad_config);
    CHECK(code_of([&] { qd::save_peft_adapter(folder / "both", {{"q", &adapter}, {"k", &plain}}); }) == Errc::bad_argument);
  }
  auto broken = make_adapter(10, 12, {.max_rank = 6, .dora = true});
  broken.magnitude().value(0, 7) = std::numeric_limits<float>::infinity();
  CHECK(code_of([&] { qd::save_peft_adapter(folder / "broken", {{"q", &broken}}); }) == Errc::non_finite);
  CHECK_FALSE(std::filesystem::exists(folder / "broken"));
}

TEST_CASE("modules of different rank and scale are told apart by patterns") {
  const auto wide = make_adapter(8, 8, {.max_rank = 8, .alpha = 8.0f}, 1);
  const auto narrow = make_adapter(8, 8, {.max_rank = 2, .alpha = 3.0f}, 2);
  const auto strong = make_adapter(8, 8, {.max_rank = 8, .alpha = 16.0f}, 3);
  test::TemporaryFolder folder;
  for (const Index rank : {0, 1, 4}) {
    CAPTURE(rank);
    qd::save_peft_adapter(folder.path(), {{"a.up", &wide}, {"up", &narrow}, {"b.up", &strong}}, {.rank = rank});
    const auto loaded = qd::load_peft_adapter(folder.path());
    REQUIRE(loaded.modules.size() == 3);
    for (const auto& [name, adapter] : {std::pair{"a.up", &wide}, std::pair{"up", &narrow}, std::pair{"b.up", &strong}}) {
      const Index r = std::min(rank == 0 ? 64 : rank, adapter->max_rank());
      CHECK(loaded.find(name)->rank() == r);
      CHECK(relative_difference(delta(*adapter, r), foreign_delta(folder.path(), name)) <= 1e-6);
      CHECK(relative_difference(delta(*adapter, r), delta(qd::to_adapter(*loaded.find(name)), r)) <= 1e-6);
    }
  }
}

TEST_CASE("an adapter assigned to one of higher rank is the same function at its own rank") {
  const auto adapter = make_adapter(9, 7, {.max_rank = 3, .alpha = 5.0f});
  test::TemporaryFolder folder;
  qd::save_peft_adapter(folder.path(), {{"lin", &adapter}});
  const auto loaded = qd::load_peft_adapter(folder.path());
  auto larger = make_adapter(9, 7, {.max_rank = 8, .alpha = 99.0f, .scale = qd::ScalePolicy::over_rank}, 4);
  qd::assign(loaded.modules[0], larger);
  CHECK(relative_difference(delta(adapter, 3), delta(larger, 3)) <= 1e-6);
  CHECK(relative_difference(delta(adapter, 3), delta(larger, 8)) <= 1e-6);

  qd::LoRAAdapter<float> smaller(9, 7, {.max_rank = 2}), other(7, 9, {.max_rank = 3}),
      gated(9, 7, {.max_rank = 3, .gated_ranks = {3}});
  CHECK(code_of([&] { qd::assign(loaded.modules[0], smaller); }) == Errc::rank_range);
  CHECK(code_of([&] { qd::assign(loaded.modules[0], other); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { qd::assign(loaded.modules[0], gated); }) == Errc::bad_config);
}

TEST_CASE("rank-stabilized adapters of others have their scale") {
  Damaged files;
  files.config["use_rslora"] = true;
  const auto loaded = files.load();
  CHECK(loaded.config.use_rslora);
  CHECK(static_cast<double>(qd::to_adapter(*loaded.find("up")).scale(2)) == Approx(4.0 / std::sqrt(2.0)));
}

TEST_CASE("patterns of others match names and ends of names") {
  Damaged files;
  files.config["r"] = 1;
  files.config["rank_pattern"] = {{"^up", 2}, {"x\\.down", 2}};
  files.config["alpha_pattern"] = {{"down", 8}};
  const auto loaded = files.load();
  CHECK(loaded.find("up")->alpha == 4.0);
  CHECK(loaded.find("x.down")->alpha == 8.0);
  files.config["alpha_pattern"] = {{"^down", 8}, {"own", 9}, {"x", 10}};
  CHECK(files.load().find("x.down")->alpha == 4.0);
  files.config["alpha_pattern"] = {{"down", 8}, {"x.down", 9}};
  CHECK(code_of([&] { files.load(); }) == Errc::unsupported);  // which one holds is a question of order
  files.config["alpha_pattern"] = {{"down", 8}, {"x.down", 8}};
  CHECK(files.load().find("x.down")->alpha == 8.0);
}

TEST_CASE("patterns that are regular expressions hold for the modules that PEFT takes them for") {
  const auto adapter = qd::load_peft_adapter(test::golden("peft_patterns"));
  REQUIRE(adapter.modules.size() == 24);
  std::map<Index, int> ranks;
  for (const auto& module : adapter.modules) {
    CAPTURE(module.name);
    ++ranks[module.rank()];
    const auto expected = test::load<float>("peft_patterns/io.safetensors", module.name + ".delta");
    CHECK(relative_difference({expected.begin(), expected.end()}, delta(qd::to_adapter(module), module.rank())) <= 1e-6);
  }
  CHECK(ranks == std::map<Index, int>{{1, 4}, {2, 1}, {3, 16}, {5, 3}});
}

TEST_CASE("modules may be saved at ranks of their own: the most common is the rule, the others have patterns") {
  for (const auto policy : policies) {
    CAPTURE(qd::name(policy));
    test::TemporaryFolder folder;
    std::vector<qd::LoRAAdapter<float>> adapters;
    for (std::uint64_t seed = 1; seed <= 5; ++seed)
      adapters.push_back(make_adapter(6, 7, {.max_rank = 8, .alpha = 5.0f, .scale = policy, .gated_ranks = {4, 8}}, seed));
    const std::vector<Index> ranks = {8, 4, 4, 1, 4};
    std::vector<qd::NamedAdapter> list;
    for (std::size_t i = 0; i < adapters.size(); ++i) list.push_back({"h." + std::to_string(i), &adapters[i], 0, ranks[i]});
    qd::save_peft_adapter(folder / "a", list);
    CHECK_FALSE(std::filesystem::exists(folder / "a" / "qdylora_gates.safetensors"));  // not whole
    const auto config = qd::read_json(folder / "a" / "adapter_config.json");
    CHECK(config["r"] == 4);
    CHECK(config["rank_pattern"] == qd::Json{{"^h\\.0", 8}, {"^h\\.3", 1}});
    CHECK(config["alpha_pattern"].size() == (policy == qd::ScalePolicy::over_rank ? 0 : 2));
    const auto loaded = qd::load_peft_adapter(folder / "a");
    for (std::size_t i = 0; i < adapters.size(); ++i) {
      CAPTURE(i);
      const auto expected = delta(adapters[i], ranks[i]);
      CHECK(loaded.modules[i].rank() == ranks[i]);
      CHECK(relative_difference(expected, foreign_delta(folder / "a", list[i].module)) <= 1e-6);
      CHECK(relative_difference(expected, delta(qd::to_adapter(loaded.modules[i]), ranks[i])) <= 1e-6);
    }
    list[2].rank = 9;
    CHECK(code_of([&] { qd::save_peft_adapter(folder / "b", list); }) == Errc::rank_range);
  }
}

TEST_CASE("keys and tensor types that others write are taken") {
  Damaged files;
  files.config["target_modules"] = "all-linear";
  files.config["some_future_key"] = {{"a", 1}};
  files.config["use_dora"] = false;
  files.config["modules_to_save"] = nullptr;
  files.config["layer_replication"] = qd::Json::array();
  files.config["init_lora_weights"] = "gaussian";
  files.config["base_model_name_or_path"] = "org/model";
  const auto loaded = files.load();
  CHECK(loaded.config.target_modules.empty());
  CHECK(loaded.config.base_model == "org/model");
  CHECK(loaded.modules.size() == 2);

  qd::Matrix<qd::bfloat16> a(2, 3), b(4, 2);
  for (auto& x : b.span()) x = qd::bfloat16(1.5f);
  qd::SafetensorsWriter writer;
  writer.add("base_model.model.up.lora_A.weight", std::as_const(a).view());
  writer.add("base_model.model.up.lora_B.weight", std::as_const(b).view());
  writer.write(files.folder / "adapter_model.safetensors");
  CHECK(qd::load_peft_adapter(files.folder.path()).find("up")->b(1, 3) == 1.5f);
}

TEST_CASE("a bias that trained is one of those modules that have it, and is enough of a change") {
  Damaged files;
  files.config["bias"] = "lora_only";
  files.zero_b();
  CHECK(code_of([&] { (void)files.load(); }) == Errc::bad_config);
  files.bias();
  const auto loaded = files.load();
  CHECK(loaded.config.trains_bias);
  CHECK(loaded.find("up")->bias(0, 3) == 4.0f);
  CHECK_FALSE(loaded.find("x.down")->biased());
  const auto up = qd::to_adapter(*loaded.find("up")), down = qd::to_adapter(*loaded.find("x.down"));
  CHECK(up.biased());
  CHECK_FALSE(down.biased());

  // Heads of a rotary layout turn with their rows.
  const test::TemporaryFolder folder;
  qd::save_peft_adapter(folder / "turned", {{"up", &up, 1}, {"x.down", &down}});
  const auto turned = qd::load_peft_adapter(folder / "turned", {.force = true});
  const auto& bias = turned.find("up")->bias;
  CHECK((bias(0, 0) == 1.0f && bias(0, 1) == 3.0f && bias(0, 2) == 2.0f && bias(0, 3) == 4.0f));
  qd::LoRAAdapter<float> back(3, 4, qd::lora_options(*turned.find("up")));
  back.add_bias();
  qd::assign(*turned.find("up"), back, 1);
  CHECK(same_bits(back.bias().value, up.bias().value));
}

TEST_CASE("modules that were trained whole come with the adapter for those who use them, and are saved with it") {
  Damaged files;
  files.config["modules_to_save"] = {"lm_head", "norm"};
  files.config["fan_in_fan_out"] = true;
  files.tensors["base_model.model.lm_head.weight"] = {{2, 3}, {1, 2, 3, 4, 5, 6}};
  files.tensors["base_model.model.x.down_norm.weight"] = {{3}, {7, 8, 9}};
  files.tensors["base_model.model.x.down_norm.bias"] = {{3}, {0, 0, 1}};
  files.write();
  const auto load = [&](const std::filesystem::path& folder, bool force = false) {
    return qd::load_peft_adapter(folder, {.force = force, .saved_modules = true});
  };
  const auto loaded = load(files.folder.path());
  CHECK(loaded.config.fan_in_fan_out);
  CHECK(loaded.modules.size() == 2);
  CHECK(loaded.saved.names == std::vector<std::string>{"lm_head", "norm"});
  CHECK_FALSE(loaded.saved.ties_weights);
  REQUIRE(loaded.saved.tensors.size() == 3);
  const auto* head = loaded.saved.find("lm_head.weight");
  REQUIRE(head != nullptr);
  CHECK(head->module() == "lm_head");
  CHECK_FALSE(head->vector);
  CHECK(head->value(1, 0) == 4.0f);
  const auto* bias = loaded.saved.find("x.down_norm.bias");
  REQUIRE(bias != nullptr);
  CHECK(bias->vector);
  CHECK(bias->value(0, 2) == 1.0f);

  // Saved again, at another rank.
  const test::TemporaryFolder folder;
  const auto up = qd::to_adapter(*loaded.find("up")), down = qd::to_adapter(*loaded.find("x.down"));
  qd::PeftSaved saved = {loaded.saved.names, {}, true};
  for (const auto& tensor : loaded.saved.tensors) saved.tensors.push_back({tensor.name, qd::clone(tensor.value.view()), tensor.vector});
  qd::save_peft_adapter(folder / "a", {{"up", &up}, {"x.down", &down}}, {.rank = 1, .saved = &saved, .fan_in_fan_out = true});
  const auto again = load(folder / "a");
  CHECK(again.max_rank() == 1);
  CHECK(again.config.fan_in_fan_out);
  CHECK(again.saved.ties_weights);
  CHECK(again.saved.names == saved.names);
  REQUIRE(again.saved.tensors.size() == 3);
  for (const auto& tensor : again.saved.tensors) {
    CHECK(same_bits(tensor.value, loaded.saved.find(tensor.name)->value));
    CHECK(tensor.vector == loaded.saved.find(tensor.name)->vector);
  }
  saved.tensors.front().value(0, 0) = std::nanf("");
  CHECK(code_of([&] { qd::save_peft_adapter(folder / "b", {{"up", &up}}, {.saved = &saved}); }) == Errc::non_finite);

  // An adapter of whole modules alone is one, and so is one whose B is zero.
  Damaged whole = {};
  whole.config["modules_to_save"] = {"lm_head"};
  whole.tensors["base_model.model.lm_head.weight"] = {{1, 1}, {1}};
  whole.zero_b();
  whole.write();
  CHECK(load(whole.folder.path()).saved.tensors.size() == 1);
  whole.tensors["base_model.model.lm_head.weight"].values[0] = std::nanf("");
  whole.write();
  CHECK(code_of([&] { (void)load(whole.folder.path()); }) == Errc::non_finite);
  CHECK_FALSE(code_of([&] { (void)load(whole.folder.path(), true); }));
  whole.config["modules_to_save"] = {"lm_head", "embed_tokens"};
  whole.tensors["base_model.model.lm_head.weight"].values[0] = 1.0f;
  whole.write();
  const auto absent = error_of([&] { (void)load(whole.folder.path()); });
  REQUIRE(absent);
  CHECK(absent->code() == Errc::missing_tensor);
  CHECK(std::string(absent->what()).find("embed_tokens") != std::string::npos);
  whole.config["modules_to_save"] = {"embed_tokens"};  // then lm_head is nobody's
  whole.tensors["base_model.model.embed_tokens.weight"] = {{1, 1}, {1}};
  whole.write();
  CHECK(code_of([&] { (void)load(whole.folder.path()); }) == Errc::unexpected_tensor);
  whole.config["modules_to_save"] = {""};
  whole.write();
  CHECK(code_of([&] { (void)load(whole.folder.path()); }) == Errc::bad_config);
}

TEST_CASE("a damaged or foreign adapter is an error that says what is wrong") {
  struct Fixture {
    std::string what;
    Errc code;
    std::string names;  // part of the message
    void (*damage)(Damaged&);
  };
  const std::vector<Fixture> fixtures = {
      {"no tensors", Errc::missing_tensor, "empty", [](Damaged& f) { f.tensors.clear(); }},
      {"NaN in A", Errc::non_finite, "up.lora_A", [](Damaged& f) { f.up_a()[4] = std::nanf(""); }},
      {"infinity in A", Errc::non_finite, "[1, 1]", [](Damaged& f) { f.up_a()[4] = std::numeric_limits<float>::infinity(); }},
      {"B zero everywhere", Errc::bad_config, "every B is zero", [](Damaged& f) { f.zero_b(); }},
      {"A without B", Errc::missing_tensor, "lora_B", [](Damaged& f) { f.tensors.erase("base_model.model.up.lora_B.weight"); }},
      {"B without A", Errc::missing_tensor, "lora_A", [](Damaged& f) { f.tensors.erase("base_model.model.up.lora_A.weight"); }},
      {"rank of A", Errc::shape_mismatch, "expected rank 2, found [3, 2]",
       [](Damaged& f) {
         f.tensors["base_model.model.up.lora_A.weight"].shape = {3, 2};
       }},
      {"rank of B", Errc::shape_mismatch, "expected rank 2, found [2, 4]",
       [](Damaged& f) {
         f.tensors["base_model.model.up.lora_B.weight"].shape = {2, 4};
       }},
      {"A of one dimension", Errc::shape, "up.lora_A",
       [](Damaged& f) { f.tensors["base_model.model.up.lora_A.weight"].shape = {6}; }},
      {"r of the config", Errc::shape_mismatch, "expected rank 4", [](Damaged& f) { f.config["r"] = 4; }},
      {"r in a pattern", Errc::shape_mismatch, "expected rank 4",
       [](Damaged& f) {
         f.config["rank_pattern"] = {{"up", 4}};
       }},
      {"r a half", Errc::shape_mismatch, "expected rank 1.5",
       [](Damaged& f) {
         f.config["rank_pattern"] = {{"up", 1.5}};
       }},
      {"no r", Errc::bad_config, "'r'", [](Damaged& f) { f.config.erase("r"); }},
      {"r zero", Errc::bad_config, "'r'", [](Damaged& f) { f.config["r"] = 0; }},
      {"r beyond the limit", Errc::bad_config, "'r'", [](Damaged& f) { f.config["r"] = 65536; }},
      {"r a text", Errc::bad_config, "'r'", [](Damaged& f) { f.config["r"] = "2"; }},
      {"no lora_alpha", Errc::bad_config, "lora_alpha", [](Damaged& f) { f.config.erase("lora_alpha"); }},
      {"lora_alpha a list", Errc::bad_config, "lora_alpha", [](Damaged& f) { f.config["lora_alpha"] = {1}; }},
      {"lora_alpha zero", Errc::bad_config, "lora_alpha", [](Damaged& f) { f.config["lora_alpha"] = 0; }},
      {"lora_alpha too large", Errc::bad_config, "lora_alpha", [](Damaged& f) { f.config["lora_alpha"] = 1e39; }},
      {"no target_modules", Errc::bad_config, "target_modules", [](Damaged& f) { f.config.erase("target_modules"); }},
      {"target_modules a number", Errc::bad_config, "target_modules", [](Damaged& f) { f.config["target_modules"] = 1; }},
      {"a module that is no target", Errc::bad_config, "target_modules", [](Damaged& f) { f.config["target_modules"] = {"down"}; }},
      {"another kind of adapter", Errc::unsupported, "IA3", [](Damaged& f) { f.config["peft_type"] = "IA3"; }},
      {"peft_type a number", Errc::bad_config, "peft_type", [](Damaged& f) { f.config["peft_type"] = 3; }},
      {"biases of all layers", Errc::unsupported, "found 'all'", [](Damaged& f) { f.config["bias"] = "all"; }},
      {"a bias a number", Errc::bad_config, "bias", [](Damaged& f) { f.config["bias"] = 1; }},
      {"a bias that none trained", Errc::unexpected_tensor, "up.base_layer.bias", [](Damaged& f) { f.bias(); }},
      {"a bias of too few outputs", Errc::shape_mismatch, "expected [4], found [3]",
       [](Damaged& f) {
         f.config["bias"] = "lora_only";
         f.bias() = {{3}, {1, 2, 3}};
       }},
      {"a bias of two dimensions", Errc::shape_mismatch, "expected [4], found [1, 4]",
       [](Damaged& f) {
         f.config["bias"] = "lora_only";
         f.bias().shape = {1, 4};
       }},
      {"infinity in a bias", Errc::non_finite, "up.base_layer.bias",
       [](Damaged& f) {
         f.config["bias"] = "lora_only";
         f.bias().values[1] = std::numeric_limits<float>::infinity();
       }},
      {"a bias without its pair", Errc::missing_tensor, "z.lora_A",
       [](Damaged& f) {
         f.config["bias"] = "lora_only";
         f.tensors["base_model.model.z.base_layer.bias"] = {{4}, {1, 1, 1, 1}};
       }},
      {"a layer's own bias, not an adapter's", Errc::unexpected_tensor, ".base_layer.bias",
       [](Damaged& f) {
         f.config["bias"] = "lora_only";
         f.tensors["base_model.model.up.bias"] = {{4}, {1, 1, 1, 1}};
       }},
      {"no magnitude", Errc::missing_tensor, "up.lora_magnitude_vector", [](Damaged& f) { f.config["use_dora"] = true; }},
      {"a magnitude without DoRA", Errc::unexpected_tensor, "up.lora_magnitude_vector", [](Damaged& f) { f.magnitude(); }},
      {"a magnitude of too few outputs", Errc::shape_mismatch, "expected [4], found [3]",
       [](Damaged& f) {
         f.config["use_dora"] = true;
         f.magnitude() = {{3}, {1, 2, 3}};
       }},
      {"a magnitude of two dimensions", Errc::shape_mismatch, "expected [4], found [1, 4]",
       [](Damaged& f) {
         f.config["use_dora"] = true;
         f.magnitude().shape = {1, 4};
       }},
      {"NaN in a magnitude", Errc::non_finite, "up.lora_magnitude_vector",
       [](Damaged& f) {
         f.config["use_dora"] = true;
         f.magnitude().values[2] = std::nanf("");
       }},
      {"a magnitude without its pair", Errc::missing_tensor, "z.lora_A",
       [](Damaged& f) {
         f.config["use_dora"] = true;
         f.magnitude();
         f.tensors["base_model.model.z.lora_magnitude_vector"] = {{4}, {1, 1, 1, 1}};
       }},
      {"use_dora a text", Errc::bad_config, "use_dora", [](Damaged& f) { f.config["use_dora"] = "yes"; }},
      {"fan_in_fan_out a number", Errc::bad_config, "fan_in_fan_out", [](Damaged& f) { f.config["fan_in_fan_out"] = 1; }},
      {"other trained modules", Errc::unsupported, "modules_to_save",
       [](Damaged& f) { f.config["modules_to_save"] = {"lm_head"}; }},
      {"another base", Errc::unsupported, "pissa", [](Damaged& f) { f.config["init_lora_weights"] = "pissa_niter_4"; }},
      {"another base, which nobody makes again", Errc::unsupported, "pissa",
       [](Damaged& f) {
         f.config["init_lora_weights"] = "pissa";
         f.metadata["qdylora.init"] = "pissa";
         f.metadata["qdylora.init_rank"] = "2";
       }},
      {"unknown initial values", Errc::unsupported, "qdylora.init",
       [](Damaged& f) {
         f.metadata["qdylora.init"] = "olora";
         f.metadata["qdylora.init_rank"] = "2";
       }},
      {"initial values of no rank", Errc::bad_config, "qdylora.init_rank", [](Damaged& f) { f.metadata["qdylora.init"] = "loftq"; }},
      {"a regular expression beyond those known", Errc::unsupported, "regular expression",
       [](Damaged& f) {
         f.config["rank_pattern"] = {{"(?!up)down", 2}};
       }},
      {"a pattern's value a text", Errc::bad_config, "alpha_pattern",
       [](Damaged& f) {
         f.config["alpha_pattern"] = {{"up", "2"}};
       }},
      {"patterns a list", Errc::bad_config, "alpha_pattern",
       [](Damaged& f) {
         f.config["alpha_pattern"] = {1, 2};
       }},
      {"a tensor of another name", Errc::unexpected_tensor, "lora_embedding_A",
       [](Damaged& f) {
         f.tensors["base_model.model.lora_embedding_A"] = {{1}, {1}};
       }},
      {"a tensor without prefix", Errc::unexpected_tensor, "up.lora_A.weight",
       [](Damaged& f) {
         f.tensors["up.lora_A.weight"] = {{1}, {1}};
       }},
      {"a tensor without module", Errc::unexpected_tensor, "model.lora_A.weight",
       [](Damaged& f) {
         f.tensors["base_model.model.lora_A.weight"] = {{1}, {1}};
       }},
      {"a later version", Errc::version, "qdylora.version", [](Damaged& f) { f.metadata["qdylora.version"] = "2"; }},
      {"an unknown scale", Errc::unsupported, "qdylora.scale", [](Damaged& f) { f.metadata["qdylora.scale"] = "alpha"; }},
      {"ranks that are none", Errc::bad_config, "qdylora.ranks", [](Damaged& f) { f.metadata["qdylora.ranks"] = "1,0"; }},
      {"ranks that are no list", Errc::json, "", [](Damaged& f) { f.metadata["qdylora.ranks"] = "1,2]"; }},
      {"gates that are not there", Errc::open, "qdylora_gates", [](Damaged& f) { f.metadata["qdylora.gates"] = "true"; }},
  };
  CHECK(Damaged().load().modules.size() == 2);
  for (const auto& fixture : fixtures) {
    CAPTURE(fixture.what);
    Damaged files;
    fixture.damage(files);
    const auto error = error_of([&] { files.load(); });
    REQUIRE(error);
    CHECK(qd::name(error->code()) == qd::name(fixture.code));
    CAPTURE(error->what());
    CHECK(std::string(error->what()).find(fixture.names) != std::string::npos);
    CHECK(error->file().starts_with(files.folder.path().native()));
  }
  for (const auto damage : {+[](Damaged& f) { f.tensors.clear(); }, +[](Damaged& f) { f.up_a()[4] = std::nanf(""); },
                            +[](Damaged& f) { f.zero_b(); }}) {
    Damaged files;
    damage(files);
    CHECK_FALSE(code_of([&] { files.load(true); }));  // forced
  }
}

TEST_CASE("how an adapter began is saved with it, and where that changed the base, it loads for those alone who make that base again") {
  test::TemporaryFolder folder;
  const auto adapter = make_adapter(6, 6, {.max_rank = 4}, 1);
  for (const std::string text : {"standard", "loftq", "loftq:3", "pissa", "qera"}) {
    CAPTURE(text);
    const auto init = qd::adapter_init(text, 4);
    const auto base_format = init.standard() ? std::string() : std::string("nf4");
    qd::save_peft_adapter(folder / "a", {{"up", &adapter}}, {.init = init, .base_format = base_format});
    const auto code = code_of([&] { qd::load_peft_adapter(folder / "a"); });
    if (init.changes_base()) CHECK(code == Errc::unsupported);
    else CHECK_FALSE(code);
    const auto loaded = qd::load_peft_adapter(folder / "a", {.changed_base = true});
    CHECK(loaded.init == init);
    CHECK(loaded.base_format == base_format);
    const auto told = [&] { return qd::read_json(folder / "a" / "adapter_config.json").at("init_lora_weights"); };
    if (text == "pissa") CHECK(told() == "pissa");
    else if (text == "loftq:3") CHECK(told() == "of a changed base: loftq:3 at rank 4");
    else CHECK(told() == true);
    qd::save_peft_adapter(folder / "a", {{"up", &adapter}}, {.rank = 2, .init = init, .base_format = base_format});
    if (text == "pissa") CHECK(told() == "of a changed base: pissa at rank 4");  // PEFT would make one of rank 2
    CHECK(qd::load_peft_adapter(folder / "a", {.changed_base = true}).init == init);
  }
}

TEST_CASE("gates of another adapter are refused") {
  test::TemporaryFolder folder;
  const qd::LoRAOptions options{.max_rank = 4, .gated_ranks = {2, 4}};
  const auto one = make_adapter(6, 6, options, 1), two = make_adapter(6, 6, options, 2);
  qd::save_peft_adapter(folder / "one", {{"lin", &one}});
  qd::save_peft_adapter(folder / "two", {{"lin", &two}});
  std::filesystem::copy_file(folder / "two" / "qdylora_gates.safetensors", folder / "one" / "qdylora_gates.safetensors",
                             std::filesystem::copy_options::overwrite_existing);
  CHECK(code_of([&] { qd::load_peft_adapter(folder / "one"); }) == Errc::bad_config);

  const auto write = [&](std::vector<Index> ranks, Index gate_rows, const std::string& extra) {
    qd::SafetensorsWriter writer;
    qd::Matrix<float> gates(gate_rows, 4), b(6, 4);
    writer.add("lin.gates", std::as_const(gates).view());
    writer.add("lin.gated_ranks", qd::DType::I64, {static_cast<Index>(ranks.size())}, std::as_bytes(std::span(ranks)));
    writer.add("lin.lora_B.weight", std::as_const(b).view());
    if (!extra.empty()) writer.add(extra, std::as_const(b).view());
    writer.write(folder / "one" / "qdylora_gates.safetensors");
  };
  const auto load = [&] { return code_of([&] { qd::load_peft_adapter(folder / "one"); }); };
  write({2, 4}, 2, "");
  CHECK(load() == Errc::bad_config);
  write({4, 2}, 2, "");
  CHECK(load() == Errc::rank_range);
  write({2, 5}, 2, "");
  CHECK(load() == Errc::rank_range);
  write({2, 4}, 3, "");
  CHECK(load() == Errc::shape_mismatch);
  qd::save_peft_adapter(folder / "one", {{"lin", &one}});
  CHECK_FALSE(load());
  {
    const qd::SafetensorsFile file(folder / "one" / "qdylora_gates.safetensors");
    qd::SafetensorsWriter writer;
    std::vector<qd::Buffer<std::byte>> kept;
    for (const auto& tensor : file.tensors()) {
      kept.push_back(file.bytes(tensor.name));
      writer.add(tensor.name, tensor.dtype, tensor.shape, kept.back().span());
    }
    writer.add("other.gates", qd::DType::U8, {0}, {});
    writer.write(folder / "gates");
  }
  std::filesystem::rename(folder / "gates", folder / "one" / "qdylora_gates.safetensors");
  CHECK(load() == Errc::unexpected_tensor);
}

TEST_CASE("wrong arguments of saving are refused before a file is touched") {
  test::TemporaryFolder folder;
  auto adapter = make_adapter(4, 4, {.max_rank = 4});
  const auto other = make_adapter(4, 4, {.max_rank = 4, .scale = qd::ScalePolicy::over_rank});
  qd::save_peft_adapter(folder.path(), {{"lin", &adapter}}, {.rank = 2});
  const std::string model = test::read_file(folder / "adapter_model.safetensors");
  const auto save = [&](std::vector<qd::NamedAdapter> list, Index rank = 0) {
    return code_of([&] { qd::save_peft_adapter(folder.path(), list, qd::PeftOptions{.rank = rank}); });
  };
  CHECK(save({}) == Errc::bad_argument);
  CHECK(save({{"lin", &adapter}}, 5) == Errc::rank_range);
  CHECK(save({{"lin", &adapter}}, -1) == Errc::rank_range);
  CHECK(code_of([&] { qd::save_peft_adapter(folder.path(), std::vector<qd::NamedAdapter>{{"lin", &adapter}}, 0); }) ==
        Errc::rank_range);
  CHECK(save({{"lin", nullptr}}) == Errc::bad_argument);
  CHECK(save({{"", &adapter}}) == Errc::bad_argument);
  CHECK(save({{"a/b", &adapter}}) == Errc::bad_argument);
  CHECK(save({{"lin", &adapter}, {"lin", &adapter}}) == Errc::duplicate);
  CHECK(save({{"lin", &adapter}, {"two", &other}}) == Errc::bad_argument);
  adapter.a().value(1, 1) = std::nanf("");
  CHECK(save({{"lin", &adapter}}) == Errc::non_finite);
  CHECK(test::read_file(folder / "adapter_model.safetensors") == model);
  CHECK(qd::load_peft_adapter(folder.path()).find("lin")->rank() == 2);
  CHECK(code_of([&] { qd::save_peft_adapter(folder / "adapter_model.safetensors", {{"lin", &other}}); }) == Errc::open);
}

TEST_CASE("saving that fails half way leaves no new tensors under an old config") {
  test::TemporaryFolder folder;
  const auto adapter = make_adapter(4, 4, {.max_rank = 4});
  qd::save_peft_adapter(folder.path(), {{"lin", &adapter}}, {.rank = 2});
  std::filesystem::remove(folder / "adapter_model.safetensors");
  std::filesystem::create_directory(folder / "adapter_model.safetensors");  // which no file can replace
  const auto save = [&](Index rank) {
    return code_of([&] { qd::save_peft_adapter(folder.path(), {{"lin", &adapter}}, {.rank = rank}); });
  };
  CHECK(save(2) == Errc::write);
  CHECK(std::filesystem::exists(folder / "adapter_config.json"));
  CHECK(save(4) == Errc::write);
  CHECK_FALSE(std::filesystem::exists(folder / "adapter_config.json"));
  CHECK(folder.count() == 1);
}

}  // namespace peft_test
