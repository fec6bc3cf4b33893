// Folders of bottleneck adapters: what is saved comes back, at any width the same function, and nothing takes it for a PEFT adapter.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/io/bottleneck.hpp>
#include <qdylora/io/peft.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"

namespace bottleneck_test {

namespace qd = qdylora;
using qd::AdapterMethod;
using qd::Errc;
using qd::Index;
using test::code_of;
using test::same_bits;

namespace {

constexpr Index units = 8, width = 12;

std::vector<qd::LoRAAdapter<float>> some_adapters(qd::ScalePolicy scale) {
  std::vector<qd::LoRAAdapter<float>> adapters;
  for (const std::uint32_t layer : {0u, 1u}) {
    adapters.emplace_back(width, width, qd::LoRAOptions{.max_rank = units, .alpha = 4.0f, .scale = scale, .layer = layer,
                                                        .name = "model.layers." + std::to_string(layer) + ".mlp_adapter"});
    qd::Rng rng(layer);
    test::fill_normal(adapters.back().b().value.view(), rng);
  }
  return adapters;
}

std::vector<qd::NamedAdapter> named(const std::vector<qd::LoRAAdapter<float>>& adapters) {
  std::vector<qd::NamedAdapter> all;
  for (const auto& adapter : adapters) all.push_back({adapter.options().name, &adapter});
  return all;
}

}  // namespace

TEST_CASE("bottlenecks come back as they were saved, at every width, with its scale at every width below") {
  for (const auto scale : {qd::ScalePolicy::constant, qd::ScalePolicy::over_rank, qd::ScalePolicy::over_sqrt_rank})
    for (const auto method : {AdapterMethod::houlsby, AdapterMethod::parallel})
      for (const Index kept : {Index{0}, Index{1}, Index{3}, units}) {
        CAPTURE(name(scale), name(method), kept);
        const auto adapters = some_adapters(scale);
        const test::TemporaryFolder folder;
        qd::save_bottleneck_adapter(folder / "a", method, named(adapters),
                                    {.rank = kept, .base_model = "tiny", .ranks = {1, 3, 8}, .recipe = "per-row"});
        CHECK(qd::is_bottleneck_adapter(folder / "a"));
        const auto loaded = qd::load_bottleneck_adapter(folder / "a");
        const Index rows = kept == 0 ? units : kept;
        CHECK(loaded.method == method);
        CHECK(loaded.max_rank() == rows);
        CHECK(loaded.config.base_model == "tiny");
        CHECK(loaded.ranks == (rows == 1 ? std::vector<Index>{1} : rows == 3 ? std::vector<Index>{1, 3} : std::vector<Index>{1, 3, 8}));
        REQUIRE(loaded.modules.size() == 2);
        for (std::size_t i = 0; i < 2; ++i) {
          const auto found = qd::to_adapter(*loaded.find(adapters[i].options().name));
          CHECK(same_bits(found.a().value.view(), adapters[i].a().value.view().top_rows(rows)));
          CHECK(same_bits(found.b().value.view(), adapters[i].b().value.view().top_rows(rows)));
          for (Index rank = 1; rank <= rows; ++rank) CHECK(found.scale(rank) == Approx(adapters[i].scale(rank)).epsilon(1e-7));
        }
      }
}

TEST_CASE("a folder of bottlenecks is no PEFT adapter, and either replaces the other") {
  const auto adapters = some_adapters(qd::ScalePolicy::constant);
  const test::TemporaryFolder folder;
  qd::save_bottleneck_adapter(folder.path(), AdapterMethod::houlsby, named(adapters));
  const auto error = test::error_of([&] { qd::load_peft_adapter(folder.path()); });
  REQUIRE(error);
  CHECK(error->code() == Errc::unsupported);
  CHECK(std::string(error->what()).find("bottleneck") != std::string::npos);
  CHECK(std::string(error->what()).find("merged") != std::string::npos);
  qd::save_peft_adapter(folder.path(), named(adapters), qd::PeftOptions{});
  CHECK_FALSE(qd::is_bottleneck_adapter(folder.path()));
  CHECK(qd::load_peft_adapter(folder.path()).method == AdapterMethod::lora);
  qd::save_bottleneck_adapter(folder.path(), AdapterMethod::houlsby, named(adapters));
  CHECK(code_of([&] { qd::load_peft_adapter(folder.path()); }) == Errc::unsupported);
}

TEST_CASE("bottlenecks that cannot be saved are refused") {
  const auto adapters = some_adapters(qd::ScalePolicy::constant);
  const test::TemporaryFolder folder;
  const auto save = [&](AdapterMethod method, std::vector<qd::NamedAdapter> all, qd::PeftOptions options) {
    return code_of([&] { qd::save_bottleneck_adapter(folder / "a", method, all, options); });
  };
  CHECK(save(AdapterMethod::lora, named(adapters), {}) == Errc::bad_argument);
  CHECK(save(AdapterMethod::houlsby, {}, {}) == Errc::bad_argument);
  CHECK(save(AdapterMethod::houlsby, {{"m", nullptr}}, {}) == Errc::bad_argument);
  CHECK(save(AdapterMethod::houlsby, named(adapters), {.rank = 9}) == Errc::rank_range);
  CHECK(save(AdapterMethod::houlsby, named(adapters), {.rank = -1}) == Errc::rank_range);
  CHECK(save(AdapterMethod::houlsby, named(adapters), {.init = {.kind = qd::AdapterInit::Kind::pissa, .rank = 8}}) == Errc::unsupported);
  CHECK(save(AdapterMethod::houlsby, {named(adapters)[0], named(adapters)[0]}, {}) == Errc::duplicate);
  auto others = some_adapters(qd::ScalePolicy::over_rank);
  CHECK(save(AdapterMethod::houlsby, {named(adapters)[0], named(others)[1]}, {}) == Errc::bad_argument);
  others[1].b().value(2, 3) = std::numeric_limits<float>::quiet_NaN();
  CHECK(save(AdapterMethod::houlsby, named(others), {}) == Errc::non_finite);
  CHECK_FALSE(std::filesystem::exists(folder / "a"));
}

TEST_CASE("damaged folders of bottlenecks give typed errors") {
  const auto adapters = some_adapters(qd::ScalePolicy::constant);
  const test::TemporaryFolder folder;
  qd::save_bottleneck_adapter(folder.path(), AdapterMethod::houlsby, named(adapters));
  const auto config = qd::read_json(folder / "bottleneck_config.json");
  const auto with = [&](const char* key, qd::Json value) {
    auto changed = config;
    if (value.is_null()) changed.erase(key);
    else changed[key] = std::move(value);
    test::write_file(folder / "bottleneck_config.json", changed.dump());
    return code_of([&] { qd::load_bottleneck_adapter(folder.path()); });
  };
  CHECK_FALSE(with("recipe", "any"));
  CHECK(with("format", "other") == Errc::bad_config);
  CHECK(with("version", 2) == Errc::version);
  CHECK(with("method", "lora") == Errc::unsupported);
  CHECK(with("activation", "relu") == Errc::unsupported);
  CHECK(with("scale", "alpha") == Errc::unsupported);
  CHECK(with("width", 0) == Errc::bad_config);
  CHECK(with("width", 7) == Errc::shape_mismatch);
  CHECK(with("alpha", -1) == Errc::bad_config);
  CHECK(with("alpha", 1e300) == Errc::bad_config);
  CHECK(with("ranks", {9}) == Errc::bad_config);
  for (const char* key : {"format", "version", "method", "activation", "scale", "width", "alpha", "ranks"}) {
    CAPTURE(key);
    CHECK(with(key, nullptr) == Errc::bad_config);
  }
  CHECK_FALSE(with("recipe", nullptr));

  const auto holding = [&](auto fill) {
    qd::SafetensorsWriter writer;
    std::vector<qd::Matrix<float>> kept;
    kept.reserve(4);
    const auto add = [&](const std::string& name, Index rows, Index cols, float value = 1.0f) {
      kept.emplace_back(rows, cols);
      std::ranges::fill(kept.back().span(), value);
      writer.add(name, std::as_const(kept.back()).view());
    };
    fill(add);
    writer.write(folder / "bottleneck_model.safetensors");
    return code_of([&] { qd::load_bottleneck_adapter(folder.path()); });
  };
  CHECK_FALSE(holding([](auto add) { add("m.down.weight", units, width), add("m.up.weight", units, width); }));
  CHECK(holding([](auto add) { add("m.down.weight", units, width); }) == Errc::missing_tensor);
  CHECK(holding([](auto add) { add("m.up.weight", units, width); }) == Errc::missing_tensor);
  CHECK(holding([](auto add) { add("m.side.weight", units, width); }) == Errc::unexpected_tensor);
  CHECK(holding([](auto add) { add(".down.weight", units, width), add(".up.weight", units, width); }) == Errc::unexpected_tensor);
  CHECK(holding([](auto add) { add("m.down.weight", units, width), add("m.up.weight", width, units); }) == Errc::shape_mismatch);
  CHECK(holding([](auto add) { add("m.down.weight", units, width), add("m.up.weight", units, 5); }) == Errc::shape_mismatch);
  CHECK(holding([](auto add) { add("m.down.weight", units, width), add("m.up.weight", units, width, std::nanf("")); }) == Errc::non_finite);
  CHECK(holding([](auto) {}) == Errc::missing_tensor);
  std::filesystem::remove(folder / "bottleneck_model.safetensors");
  CHECK(code_of([&] { qd::load_bottleneck_adapter(folder.path()); }) == Errc::open);
}

}  // namespace bottleneck_test
