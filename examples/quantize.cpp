// Quantizes the linear weights of a model's blocks to bitsandbytes' 4 bits: a folder as transformers saves and loads one. Or all matrices
// of one safetensors file. Everything else is copied. Or shows what quantization costs each linear weight of a model.
//
//   quantize MODEL_DIR OUT_DIR --format nf4|fp4 --block-size 64 --double-quant on|off
//   quantize IN.safetensors OUT.safetensors
//   quantize --heat-map OUT.svg MODEL --format nf4|fp4|int4|fp8 --init loftq --rank 16
//
// The heat map has a row for each block and a column for each linear layer: |W - base| / |W| (Frobenius norms), and with --init the same of
// base + adapter as they begin. OUT.json has its numbers. MODEL is read in float32.
#include <algorithm>
#include <cstdio>
#include <deque>
#include <filesystem>
#include <limits>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include <qdylora/io.hpp>
#include <qdylora/model.hpp>

#include "common/heat_map.hpp"
#include "common/model.hpp"
#include "common/model_folder.hpp"
#include "common/program.hpp"
#include "common/weight_error.hpp"

namespace {

using namespace qdylora;
using namespace qdylora::examples;

bool is_matrix(const TensorInfo& t) {
  return t.shape.size() == 2 && t.shape[0] > 0 && t.shape[1] > 0 &&
         (t.dtype == DType::F32 || t.dtype == DType::F16 || t.dtype == DType::BF16);
}

// Root mean square of what quantization changed, relative to that of the weight; the file is read again, some rows at a time.
double relative_error(const SafetensorsFile& file, const TensorInfo& t, const WeightFor<AnyFormat>& weight) {
  WeightError error;
  const Index step = std::max<Index>(1, (Index{1} << 20) / t.shape[1]);
  Matrix<float> original, decoded;
  for (Index first = 0; first < t.shape[0]; first += step) {
    const Index rows = std::min(step, t.shape[0] - first);
    original.resize(rows, t.shape[1]);
    decoded.resize(rows, t.shape[1]);
    file.read_rows(t.name, first, original.view());
    weight.visit([&]<class View>(const View& view) {
      if constexpr (requires { typename View::format; }) dequantize(view, decoded.view(), first);
    });
    error.add(decoded.view(), original.view());
  }
  return error.root_mean_square();
}

/// Writes files with matrices in 4 bits, a line for each, and sums over all.
class FileQuantizer {
 public:
  explicit FileQuantizer(const BaseOptions& options) : options_(options) {
    std::printf("%-60s %14s %8s %10s\n", "tensor", "shape", "bits", "error");
  }

  /// The tensors of a file: matrices that `chosen` says in 4 bits, the others as they are.
  template <class Chosen>
  void write(const SafetensorsFile& file, const std::filesystem::path& out, Chosen&& chosen) {
    SafetensorsWriter writer;
    BnbStates states;
    std::deque<std::shared_ptr<const WeightFor<AnyFormat>>> weights;  // the writer borrows: these live until it has written
    std::deque<Buffer<std::byte>> copies;
    for (const auto& [key, value] : file.metadata()) writer.metadata(key, value);
    for (const auto& t : file.tensors()) {
      if (!chosen(t)) {
        copies.push_back(file.bytes(t.name));
        writer.add(t.name, t.dtype, t.shape, copies.back().span());
        continue;
      }
      weights.push_back(at_tensor(file.name(), t.name, [&] {
        return make_base_weight(
            t.shape[0], t.shape[1], options_, [&](Index first, MatrixView<float> rows) { file.read_rows(t.name, first, rows); }, cpu_);
      }));
      const auto& weight = *weights.back();
      add_bnb_4bit(writer, states, t.name, weight, t.dtype);
      const Index size = t.shape[0] * t.shape[1];
      bits_ += 8.0 * static_cast<double>(weight.bytes());
      count_ += size;
      std::printf("%-60s %14s %8.4f %9.3f%%\n", printable(t.name, 60).c_str(),
                  (std::to_string(t.shape[0]) + "x" + std::to_string(t.shape[1])).c_str(),
                  8.0 * static_cast<double>(weight.bytes()) / static_cast<double>(size), 100.0 * relative_error(file, t, weight));
    }
    writer.write(out);
    matrices_ += weights.size();
    copies_ += copies.size();
  }

  void print_sum(const std::string& out) const {
    std::printf("%zu matrices, %.2f M weights, %.4f bits each; %zu other tensors copied; wrote %s\n", matrices_,
                static_cast<double>(count_) / 1e6, bits_ / static_cast<double>(count_), copies_, out.c_str());
  }

