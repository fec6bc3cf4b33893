// Merges an adapter, at a rank, into the weights of its base model: a folder that any program loads without the adapter.
//
//   merge MODEL_DIR ADAPTER_DIR OUT_DIR [--rank b] [--dtype same|float32|float16|bfloat16]
//
// Weights keep the type they are stored in unless --dtype says otherwise. Those in bitsandbytes' 4 bits are then quantized again, which
// loses part of a small update: how much of it survives is shown for each tensor.
#include <cmath>
#include <cstdio>
#include <deque>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/io.hpp>
#include <qdylora/model/load_hugging_face.hpp>

#include "common/model_folder.hpp"
#include "common/program.hpp"

namespace {

using namespace qdylora;
using namespace qdylora::examples;

using AnyWeight = WeightFor<AnyFormat>;

/// Of an update that was quantized together with its weight: the share of it that is left (its projection), and the size of what is not it.
struct Retained {
  double along = 0.0, size = 0.0, error = 0.0;

  void add(const Matrix<float>& before, const Matrix<float>& sum, const Matrix<float>& after) {
    for (std::size_t i = 0; i < before.span().size(); ++i) {
      const double update = static_cast<double>(sum.span()[i]) - static_cast<double>(before.span()[i]);
      const double found = static_cast<double>(after.span()[i]) - static_cast<double>(before.span()[i]);
      along += found * update;
      size += update * update;
      error += (found - update) * (found - update);
    }
  }
  void operator+=(const Retained& other) {
    along += other.along;
    size += other.size;
    error += other.error;
  }
  double left() const { return size > 0.0 ? along / size : 1.0; }
  void print(const std::string& tensor) const {
    std::printf("%-60s %7.1f%% %7.0f%%\n", printable(tensor, 60).c_str(), 100.0 * left(), size > 0.0 ? 100.0 * std::sqrt(error / size) : 0.0);
  }
};

class Merger {
 public:
  Merger(const PeftAdapter& adapter, Index rank, std::optional<DType> dtype) : adapter_(adapter), rank_(rank), dtype_(dtype) {}

  /// Writes a file's tensors, merged, to `out`.
  void merge(const SafetensorsFile& file, const std::filesystem::path& out) {
    SafetensorsWriter writer;
    for (const auto& [key, value] : file.metadata()) writer.metadata(key, value);
    std::set<std::string, std::less<>> parts;  // of 4-bit weights, with which they are read
    for (const auto& tensor : file.tensors())
      if (is_bnb_4bit(file, tensor.name))
        for (const auto& part : qdylora::detail::tensors_under(file, tensor.name)) parts.insert(part.name);
    for (const auto& tensor : file.tensors()) {
      if (parts.contains(tensor.name)) continue;
      const auto module_of = [&](std::string_view ending) {
        const std::string_view name = tensor.name;
        return name.ends_with(ending) ? adapter_.find(name.substr(0, name.size() - ending.size())) : nullptr;
      };
      const PeftModule *const module = module_of(".weight"), *const biased = module_of(".bias");
      at_tensor(file.name(), tensor.name, [&] {
        if (const PeftTensor* whole = adapter_.saved.find(tensor.name)) put_whole(writer, *whole, dtype_.value_or(tensor.dtype));
        else if (is_bnb_4bit(file, tensor.name)) merge_4bit(file, tensor.name, module, writer);
        else if (biased != nullptr && biased->biased())
          put(writer, tensor.name, clone(biased->bias.view()), dtype_.value_or(tensor.dtype), true);
        else if (module != nullptr && !adapter_.init.standard())
          throw Error(Errc::unsupported, "is in float, and the adapter began as " + name(adapter_.init) + " of a base in " +
                                             printable(adapter_.base_format, 32));
        else if (module != nullptr)
          put(writer, tensor.name, sum(*module, file.matrix(tensor.name)), dtype_.value_or(tensor.dtype));
        else if (dtype_ && (tensor.dtype == DType::F32 || tensor.dtype == DType::F16 || tensor.dtype == DType::BF16) &&
                 tensor.shape.size() == 2)
          put(writer, tensor.name, file.matrix(tensor.name), *dtype_);
        else writer.add(tensor.name, tensor.dtype, tensor.shape, copies_.emplace_back(file.bytes(tensor.name)).span());
      });
      if (module != nullptr) ++merged_;
    }
    writer.write(out);
    states_ = {};
    matrices_.clear();
    weights_.clear();
    copies_.clear();
  }

  std::size_t merged() const noexcept { return merged_; }
  std::size_t replaced() const noexcept { return replaced_; }
  const Retained& retained() const noexcept { return retained_; }

