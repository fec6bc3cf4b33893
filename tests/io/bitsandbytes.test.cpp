#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/core/random.hpp>
#include <qdylora/io/bitsandbytes.hpp>
#include <qdylora/quant/quantize.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"

namespace bitsandbytes_test {

namespace qd = qdylora;
using qd::DType;
using qd::Errc;
using qd::Index;
using test::error_of;

namespace {

// One tensor of a file under construction.
struct Entry {
  DType dtype;
  std::vector<Index> shape;
  std::string data;
};
using Entries = std::map<std::string, Entry>;

Entries entries_of(const qd::SafetensorsFile& file) {
  Entries result;
  for (const auto& tensor : file.tensors()) {
    const auto bytes = file.bytes(tensor.name);
    result[tensor.name] = {tensor.dtype, tensor.shape,
                           {reinterpret_cast<const char*>(bytes.data()), static_cast<std::size_t>(bytes.size())}};
  }
  return result;
}

void write_entries(const std::filesystem::path& path, const Entries& entries) {
  qd::SafetensorsWriter writer;
  for (const auto& [name, e] : entries) writer.add(name, e.dtype, e.shape, std::as_bytes(std::span(e.data)));
  writer.write(path);
}

template <class T>
std::vector<T> decoded(const qd::WeightFor<qd::AnyFormat>& weight) {
  std::vector<T> values(static_cast<std::size_t>(weight.rows() * weight.cols()));
  weight.visit([&](const auto& view) {
    if constexpr (requires { view.codes; }) {
      qd::dequantize(view, qd::MatrixView<T>(values.data(), view.rows, view.cols));
    } else {
      FAIL("expected a quantized weight");
    }
  });
  return values;
}

// The weight of make_golden.py quantized here and written, with the bias that bitsandbytes' file has.
template <class Format, class Scales, class T = float>
std::string own_file(DType dtype, bool bias) {
  const qd::SafetensorsFile io(test::golden("linear4bit_io.safetensors"));
  const auto w = io.matrix("W");
  qd::Matrix<T> source(w.rows(), w.cols());
  for (Index i = 0; i < w.size(); ++i) source.data()[i] = static_cast<T>(w.data()[i]);
  const auto tensor = qd::quantize<Format, Scales>(std::as_const(source).view());
  qd::SafetensorsWriter writer;
  qd::BnbStates states;
  qd::add_bnb_4bit(writer, states, "weight", tensor, dtype);
  const auto bias_bytes = io.bytes("bias");
  if (bias) writer.add("bias", DType::F32, {96}, bias_bytes.span());
  test::TemporaryFolder folder;
  writer.write(folder / "own.safetensors");
  return test::read_file(folder / "own.safetensors");
}

// A small double-quantized weight of 3 x 100 elements, odd blocks included, to be damaged.
Entries small_weight() {
  test::TemporaryFolder folder;
  qd::Matrix<float> w(3, 101);
  qd::Rng rng(5);
  for (float& x : w.span()) x = rng.normal();
  const auto tensor = qd::quantize<qd::NF4>(std::as_const(w).view(), {.block_size = 32});
  qd::SafetensorsWriter writer;
  qd::BnbStates states;
  qd::add_bnb_4bit(writer, states, "up.weight", tensor, DType::F32);
  writer.write(folder / "w.safetensors");
  return entries_of(qd::SafetensorsFile(folder / "w.safetensors"));
}

const std::string state_name = "up.weight.quant_state.bitsandbytes__nf4";

void set_text(Entry& entry, const std::string& text) {
  entry.data = text;
  entry.shape = {static_cast<Index>(text.size())};
}

void replace_in(Entries& entries, const std::string& from, const std::string& to) {
  Entry& entry = entries.at(state_name);
  std::string text = entry.data;
  const auto at = text.find(from);
  REQUIRE(at != std::string::npos);
  set_text(entry, text.replace(at, from.size(), to));
}

}  // namespace

TEST_CASE("4-bit weights that bitsandbytes saved decode to its values, bit for bit") {
  const qd::SafetensorsFile io(test::golden("linear4bit_io.safetensors"));
  const auto check = [&](const std::string& variant, std::size_t alternative) {
    CAPTURE(variant);
    const qd::SafetensorsFile file(test::golden("linear4bit_" + variant + ".safetensors"));
    CHECK(qd::is_bnb_4bit(file, "weight"));
    CHECK_FALSE(qd::is_bnb_4bit(file, "bias"));
    CHECK_FALSE(qd::is_bnb_4bit(file, "weigh"));
    const auto weight = qd::load_bnb_4bit(file, "weight");
    CHECK(weight.storage().index() == alternative);
    CHECK(weight.rows() == 96);
    CHECK(weight.cols() == 128);
    CHECK(decoded<float>(weight) == test::load<float>(io, variant + "/W_dequant"));
  };
  check("nf4_dq", 0);
  check("nf4_nodq", 1);
  check("fp4_dq", 2);
  check("fp4_nodq", 3);

  const qd::SafetensorsFile file(test::golden("linear4bit_nf4_dq_bf16.safetensors"));
  CHECK(qd::bnb_4bit_state(file, "weight").dtype == DType::BF16);
  const auto ours = decoded<qd::bfloat16>(qd::load_bnb_4bit(file, "weight"));
  const auto theirs = test::load<qd::bfloat16>(io, "bf16/W_dequant");
  REQUIRE(ours.size() == theirs.size());
  CHECK(std::memcmp(ours.data(), theirs.data(), ours.size() * 2) == 0);
}

TEST_CASE("all 4-bit weights of a model that transformers saved are read") {
  const qd::SafetensorsFile file(test::golden("llama_tiny_bnb4/model.safetensors"));
  int count = 0;
  for (const auto& tensor : file.tensors()) {
    if (!qd::is_bnb_4bit(file, tensor.name)) continue;
    const auto state = qd::bnb_4bit_state(file, tensor.name);
    const auto weight = qd::load_bnb_4bit(file, tensor.name);
    CHECK(state.format == "nf4");
    CHECK(state.nested);
    CHECK(weight.rows() == state.rows);
    CHECK(weight.cols() == state.cols);
    ++count;
  }
  CHECK(count == 14);
}

TEST_CASE("a weight read and written again is byte-identical to bitsandbytes' file") {
  test::TemporaryFolder folder;
  for (const char* variant : {"nf4_dq", "nf4_nodq", "fp4_dq", "fp4_nodq", "nf4_dq_bf16"}) {
    CAPTURE(variant);
    const auto path = test::golden("linear4bit_" + std::string(variant) + ".safetensors");
    const qd::SafetensorsFile file(path);
    const auto weight = qd::load_bnb_4bit(file, "weight");
    qd::SafetensorsWriter writer;
    qd::BnbStates states;
    qd::add_bnb_4bit(writer, states, "weight", weight, qd::bnb_4bit_state(file, "weight").dtype);
    qd::Buffer<std::byte> bias;
    if (file.contains("bias")) {
      bias = file.bytes("bias");
      writer.add("bias", DType::F32, {96}, bias.span());
    }
    writer.write(folder / "again.safetensors");
    CHECK((test::read_file(folder / "again.safetensors") == test::read_file(path)));
  }
}

// All of it, nested codes too: bitsandbytes on the CPU takes them from a table of 65,536 bins, which for these 192 scales is the
// nearest code each time. (It is not always: the cases of nested.safetensors are compared where quantization is tested.)
TEST_CASE("a weight quantized here makes the very file that bitsandbytes made of it") {
  const auto golden = [](const std::string& variant) {
    return test::read_file(test::golden("linear4bit_" + variant + ".safetensors"));
  };
  CHECK((own_file<qd::NF4, qd::Float32Scales>(DType::F32, true) == golden("nf4_nodq")));
  CHECK((own_file<qd::FP4, qd::Float32Scales>(DType::F32, true) == golden("fp4_nodq")));
  CHECK((own_file<qd::NF4, qd::DoubleQuant<>>(DType::F32, true) == golden("nf4_dq")));
  CHECK((own_file<qd::FP4, qd::DoubleQuant<>>(DType::F32, true) == golden("fp4_dq")));
  CHECK((own_file<qd::NF4, qd::DoubleQuant<>, qd::bfloat16>(DType::BF16, false) == golden("nf4_dq_bf16")));
}

TEST_CASE("numbers are written as Python's json.dumps writes them") {
  // From Python: [json.dumps(x) for x in ...]
  const std::vector<std::pair<double, std::string>> known = {
      {0.0, "0.0"}, {-0.0, "-0.0"}, {1.0, "1.0"}, {0.1, "0.1"}, {static_cast<double>(0.1f), "0.10000000149011612"},
      {0.0872197225689888, "0.0872197225689888"}, {1e-4, "0.0001"}, {9.999e-5, "9.999e-05"}, {1e-5, "1e-05"}, {1.5e-7, "1.5e-07"},
      {-2.5e-10, "-2.5e-10"}, {123456.75, "123456.75"}, {1e15, "1000000000000000.0"}, {9999999999999998.0, "9999999999999998.0"},
      {1e16, "1e+16"}, {1.7976931348623157e308, "1.7976931348623157e+308"}, {5e-324, "5e-324"}};
  for (const auto& [value, text] : known) CHECK(qd::detail::python_number(value) == text);
}

TEST_CASE("4-bit codes stored as wider types are the same weight") {
  const qd::SafetensorsFile file(test::golden("linear4bit_nf4_dq.safetensors"));
  const auto expected = decoded<float>(qd::load_bnb_4bit(file, "weight"));
  test::TemporaryFolder folder;
  for (const auto& [dtype, size] : {std::pair{DType::BF16, 2}, std::pair{DType::F16, 2}, std::pair{DType::F32, 4}}) {
    auto entries = entries_of(file);
    entries["weight"].dtype = dtype;
    entries["weight"].shape = {6144 / size, 1};
    write_entries(folder / "wide.safetensors", entries);
    const qd::SafetensorsFile wide(folder / "wide.safetensors");
    CHECK(decoded<float>(qd::load_bnb_4bit(wide, "weight")) == expected);
  }
  auto entries = entries_of(file);
  entries["weight"].shape = {1, 6144};
  write_entries(folder / "row.safetensors", entries);
  CHECK(decoded<float>(qd::load_bnb_4bit(qd::SafetensorsFile(folder / "row.safetensors"), "weight")) == expected);
}

TEST_CASE("every contradiction in a 4-bit weight is an error that names the tensor") {
  struct Fixture {
    std::string what;
    Errc code;
    std::string tensor;
    void (*damage)(Entries&);
  };
  const std::vector<Fixture> fixtures = {
      {"no weight", Errc::missing_tensor, "up.weight", [](Entries& e) { e.erase("up.weight"); }},
      {"no state", Errc::missing_tensor, "up.weight", [](Entries& e) { e.erase(state_name); }},
      {"two states", Errc::duplicate, state_name,
       [](Entries& e) { e["up.weight.quant_state.bitsandbytes__fp4"] = e.at(state_name); }},
      {"a state of another format", Errc::unsupported, "up.weight.quant_state.bitsandbytes__int8",
       [](Entries& e) {
         e["up.weight.quant_state.bitsandbytes__int8"] = e.at(state_name);
         e.erase(state_name);
       }},
      {"another tensor", Errc::unexpected_tensor, "up.weight.extra", [](Entries& e) { e["up.weight.extra"] = e.at("up.weight"); }},
      {"no absmax", Errc::missing_tensor, "up.weight.absmax", [](Entries& e) { e.erase("up.weight.absmax"); }},
      {"no quant_map", Errc::missing_tensor, "up.weight.quant_map", [](Entries& e) { e.erase("up.weight.quant_map"); }},
      {"no nested_quant_map", Errc::missing_tensor, "up.weight.nested_quant_map",
       [](Entries& e) { e.erase("up.weight.nested_quant_map"); }},
      {"no nested_absmax", Errc::bad_config, state_name, [](Entries& e) { e.erase("up.weight.nested_absmax"); }},
      {"too few codes", Errc::shape_mismatch, "up.weight",
       [](Entries& e) {
         e["up.weight"].data.pop_back();
         e["up.weight"].shape = {151, 1};
       }},
      {"codes in two columns", Errc::shape_mismatch, "up.weight",
       [](Entries& e) {
         e["up.weight"].shape = {76, 2};
       }},
      {"codes as I8", Errc::dtype, "up.weight", [](Entries& e) { e["up.weight"].dtype = DType::I8; }},
      {"too few absmax", Errc::shape_mismatch, "up.weight.absmax",
       [](Entries& e) {
         e["up.weight.absmax"].data.pop_back();
         e["up.weight.absmax"].shape = {9};
       }},
      {"absmax as a matrix", Errc::shape_mismatch, "up.weight.absmax",
       [](Entries& e) {
         e["up.weight.absmax"].shape = {10, 1};
       }},
      {"absmax of another type", Errc::dtype, "up.weight.absmax",
       [](Entries& e) {
         e["up.weight.absmax"] = {DType::F32, {10}, std::string(40, '\0')};
       }},
      {"nested_absmax not finite", Errc::non_finite, "up.weight.nested_absmax",
       [](Entries& e) { e["up.weight.nested_absmax"].data = std::string("\0\0\xC0\x7F", 4); }},
      {"another quant_map", Errc::unsupported, "up.weight.quant_map", [](Entries& e) { e["up.weight.quant_map"].data[4] ^= 1; }},
      {"another nested_quant_map", Errc::unsupported, "up.weight.nested_quant_map",
       [](Entries& e) { e["up.weight.nested_quant_map"].data[42] ^= 1; }},
      {"state of another type", Errc::dtype, state_name, [](Entries& e) { e[state_name].dtype = DType::I8; }},
      {"state that is no JSON", Errc::json, state_name, [](Entries& e) { set_text(e[state_name], "quant_type: nf4"); }},
      {"state that is no object", Errc::bad_config, state_name, [](Entries& e) { set_text(e[state_name], "[1, 2]"); }},
      {"a key twice", Errc::duplicate, state_name, [](Entries& e) { replace_in(e, "{", "{\"shape\": [1, 1], "); }},
      {"an unknown key", Errc::bad_config, state_name, [](Entries& e) { replace_in(e, "{", "{\"axis\": 1, "); }},
      {"quant_type of the other format", Errc::bad_config, state_name, [](Entries& e) { replace_in(e, "\"nf4\"", "\"fp4\""); }},
      {"quant_type a number", Errc::bad_config, state_name, [](Entries& e) { replace_in(e, "\"nf4\"", "4"); }},
      {"blocksize 48", Errc::block_size, state_name, [](Entries& e) { replace_in(e, "32", "48"); }},
      {"blocksize a text", Errc::bad_config, state_name, [](Entries& e) { replace_in(e, "32", "\"32\""); }},
      {"another blocksize", Errc::shape_mismatch, "up.weight.absmax", [](Entries& e) { replace_in(e, "32", "64"); }},
      {"dtype float64", Errc::unsupported, state_name, [](Entries& e) { replace_in(e, "\"float32\"", "\"float64\""); }},
      {"shape of one dimension", Errc::shape, state_name, [](Entries& e) { replace_in(e, "[3, 101]", "[303]"); }},
      {"shape null", Errc::bad_config, state_name, [](Entries& e) { replace_in(e, "[3, 101]", "null"); }},
      {"a negative shape", Errc::bad_config, state_name, [](Entries& e) { replace_in(e, "[3, 101]", "[-3, -101]"); }},
      {"an empty shape", Errc::bad_config, state_name, [](Entries& e) { replace_in(e, "[3, 101]", "[0, 101]"); }},
      {"a shape that overflows", Errc::overflow, state_name,
       [](Entries& e) { replace_in(e, "[3, 101]", "[4611686018427387904, 4]"); }},
      {"a shape beyond the codes", Errc::shape_mismatch, "up.weight",
       [](Entries& e) { replace_in(e, "[3, 101]", "[3, 1010000]"); }},
      {"nested_blocksize 128", Errc::unsupported, state_name, [](Entries& e) { replace_in(e, "256", "128"); }},
      {"nested_dtype float16", Errc::unsupported, state_name,
       [](Entries& e) { replace_in(e, "\"nested_dtype\": \"float32\"", "\"nested_dtype\": \"float16\""); }},
      {"nested_offset beyond float32", Errc::non_finite, state_name,
       [](Entries& e) {
         const std::string& text = e[state_name].data;
         set_text(e[state_name], text.substr(0, text.rfind(' ')) + " 1e39}");
       }},
      {"nested_offset NaN", Errc::json, state_name,
       [](Entries& e) { replace_in(e, "\"nested_offset\": ", "\"nested_offset\": NaN"); }},
  };
  test::TemporaryFolder folder;
  const auto path = folder / "w.safetensors";
  const Entries good = small_weight();
  write_entries(path, good);
  CHECK(qd::load_bnb_4bit(qd::SafetensorsFile(path), "up.weight").cols() == 101);
  for (const auto& fixture : fixtures) {
    CAPTURE(fixture.what);
    Entries entries = good;
    fixture.damage(entries);
    write_entries(path, entries);
    const auto error = error_of([&] { qd::load_bnb_4bit(qd::SafetensorsFile(path), "up.weight"); });
    REQUIRE(error);
    CHECK(qd::name(error->code()) == qd::name(fixture.code));
    CHECK(error->tensor() == fixture.tensor);
    CHECK(error->file() == path.native());
    INFO(error->what());
  }
}

TEST_CASE("a weight that bitsandbytes could not have quantized is not written") {
  qd::Matrix<float> w(2, 32);
  const auto tensor = qd::quantize<qd::NF4>(std::as_const(w).view());
  qd::SafetensorsWriter writer;
  qd::BnbStates states;
  CHECK(test::code_of([&] { qd::add_bnb_4bit(writer, states, "w", tensor, DType::F64); }) == Errc::bad_argument);
  const qd::WeightFor<qd::AnyFormat> dense(qd::Matrix<float>(2, 32));
  CHECK(test::code_of([&] { qd::add_bnb_4bit(writer, states, "w", dense, DType::F32); }) == Errc::unsupported);
}

}  // namespace bitsandbytes_test