 private:
  BaseOptions options_;
  Cpu cpu_;
  double bits_ = 0.0;
  Index count_ = 0;
  std::size_t matrices_ = 0, copies_ = 0;
};

int quantize_file(const std::string& in, const std::string& out, const BaseOptions& options) {
  expect_no_overwrite(in, out);
  const SafetensorsFile file(in);
  QDYLORA_EXPECTS(std::ranges::any_of(file.tensors(), is_matrix), bad_argument,
                  in + ": has no matrix of float32, float16 or bfloat16");
  FileQuantizer quantizer(options);
  quantizer.write(file, out, is_matrix);
  quantizer.print_sum(out);
  return 0;
}

/// A model's folder, whose blocks' linear weights alone are quantized, as transformers does it: embedding, head and norms stay as they are.
int quantize_folder(const std::filesystem::path& model, const std::filesystem::path& out, const BaseOptions& options) {
  const auto config_file = model / "config.json";
  const auto config = hugging_face_config(config_file);
  const ErrorPlace config_place{.file = config_file.string()};
  if (qdylora::detail::find_key(read_json(config_file), "quantization_config", config_place) != nullptr)
    throw Error(Errc::unsupported, "has a quantization_config: the weights are quantized already", config_place);
  const SafetensorsFolder source(model);
  std::set<std::string, std::less<>> linears;
  auto type = DType::F32;
  for (Index i = 0; i < config.layers; ++i)
    for (const auto& linear : config.linears()) {  // all, before anything is written
      const auto& name = *linears.insert(config.block_name(i) + std::string(linear.name) + ".weight").first;
      const auto& file = source.file_of(name);
      const auto& t = file.info(name);
      const ErrorPlace place{.file = file.name(), .tensor = name};
      if (t.shape != std::vector{linear.out, linear.in})
        throw Error(Errc::shape_mismatch,
                    "expected " + qdylora::detail::shape_text(linear.out, linear.in) + ", found " +
                        qdylora::detail::shape_text(std::span<const Index>(t.shape)),
                    place);
      if (!is_matrix(t))
        throw Error(Errc::dtype, "expected a weight of F32, F16 or BF16, found " + std::string(qdylora::name(t.dtype)), place);
      type = t.dtype;
    }
  make_folder_of(model, source, out);
  FileQuantizer quantizer(options);
  write_weights(source, out, [&](const SafetensorsFile& file, const std::filesystem::path& path) {
    quantizer.write(file, path, [&](const TensorInfo& t) { return linears.contains(t.name); });
  });
  copy_beside(model, out, [&](Json& json) {
    json["quantization_config"] = bnb_4bit_config(name(options.format), options.double_quant, type);
  });
  quantizer.print_sum(out.string());
  if (config.architecture == Architecture::falcon)
    std::printf("transformers 5 keeps a Falcon's linear layers in float and does not load this folder; this library does\n");
  return 0;
}

int show_errors(const std::string& path, const std::string& svg_path, const BaseOptions& options) {
  const auto json_path = std::filesystem::path(svg_path).replace_extension(".json");
  for (const std::filesystem::path& out : {std::filesystem::path(svg_path), json_path}) expect_no_overwrite(path, out);
  const Cpu cpu;
  const auto model = open_model(path, "", {.format = BaseFormat::float32}, cpu);
  const auto weights = model.read(model.base);
  const auto& config = weights->config;
  const auto linears = config.linears();
  const bool begun = !options.init.standard();
  std::string of = std::string(name(options.format)) + ", blocks of " + std::to_string(options.block_size);
  if (!options.double_quant) of += ", float32 scales";
  const std::string with = name(options.init) + " of rank " + std::to_string(options.init.rank);
  std::vector<HeatMap> maps{heat_map_of(config, "Error of the weights, %: " + of)};
  if (begun) maps.push_back(heat_map_of(config, "With the adapter as it begins, %: " + with));
  Json json = {{"model", model.name},
               {"format", name(options.format)},
               {"block_size", options.block_size},
               {"double_quant", options.double_quant},
               {"relative_error", Json::object()}};
  if (begun) {
    json["init"] = name(options.init);
    json["rank"] = options.init.rank;
    json["relative_error_with_adapter"] = Json::object();
  }
  for (std::size_t block = 0; block < weights->blocks.size(); ++block)
    for (std::size_t l = 0; l < linears.size(); ++l) {
      const auto w = weights->blocks[block]->linear[l]->get<Matrix<float>>().view();
      const auto module = config.block_name(static_cast<Index>(block)) + std::string(linears[l].name);
      const auto rows = [&](Index first, MatrixView<float> out) { copy(w.middle_rows(first, out.rows), out); };
      Matrix<float> found(w.rows, w.cols);
      const auto put_error = [&](std::size_t map, const char* key) {
        WeightError error;
        error.add(found.view(), w);
        put(maps[map], 100.0 * error.root_mean_square(), 2);
        json[key][module] = error.root_mean_square();
      };
      auto plain = options;
      plain.init = {};
      at_tensor(path, module, [&] {
        decode(*make_base_weight(w.rows, w.cols, plain, rows, cpu), found.view(), cpu);
        put_error(0, "relative_error");
        if (!begun) return;
        const auto [base, adapter] = make_initial_weight(w.rows, w.cols, options, rows, cpu);
        decode(*base, found.view(), cpu);
        if (adapter.rank() > 0) cpu.weight_gradient(adapter.b.view(), adapter.a.view(), found.view(), Update::accumulate);
        put_error(1, "relative_error_with_adapter");
      });
    }
  for (auto& map : maps) {
    map.least = std::numeric_limits<double>::infinity();
    for (const auto& row : map.values) map.least = std::min(map.least, *std::ranges::min_element(row));
  }
  write_svg(svg_path, maps);
  replace_file(json_path, json.dump(1) + "\n");
  for (const auto& map : maps) {
    double least = map.least, most = 0.0, sum = 0.0;
    for (const auto& row : map.values)
      for (const double value : row) {
        most = std::max(most, value);
        sum += value;
      }
    std::printf("%-60s least %.2f, mean %.2f, most %.2f\n", map.title.c_str(), least,
                sum / static_cast<double>(map.rows.size() * map.columns.size()), most);
  }
  std::printf("wrote %s and %s\n", svg_path.c_str(), json_path.string().c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Quantizes a model's folder, or the matrices of a safetensors file, to bitsandbytes' 4 bits, or shows what that costs a "
               "model's weights.",
               "quantize"};
  std::string in, out, heat_map, format = "nf4", double_quant = "on", init = "standard";
  Index block_size = 64, rank = 16;
  app.add_option("IN", in, "Hugging Face folder or safetensors file to read; with --heat-map a folder or a .gguf file")
      ->required()
      ->check(not_empty());
  auto* out_option = app.add_option("OUT", out, "folder or safetensors file to write")->check(not_empty());
  auto* heat_map_option =
      app.add_option("--heat-map", heat_map,
                     "write no weights, but a picture of the error of each linear weight, .svg, and a .json beside it with its numbers")
          ->check(not_empty())
          ->excludes(out_option);
  app.add_option("--format", format, "nf4 or fp4; with --heat-map int4, fp8, bfloat16 or float32 too")->capture_default_str();
  app.add_option("--block-size", block_size, "weights that share a scale")
      ->check(CLI::IsMember(std::set<Index>{32, 64, 128, 256, 512, 1024, 2048, 4096}))
      ->capture_default_str();
  app.add_option("--double-quant", double_quant, "quantize the scales too: on or off")
      ->check(CLI::IsMember({"on", "off"}))
      ->capture_default_str();
  auto* init_option =
      app.add_option("--init", init, "of the heat map: loftq, loftq:ITERATIONS or pissa, what is left with an adapter that begins so")
          ->needs(heat_map_option)
          ->capture_default_str();
  app.add_option("--rank", rank, "of --init")->check(in_range<Index>(1, most_rank))->needs(init_option)->capture_default_str();
  return run_program(app, argc, argv, [&] {
    BaseOptions options{.format = base_format(format), .double_quant = double_quant == "on", .block_size = block_size};
    if (!heat_map.empty()) {
      options.init = adapter_init(init, rank);
      QDYLORA_EXPECTS(!options.init.calibrated(), unsupported, "--init " + init + ": looks at what passes through the model on texts");
      return show_errors(in, heat_map, options);
    }
    QDYLORA_EXPECTS(!out.empty(), bad_argument, "give OUT, or --heat-map");
    QDYLORA_EXPECTS(options.format == BaseFormat::nf4 || options.format == BaseFormat::fp4, bad_argument,
                    "--format " + format + ": bitsandbytes' 4-bit keys hold nf4 and fp4");
    return std::filesystem::is_directory(in) ? quantize_folder(in, out, options) : quantize_file(in, out, options);
  });
}