 private:
  /// The weight with the module's update at the rank.
  Matrix<float> sum(const PeftModule& module, std::shared_ptr<const AnyWeight> base) const {
    DynamicLoRALinear<float, Cpu, AnyFormat> layer(std::move(base), lora_options(module), cpu_);
    if (module.biased()) layer.adapter().add_bias();
    assign(module, layer.adapter());
    return layer.merged_weight(std::min(rank_, module.rank()));
  }

  /// The same of a weight as a file has it: of a Conv1D [in, out].
  Matrix<float> sum(const PeftModule& module, Matrix<float> stored) const {
    const bool turned = adapter_.config.fan_in_fan_out;
    if (turned) stored = qdylora::detail::transposed(stored);
    auto whole = sum(module, std::make_shared<AnyWeight>(std::move(stored)));
    return turned ? qdylora::detail::transposed(whole) : std::move(whole);
  }

  Matrix<float> decoded(const AnyWeight& weight) const {
    Matrix<float> matrix(weight.rows(), weight.cols());
    decode(weight, matrix.view(), cpu_);
    return matrix;
  }

  void merge_4bit(const SafetensorsFile& file, const std::string& tensor, const PeftModule* module, SafetensorsWriter& writer) {
    const BnbState state = bnb_4bit_state(file, tensor);
    auto weight = std::make_shared<const AnyWeight>(load_bnb_4bit(file, tensor));
    if (dtype_) return put(writer, tensor, module != nullptr ? sum(*module, weight) : decoded(*weight), *dtype_);
    if (module != nullptr) {
      QDYLORA_EXPECTS(!adapter_.config.fan_in_fan_out, unsupported, "is in 4 bits, and the adapter belongs to a Conv1D (fan_in_fan_out)");
      const auto before = decoded(*weight), whole = sum(*module, weight);
      weight = make_base_weight(
          whole.rows(), whole.cols(), {.format = base_format(state.format), .double_quant = state.nested, .block_size = state.block_size},
          [&](Index first, MatrixView<float> rows) { copy(whole.view().middle_rows(first, rows.rows), rows); }, cpu_);
      const auto after = decoded(*weight);
      if (retained_.size == 0.0) std::printf("%-60s %8s %8s\n", "quantized again", "left", "error");
      Retained own;
      own.add(before, whole, after);
      own.print(tensor);
      retained_ += own;
    }
    add_bnb_4bit(writer, states_, tensor, *weights_.emplace_back(std::move(weight)), state.dtype);
  }

  void put_whole(SafetensorsWriter& writer, const PeftTensor& whole, DType dtype) {
    put(writer, whole.name, clone(whole.value.view()), dtype, whole.vector);
    ++replaced_;
  }

  void put(SafetensorsWriter& writer, const std::string& tensor, Matrix<float> matrix, DType dtype, bool vector = false) {
    const auto add = [&]<class S>(S) {
      Matrix<S> stored(matrix.rows(), matrix.cols());
      for (std::size_t i = 0; i < matrix.span().size(); ++i) {
        stored.span()[i] = static_cast<S>(matrix.span()[i]);
        matrix.span()[i] = static_cast<float>(stored.span()[i]);
      }
      expect_finite(matrix.view());  // as it is stored: float16 ends at 65504
      const auto& kept = std::get<Matrix<S>>(matrices_.emplace_back(std::move(stored)));
      if (vector) writer.add(tensor, dtype, {kept.cols()}, std::as_bytes(kept.span()));
      else writer.add(tensor, kept.view());
    };
    if (dtype == DType::F16) add(half{});
    else if (dtype == DType::BF16) add(bfloat16{});
    else if (dtype == DType::F32) add(float{});
    else throw Error(Errc::unsupported, "expected a weight of F32, F16 or BF16, found " + std::string(name(dtype)));
  }

  const PeftAdapter& adapter_;
  Index rank_;
  std::optional<DType> dtype_;
  Cpu cpu_;
  std::size_t merged_ = 0, replaced_ = 0;
  Retained retained_;
  // What the writer of a file borrows.
  BnbStates states_;
  std::deque<std::variant<Matrix<float>, Matrix<half>, Matrix<bfloat16>>> matrices_;
  std::deque<std::shared_ptr<const AnyWeight>> weights_;
  std::deque<Buffer<std::byte>> copies_;
};

/// Errc::shape_mismatch where a tensor of the model has another shape than what is to take its place.
void expect_same_shape(const SafetensorsFile& file, const std::string& tensor, const std::vector<Index>& shape) {
  const auto& expected = file.info(tensor).shape;
  if (expected == shape) return;
  const auto text = [](const std::vector<Index>& numbers) { return qdylora::detail::shape_text(std::span<const Index>(numbers)); };
  throw Error(Errc::shape_mismatch, "expected " + text(expected) + ", found " + text(shape) + " in the adapter",
              {.file = file.name(), .tensor = tensor});
}

/// Whole modules take the place of tensors of the same name and shape. Errc::missing_tensor, shape_mismatch; unsupported where the head is the
/// embedding, which would change with it.
void expect_place_for(const PeftAdapter& adapter, const SafetensorsFolder& source) {
  for (const auto& whole : adapter.saved.tensors) {
    const auto& file = source.file_of(whole.name);
    const std::vector<Index> shape = whole.vector ? std::vector{whole.value.cols()} : std::vector{whole.value.rows(), whole.value.cols()};
    const ErrorPlace place{.file = file.name(), .tensor = whole.name};
    if (is_bnb_4bit(file, whole.name)) throw Error(Errc::unsupported, "is in 4 bits, and the adapter has the module whole", place);
    expect_same_shape(file, whole.name, shape);
    const bool embedding = whole.module().ends_with("embed_tokens") || whole.module().ends_with("word_embeddings");
    if (embedding && !source.contains("lm_head.weight") && !adapter.saved.ties_weights)
      throw Error(Errc::unsupported, "is the model's head too, and the adapter changes the embedding alone", place);
  }
}

int merge(const std::filesystem::path& model, const std::string& adapter_folder, const std::filesystem::path& out, Index rank,
          const std::string& dtype) {
  const auto adapter = load_peft_adapter(adapter_folder, {.saved_modules = true});
  QDYLORA_EXPECTS(rank >= 0 && rank <= adapter.max_rank(), rank_range,
                  "--rank " + std::to_string(rank) + ": the adapter has ranks 1 ... " + std::to_string(adapter.max_rank()));
  expect_folder(model);
  const SafetensorsFolder source(model);
  for (const auto& module : adapter.modules) {  // all, before anything is written
    source.file_of(module.name + ".weight");
    const std::string bias = module.name + ".bias";
    if (module.biased()) expect_same_shape(source.file_of(bias), bias, {module.out()});
  }
  expect_place_for(adapter, source);
  expect_no_overwrite(adapter_folder, out);
  make_folder_of(model, source, out);
  const std::map<std::string, DType> types = {{"float32", DType::F32}, {"float16", DType::F16}, {"bfloat16", DType::BF16}};
  const auto type = types.find(dtype);
  const Index at = rank == 0 ? adapter.max_rank() : rank;
  Merger merger(adapter, at, type == types.end() ? std::nullopt : std::optional(type->second));
  write_weights(source, out, [&](const SafetensorsFile& file, const std::filesystem::path& path) { merger.merge(file, path); });
  copy_beside(model, out, [&](Json& config) {
    if (dtype == "same") {
      const auto quantization = config.find("quantization_config");  // whose codes are written as bytes, whatever they were stored as
      if (quantization != config.end() && quantization->contains("bnb_4bit_quant_storage"))
        (*quantization)["bnb_4bit_quant_storage"] = "uint8";
      return;
    }
    config.erase("quantization_config");
    for (const char* key : {"dtype", "torch_dtype"})
      if (config.contains(key)) config[key] = dtype;
  });
  if (const auto& retained = merger.retained(); retained.size > 0.0) {
    retained.print("all together");
    if (retained.left() < 0.5)
      std::printf("note: most of the update is lost, for it is smaller than the steps of 4 bits; --dtype bfloat16 keeps it\n");
  }
  std::printf("wrote %s: %zu weights merged at rank %lld", out.string().c_str(), merger.merged(), static_cast<long long>(at));
  if (merger.replaced() > 0) std::printf(", %zu tensors replaced", merger.replaced());
  std::printf("\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Merges an adapter, at a rank, into the weights of its base model.", "merge"};
  std::string model, adapter, out, dtype = "same";
  Index rank = 0;
  app.add_option("MODEL", model, "Hugging Face folder of the base model")->required()->check(not_empty());
  app.add_option("ADAPTER", adapter, "PEFT folder")->required()->check(not_empty());
  app.add_option("OUT", out, "folder to write")->required()->check(not_empty());
  app.add_option("--rank", rank, "of the adapter to merge; the largest by default")->check(in_range<Index>(1, most_rank));
  app.add_option("--dtype", dtype, "of the weights written; same: as they are stored, 4 bits again where they are")
      ->check(CLI::IsMember({"same", "float32", "float16", "bfloat16"}))
      ->capture_default_str();
  return run_program(app, argc, argv, [&] { return merge(model, adapter, out, rank, dtype); });
}
