// The programs as a user runs them: exit status, messages, files. They stand in QDYLORA_EXAMPLES_DIR; a test whose program has not been
// built is skipped.
#include <sys/wait.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/io.hpp>
#include <qdylora/model.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"
#include "support/llama2c_files.hpp"
#include "support/python.hpp"
#include "support/random_data.hpp"
#include "support/smollm2.hpp"
#include "support/tiny_model.hpp"

namespace programs_test {

namespace qd = qdylora;
using qd::Index;

namespace {

struct Run {
  int status = -1;
  std::string out, err;
};

bool built(const std::string& program) { return std::filesystem::exists(std::filesystem::path(QDYLORA_EXAMPLES_DIR) / program); }

Run run(const std::string& program, const std::string& arguments) {
  const test::TemporaryFolder folder;
  const auto out = (folder / "out").native(), err = (folder / "err").native();
  const std::string command =
      "'" + std::string(QDYLORA_EXAMPLES_DIR) + "/" + program + "' " + arguments + " >'" + out + "' 2>'" + err + "' </dev/null";
  const int result = std::system(command.c_str());
  return {WIFEXITED(result) ? WEXITSTATUS(result) : 128, test::read_file(out), test::read_file(err)};
}

std::string quoted(const std::filesystem::path& path) { return "'" + path.native() + "'"; }

// What a program prints that ends well.
std::string succeeds(const std::string& program, const std::string& arguments) {
  const auto result = run(program, arguments);
  CAPTURE(program, arguments, result.out, result.err);
  REQUIRE(result.status == 0);
  return result.out;
}

// Of some tokens, by evaluate.
qd::Matrix<float> logits_of(const std::string& arguments) {
  const test::TemporaryFolder folder;
  succeeds("evaluate", arguments + " --base-format float32 --ids 1,2,3,5,8,13,21 --logits " + quoted(folder / "l"));
  return qd::SafetensorsFile(folder / "l").matrix("logits");
}

// Of all tensors in a file, without its header.
Index tensor_bytes(const std::filesystem::path& file) {
  const qd::SafetensorsFile tensors(file);
  Index bytes = 0;
  for (const auto& tensor : tensors.tensors()) bytes += static_cast<Index>(tensors.bytes(tensor.name).span().size());
  return bytes;
}

double difference(const qd::Matrix<float>& found, const qd::Matrix<float>& expected) {
  return test::largest_difference(found.view(), expected.view());
}

// A golden model with a tokenizer of as many tokens as it knows: letters from `first` on; "in" is a token of its own.
void write_letters_model(const std::filesystem::path& folder, const std::string& golden = "llama_tiny_bnb4", int tokens = 64,
                         char first = '=') {
  std::filesystem::copy(test::golden(golden), folder);
  qd::Json vocab = qd::Json::object();
  for (int i = 0; i < tokens - 3; ++i) vocab[std::string(1, static_cast<char>(first + i))] = i;
  vocab["in"] = tokens - 3;
  vocab["Ċ"] = tokens - 2;
  const qd::Json json{{"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", {"i n"}}}},
                      {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}},
                      {"added_tokens", {{{"id", tokens - 1}, {"content", "</s>"}, {"special", true}}}}};
  test::write_file(folder / "tokenizer.json", json.dump());
  test::write_file(folder / "tokenizer_config.json", R"({"eos_token":"</s>"})");
}

// Texts of those letters to train on.
void write_letters_data(const std::filesystem::path& file) {
  std::string data;
  for (const std::string word : {"in", "inn", "pin", "spin", "tin", "kin"}) data += R"({"prompt":"in","response":")" + word + "\"}\n";
  test::write_file(file, data);
}

// The golden Llama with a tokenizer that can write MMLU's prompts: what they begin with is one token, for the model's context is 64.
void write_words_model(const std::filesystem::path& folder) {
  std::filesystem::copy(test::golden("llama_tiny_bnb4"), folder);
  qd::Json vocab = qd::Json::object(), added = qd::Json::array();
  const std::string letters = "ABCDTabcdefghijklmnopqrstuvwxyz().:?0123456789!#$%&*+-/;<=";  // 64 tokens with the others
  for (const char c : letters) vocab[std::string(1, c)] = vocab.size();
  for (const char* token : {"\u0120", "\u010a"}) vocab[token] = vocab.size();
  const auto add = [&](const std::string& content, bool special) {
    added.push_back({{"id", vocab.size() + added.size()}, {"content", content}, {"special", special}});
  };
  add("The following are multiple choice questions (with answers).\n\n", false);
  add("The following are questions (with answers).\n\n", false);
  add("Answer:", false);
  add("</s>", true);
  const qd::Json json{{"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", qd::Json::array()}}},
                      {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}},
                      {"added_tokens", added}};
  test::write_file(folder / "tokenizer.json", json.dump());
  test::write_file(folder / "tokenizer_config.json", R"({"eos_token":"</s>"})");
}

// A run of the toy that takes seconds: 12 steps through all phases of the recipe.
std::string toy(const std::filesystem::path& out, const std::string& more = "") {
  const bool has_ranks = more.find("--method alpha") == more.npos && more.find("--method full") == more.npos;
  return std::string(has_ranks ? "--ranks 1,4,16 --alpha 16 " : "") +
         "--toy --steps 12 --batch 4 --lr 3e-3 --train-examples 200 --eval-examples 4 --answers 2 "
         "--max-new-tokens 8 "
         "--save-every 1 --out " +
         quoted(out) + " " + more;
}

// Cells of the row of a Markdown table whose first ones are these, after `from` where that is given; REQUIREs that there is one.
std::vector<std::string> table_row(const std::string& text, const std::string& first, const std::string& from = "") {
  const auto start = text.find(from);
  CAPTURE(text, first, from);
  REQUIRE(start != std::string::npos);
  const auto at = text.find("\n| " + first + " |", start);
  REQUIRE(at != std::string::npos);
  std::vector<std::string> cells;
  const auto end = text.find('\n', at + 1);
  for (auto begin = at + 3; begin < end;) {
    const auto stop = text.find(" |", begin);
    cells.push_back(text.substr(begin, stop - begin));
    begin = stop + 3;
  }
  return cells;
}

// A random model of llama2.c and a tokenizer of bytes, as the arguments that name them.
std::string llama2c_model(const test::TemporaryFolder& folder) {
  qd::DecoderConfig config;
  config.vocab = 259;
  config.width = 64;
  config.mlp_width = 172;
  config.layers = 2;
  config.heads = {.heads = 2, .kv_heads = 1, .head_dim = 32};
  config.context = 128;
  config.rope_layout = qd::RopeLayout::interleaved;
  test::write_file(folder / "model.bin", test::llama2c_checkpoint(*test::tiny_weights<float>(config)));
  test::write_file(folder / "tokenizer.bin", test::llama2c_tokenizer({}));
  return "--model " + quoted(folder / "model.bin");
}

}  // namespace

TEST_CASE("programs: --help tells the options and succeeds") {
  for (const std::string program : {"finetune", "evaluate", "quantize", "adapter", "merge", "compare", "rank_map", "formats", "memory",
                                    "optimizers"}) {
    if (!built(program)) SKIP(program << " has not been built");
    const auto result = run(program, "--help");
    CAPTURE(program);
    CHECK(result.status == 0);
    CHECK(result.out.find("--help") != std::string::npos);
    CHECK(result.err.empty());
  }
}

TEST_CASE("programs: a wrong argument or file gives one line and status 2") {
  const test::TemporaryFolder folder;
  test::write_file(folder / "junk.gguf", "GGUF but not really");
  test::write_file(folder / "junk.safetensors", "nothing");
  test::write_file(folder / "bad.jsonl", "{\"prompt\": \"a\"}\n");
  test::write_file(folder / "good.jsonl",
                   "{\"prompt\": \"one and one\", \"response\": \"two\"}\n{\"prompt\": \"two and two\", \"response\": \"four\"}\n");
  const auto junk = quoted(folder / "junk.gguf"), good = quoted(folder / "good.jsonl");
  const auto tiny = "--model " + quoted(test::golden("llama_tiny_bnb4"));
  const struct {
    std::string program, arguments, says;
  } cases[] = {
      {"finetune", "", "--model"},
      {"finetune", "--nonsense", "nonsense"},
      {"finetune", "--toy --ranks 1,2,two", "--ranks"},
      {"finetune", "--toy --ranks 0,2", "rank 0"},
      {"finetune", "--toy --ranks 4,4", "twice"},
      {"finetune", "--toy --recipe best", "order-then-nest"},
      {"finetune", "--toy --rival --recipe qlora-svd", "its own rival"},
      {"finetune", "--toy --rival --method houlsby", "--method houlsby"},
      {"finetune", "--toy --rival --method alpha", "--method alpha"},
      {"finetune", "--toy --base-format nf5", "nf4"},
      {"finetune", "--toy --alpha 0 --out " + quoted(folder / "x"), "alpha"},
      {"finetune", "--toy --data /no/such/file.jsonl", "/no/such/file.jsonl"},
      {"finetune", "--toy --data " + quoted(folder / "bad.jsonl"), "line 1"},
      {"finetune", "--toy --resume --out " + quoted(folder / "absent"), "state.safetensors"},
      {"finetune", "--toy --data ''", "--data"},  // what a shell makes of a variable nobody set
      {"finetune", "--toy --out ''", "--out"},
      {"finetune", "--toy --eval " + good, "--data"},
      {"finetune", "--toy --tokenizer " + good, "--model"},
      {"finetune", "--toy --data " + good + " --out " + quoted(folder / "x"), "2 examples are too few"},
      {"finetune", "--toy --seq-len 8 --data " + good + " --eval " + good + " --out " + quoted(folder / "x"), "within --seq-len 8"},
      {"finetune", "--toy --batch 99999999999", "--batch: expected 1 ... 4096, found '99999999999'"},
      {"finetune", "--toy --batch 4097", "--batch"},
      {"finetune", "--toy --batch 1.5", "--batch"},
      {"finetune", "--toy --steps 0", "--steps"},
      {"finetune", "--toy --steps 99999999999999999999", "--steps"},
      {"finetune", "--toy --seq-len 7", "--seq-len"},
      {"finetune", "--toy --seq-len 99999999999", "--seq-len"},
      {"finetune", "--toy --seq-len 5000", "context is 512"},
      {"finetune", "--toy --ranks 1,65", "width of 64"},
      {"finetune", "--toy --threads -1", "--threads"},
      {"finetune", "--toy --threads 100000", "--threads"},
      {"finetune", "--toy --train-examples 0", "--train-examples"},
      {"finetune", "--toy --train-examples 99999999999", "--train-examples"},
      {"finetune", "--toy --eval-examples 0", "--eval-examples"},
      {"finetune", "--toy --eval-examples -3", "--eval-examples"},
      {"finetune", "--toy --answers -1", "--answers"},
      {"finetune", "--toy --answers 99999999999", "--answers"},
      {"finetune", "--toy --max-new-tokens 0", "--max-new-tokens"},
      {"finetune", "--toy --max-new-tokens 99999999999", "--max-new-tokens"},
      {"finetune", "--toy --save-every -1", "--save-every"},
      {"finetune", "--toy --lr nan", "--lr"},
      {"finetune", "--toy --lr -1", "--lr"},
      {"finetune", "--toy --alpha inf", "--alpha"},
      {"finetune", "--toy --optimizer sgd", "lion"},
      {"finetune", "--toy --paged /no/such/folder --out " + quoted(folder / "x"), "/no/such/folder"},
      {"finetune", "--toy --paged /tmp --device cuda", "--paged /tmp: moments of --device cuda go to the host's memory; expected host"},
      {"finetune", "--toy --offload /tmp", "--gradient-checkpointing"},
      {"finetune", "--toy --gradient-checkpointing --offload /no/such/folder --out " + quoted(folder / "x"), "/no/such/folder"},
      {"finetune", "--toy --gradient-checkpointing --offload /tmp --device cuda",
       "--offload /tmp: checkpoints of --device cuda go to the host's memory; expected host"},
      {"finetune", "--toy --train-bias", "--train-bias: no linear layer of"},
      {"finetune", "--toy --train-bias --method houlsby", "--train-bias"},
      {"finetune", "--toy --init eva", "loftq:ITERATIONS"},
      {"finetune", "--toy --init loftq --dora", "--dora excludes --init"},
      {"finetune", "--toy --init qera --recipe qdylora", "alpha/b"},
      {"finetune", "--toy --init loftq --recipe 'qlora+alpha/sqrt(b)'", "alpha/sqrt(b)"},
      {"finetune", "--toy --recipe 'auto+alpha/sqrt(b)'", "auto re-orders"},
      {"finetune", "--toy --rank-pattern q_proj", "--rank-pattern: expected a list"},
      {"finetune", "--toy --rank-pattern q_proj=", "--rank-pattern: expected a list"},
      {"finetune", "--toy --rank-pattern =4", "--rank-pattern: expected a list"},
      {"finetune", "--toy --rank-pattern q_proj=65", "q_proj: rank 65"},
      {"finetune", "--toy --rank-pattern q_prog=4", "--rank-pattern: 'q_prog' matches no module"},
      {"finetune", "--toy --rank-pattern q_proj=4,q_proj=4", "stands there twice"},
      {"finetune", "--toy --rank-pattern '.*=4'", "no layer has rank 64"},
      {"finetune", "--toy --rank-pattern q_proj=4 --init pissa", "--rank-pattern: --init pissa"},
      {"finetune", "--toy --rank-pattern q_proj=4 --gates", "--gates"},
      {"finetune", "--toy --alpha-pattern q_proj=-1", "--alpha-pattern: expected a list"},
      {"finetune", "--toy --alpha-pattern q_proj=nan", "--alpha-pattern: expected a list"},
      {"finetune", "--toy --alpha-pattern q_proj=2 --method houlsby", "--alpha-pattern"},
      {"finetune", "--toy --init pissa --recipe qdylora", "alpha/b"},
      {"finetune", "--toy --dropout nan", "--dropout"},
      {"finetune", "--toy --seed -1", "--seed"},
      {"finetune", "--toy --steps 1 --out " + quoted(folder / "junk.gguf"), "junk.gguf"},
      {"finetune", "--toy --nonsense '\x1b[2J\n'", "nonsense"},
      {"finetune", "--model /no/such/model.gguf", "/no/such/model.gguf"},
      {"finetune", "--model " + junk, "junk.gguf"},
      {"evaluate", "--model " + junk + " --ids 1,2", "--logits"},
      {"evaluate", "--ids 1,2 --logits x", "--model"},
      {"evaluate", "--model " + quoted(test::golden("llama_tiny_bnb4")) + " --data " + quoted(folder / "bad.jsonl"), "line 1"},
      {"evaluate", "--model " + quoted(test::golden("llama_tiny_bnb4")) + " --ids 1,2,99 --logits " + quoted(folder / "l"), "99"},
      {"evaluate", "--model " + quoted(test::golden("llama_tiny_bnb4")) + " --rank 3 --ids 1 --logits " + quoted(folder / "l"), "rank 3"},
      {"evaluate", tiny + " --ids '' --logits " + quoted(folder / "l"), "--ids"},
      {"evaluate", tiny + " --ids 1,,3 --logits " + quoted(folder / "l"), "--ids"},
      {"evaluate", tiny + " --ids 1,-3 --logits " + quoted(folder / "l"), "--ids"},
      {"evaluate", tiny + " --ids 1,99999999999 --logits " + quoted(folder / "l"), "--ids"},
      {"evaluate", tiny + " --ids 1 --logits ''", "--logits"},
      {"evaluate", tiny + " --adapter '' --ids 1 --logits " + quoted(folder / "l"), "--adapter"},
      {"evaluate", tiny + " --rank -1 --ids 1 --logits " + quoted(folder / "l"), "--rank"},
      {"evaluate", tiny + " --threads -2 --ids 1 --logits " + quoted(folder / "l"), "--threads"},
      {"evaluate", tiny + " --data " + good + " --max-examples 0", "--max-examples"},
      {"evaluate", tiny + " --data " + good + " --answers -1", "--answers"},
      {"evaluate", tiny + " --data " + good + " --keep 0", "--keep"},
      {"evaluate", tiny + " --keep 0.9 --ids 1 --logits " + quoted(folder / "l"), "--keep"},
      {"finetune", "--toy --keep 1.5", "--keep"},
      {"finetune", "--toy --all-turns", "--all-turns requires --data"},
      {"evaluate", tiny + " --data " + good + " --max-new-tokens -1", "--max-new-tokens"},
      {"evaluate", tiny + " --data " + good + " --seq-len 1", "--seq-len"},
      {"evaluate", tiny + " --data " + good, "context is 64"},
      {"evaluate", tiny + " --data " + good + " --chat-template vicuna", "mistral-v3"},
      {"finetune", "--toy --chat-template vicuna", "mistral-v3"},
      {"finetune", "--toy --pack --group-by-length", "excludes"},
      {"evaluate", tiny + " --choices " + quoted(folder / "bad.jsonl"), "bad.jsonl: line 1: expected a field 'question'"},
      {"evaluate", tiny + " --choices /no/such/file.csv", "/no/such/file.csv"},
      {"evaluate", tiny + " --choices sample --shots -1", "--shots"},
      {"evaluate", tiny + " --choices sample --choice-score sum", "letters"},
      {"evaluate", tiny + " --choices sample --ids 1 --logits " + quoted(folder / "l"), "--ids"},
      {"evaluate", tiny + " --shots 5 --data " + good, "--choices"},
      {"evaluate", tiny + " --shots-file " + good + " --data " + good, "--shots"},
      {"evaluate", tiny + " --bleu --choices sample", "--data"},
      {"evaluate", tiny + " --answers 2 --choices sample", "--data"},
      {"evaluate", tiny + " --choices sample --shots-file " + good, "--shots"},
      {"evaluate", tiny + " --ranks 0,2 --ids 1 --logits " + quoted(folder / "l"), "rank 2"},
      {"evaluate", tiny + " --ranks 0,0 --ids 1 --logits " + quoted(folder / "l"), "--ranks"},
      {"evaluate", tiny + " --ranks 0 --rank 0 --ids 1 --logits " + quoted(folder / "l"), "--rank"},
      {"adapter", "gguf " + quoted(test::golden("peft_linear")) + " " + quoted(folder / "a.gguf"), "--model"},
      {"adapter", "gguf " + quoted(test::golden("peft_linear")) + " --model " + junk + " " + quoted(folder / "a.gguf"), "junk.gguf"},
      {"adapter", "gguf " + quoted(test::golden("peft_linear")) + " --rank 999 --model " + junk + " " + quoted(folder / "a"), "--rank"},
      {"adapter", "gguf " + quoted(test::golden("peft_linear")) + " --model " + junk + " " + junk, "written over"},
      {"adapter", "sum " + quoted(test::golden("peft_linear")) + " --weights 1 " + quoted(test::golden("peft_linear")), "written over"},
      {"adapter", "sum " + quoted(test::golden("peft_linear")) + " " + quoted(folder / "a") + " --weights 1,2", "2 weights for 1 adapters"},
      {"adapter", "sum " + quoted(test::golden("peft_linear")) + " " + quoted(folder / "a") + " --weights half", "'half'"},
      {"adapter", "sum " + quoted(test::golden("peft_linear")) + " " + quoted(folder / "a") + " --weights nan", "not finite"},
      {"adapter", "sum " + quoted(test::golden("peft_linear")) + " " + quoted(folder / "a"), "--weights"},
      {"adapter", "sum " + quoted(folder / "a") + " --weights 1", "found one folder"},
      {"adapter", "sum " + quoted(test::golden("peft_linear")) + " " + quoted(folder / "a") + " --weights 1 --rank 999", "--rank 999"},
      {"adapter",
       "sum " + quoted(test::golden("llama_tiny_adapter")) + " " + quoted(test::golden("falcon_7b/adapter")) + " --weights 1,1 " +
           quoted(folder / "a"),
       "another base model (falcon_7b)"},
      {"adapter", "sum " + quoted(test::golden("dora/adapter")) + " " + quoted(folder / "a") + " --weights 1", "magnitude"},
      {"compare", "--model " + junk + " --data " + good + " --seeds 0,,1", "--seeds"},
      {"compare", "--model " + junk + " --data " + good + " --seeds ''", "--seeds"},
      {"compare", "--model " + junk + " --data " + good + " --recipes auto,", "--recipes"},
      {"compare", "--model " + junk + " --data " + good + " --recipes auto,best", "best"},
      {"compare", "--model " + junk + " --data " + good + " --recipes qdylora+best", "there are frozen, geometric"},
      {"compare", "--model " + junk + " --data " + good + " --recipes auto+frozen", "draws no ranks at first"},
      {"compare", "--model " + junk + " --data " + good + " --against best", "--against best"},
      {"compare", "--model " + junk + " --data " + good + " --recipes auto,houlsby:qlora-svd", "--recipes houlsby:qlora-svd"},
      {"compare", "--model " + junk + " --data " + good + " --recipes 'alpha*fast'", "found 'fast'; expected [METHOD:]RECIPE"},
      {"compare", "--model " + junk + " --data " + good + " --base-format nf4,int5", "int5"},
      {"compare", "--model " + junk + " --data " + good + " --base-format nf4,fp8,nf4", "twice"},
      {"compare", "--model " + junk + " --data " + good + " --eval-formats nf4,", "--eval-formats"},
      {"compare", "--model " + junk + " --data " + good + " --init loftq --base-format nf4,fp8", "--init"},
      {"compare", "--model " + junk + " --data " + good + " --init loftq --recipes qlora,separate", "--init loftq: not for separate"},
      {"compare", "--model " + junk + " --data " + good + " --init loftq --recipes qlora+dora", "--init loftq: not for qlora+dora"},
      {"compare", "--model " + junk + " --data " + good + " --init loftq --recipes qlora@fp8", "--init loftq: not for qlora@fp8"},
      {"compare", "--model " + junk + " --data " + good + " --init loftq --recipes parallel", "--init loftq: not for parallel"},
      {"compare", "--model " + junk + " --data " + good + " --recipes qlora@fp8 --base-format nf4,int4", "--recipes qlora@fp8"},
      {"compare", "--model " + junk + " --data " + good + " --recipes qlora,full --base-format nf4,int4", "--recipes full"},
      {"compare", "--model " + junk + " --data " + good + " --recipes full --eval-formats nf4", "--recipes full"},
      {"compare", "--model " + junk + " --data " + good + " --compute int8", "--compute"},
      {"compare", "--model " + junk + " --data " + good + " --batch 99999999999", "--batch"},
      {"compare", "--model " + junk + " --data " + good + " --eval-rows 0", "--eval-rows"},
      {"compare", "--model " + junk + " --data " + good + " --alpha nan", "--alpha"},
      {"compare", "--model " + junk + " --data x.txt --answers 3", "--answers"},
      {"compare", "--model " + quoted(folder / "m.bin") + " --data x.txt --choices sample", "--choices"},
      {"compare", "--model " + junk + " --data " + good + " --shots 3", "--choices"},
      {"compare", "--model " + quoted(folder / "m.bin") + " --data x.txt", "--tokenizer"},
      {"compare", "--model " + quoted(folder / "m.bin") + " --data " + good, ".txt"},
      {"finetune", "--toy --lora-plus 0", "--lora-plus"},
      {"finetune", "--toy --compute int8", "--compute"},
      {"finetune", "--toy --device cuda --compute bits16", "--compute bits16: is the CPU's"},
      {"finetune", "--toy --method prefix", "lora, houlsby, parallel, alpha, full"},
      {"finetune", "--toy --method houlsby --recipe order-then-nest", "recipes that fit are qdylora, qdylora-frozen, per-row and qlora"},
      {"finetune", "--toy --method parallel --dora", "--dora"},
      {"finetune", "--toy --method parallel --gates", "--gates"},
      {"finetune", "--toy --method houlsby --init pissa", "--init"},
      {"finetune", "--toy --method alpha --ranks 1,2", "--ranks: is not for --method alpha"},
      {"finetune", "--toy --method alpha --recipe qdylora", "--recipe: is not for --method alpha"},
      {"finetune", "--toy --method alpha --base-format nf4", "--base-format: is not for --method alpha"},
      {"finetune", "--toy --method alpha --init pissa", "--init"},
      {"finetune", "--toy --method alpha --planes 9", "1 ... 8"},
      {"finetune", "--toy --method alpha --planes 2 --trained-planes 3", "above --planes 2"},
      {"finetune", "--toy --method alpha --group-size 12", "multiple of 8"},
      {"finetune", "--toy --method full", "--base-format nf4: --method full trains the weights themselves"},
      {"finetune", "--toy --method full --base-format fp8", "--base-format fp8: --method full trains the weights themselves"},
      {"finetune", "--toy --method full --base-format float32 --ranks 1,2", "--ranks: is not for --method full"},
      {"finetune", "--toy --method full --base-format float32 --recipe qlora", "--recipe: is not for --method full"},
      {"finetune", "--toy --method full --base-format float32 --planes 2", "--planes: is not for --method full"},
      {"finetune", "--toy --method full --base-format float32 --dora", "--dora"},
      {"finetune", "--toy --method full --base-format float32 --rival", "not those of --method full"},
      {"finetune", "--toy --method full --base-format float32 --device cuda", "--device cuda"},
      {"finetune", "--toy --planes 2", "--planes: is not for --method lora"},
      {"finetune", "--toy --device tpu", "cpu"},
      {"finetune", "--toy --dtype float64", "bfloat16"},
      {"finetune", "--toy --steps 1 --device cuda --out " + quoted(folder / "gpu"), "QDYLORA_CUDA=ON"},
      {"rank_map", tiny + " --adapter " + quoted(test::golden("llama_tiny_adapter")) + " --data " + good + " " + quoted(folder / "m"),
       "ranks up to 8"},
      {"rank_map",
       tiny + " --adapter " + quoted(test::golden("llama_tiny_adapter")) + " --data " + good + " " +
           quoted(test::golden("llama_tiny_adapter")),
       "written over"},
      {"quantize", "in out --format int4", "int4"},
      {"quantize", "in", "--heat-map"},
      {"quantize", "in out --heat-map map.svg", "OUT excludes --heat-map"},
      {"quantize", "in out --init loftq", "--init requires --heat-map"},
      {"quantize", "--heat-map " + quoted(folder / "map.svg") + " " + junk, "junk.gguf"},
      {"quantize", "--heat-map map.svg --init eva m", "loftq:ITERATIONS"},
      {"quantize", "--heat-map map.svg --init qera m", "--init qera"},
      {"quantize", quoted(folder / "junk.safetensors") + " out", "junk.safetensors"},
      {"quantize", quoted(test::golden("codes.safetensors")) + " out", "no matrix"},
      {"quantize", quoted(test::golden("linear4bit_io.safetensors")) + " " + quoted(folder / "q") + " --block-size 48", "48"},
      {"formats", "--formats nf4,nf5", "no format 'nf5'; there are nf4, af4, fp4, e2m1"},
      {"formats", "--formats nf4,", "--formats"},
      {"formats", "--block-sizes 64,48", "48"},
      {"formats", "--data " + good, "--model"},
      {"formats", "--model " + junk, "junk.gguf"},
      {"formats", "--model m.bin --data " + good, "--tokenizer"},
      {"formats", tiny + " --data " + good, "context is 64"},
      {"formats", tiny + " --own-text -1", "--own-text"},
      {"memory", "--shapes llama-7b,llama-8b", "no shape 'llama-8b'; there are smollm2-135m"},
      {"memory", "--model " + junk + " --shapes llama-7b", "--shapes"},
      {"memory", "--model " + junk, "junk.gguf"},
      {"memory", "--shapes llama-7b --seq-len 4096", "context is 2048"},
      {"memory", "--shapes smollm2-135m --rank 577", "width of smollm2-135m"},
      {"memory", "--block-size 48", "48"},
      {"memory", "--optimizer lion", "adamw8bit"},
      {"optimizers", "--model " + junk, "--data"},
      {"optimizers", "--model " + junk + " --data " + good + " --optimizers adamw,sgd", "no optimizer 'sgd'; there are adamw"},
      {"optimizers", "--model " + junk + " --data " + good + " --optimizers adamw,", "--optimizers"},
      {"optimizers", "--model " + junk + " --data " + good + " --recipe best", "order-then-nest"},
      {"optimizers", "--model " + junk + " --data " + good + " --every 0", "--every"},
      {"optimizers", "--model " + junk + " --data " + good + " --lion-lr nan", "--lion-lr"},
      {"optimizers", "--model " + junk + " --data " + good + " --seeds -1", "--seeds"},
      {"optimizers", "--model " + junk + " --data " + good, "junk.gguf"},
      {"optimizers", "--model m.bin --data " + good, ".txt"},
      {"optimizers", "--model m.bin --data x.txt", "--tokenizer"},
      {"adapter", "", "subcommand"},
      {"adapter", "info /no/such/folder", "/no/such/folder"},
      {"adapter", "truncate " + quoted(test::golden("llama_tiny_adapter")) + " --rank 9 " + quoted(folder / "a"), "1 ... 8"},
  };
  for (const auto& c : cases) {
    if (!built(c.program)) SKIP(c.program << " has not been built");
    const auto result = run(c.program, c.arguments);
    CAPTURE(c.program, c.arguments, result.err);
    CHECK(result.status == 2);
    CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
    CHECK(result.err.find(c.says) != std::string::npos);
    CHECK(std::none_of(result.err.begin(), result.err.end() - 1, [](char x) { return static_cast<unsigned char>(x) < 0x20; }));
    CHECK(result.err.starts_with(c.program + ": "));
  }
}

TEST_CASE("programs: finetune writes its report and an adapter that loads") {
  if (!built("finetune")) SKIP("finetune has not been built");
  const test::TemporaryFolder folder;
  const auto out = folder / "out";
  const auto result = run("finetune", toy(out));
  CAPTURE(result.out, result.err);
  REQUIRE(result.status == 0);
  CHECK(result.err.find("step 12/12") != std::string::npos);  // plain lines where stderr is no terminal
  CHECK(result.out.find("beats the base") != std::string::npos);
  const auto report = qd::read_json(out / "report.json");
  REQUIRE(report.at("ranks").size() == 4);
  CHECK(report.at("ranks")[0].at("rank") == 0);
  CHECK(report.at("ranks")[3].at("rank") == 16);
  CHECK(report.at("ranks")[3].at("loss").get<double>() < report.at("ranks")[0].at("loss").get<double>());
  CHECK(report.at("step_losses").size() == 12);
  const auto& plan = report.at("memory_plan");
  const auto bytes = [&](const char* part) { return plan.at(part).get<std::size_t>(); };
  // A weight counts the offset of its scales, 4 bytes, which no buffer holds.
  CHECK(bytes("base codes") + bytes("block scales") + bytes("scales of scales") + 21 * 4 == report.at("base_bytes").get<std::size_t>());
  CHECK(bytes("adapters") == 4 * report.at("adapter_parameters").get<std::size_t>());
  CHECK(bytes("process") < report.at("peak_memory_bytes").get<std::size_t>());
  CHECK(result.out.find(" MB planned, ") != std::string::npos);
  // The last rank's parameters are the adapter's; what a rank is above the best, its interval holds; the best is above itself by nothing.
  CHECK(report.at("ranks")[3].at("parameters") == report.at("adapter_parameters"));
  double least = report.at("ranks")[0].at("above_best").at("value").get<double>();
  CHECK(least > 0.0);
  for (const auto& rank : report.at("ranks")) {
    const auto& above = rank.at("above_best");
    const auto value = above.at("value").get<double>();
    CHECK(above.at("low").get<double>() <= value);
    CHECK(above.at("high").get<double>() >= value);
    CHECK(rank.at("ms_per_token").get<double>() > 0.0);
    const auto matches = rank.at("example_matches").get<std::vector<double>>();
    REQUIRE(matches.size() == 2);
    CHECK(matches[0] + matches[1] == rank.at("correct"));
    CHECK(rank.at("match_gain").at("value").get<double>() * 2.0 ==
          rank.at("correct").get<double>() - report.at("ranks")[0].at("correct").get<double>());
    least = std::min(least, value);
  }
  CHECK(least == 0.0);
  CHECK(report.at("keep") == 0.99);
  CHECK(report.at("over_ranks").at("loss").at("smallest_rank_keeping").get<Index>() >= 1);
  CHECK(report.at("over_ranks").contains("exact_match"));
  // Whoever reads the report alone finds what it lacks.
  CHECK(report.at("no_rival").get<std::string>().find("--resume --rival") != std::string::npos);
  CHECK(result.out.find("rival      " + report.at("no_rival").get<std::string>() + "\n") != std::string::npos);
  CHECK(test::read_file(out / "report.csv")
            .starts_with("rank,loss,perplexity,above_best,low,high,answers,correct,match_gain,match_gain_low,match_gain_high,parameters,"
                         "bytes,ms_per_token,rival_loss,"));
  CHECK(test::read_file(out / "ranks.svg").find("</svg>") != std::string::npos);
  const auto adapter = qd::load_peft_adapter(out / "adapter");
  CHECK(adapter.modules.size() == 21);
  CHECK(adapter.max_rank() == 16);
  CHECK(adapter.ranks == std::vector<Index>{1, 4, 16});
  // The bytes of a rank are those of the file's tensors; a cut to rank 4 keeps a quarter of the rows of rank 16.
  const auto file_bytes = tensor_bytes(out / "adapter" / "adapter_model.safetensors");
  for (const auto& rank : report.at("ranks")) CHECK(rank.at("bytes").get<Index>() * 16 == file_bytes * rank.at("rank").get<Index>());
}

TEST_CASE("programs: a base of bfloat16 is a file in bfloat16 as it is; adapters are trained on it, and evaluated") {
  if (!built("finetune") || !built("evaluate")) SKIP("finetune or evaluate has not been built");
  const test::TemporaryFolder folder;
  const auto logits = [&](const std::string& format) {
    succeeds("evaluate", "--model " + quoted(test::golden("mistral")) + " --base-format " + format +
                             " --ids 1,2,3,5,8,13,21 --logits " + quoted(folder / format));
    return qd::SafetensorsFile(folder / format).matrix("logits");
  };
  const auto exact = logits("float32");
  CHECK(difference(logits("bfloat16"), exact) == 0.0);
  CHECK(difference(logits("nf4"), exact) > 1e-2);

  succeeds("finetune", toy(folder / "run", "--base-format bfloat16"));
  CHECK(qd::load_peft_adapter(folder / "run" / "adapter").max_rank() == 16);
  const auto report = qd::read_json(folder / "run" / "report.json");
  CHECK(report.at("memory_plan").at("base codes") == report.at("base_bytes"));
  CHECK(report.at("base_bytes") == 2 * 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 192 * 64));  // 3 blocks of the toy's linear weights
  CHECK(report.at("ranks").back().at("loss").get<double>() < report.at("ranks").front().at("loss").get<double>());
}

TEST_CASE("programs: layers have ranks and alphas by the ends of their names") {
  if (!built("finetune")) SKIP("finetune has not been built");
  const test::TemporaryFolder folder;
  succeeds("finetune", toy(folder / "out", "--rank-pattern q_proj=4,layers.2.mlp.down_proj=2 --alpha-pattern v_proj=8"));
  const auto adapter = qd::load_peft_adapter(folder / "out" / "adapter");
  CHECK(adapter.modules.size() == 21);
  CHECK(adapter.ranks == std::vector<Index>{1, 4, 16});
  Index parameters = 0;
  for (const auto& module : adapter.modules) {
    CAPTURE(module.name);
    const bool q = module.name.ends_with("q_proj"), down = module.name == "model.layers.2.mlp.down_proj";
    CHECK(module.rank() == (q ? 4 : down ? 2 : 16));
    CHECK(module.alpha == (module.name.ends_with("v_proj") ? 8.0 : 16.0));
    parameters += module.rank() * (module.in() + module.out());
  }
  const auto report = qd::read_json(folder / "out" / "report.json");
  CHECK(report.at("adapter_parameters") == parameters);
  CHECK(report.at("ranks")[3].at("parameters") == parameters);
  CHECK(report.at("memory_plan").at("adapters") == 4 * parameters);
  CHECK(report.at("rank_pattern") == "q_proj=4,layers.2.mlp.down_proj=2");
}

TEST_CASE("programs: evaluate reports of an adapter over its ranks what finetune reported, and what each rank costs") {
  if (!built("finetune") || !built("evaluate")) SKIP("finetune or evaluate has not been built");
  const test::TemporaryFolder folder;
  write_letters_model(folder / "model");
  write_letters_data(folder / "data.jsonl");
  const std::string common = "--model " + quoted(folder / "model") + " --seq-len 16 --max-new-tokens 3 --answers 6 --keep 0.75 --data " +
                             quoted(folder / "data.jsonl");
  const auto trained = succeeds("finetune", common + " --eval " + quoted(folder / "data.jsonl") +
                                                " --steps 6 --batch 3 --ranks 1,2,4 --rank-pattern q_proj=2 --lr 1e-2 --out " +
                                                quoted(folder / "run"));
  const auto adapter = folder / "run" / "adapter";
  const auto evaluated =
      succeeds("evaluate", common + " --adapter " + quoted(adapter) + " --ranks 4,0,1,2 --out " + quoted(folder / "out"));
  CAPTURE(trained, evaluated);
  const auto before = qd::read_json(folder / "run" / "report.json"), after = qd::read_json(folder / "out" / "report.json");
  CHECK(after.at("keep") == 0.75);
  REQUIRE(after.at("over_ranks").size() == 2);
  for (const char* measure : {"loss", "exact_match"}) {
    const auto &was = before.at("over_ranks").at(measure), &is = after.at("over_ranks").at(measure);
    for (const char* mean : {"mean_over_rank", "mean_over_log2_rank"})
      CHECK(is.at(mean).get<double>() == Approx(was.at(mean).get<double>()).margin(1e-4));
    CHECK(is.at("best_rank") == was.at("best_rank"));
    CHECK(is.at("smallest_rank_keeping") == was.at("smallest_rank_keeping"));
  }
  for (const std::string line : {"\n  loss: mean over ranks ", "\n  exact match: mean over ranks "})
    for (const auto* said : {&trained, &evaluated}) CHECK(said->find(line) != std::string::npos);
  CHECK(evaluated.find(" keeps 75 % of what the best rank, ") != std::string::npos);
  const std::size_t place[] = {3, 0, 1, 2};  // of evaluate's ranks in finetune's report
  for (std::size_t i = 0; i < 4; ++i) {
    const auto &was = before.at("ranks")[place[i]], &is = after.at("ranks")[i];
    for (const char* cost : {"rank", "parameters", "bytes"}) CHECK(is.at(cost) == was.at(cost));
    CHECK(is.at("ms_per_token").get<double>() > 0.0);
    CHECK(evaluated.find("\nrank " + is.at("rank").dump() + ": ") != std::string::npos);
  }
  CHECK(after.at("ranks")[0].at("bytes") == tensor_bytes(adapter / "adapter_model.safetensors"));
}

TEST_CASE("programs: an adapter whose scale is rsLoRA's is saved with what every LoRA reader divides by its rank") {
  if (!built("finetune")) SKIP("finetune has not been built");
  const test::TemporaryFolder folder;
  succeeds("finetune", toy(folder / "out", "--recipe 'per-row+alpha/sqrt(b)'"));
  const auto config = qd::read_json(folder / "out" / "adapter" / "adapter_config.json");
  CHECK(config.at("r") == 16);
  CHECK(config.at("use_rslora") == false);
  CHECK(config.at("lora_alpha") == 64);  // 16 * sqrt(16)
  const auto adapter = qd::load_peft_adapter(folder / "out" / "adapter");
  for (const auto& module : adapter.modules) {
    CHECK(module.policy == qd::ScalePolicy::over_sqrt_rank);
    CHECK(qd::to_adapter(module).scale(4) == 8.0f);
  }
}

TEST_CASE("programs: a run that was stopped resumes to the same bytes, on any number of threads") {
  if (!built("finetune")) SKIP("finetune has not been built");
  for (const std::string recipe : {"--recipe auto", "--recipe qdylora --optimizer adamw8bit", "--recipe qlora --init qera",
                                   "--recipe order-then-nest --rank-pattern q_proj=4,down_proj=1 --alpha-pattern o_proj=4",
                                   "--method houlsby", "--method alpha", "--dtype float16",
                                   "--optimizer adamw8bit --base-format bfloat16 --method full"}) {
    const test::TemporaryFolder folder;
    const bool scales = recipe.ends_with("alpha"), whole_model = recipe.ends_with("full");
    const auto more = (scales || whole_model ? "" : "--dropout 0.1 ") + recipe;
    REQUIRE(run("finetune", toy(folder / "whole", more + " --threads 1")).status == 0);
    // Stopped by a signal once the first state is there, wherever that finds it; with its moments on disk, which changes nothing.
    const std::string state = (folder / "parts" / "state.safetensors").native();
    const std::string command = "'" + std::string(QDYLORA_EXAMPLES_DIR) + "/finetune' " +
                                toy(folder / "parts", more + " --threads 2 --paged " + quoted(folder.path())) +
                                " >/dev/null 2>&1 & pid=$!; while [ ! -f '" + state +
                                "' ] && kill -0 $pid 2>/dev/null; do sleep 0.01; done; kill -TERM $pid; wait $pid";
    const int stopped = std::system(command.c_str());
    CHECK((WIFEXITED(stopped) && (WEXITSTATUS(stopped) == 130 || WEXITSTATUS(stopped) == 0)));
    const auto resumed = run("finetune", toy(folder / "parts", more + " --threads 4 --resume"));
    CAPTURE(resumed.out, resumed.err);
    REQUIRE(resumed.status == 0);
    const qd::SafetensorsFile whole(folder / "whole" / "state.safetensors"), parts(state);
    REQUIRE(whole.tensors().size() == parts.tensors().size());
    for (const auto& tensor : whole.tensors()) {
      const auto expected = whole.bytes(tensor.name), found = parts.bytes(tensor.name);
      CAPTURE(tensor.name);
      CHECK((tensor.name == "seconds" || std::ranges::equal(expected.span(), found.span())));
    }
    const std::string file = scales                        ? "adapter/alpha_model.safetensors"
                             : whole_model                 ? "model/model.safetensors"
                             : recipe.ends_with("houlsby") ? "adapter/bottleneck_model.safetensors"
                                                           : "adapter/adapter_model.safetensors";
    const auto trained = test::read_file(folder / "whole" / file);
    CHECK_FALSE(trained.empty());
    CHECK(trained == test::read_file(folder / "parts" / file));
    if (!whole_model) continue;  // what was is measured again
    for (const std::size_t i : {0u, 1u})
      CHECK(qd::read_json(folder / "whole" / "report.json").at("ranks")[i].at("example_losses") ==
            qd::read_json(folder / "parts" / "report.json").at("ranks")[i].at("example_losses"));
  }
}

TEST_CASE("programs: with activations in 16 bits a run has the losses of one in float32, nearly") {
  if (!built("finetune")) SKIP("finetune has not been built");
  const test::TemporaryFolder folder;
  const auto losses = [&](const std::string& dtype) {
    succeeds("finetune", toy(folder / dtype, "--dtype " + dtype));
    const auto report = qd::read_json(folder / dtype / "report.json");
    std::vector<double> all;
    for (const auto& rank : report.at("ranks")) all.push_back(rank.at("loss").get<double>());
    return all;
  };
  const auto expected = losses("float32");
  REQUIRE(expected.size() == 4);
  for (const std::string dtype : {"bfloat16", "float16"}) {
    const auto found = losses(dtype);
    CAPTURE(dtype);
    REQUIRE(found.size() == expected.size());
    for (std::size_t i = 0; i < found.size(); ++i) CHECK(found[i] == Approx(expected[i]).epsilon(dtype == "float16" ? 2e-3 : 2e-2));
    CHECK(found != expected);
  }
}

TEST_CASE("programs: a rival has the same batches, stands beside the run at every rank, and resumes as a run of its own") {
  if (!built("finetune")) SKIP("finetune has not been built");
  const test::TemporaryFolder folder;
  const auto out = folder / "out";
  const std::string recipe = "--recipe qdylora";
  CHECK(succeeds("finetune", toy(out, recipe)).find("with --resume --rival trains QLoRA") != std::string::npos);
  CHECK_FALSE(qd::read_json(out / "report.json").contains("rival"));
  const auto said = succeeds("finetune", toy(out, recipe + " --resume --rival"));  // trains the rival alone
  CAPTURE(said);
  CHECK(said.find("resumed    at step 12 of 12") != std::string::npos);
  CHECK(said.find("above the rival, 95 %") != std::string::npos);
  const auto report = qd::read_json(out / "report.json");
  const auto& rival = report.at("rival");
  CHECK(rival.at("recipe") == "qlora-svd");
  CHECK(rival.at("steps") == report.at("steps"));
  CHECK(rival.at("tokens") == report.at("tokens"));
  CHECK(rival.at("reordered_at_end") == true);
  REQUIRE(rival.at("ranks").size() == 4);
  for (std::size_t i = 0; i < 4; ++i) {
    const auto& ours = report.at("ranks")[i];
    const auto& theirs = rival.at("ranks")[i];
    CHECK(ours.at("rank") == theirs.at("rank"));
    CHECK(ours.at("example_tokens") == theirs.at("example_tokens"));
    const auto above = ours.at("above_rival").at("value").get<double>();
    CHECK(above == Approx(ours.at("loss").get<double>() - theirs.at("loss").get<double>()).margin(1e-9));
    CHECK((above == 0.0) == (i == 0));  // the base is the same
    CHECK(ours.contains("match_above_rival"));
  }
  CHECK(test::read_file(out / "ranks.svg").find("rival") != std::string::npos);
  CHECK(qd::load_peft_adapter(out / "rival" / "adapter").max_rank() == 16);

  // It is the run that its recipe gives by itself.
  REQUIRE(run("finetune", toy(folder / "alone", "--recipe qlora-svd")).status == 0);
  const auto tensors = [](const std::filesystem::path& run) { return test::read_file(run / "adapter" / "adapter_model.safetensors"); };
  CHECK(tensors(folder / "alone") == tensors(out / "rival"));
  const auto alone = qd::read_json(folder / "alone" / "report.json");
  for (std::size_t i = 0; i < 4; ++i) CHECK(alone.at("ranks")[i].at("example_losses") == rival.at("ranks")[i].at("example_losses"));

  // Stopped in the rival, by a signal once its first state is there: not begun again unawares, and resumed to the same bytes.
  const auto parts = folder / "parts";
  const std::string state = (parts / "rival" / "state.safetensors").native();
  const std::string command = "'" + std::string(QDYLORA_EXAMPLES_DIR) + "/finetune' " + toy(parts, recipe + " --rival") +
                              " >/dev/null 2>&1 & pid=$!; while [ ! -f '" + state +
                              "' ] && kill -0 $pid 2>/dev/null; do sleep 0.01; done; kill -TERM $pid; wait $pid";
  const int stopped = std::system(command.c_str());
  REQUIRE(WIFEXITED(stopped));
  CHECK_FALSE(qd::read_json(parts / "report.json").at("ranks").empty());  // of the run itself
  if (WEXITSTATUS(stopped) == 130) {
    const auto refused = run("finetune", toy(parts, recipe + " --rival"));
    CHECK(refused.status == 2);
    CHECK(refused.err.find("rival/state.safetensors: holds a run that stopped") != std::string::npos);
  }
  succeeds("finetune", toy(parts, recipe + " --rival --resume"));
  CHECK(tensors(parts / "rival") == tensors(out / "rival"));
  CHECK(qd::read_json(parts / "report.json").at("rival").at("ranks")[1].at("loss") == rival.at("ranks")[1].at("loss"));
}

TEST_CASE("programs: a rival begins with the same initial values and layers, even where the run before it goes on from its state") {
  if (!built("finetune")) SKIP("finetune has not been built");
  const std::string options = " --init qera --rank-pattern q_proj=4 --alpha-pattern o_proj=4";
  const test::TemporaryFolder folder;
  const auto tensors = [](const std::filesystem::path& run) { return test::read_file(run / "adapter" / "adapter_model.safetensors"); };
  succeeds("finetune", toy(folder / "alone", "--recipe qlora-svd" + options));
  succeeds("finetune", toy(folder / "out", "--recipe qlora" + options));
  const auto before = tensors(folder / "out");
  for (int i = 0; i < 2; ++i) {  // the second time both go on
    succeeds("finetune", toy(folder / "out", "--resume --rival --recipe qlora" + options));
    CHECK(tensors(folder / "out" / "rival") == tensors(folder / "alone"));
    CHECK(tensors(folder / "out") == before);
  }
  for (const auto& module : qd::load_peft_adapter(folder / "out" / "rival" / "adapter").modules)
    CHECK(module.rank() == (module.name.ends_with("q_proj") ? 4 : 16));
}

TEST_CASE("programs: the report of a resumed run counts all its parts") {
  if (!built("finetune")) SKIP("finetune has not been built");
  const test::TemporaryFolder folder;
  REQUIRE(run("finetune", toy(folder / "out")).status == 0);
  const auto whole = qd::read_json(folder / "out" / "report.json");
  CHECK(whole.at("tokens").get<Index>() > 12 * 4 * 8);
  REQUIRE(run("finetune", toy(folder / "out", "--resume")).status == 0);  // only evaluates
  const auto resumed = qd::read_json(folder / "out" / "report.json");
  for (const char* key : {"tokens", "step_losses"}) CHECK(resumed.at(key) == whole.at(key));
  for (const char* key : {"training_seconds", "tokens_per_second"}) {
    CHECK(whole.at(key).get<double>() > 0.0);
    CHECK(std::fabs(resumed.at(key).get<double>() / whole.at(key).get<double>() - 1.0) < 0.2);  // the last state was written within it
  }

  auto state = qd::load_train_state(folder / "out" / "state.safetensors");
  qd::TrainState old;  // without what it has taken, as earlier versions saved it
  old.add_text_view("settings", state.text("settings"));
  qd::save_train_state(folder / "out" / "state.safetensors", old);
  const auto result = run("finetune", toy(folder / "out", "--resume"));
  CHECK(result.status == 2);
  CHECK(result.err.find("earlier version") != std::string::npos);
}

TEST_CASE("programs: a stopped run is not overwritten, a finished one is") {
  if (!built("finetune")) SKIP("finetune has not been built");
  const test::TemporaryFolder folder;
  const auto path = folder / "out" / "state.safetensors";
  REQUIRE(run("finetune", toy(folder / "out")).status == 0);
  REQUIRE(run("finetune", toy(folder / "out")).status == 0);
  qd::TrainState state;
  state.add_text("settings", "{\"steps\": 12}");
  state.add_integers("trainer", {7, 0, 0});
  qd::save_train_state(path, state);
  const auto before = test::read_file(path);
  const auto result = run("finetune", toy(folder / "out"));
  CHECK(result.status == 2);
  CHECK(result.err.find("step 7 of 12") != std::string::npos);
  CHECK(result.err.find("--resume") != std::string::npos);
  CHECK(test::read_file(path) == before);
}

TEST_CASE("programs: answers and data reach the terminal readable and harmless, each rank once") {
  if (!built("finetune")) SKIP("finetune has not been built");
  const test::TemporaryFolder folder;
  std::string lines;
  for (int i = 0; i < 6; ++i) lines += "{\"prompt\": \"Where?\", \"response\": \"Z\u00fcrich\\u001b[2J\\u009b\"}\n";
  test::write_file(folder / "data.jsonl", lines);
  const auto result = run("finetune", "--toy --steps 1 --batch 1 --ranks 4 --answers 1 --max-new-tokens 4 --data " +
                                          quoted(folder / "data.jsonl") + " --out " + quoted(folder / "out"));
  CAPTURE(result.out, result.err);
  REQUIRE(result.status == 0);
  const auto answers = result.out.substr(std::min(result.out.find("Some answers"), result.out.size()));
  CHECK(answers.find("Z\u00fcrich\\x1b[2J\\xc2\\x9b") != std::string::npos);
  CHECK(std::none_of(result.out.begin(), result.out.end(), [](char c) { return c != '\n' && static_cast<unsigned char>(c) < 0x20; }));
  const auto first = answers.find("\n    rank 4");
  REQUIRE(first != std::string::npos);
  CHECK(answers.find("\n    rank 4", first + 1) == std::string::npos);
}

TEST_CASE("programs: a run does not resume with other settings") {
  if (!built("finetune")) SKIP("finetune has not been built");
  const test::TemporaryFolder folder;
  REQUIRE(run("finetune", toy(folder / "out")).status == 0);
  const auto result = run("finetune", toy(folder / "out", "--resume --seed 3"));
  CHECK(result.status == 2);
  CHECK(result.err.find("other settings") != std::string::npos);
}

TEST_CASE("programs: evaluate's logits are those of transformers and PEFT") {
  if (!built("evaluate")) SKIP("evaluate has not been built");
  const test::TemporaryFolder folder;
  const auto ids = test::load<std::int32_t>("llama_tiny_io.safetensors", "input_ids");
  std::string list;
  for (std::size_t i = 0; i < 12; ++i) list += (i > 0 ? "," : "") + std::to_string(ids[i]);
  const struct {
    std::string arguments, golden;
  } cases[] = {{"--adapter " + quoted(test::golden("llama_tiny_adapter")), "logits"},
               {"--adapter " + quoted(test::golden("llama_tiny_adapter")) + " --rank 0", "logits_base_only"},
               {"", "logits_base_only"}};
  for (const auto& c : cases) {
    const auto out = folder / "logits.safetensors";
    const auto result = run("evaluate", "--model " + quoted(test::golden("llama_tiny_bnb4")) + " " + c.arguments + " --ids " + list +
                                            " --logits " + quoted(out));
    CAPTURE(c.arguments, result.err);
    REQUIRE(result.status == 0);
    const auto logits = qd::SafetensorsFile(out).matrix("logits");
    const auto expected = test::load<float>("llama_tiny_io.safetensors", c.golden);  // [2, 12, 64], the first sequence
    REQUIRE(logits.rows() == 12);
    REQUIRE(logits.cols() == 64);
    double worst = 0.0;
    for (Index i = 0; i < logits.size(); ++i)
      worst = std::max(worst, std::fabs(static_cast<double>(logits.data()[i] - expected[static_cast<std::size_t>(i)])));
    CHECK(worst < 1e-4);
    const auto array = folder / "logits.npy";
    succeeds("evaluate",
             "--model " + quoted(test::golden("llama_tiny_bnb4")) + " " + c.arguments + " --ids " + list + " --logits " + quoted(array));
    CHECK(difference(qd::NpyFile(array).matrix(), logits) == 0.0);
  }
}

TEST_CASE("programs: finetune warns of data whose tokens are scored by less than 5 %") {
  if (!built("finetune")) SKIP("finetune has not been built");
  const test::TemporaryFolder folder;
  const auto said = [&](std::size_t prompt) {  // an answer of a letter and the end, behind a line feed: 2 of prompt + 3 tokens
    std::string data;
    for (const char letter : {'a', 'b', 'c', 'd'})
      data += R"({"prompt":")" + std::string(prompt, letter) + R"(","response":")" + letter + "\"}\n";
    const auto file = folder / (std::to_string(prompt) + ".jsonl");
    test::write_file(file, data);
    return succeeds("finetune", "--toy --data " + quoted(file) + " --eval " + quoted(file) +
                                    " --ranks 1,2 --recipe qdylora --steps 1 --batch 1 --answers 1 --max-new-tokens 2 --out " +
                                    quoted(folder / std::to_string(prompt)));
  };
  CHECK(said(37).find("warning") == std::string::npos);  // 5 % are not less
  const auto less = said(38);
  CAPTURE(less);
  CHECK(less.find("41 tokens each, 5 % scored\nwarning    4.9 % of the tokens are scored") != std::string::npos);
}

TEST_CASE("programs: finetune learns every answer of conversations where it is told to, and holds out the last ones") {
  if (!built("finetune")) SKIP("finetune has not been built");
  const test::TemporaryFolder folder;
  write_letters_model(folder / "model");
  std::string data;
  for (const std::string word : {"in", "inn", "pin", "spin", "tin", "kin"})
    data += R"({"conversations":[{"from":"human","value":"in"},{"from":"gpt","value":")" + word +
            R"("},{"from":"human","value":"inn"},{"from":"gpt","value":")" + word + "\"}]}\n";
  test::write_file(folder / "data.jsonl", data);
  const auto file = quoted(folder / "data.jsonl");
  const std::string arguments = "--model " + quoted(folder / "model") + " --seq-len 32 --steps 1 --batch 2 --ranks 1,2 --answers 0 " +
                                "--data " + file + " --eval " + file + " --recipe qlora --out ";
  const auto last = succeeds("finetune", arguments + quoted(folder / "last"));
  CHECK(last.find("data       6 training and 6 held-out examples") != std::string::npos);
  const auto all = succeeds("finetune", arguments + quoted(folder / "all") + " --all-turns");
  CHECK(all.find("data       12 training and 6 held-out examples") != std::string::npos);
}

TEST_CASE("programs: a run on packed rows, or on examples of like length, takes its steps; a state of one is not of the other") {
  if (!built("finetune")) SKIP("finetune has not been built");
  const test::TemporaryFolder folder;
  const auto packed = succeeds("finetune", toy(folder / "packed", "--pack --seq-len 200"));
  const auto plain = succeeds("finetune", toy(folder / "plain", "--seq-len 200")),
             grouped = succeeds("finetune", toy(folder / "grouped", "--seq-len 200 --group-by-length"));
  CHECK(packed.find("packed into") != std::string::npos);
  CHECK(plain.find("packed into") == std::string::npos);
  const auto tokens = [](const std::string& out) {  // "trained    12 steps, 4321 tokens"
    const auto at = out.find("12 steps, ");
    REQUIRE(at != std::string::npos);
    return std::stol(out.substr(at + 10));
  };
  CHECK(tokens(packed) > tokens(plain) * 11 / 10);  // four rows hold more than four examples
  CHECK(tokens(grouped) != tokens(plain));
  const auto other = run("finetune", toy(folder / "packed", "--resume --seq-len 200"));
  CHECK(other.status == 2);
}

TEST_CASE("programs: whole modules of an adapter take the place of the model's, beside it, merged and after a cut") {
  if (!built("evaluate") || !built("merge") || !built("adapter")) SKIP("evaluate, merge or adapter has not been built");
  const test::TemporaryFolder folder;
  const auto logits = [&](const std::filesystem::path& model, const std::string& more) {
    const auto out = folder / "logits.npy";
    succeeds("evaluate", "--model " + quoted(model) + " --base-format float32 --ids 3,1,4,1,5,9,2,6 --logits " + quoted(out) + " " + more);
    return qd::NpyFile(out).matrix();
  };
  for (const std::string name : {"head", "both", "norms"}) {
    CAPTURE(name);
    const auto model = test::golden("saved_modules/untied");
    const auto adapter = quoted(model / name);
    const auto expected = qd::SafetensorsFile(model / "io.safetensors").matrix(name);
    CHECK(difference(logits(model, "--adapter " + adapter), expected) < 1e-4);
    succeeds("merge", quoted(model) + " " + adapter + " " + quoted(folder / name));
    CHECK(difference(logits(folder / name, ""), expected) < 1e-4);
    succeeds("adapter", "truncate " + adapter + " --rank 1 " + quoted(folder / ("cut " + name)));
    CHECK(difference(logits(model, "--adapter " + quoted(folder / ("cut " + name))), logits(model, "--adapter " + adapter + " --rank 1")) ==
          0.0);
  }
  // Its file has adapters of some layers alone, and the whole modules at any rank.
  write_letters_model(folder / "letters", "saved_modules/untied", 32, 'a');
  write_letters_data(folder / "data.jsonl");
  const auto both = test::golden("saved_modules/untied") / "both";
  succeeds("evaluate", "--model " + quoted(folder / "letters") + " --base-format float32 --seq-len 16 --ranks 0,2 --data " +
                           quoted(folder / "data.jsonl") + " --adapter " + quoted(both) + " --out " + quoted(folder / "out"));
  const auto ranks = qd::read_json(folder / "out" / "report.json").at("ranks");
  CHECK(ranks[1].at("bytes") == tensor_bytes(both / "adapter_model.safetensors"));
  CHECK(ranks[0].at("parameters") == 2 * 32 * 16);

  const auto tied = test::golden("saved_modules/tied");
  const auto refused = run("merge", quoted(tied) + " " + quoted(tied / "embedding") + " " + quoted(folder / "tied"));
  CHECK(refused.status == 2);
  CHECK(refused.err.find("embed_tokens") != std::string::npos);
  CHECK(!std::filesystem::exists(folder / "tied"));
}

TEST_CASE("programs: an adapter of a Conv1D merges into weights that are stored [in, out]") {
  if (!built("merge")) SKIP("merge has not been built");
  const test::TemporaryFolder folder;
  const auto weight = test::normal_matrix<float>(5, 7, 1), turned = qd::detail::transposed(weight);  // [out, in], [in, out]
  const qd::LoRAAdapter<float> adapter = [&] {
    qd::LoRAAdapter<float> made(7, 5, {.max_rank = 2});
    qd::copy(test::normal_matrix<float>(2, 5, 2).view(), made.b().value.view());
    return made;
  }();
  for (const bool conv : {false, true}) {
    const std::string name = conv ? "conv" : "linear";
    qd::SafetensorsWriter writer;
    writer.add("h.weight", (conv ? turned : weight).view());
    std::filesystem::create_directories(folder / name);
    writer.write(folder / name / "model.safetensors");
    qd::save_peft_adapter(folder / (name + " adapter"), {{"h", &adapter}}, {.fan_in_fan_out = conv});
    succeeds("merge", quoted(folder / name) + " " + quoted(folder / (name + " adapter")) + " " + quoted(folder / (name + " merged")));
  }
  const auto merged = [&](const std::string& name) {
    return qd::SafetensorsFile(folder / (name + " merged") / "model.safetensors").matrix("h.weight");
  };
  CHECK(difference(merged("conv"), qd::detail::transposed(merged("linear"))) == 0.0);
  CHECK(difference(merged("linear"), weight) > 0.1);
}

TEST_CASE("programs: a chat template that is not known is said, and prompts are plain") {
  if (!built("evaluate")) SKIP("evaluate has not been built");
  const test::TemporaryFolder folder;
  write_letters_model(folder / "model");
  test::write_file(folder / "data.jsonl", "{\"prompt\": \"What\", \"response\": \"in\"}\n");
  const auto evaluate = [&](const std::string& more) {
    return run("evaluate", "--model " + quoted(folder / "model") + " --seq-len 48 --data " + quoted(folder / "data.jsonl") + " " + more);
  };
  const auto holds = [](const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; };
  const auto silent = evaluate("--no-chat-template"), none = evaluate("");
  CAPTURE(silent.err, none.err);
  REQUIRE(silent.status == 0);
  REQUIRE(none.status == 0);
  CHECK(!holds(silent.out, "chat"));
  CHECK(holds(none.out, "the model has no chat template; prompts are plain text"));
  test::write_file(folder / "model" / "chat_template.jinja",
                   "{% for message in messages %}<|strange|>{{ message['content'] }}{% endfor %}");
  const auto unknown = evaluate("");
  CHECK(holds(unknown.out, "chat_template.jinja"));
  CHECK(holds(unknown.out, "prompts are plain text"));
  const auto without_times = [](std::string text) {  // those of tokens, which no two runs share
    for (std::size_t at; (at = text.find(" ms a token")) != text.npos;) {
      const auto begin = text.rfind(' ', at - 1);
      text.erase(begin, at + std::strlen(" ms a token") - begin);
    }
    return text;
  };
  const auto loss = [&](const std::string& text) { return without_times(text.substr(std::min(text.find("rank 0"), text.size()))); };
  CHECK(loss(unknown.out) == loss(silent.out));
  CHECK(holds(loss(silent.out), "loss"));
  CHECK(without_times(evaluate("--chat-template none").out) == without_times(silent.out));
  const auto other = evaluate("--chat-template llama3");  // whose marks this vocabulary has not
  CHECK(other.status == 2);
  CHECK(holds(other.err, "bos"));
}

TEST_CASE("programs: an adapter that began on a base of its own is used with that base, by those programs alone that make it") {
  if (!built("finetune") || !built("evaluate") || !built("adapter")) SKIP("finetune, evaluate or adapter has not been built");
  const test::TemporaryFolder folder;
  const auto trained = run("finetune", toy(folder / "out", "--init pissa"));
  CAPTURE(trained.out, trained.err);
  REQUIRE(trained.status == 0);
  CHECK(trained.out.find("begin as pissa") != std::string::npos);
  CHECK(qd::load_peft_adapter(folder / "out" / "adapter", {.changed_base = true}).init == qd::adapter_init("pissa", 16));
  REQUIRE(run("adapter", "truncate " + quoted(folder / "out" / "adapter") + " --rank 4 " + quoted(folder / "cut")).status == 0);
  CHECK(qd::load_peft_adapter(folder / "cut", {.changed_base = true}).init == qd::adapter_init("pissa", 16));
  CHECK(run("adapter", "info " + quoted(folder / "cut")).out.find("began as pissa at rank 16") != std::string::npos);
  CHECK(run("adapter", "gguf " + quoted(folder / "cut") + " --model m.gguf " + quoted(folder / "a")).err.find("pissa") != std::string::npos);

  // At rank 0 the adapter's own values do not matter: what is left is the base.
  const auto up = test::normal_matrix<float>(4, 40, 1);
  qd::LoRAAdapter<float> adapter(32, 40, {.max_rank = 4});
  qd::copy(up.view(), adapter.b().value.view());
  const auto logits = [&](const std::string& init, const std::string& format) {
    qd::save_peft_adapter(folder / "adapter", {{"model.layers.0.mlp.up_proj", &adapter}},
                          {.init = qd::adapter_init(init, 4), .base_format = init == "standard" ? "" : "nf4"});
    const auto result = run("evaluate", "--model " + quoted(test::golden("mistral")) + " --base-format " + format + " --adapter " +
                                            quoted(folder / "adapter") + " --rank 0 --ids 1,2,3 --logits " + quoted(folder / "logits"));
    return result.status == 0 ? test::read_file(folder / "logits") : result.err;
  };
  const auto plain = logits("standard", "nf4");
  CHECK(logits("loftq", "nf4") == plain);
  CHECK(logits("pissa", "nf4").size() == plain.size());
  CHECK(logits("pissa", "nf4") != plain);
  CHECK(logits("loftq", "int4").find("--base-format int4") != std::string::npos);
}

TEST_CASE("programs: an adapter that begins as the inputs of the first training rows say is one of the plain quantized model") {
  if (!built("finetune")) SKIP("finetune has not been built");
  const test::TemporaryFolder folder;
  const auto ranks = [&](const std::string& init, const std::string& more = "") {
    const auto out = folder / (init + more);
    const auto told = succeeds("finetune", toy(out, "--recipe qlora --init " + init + more));
    CHECK((init == "standard" || told.find("begin as " + init + "; rank 0 is the plain quantized model") != std::string::npos));
    const auto adapter = qd::load_peft_adapter(out / "adapter");
    CHECK(adapter.init == qd::adapter_init(init, 16));
    CHECK(adapter.base_format == (init == "standard" ? "" : "nf4"));
    return qd::read_json(out / "report.json").at("ranks");
  };
  const auto standard = ranks("standard"), loftq = ranks("loftq"), qera = ranks("qera");
  CHECK(qera[0].at("loss") == standard[0].at("loss"));
  CHECK(qera[3].at("loss") != standard[3].at("loss"));
  CHECK(qera[3].at("loss") != loftq[3].at("loss"));
  CHECK(ranks("qera", " --threads 1")[3].at("loss") == qera[3].at("loss"));
}

TEST_CASE("programs: compare lets adapters begin as the inputs of the first rows say") {
  if (!built("compare")) SKIP("compare has not been built");
  const test::TemporaryFolder folder;
  const auto model = llama2c_model(folder) + " --tokenizer " + quoted(folder / "tokenizer.bin");
  std::string text;
  for (int i = 0; i < 200; ++i) text += "word" + std::to_string(i % 13) + " ";
  test::write_file(folder / "d.txt", text);
  const auto losses = [&](const std::string& init) {
    const auto runs = folder / (init + ".jsonl");
    succeeds("compare", model + " --data " + quoted(folder / "d.txt") + " --recipes qlora --against qlora --seeds 0 --ranks 1,4 --steps 1" +
                            " --batch 2 --seq-len 16 --eval-rows 2 --init " + init + " --results " + quoted(runs));
    return qd::parse_json(test::read_file(runs), {}).at("losses");
  };
  const auto standard = losses("standard"), loftq = losses("loftq"), qera = losses("qera");
  CHECK(qera[2] == standard[2]);  // of the base
  CHECK(qera[1] != standard[1]);
  CHECK(qera[1] != loftq[1]);
}

TEST_CASE("programs: a heat map shows the error of each linear weight, and has its numbers beside it") {
  if (!built("quantize")) SKIP("quantize has not been built");
  const test::TemporaryFolder folder;
  const auto map = [&](const std::string& arguments) {
    succeeds("quantize", "--heat-map " + quoted(folder / "map.svg") + " " + quoted(test::golden("mistral")) + " " + arguments);
    CHECK(test::read_file(folder / "map.svg").ends_with("</svg>\n"));
    return qd::read_json(folder / "map.json");
  };
  const auto plain = map(""), int4 = map("--format int4 --block-size 32"), exact = map("--format float32");
  const auto begun = map("--init loftq --rank 8");
  const auto config = qd::hugging_face_config(test::golden("mistral") / "config.json");
  const qd::SafetensorsFile file(test::golden("mistral") / "model.safetensors");
  std::size_t seen = 0;
  for (const auto& [module, error] : plain.at("relative_error").items()) {
    CAPTURE(module);
    const auto w = file.matrix(module + ".weight");
    const auto coded = qd::quantize(w.view());
    qd::Matrix<float> decoded(w.rows(), w.cols());
    qd::dequantize(coded.view(), decoded.view());
    CHECK(error.get<double>() == Approx(std::sqrt(test::normalised_squared_error(decoded.view(), w.view()))).epsilon(1e-4));
    CHECK(int4.at("relative_error").at(module) != error);
    CHECK(exact.at("relative_error").at(module) == 0.0);
    CHECK(begun.at("relative_error").at(module) == error);
    CHECK(begun.at("relative_error_with_adapter").at(module).get<double>() < 0.95 * error.get<double>());
    ++seen;
  }
  CHECK(seen == static_cast<std::size_t>(config.layers) * config.linears().size());
  CHECK(begun.at("init") == "loftq");
}

TEST_CASE("programs: rank_map keeps to its budget, and its adapter has the losses it says, at ranks that PEFT reads") {
  if (!built("rank_map") || !built("evaluate")) SKIP("rank_map or evaluate has not been built");
  const bool dora = GENERATE(false, true);
  const test::TemporaryFolder folder;
  const auto model = folder / "model";
  std::filesystem::create_directory(model);
  for (const std::string file : {"tokenizer.json", "tokenizer_config.json"})
    std::filesystem::copy_file(test::golden("tokenizers") / "gpt2" / file, model / file);
  test::write_file(model / "config.json",
                   R"({"model_type": "llama", "vocab_size": 520, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                       "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-05,
                       "hidden_act": "silu", "tie_word_embeddings": true})");
  qd::SafetensorsWriter writer;
  std::deque<qd::Matrix<float>> kept;
  std::deque<qd::LoRAAdapter<float>> adapters;
  std::vector<qd::NamedAdapter> list;
  std::vector<Index> costs;
  std::uint64_t seed = 1;
  const auto add = [&](const std::string& name, Index rows, Index cols) {
    const auto& m = kept.emplace_back(qd::clone(test::normal_matrix<float>(rows, cols, seed++, 0.2).view()));
    writer.add(name, qd::DType::F32, rows == 1 ? std::vector<Index>{cols} : std::vector<Index>{rows, cols}, std::as_bytes(m.span()));
  };
  add("model.embed_tokens.weight", 520, 32);
  add("model.norm.weight", 1, 32);
  for (const std::string layer : {"model.layers.0.", "model.layers.1."}) {
    add(layer + "input_layernorm.weight", 1, 32);
    add(layer + "post_attention_layernorm.weight", 1, 32);
    for (const auto& [name, out, in] : {std::tuple("self_attn.q_proj", 32, 32), std::tuple("self_attn.k_proj", 32, 32),
                                        std::tuple("self_attn.v_proj", 32, 32), std::tuple("self_attn.o_proj", 32, 32),
                                        std::tuple("mlp.gate_proj", 48, 32), std::tuple("mlp.up_proj", 48, 32),
                                        std::tuple("mlp.down_proj", 32, 48)}) {
      add(layer + name + ".weight", out, in);
      auto& adapter = adapters.emplace_back(in, out, qd::LoRAOptions{.max_rank = 8, .seed = seed, .dora = dora});
      if (dora)  // near the rows' own lengths
        for (Index o = 0; o < out; ++o)
          adapter.magnitude().value(0, o) = static_cast<float>(1.1 * qd::as_eigen(kept.back().view()).row(o).norm());
      ++seed;  // some layers do much, others little
      qd::copy(test::normal_matrix<float>(8, out, seed, seed % 3 == 0 ? 0.5 : 0.05).view(), adapter.b().value.view());
      list.push_back({layer + name, &adapter});
      costs.push_back(in + out);
    }
  }
  writer.write(model / "model.safetensors");
  qd::save_peft_adapter(folder / "adapter", list);
  std::string data;
  for (int i = 0; i < 12; ++i)
    data += "{\"prompt\": \"one and " + std::to_string(i) + "\", \"response\": \"is " + std::to_string(i + 1) + "\"}\n";
  test::write_file(folder / "data.jsonl", data);

  const std::string common = "--model " + quoted(model) + " --no-chat-template --seq-len 48 --data " + quoted(folder / "data.jsonl");
  const auto result = run("rank_map", common + " --adapter " + quoted(folder / "adapter") + " --rank 2 --examples 6 --held-out 6 " +
                                          quoted(folder / "map"));
  CAPTURE(result.out, result.err);
  REQUIRE(result.status == 0);
  const auto json = qd::read_json(folder / "map" / "rank_map.json");
  const auto loaded = qd::load_peft_adapter(folder / "map");
  Index parameters = 0, whole = 0;
  for (std::size_t i = 0; i < list.size(); ++i) {
    const auto* module = loaded.find(list[i].module);
    const Index rank = json.at("ranks").at(list[i].module).get<Index>();
    CHECK((module == nullptr ? 0 : module->rank()) == rank);
    parameters += rank * costs[i];
    whole += 2 * costs[i];
  }
  CHECK(json.at("budget") == whole);
  CHECK(json.at("parameters") == parameters);
  CHECK(parameters <= whole);
  CHECK(json.at("chosen_on").at("loss").get<double>() < json.at("chosen_on").at("uniform_loss").get<double>());
  CHECK(test::read_file(folder / "map" / "rank_map.svg").ends_with("</svg>\n"));
  // The adapter that was cut has the loss that was measured with limits.
  const auto evaluated = run("evaluate", common + " --max-examples 6 --adapter " + quoted(folder / "map"));
  CAPTURE(evaluated.out, evaluated.err);
  REQUIRE(evaluated.status == 0);
  const auto at = evaluated.out.find("loss ");
  REQUIRE(at != std::string::npos);
  CHECK(std::stod(evaluated.out.substr(at + 5)) == Approx(json.at("chosen_on").at("loss").get<double>()).margin(1e-4));
}

TEST_CASE("programs: a merged model has the logits of its adapter at that rank") {
  if (!built("merge") || !built("evaluate")) SKIP("merge or evaluate has not been built");
  const test::TemporaryFolder folder;
  const auto model = quoted(test::golden("llama_tiny_bnb4")), adapter = quoted(test::golden("llama_tiny_adapter"));
  const auto merge = [&](const std::string& source, const std::string& name, const std::string& options) {
    return succeeds("merge", source + " " + adapter + " " + quoted(folder / name) + " " + options);
  };
  const auto base = logits_of("--model " + model);
  for (const std::string rank : {"4", "8"}) {
    CAPTURE(rank);
    const auto expected = logits_of("--model " + model + " --adapter " + adapter + " --rank " + rank);
    merge(model, "float" + rank, "--dtype float32 --rank " + rank);
    CHECK(difference(logits_of("--model " + quoted(folder / ("float" + rank))), expected) < 1e-5);
    CHECK(difference(base, expected) > 0.1);
  }
  // In float32 each tensor is the sum itself, in 16 bits that rounded once; in 4 bits it is another model, and the program says by how much.
  const auto whole = logits_of("--model " + model + " --adapter " + adapter);
  const auto quantized_again = merge(model, "four", "");
  merge(model, "whole", "--dtype float32");
  merge(model, "brain", "--dtype bfloat16");
  {
    const qd::SafetensorsFile stored(test::golden("llama_tiny_bnb4") / "model.safetensors"), whole_file(folder / "whole" / "model.safetensors"),
        brain(folder / "brain" / "model.safetensors"), four(folder / "four" / "model.safetensors");
    for (const auto& module : qd::load_peft_adapter(test::golden("llama_tiny_adapter")).modules) {
      CAPTURE(module.name);
      const std::string tensor = module.name + ".weight";
      qd::Matrix<float> before(module.out(), module.in()), after(module.out(), module.in());
      decode(qd::load_bnb_4bit(stored, tensor), before.view(), qd::Cpu{});
      decode(qd::load_bnb_4bit(four, tensor), after.view(), qd::Cpu{});
      const auto found = whole_file.matrix(tensor), rounded = brain.matrix(tensor);
      const double scale = module.alpha / static_cast<double>(module.rank());
      double along = 0.0, size = 0.0, error = 0.0, worst = 0.0;
      for (Index o = 0; o < module.out(); ++o)
        for (Index k = 0; k < module.in(); ++k) {
          double update = 0.0;
          for (Index r = 0; r < module.rank(); ++r) update += scale * static_cast<double>(module.b(r, o)) * static_cast<double>(module.a(r, k));
          const double sum = static_cast<double>(before(o, k)) + update;
          worst = std::max(worst, std::abs(static_cast<double>(found(o, k)) - sum) / (1.0 + std::abs(sum)));
          CHECK(rounded(o, k) == static_cast<float>(qd::bfloat16(found(o, k))));
          const double left = static_cast<double>(after(o, k)) - static_cast<double>(before(o, k));
          along += left * update;
          size += update * update;
          error += (left - update) * (left - update);
        }
      CHECK(worst < 1e-6);
      std::istringstream said(quantized_again.substr(quantized_again.find(tensor) + tensor.size()));
      double left_percent = 0.0, error_percent = 0.0;
      char sign = 0;
      said >> left_percent >> sign >> error_percent;
      CHECK(std::abs(left_percent - 100.0 * along / size) < 0.06);
      CHECK(std::abs(error_percent - 100.0 * std::sqrt(error / size)) < 0.6);
      CHECK(error_percent > 1.0);
    }
  }
  merge(model, "half", "--dtype float16");
  CHECK(difference(logits_of("--model " + quoted(folder / "half")), whole) < 2e-2);
  CHECK(qd::SafetensorsFile(folder / "half" / "model.safetensors").info("model.layers.0.mlp.up_proj.weight").dtype == qd::DType::F16);
  CHECK(quantized_again.find("all together") != std::string::npos);
  CHECK(qd::is_bnb_4bit(qd::SafetensorsFile(folder / "four" / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"));
  CHECK(difference(logits_of("--model " + quoted(folder / "four")), base) > 0.1);
  // Codes that were stored as bfloat16 are bytes then, and config.json says so.
  {
    qd::LoRAAdapter<float> small(64, 64, {.max_rank = 2});
    qd::copy(test::normal_matrix<float>(2, 64, 2).view(), small.b().value.view());
    qd::save_peft_adapter(folder / "small", {{"model.layers.0.mlp.up_proj", &small}});
    succeeds("merge", quoted(test::golden("quantized") / "nf4_storage") + " " + quoted(folder / "small") + " " + quoted(folder / "bytes"));
    const auto config = qd::read_json(folder / "bytes" / "config.json");
    CHECK(config.at("quantization_config").at("bnb_4bit_quant_storage") == "uint8");
    CHECK(qd::SafetensorsFile(folder / "bytes" / "model.safetensors").info("model.layers.0.mlp.up_proj.weight").dtype == qd::DType::U8);
    const auto expected = logits_of("--model " + quoted(folder / "bytes"));
    CHECK(difference(logits_of("--model " + quoted(test::golden("quantized") / "nf4_storage")), expected) > 1e-2);
  }
  // Of an update smaller than the steps of 4 bits next to nothing is left, which the program says; of one of their size most is.
  for (const float size : {1e-4f, 1.0f}) {
    CAPTURE(size);
    qd::LoRAAdapter<float> update(64, 128, {.max_rank = 2});
    auto b = test::normal_matrix<float>(2, 128, 2);
    for (float& x : b.span()) x *= size;
    qd::copy(b.view(), update.b().value.view());
    const auto name = size < 1.0f ? "faint" : "strong";
    qd::save_peft_adapter(folder / name, {{"model.layers.0.mlp.up_proj", &update}});
    const auto text = succeeds("merge", model + " " + quoted(folder / name) + " " + quoted(folder / (std::string(name) + "-merged")));
    std::istringstream all(text.substr(text.find("all together") + 12));
    double left = -1.0;
    all >> left;
    CHECK((size < 1.0f ? left < 10.0 : left > 80.0));
    CHECK((text.find("--dtype bfloat16 keeps it") != std::string::npos) == (size < 1.0f));
  }
  // Stored floats keep their type.
  merge(quoted(folder / "half"), "again", "");
  CHECK(qd::SafetensorsFile(folder / "again" / "model.safetensors").info("model.layers.0.mlp.up_proj.weight").dtype == qd::DType::F16);
  const auto refused = run("merge", quoted(folder / "half") + " " + quoted(test::golden("peft_linear")) + " " + quoted(folder / "none"));
  CHECK(refused.status == 2);
  CHECK(refused.err.find("not in the checkpoint") != std::string::npos);
  CHECK_FALSE(std::filesystem::exists(folder / "none"));
  CHECK(run("merge", quoted(folder / "half") + " " + adapter + " " + quoted(folder / "half")).status == 2);
  CHECK(run("merge", quoted(folder / "half") + " " + adapter + " " + adapter).status == 2);
  // float16 ends at 65504.
  {
    const qd::SafetensorsFile file(folder / "float8" / "model.safetensors");
    std::filesystem::copy(folder / "float8", folder / "large");
    qd::SafetensorsWriter writer;
    std::vector<qd::Matrix<float>> matrices;
    matrices.reserve(file.tensors().size());
    for (const auto& tensor : file.tensors()) {
      if (tensor.shape.size() != 2) continue;
      matrices.push_back(file.matrix(tensor.name));
      if (tensor.name == "lm_head.weight") matrices.back()(0, 0) = 1e5f;
      writer.add(tensor.name, std::as_const(matrices.back()).view());
    }
    writer.write(folder / "large" / "model.safetensors");
  }
  const auto overflow = run("merge", quoted(folder / "large") + " " + adapter + " " + quoted(folder / "small") + " --dtype float16");
  CAPTURE(overflow.err);
  CHECK(overflow.status == 2);
  CHECK(overflow.err.find("lm_head.weight") != std::string::npos);
}

TEST_CASE("programs: an adapter with magnitudes is evaluated, cut, resized and merged, and refused for llama.cpp") {
  for (const char* program : {"adapter", "merge", "evaluate"})
    if (!built(program)) SKIP(program << " has not been built");
  const test::TemporaryFolder folder;
  const auto model = quoted(test::golden("llama_tiny_bnb4"));
  {
    const auto source = qd::load_peft_adapter(test::golden("llama_tiny_adapter"));
    std::vector<qd::LoRAAdapter<float>> adapters;
    std::vector<qd::NamedAdapter> named;
    qd::Rng rng(3);
    adapters.reserve(source.modules.size());
    for (const auto& m : source.modules) {
      adapters.emplace_back(m.in(), m.out(), qd::LoRAOptions{.max_rank = m.rank(), .alpha = static_cast<float>(m.alpha), .dora = true});
      qd::copy<float>(m.a.view(), adapters.back().a().value.view());
      qd::copy<float>(m.b.view(), adapters.back().b().value.view());
      for (float& x : adapters.back().magnitude().value.span()) x = rng.uniform(0.5f, 1.5f);
      named.push_back({m.name, &adapters.back()});
    }
    qd::save_peft_adapter(folder / "dora", named);
  }
  const auto dora = quoted(folder / "dora");
  const auto whole = logits_of("--model " + model + " --adapter " + dora);
  const auto plain = logits_of("--model " + model + " --adapter " + quoted(test::golden("llama_tiny_adapter")));
  CHECK(difference(whole, plain) > 0.1);
  CHECK(succeeds("adapter", "info " + dora).find("DoRA") != std::string::npos);
  const auto at_4 = logits_of("--model " + model + " --adapter " + dora + " --rank 4");
  CHECK(difference(whole, at_4) > 1e-2);
  succeeds("merge", model + " " + dora + " " + quoted(folder / "merged") + " --dtype float32 --rank 4");
  CHECK(difference(logits_of("--model " + quoted(folder / "merged")), at_4) < 1e-5);
  succeeds("adapter", "truncate " + dora + " --rank 4 " + quoted(folder / "cut"));
  CHECK(difference(logits_of("--model " + model + " --adapter " + quoted(folder / "cut")), at_4) < 1e-5);
  succeeds("adapter", "resize " + dora + " --rank 8 " + quoted(folder / "resized"));
  CHECK(difference(logits_of("--model " + model + " --adapter " + quoted(folder / "resized")), whole) < 1e-4);
  const auto refused = run("adapter", "gguf " + dora + " --model " + quoted(test::golden("tiny.gguf")) + " " + quoted(folder / "a.gguf"));
  CHECK(refused.status == 2);
  CAPTURE(refused.err);
  CHECK(refused.err.find("DoRA") != std::string::npos);
}

TEST_CASE("programs: the weighted sum of adapters has the sum of their dense updates, and cuts by singular values") {
  if (!built("adapter")) SKIP("adapter has not been built");
  const test::TemporaryFolder folder;
  // The second adapter lacks a module of the first, and the other way round.
  const auto make = [](Index in, Index out, qd::LoRAOptions options) {
    qd::LoRAAdapter<float> adapter(in, out, options);
    qd::copy(test::normal_matrix<float>(options.max_rank, out, options.seed).view(), adapter.b().value.view());
    return adapter;
  };
  const auto a_q = make(12, 10, {.max_rank = 4, .alpha = 6, .seed = 1}), a_v = make(12, 8, {.max_rank = 4, .alpha = 6, .seed = 2});
  const auto b_q = make(12, 10, {.max_rank = 8, .alpha = 4, .scale = qd::ScalePolicy::over_rank, .seed = 3, .gated_ranks = {2, 8}});
  const auto b_o = make(10, 12, {.max_rank = 3, .alpha = 4, .scale = qd::ScalePolicy::over_rank, .seed = 4, .gated_ranks = {3}});
  qd::save_peft_adapter(folder / "a", {{"q", &a_q}, {"v", &a_v}}, {.base_model = "model"});
  qd::save_peft_adapter(folder / "b", {{"q", &b_q}, {"o", &b_o}});
  const auto update = [](const qd::PeftAdapter& adapter, const std::string& name, Index rank) {
    const auto* module = adapter.find(name);
    REQUIRE(module != nullptr);
    const auto one = qd::to_adapter(*module);
    const Index b = std::min(rank, module->rank());
    const auto coefficients = one.coefficients(b, b);
    qd::Matrix<double> sum(module->out(), module->in());
    for (Index i = 0; i < b; ++i)
      for (Index o = 0; o < sum.rows(); ++o)
        for (Index k = 0; k < sum.cols(); ++k)
          sum(o, k) += static_cast<double>(coefficients[static_cast<std::size_t>(i)]) * static_cast<double>(module->b(i, o)) *
                       static_cast<double>(module->a(i, k));
    return sum;
  };
  const auto a = qd::load_peft_adapter(folder / "a"), b = qd::load_peft_adapter(folder / "b");
  for (const Index rank : {99, 2}) {
    const std::string option = rank == 2 ? " --rank 2" : "";
    const auto both = quoted(folder / "a") + " " + quoted(folder / "b");
    succeeds("adapter", "sum " + both + " --weights -0.5,2 " + quoted(folder / "sum") + option);
    const auto sum = qd::load_peft_adapter(folder / "sum");
    REQUIRE(sum.modules.size() == 3);
    CHECK(sum.config.base_model == "model");
    CHECK(sum.find("q")->rank() == std::min<Index>(rank, 4) + std::min<Index>(rank, 8));
    const auto error = [&](const std::string& name, const qd::PeftAdapter& found) {
      qd::Matrix<double> expected(found.find(name)->out(), found.find(name)->in());
      for (const auto& [source, weight] : {std::pair(&a, -0.5), std::pair(&b, 2.0)})
        if (source->find(name) != nullptr) {
          const auto term = update(*source, name, rank);
          for (Index i = 0; i < term.size(); ++i) expected.data()[i] += weight * term.data()[i];
        }
      return test::normalised_squared_error(update(found, name, 99).view(), expected.view());
    };
    for (const std::string name : {"q", "v", "o"}) CHECK(error(name, sum) < 1e-12);
    succeeds("adapter", "resize " + quoted(folder / "sum") + " --rank 4 " + quoted(folder / "cut"));
    succeeds("adapter", "truncate " + quoted(folder / "sum") + " --rank 4 " + quoted(folder / "first"));
    const double by_values = error("q", qd::load_peft_adapter(folder / "cut")), first = error("q", qd::load_peft_adapter(folder / "first"));
    if (rank == 2) CHECK(by_values < 1e-10);  // all there is
    else CHECK(by_values < 0.5 * first);
  }
}

TEST_CASE("programs: finetune trains magnitudes by LoRA+, counts their memory, and resumes as it was told to") {
  if (!built("finetune")) SKIP("finetune has not been built");
  const test::TemporaryFolder folder;
  const auto out = folder / "out";
  const auto result = run("finetune", toy(out, "--dora --lora-plus 4"));
  CAPTURE(result.out, result.err);
  REQUIRE(result.status == 0);
  CHECK(result.out.find("beats the base") != std::string::npos);
  const auto adapter = qd::load_peft_adapter(out / "adapter");
  CHECK(adapter.config.use_dora);
  const auto report = qd::read_json(out / "report.json");
  CHECK(report.at("ranks")[3].at("bytes") == tensor_bytes(out / "adapter" / "adapter_model.safetensors"));
  CHECK(report.at("dora") == true);
  CHECK(report.at("lora_plus") == 4.0);
  CHECK(report.at("memory_plan").at("adapters").get<std::size_t>() == 4 * report.at("adapter_parameters").get<std::size_t>());
  CHECK(report.at("ranks")[3].at("parameters") == report.at("adapter_parameters"));
  for (const std::string other : {"--lora-plus 4", "--dora", "--dora --lora-plus 8"}) {
    const auto refused = run("finetune", toy(out, "--resume " + other));
    CAPTURE(other, refused.err);
    CHECK(refused.status == 2);
    CHECK(refused.err.find("other settings") != std::string::npos);
  }
}

TEST_CASE("programs: biases train where a model has them, and are PEFT's: evaluated, cut, merged, refused for llama.cpp") {
  for (const char* program : {"finetune", "adapter", "merge", "evaluate"})
    if (!built(program)) SKIP(program << " has not been built");
  const test::TemporaryFolder folder;
  write_letters_model(folder / "model", "qwen2", 48, 'L');
  write_letters_data(folder / "data.jsonl");
  const auto model = quoted(folder / "model"), out = quoted(folder / "out"), adapter = quoted(folder / "out" / "adapter");
  const auto told = succeeds("finetune", "--model " + model + " --data " + quoted(folder / "data.jsonl") + " --out " + out +
                                             " --train-bias --base-format float32 --ranks 1,4 --alpha 8 --steps 6 --batch 2 --seq-len 16 --lr 2e-2" +
                                             " --eval-examples 1 --answers 0");
  CHECK(told.find("biases train") != std::string::npos);
  const auto loaded = qd::load_peft_adapter(folder / "out" / "adapter");
  CHECK(loaded.config.trains_bias);
  for (const auto& module : loaded.modules) {
    CAPTURE(module.name);
    const bool has_one = module.name.ends_with("q_proj") || module.name.ends_with("k_proj") || module.name.ends_with("v_proj");
    CHECK(module.biased() == has_one);
    if (!has_one) continue;
    const auto before = qd::SafetensorsFile(folder / "model" / "model.safetensors").matrix(module.name + ".bias");
    CHECK(test::largest_difference(module.bias.view(), before.view()) > 1e-3);
  }
  const auto report = qd::read_json(folder / "out" / "report.json");
  CHECK(report.at("train_bias") == true);
  CHECK(report.at("memory_plan").at("adapters").get<std::size_t>() == 4 * report.at("adapter_parameters").get<std::size_t>());
  CHECK(report.at("ranks")[2].at("parameters") == report.at("adapter_parameters"));
  CHECK(report.at("ranks")[2].at("bytes") == tensor_bytes(folder / "out" / "adapter" / "adapter_model.safetensors"));

  const auto logits = [&](const std::string& more) { return logits_of("--model " + model + more); };
  const auto whole = logits(" --adapter " + adapter), at_1 = logits(" --adapter " + adapter + " --rank 1");
  CHECK(difference(whole, logits("")) > 1e-2);
  CHECK(difference(whole, at_1) > 1e-4);
  CHECK(succeeds("adapter", "info " + adapter).find("biases that trained") != std::string::npos);
  succeeds("adapter", "truncate " + adapter + " --rank 1 " + quoted(folder / "cut"));
  CHECK(difference(logits(" --adapter " + quoted(folder / "cut")), at_1) < 1e-5);
  succeeds("merge", model + " " + adapter + " " + quoted(folder / "merged") + " --dtype float32");
  CHECK(difference(logits_of("--model " + quoted(folder / "merged")), whole) < 1e-5);
  const auto refused = run("adapter", "gguf " + adapter + " --model " + quoted(test::golden("tiny.gguf")) + " " + quoted(folder / "a.gguf"));
  CAPTURE(refused.err);
  CHECK(refused.status == 2);
  CHECK(refused.err.find("no biases; merge it") != std::string::npos);
  // A model without that bias.
  const auto other = run("merge", quoted(test::golden("llama_tiny_bnb4")) + " " + adapter + " " + quoted(folder / "none"));
  CHECK(other.status == 2);
  CHECK_FALSE(std::filesystem::exists(folder / "none"));
}

TEST_CASE("programs: a run whose checkpoints are in files trains the same adapter") {
  if (!built("finetune")) SKIP("finetune has not been built");
  const test::TemporaryFolder folder;
  std::vector<std::string> adapters;
  for (const bool files : {false, true}) {
    const auto out = folder / (files ? "files" : "memory");
    const auto told = succeeds("finetune", toy(out, "--gradient-checkpointing" + (files ? " --offload " + quoted(folder.path()) : "")));
    CHECK((told.find("checkpoint files") != std::string::npos) == files);
    CHECK(qd::read_json(out / "report.json").at("memory_plan").contains("checkpoint files") == files);
    adapters.push_back(test::read_file(out / "adapter" / "adapter_model.safetensors"));
  }
  CHECK(adapters[0] == adapters[1]);
}

TEST_CASE("programs: bottlenecks are trained, have at every width the loss that was reported, are cut, and are no PEFT adapter") {
  for (const char* program : {"finetune", "evaluate", "adapter", "merge"})
    if (!built(program)) SKIP(program << " has not been built");
  const test::TemporaryFolder folder;
  write_letters_model(folder / "model");
  write_letters_data(folder / "data.jsonl");
  const std::string model = "--model " + quoted(folder / "model"), texts = " --seq-len 16 --data " + quoted(folder / "data.jsonl");
  const auto loss_of = [&](const std::string& arguments) {
    const auto out = succeeds("evaluate", model + texts + " --adapter " + arguments);
    const auto at = out.find("loss ");
    REQUIRE(at != std::string::npos);
    return std::stod(out.substr(at + 5));
  };
  for (const std::string method : {"houlsby", "parallel"}) {
    const auto out = folder / method;
    const auto said = succeeds("finetune", model + texts + " --eval " + quoted(folder / "data.jsonl") + " --method " + method +
                                               " --steps 2 --batch 3 --ranks 1,2,4 --lr 1e-1 --answers 0 --out " + quoted(out));
    CAPTURE(method, said);
    CHECK(said.find("recipe per-row, " + method) != std::string::npos);
    const auto report = qd::read_json(out / "report.json");
    CHECK(report.at("method") == method);
    CHECK(report.at("recipe") == "per-row");
    // 2 layers of width 64, with two bottlenecks each or one: A and B of 4 units.
    CHECK(report.at("adapter_parameters") == 2 * (method == "houlsby" ? 2 : 1) * 2 * 4 * 64);
    CHECK(report.at("ranks")[3].at("parameters") == report.at("adapter_parameters"));
    CHECK(report.at("ranks")[3].at("bytes") == tensor_bytes(out / "adapter" / "bottleneck_model.safetensors"));
    CHECK(report.at("memory_plan").at("adapters").get<std::size_t>() == 4 * report.at("adapter_parameters").get<std::size_t>());
    CHECK_FALSE(std::filesystem::exists(out / "adapter" / "adapter_config.json"));
    const auto adapter = quoted(out / "adapter");
    double before = -1.0;
    for (const auto& rank : report.at("ranks")) {
      const double loss = loss_of(adapter + " --rank " + rank.at("rank").dump());
      CHECK(loss == Approx(rank.at("loss").get<double>()).margin(1e-4));
      CHECK(loss != before);
      before = loss;
    }
    succeeds("adapter", "truncate " + adapter + " --rank 2 " + quoted(folder / (method + "-cut")));
    CHECK(loss_of(quoted(folder / (method + "-cut"))) == loss_of(adapter + " --rank 2"));
    for (const auto& [program, arguments] :
         {std::pair("merge", quoted(folder / "model") + " " + adapter + " " + quoted(folder / "merged")),
          std::pair("adapter", "resize " + adapter + " --rank 2 " + quoted(folder / "resized")), std::pair("adapter", "info " + adapter)}) {
      const auto refused = run(program, arguments);
      CAPTURE(program, refused.err);
      CHECK(refused.status == 2);
      CHECK(refused.err.find("not to be merged or re-ordered") != std::string::npos);
    }
  }
}

TEST_CASE("programs: scales of planes of signs are trained, have the losses that were reported, and are no PEFT adapter") {
  for (const char* program : {"finetune", "evaluate", "adapter", "merge"})
    if (!built(program)) SKIP(program << " has not been built");
  const test::TemporaryFolder folder;
  write_letters_model(folder / "model");
  write_letters_data(folder / "data.jsonl");
  const std::string model = "--model " + quoted(folder / "model"), texts = " --seq-len 16 --data " + quoted(folder / "data.jsonl");
  const auto out = folder / "out", adapter = out / "adapter";
  const auto said = succeeds("finetune", model + texts + " --eval " + quoted(folder / "data.jsonl") +
                                             " --method alpha --planes 4 --group-size 16 --trained-planes 2 --steps 6 --batch 3 --lr 1e-2 "
                                             "--max-new-tokens 3 --out " +
                                             quoted(out));
  CAPTURE(said);
  CHECK(said.find("of 2 of 4 planes of all 14 linear layers") != std::string::npos);
  CHECK(said.find("The trained scales beat the base") != std::string::npos);
  const auto report = qd::read_json(out / "report.json");
  CHECK(report.at("method") == "alpha");
  CHECK(report.at("base") == "binary4");
  REQUIRE(report.at("ranks").size() == 2);  // the base, and the trained scales
  CHECK(report.at("ranks")[1].at("loss") < report.at("ranks")[0].at("loss"));
  CHECK(report.at("ranks")[1].at("parameters") == report.at("adapter_parameters"));
  CHECK(report.at("ranks")[1].at("bytes") == tensor_bytes(adapter / "alpha_model.safetensors"));
  CHECK(report.at("ranks")[1].at("answers") == 6);
  const auto& plan = report.at("memory_plan");
  CHECK(plan.at("base codes").get<std::size_t>() + plan.at("block scales").get<std::size_t>() ==
        report.at("base_bytes").get<std::size_t>());
  CHECK(plan.at("adapters").get<std::size_t>() == 4 * report.at("adapter_parameters").get<std::size_t>());
  CHECK(plan.at("moments").get<std::size_t>() == 8 * report.at("adapter_parameters").get<std::size_t>());
  CHECK_FALSE(std::filesystem::exists(out / "ranks.svg"));
  for (const auto& rank : report.at("ranks")) {
    const auto text = succeeds("evaluate", model + texts + " --adapter " + quoted(adapter) + " --rank " + rank.at("rank").dump());
    const auto at = text.find("loss ");
    REQUIRE(at != std::string::npos);
    CHECK(std::stod(text.substr(at + 5)) == Approx(rank.at("loss").get<double>()).margin(1e-4));
  }
  const auto refuses = [&](const char* program, const std::string& arguments, const std::string& word) {
    const auto refused = run(program, arguments);
    CAPTURE(program, refused.err);
    CHECK(refused.status == 2);
    CHECK(refused.err.find(word) != std::string::npos);
  };
  const auto scales = " --adapter " + quoted(adapter);
  refuses("evaluate", model + texts + scales + " --rank 2", "rank 2");
  refuses("evaluate", model + texts + scales + " --base-format nf4", "--base-format");
  refuses("merge", quoted(folder / "model") + " " + quoted(adapter) + " " + quoted(folder / "merged"), "not to be merged or re-ordered");
  refuses("adapter", "info " + quoted(adapter), "not to be merged or re-ordered");
  auto config = qd::read_json(adapter / "alpha_config.json");
  config["iterations"] = 0;  // other signs
  test::write_file(adapter / "alpha_config.json", config.dump());
  refuses("evaluate", model + texts + scales, "other planes of signs");
}

namespace {

// A golden model of 48 tokens with a tokenizer of so many, and texts for it.
void write_small_model(const std::filesystem::path& folder, const std::string& golden) {
  std::filesystem::copy(test::golden(golden), folder);
  qd::Json vocab = qd::Json::object();
  for (const char c : std::string("abcdefghijklmnopqrstuvwxyz=?!.:0123456789#$%")) vocab[std::string(1, c)] = vocab.size();
  for (const char* token : {"\u0120", "\u010a"}) vocab[token] = vocab.size();
  vocab["in"] = vocab.size();
  const qd::Json end{{"id", vocab.size()}, {"content", "</s>"}, {"special", true}};
  test::write_file(folder / "tokenizer.json", qd::Json{{"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", {"i n"}}}},
                                                       {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}},
                                                       {"added_tokens", {end}}}
                                                  .dump());
  test::write_file(folder / "tokenizer_config.json", R"({"eos_token":"</s>"})");
}

}  // namespace

TEST_CASE("programs: a model whose weights all train is saved as a folder, which reads as the model that was reported") {
  for (const char* program : {"finetune", "evaluate"})
    if (!built(program)) SKIP(program << " has not been built");
  for (const std::string name : {"qwen2", "mistral", "falcon_7b"})  // biases; a head of its own; layer norms
    for (const std::string format : {"float32", "bfloat16"}) {
      CAPTURE(name, format);
      const test::TemporaryFolder folder;
      write_small_model(folder / "model", name);
      write_letters_data(folder / "data.jsonl");
      const std::string texts = " --seq-len 12 --data " + quoted(folder / "data.jsonl") + " --base-format " + format;
      const auto out = folder / "out", model = out / "model";
      const auto said = succeeds("finetune", "--model " + quoted(folder / "model") + texts + " --eval " + quoted(folder / "data.jsonl") +
                                                 " --method full --steps 6 --batch 3 --lr 3e-3 --max-new-tokens 3 --out " + quoted(out));
      CAPTURE(said);
      CHECK(said.find("The trained model beats the one it was") != std::string::npos);
      CHECK(said.find("  rank ") == std::string::npos);
      const auto report = qd::read_json(out / "report.json");
      CHECK(report.at("method") == "full");
      REQUIRE(report.at("ranks").size() == 2);  // before, and after
      CHECK(report.at("ranks")[1].at("loss") < report.at("ranks")[0].at("loss"));
      CHECK(report.at("ranks")[1].at("parameters") == report.at("adapter_parameters"));
      CHECK(report.at("ranks")[1].at("bytes") == tensor_bytes(model / "model.safetensors"));
      CHECK(report.at("ranks")[1].at("answers") == 6);
      CHECK_FALSE(std::filesystem::exists(out / "ranks.svg"));
      CHECK_FALSE(std::filesystem::exists(out / "adapter"));
      const auto& plan = report.at("memory_plan");
      const auto parameters = report.at("adapter_parameters").get<double>();
      CHECK(plan.at("master weights").get<double>() == Approx(4 * parameters).epsilon(0.01));  // biases in folders are not counted
      CHECK(plan.at("moments").get<double>() == Approx(8 * parameters).epsilon(0.01));
      CHECK(plan.at("bfloat16 weights").get<std::size_t>() == (format == "bfloat16" ? report.at("base_bytes").get<std::size_t>() : 0));

      // Beside the weights lies what did, and config.json is the model's but for the type.
      CHECK(test::read_file(model / "tokenizer.json") == test::read_file(folder / "model" / "tokenizer.json"));
      auto before = qd::read_json(folder / "model" / "config.json"), after = qd::read_json(model / "config.json");
      const char* const key = before.contains("dtype") ? "dtype" : "torch_dtype";
      CHECK(after.at(key) == format);
      before.erase(key);
      after.erase(key);
      CHECK(after == before);
      for (const auto& [folder_of, rank] : {std::pair(folder / "model", 0), std::pair(model, 1)}) {
        const auto text = succeeds("evaluate", "--model " + quoted(folder_of) + texts);
        const auto at = text.find("loss ");
        REQUIRE(at != std::string::npos);
        const auto reported = report.at("ranks")[static_cast<std::size_t>(rank)].at("loss").get<double>();
        CHECK(std::stod(text.substr(at + 5)) == Approx(reported).margin(5.1e-5));
      }
      // Over itself it is not written.
      const auto again = run("finetune", "--model " + quoted(model) + texts + " --method full --steps 1 --out " + quoted(out));
      CHECK(again.status == 2);
      CHECK(again.err.find("would be written over") != std::string::npos);
    }
  const test::TemporaryFolder folder;
  write_letters_model(folder / "model");  // whose weights are in 4 bits, whatever --base-format says
  write_letters_data(folder / "data.jsonl");
  const auto refused = run("finetune", "--model " + quoted(folder / "model") + " --seq-len 12 --data " + quoted(folder / "data.jsonl") +
                                           " --method full --base-format float32 --steps 1 --out " + quoted(folder / "out"));
  CHECK(refused.status == 2);
  CHECK(refused.err.find("q_proj: full fine-tuning takes weights in float32 or bfloat16, these are in codes") != std::string::npos);
}

TEST_CASE("programs: transformers loads the folder of a model whose weights all trained", "[python]") {
  if (!built("finetune") || !built("evaluate")) SKIP("finetune or evaluate has not been built");
  if (!test::has_python("torch, transformers, safetensors")) SKIP("no Python with torch, transformers and safetensors ($QDYLORA_PYTHON)");
  const test::TemporaryFolder folder;
  const std::vector<std::int32_t> ids = {1, 5, 9, 3, 20, 7};
  qd::SafetensorsWriter writer;
  writer.add("ids", qd::DType::I32, {static_cast<Index>(ids.size())}, std::as_bytes(std::span(ids)));
  writer.write(folder / "ids.safetensors");
  write_letters_data(folder / "data.jsonl");
  for (const std::string name : {"toy", "qwen2", "mistral", "falcon_7b", "falcon_40b"})
    for (const std::string format : {"float32", "bfloat16"}) {
      const test::TemporaryFolder work;
      if (name != "toy") write_small_model(work / "model", name);
      const auto saved = folder / (name + "_" + format);
      const auto texts = " --seq-len 12 --data " + quoted(folder / "data.jsonl");
      succeeds("finetune", (name == "toy" ? "--toy" : "--model " + quoted(work / "model") + texts) +
                               " --method full --base-format " + format + " --steps 3 --batch 3 --lr 3e-3 --answers 0 --out " +
                               quoted(work / "out"));
      std::filesystem::copy(work / "out" / "model", saved);
      succeeds("evaluate", "--model " + quoted(saved) + " --base-format " + format + " --ids 1,5,9,3,20,7 --logits " +
                               quoted(folder / (name + "_" + format + ".safetensors")));
    }
  CHECK(test::run_python("check_saved.py", folder.path()) == 0);
}

TEST_CASE("programs: evaluate's logits of Falcons are those of transformers and PEFT") {
  if (!built("evaluate")) SKIP("evaluate has not been built");
  const test::TemporaryFolder folder;
  for (const std::string name : {"falcon_7b", "falcon_40b", "falcon_11b", "falcon_biased"}) {
    const auto golden = test::golden(name);
    const qd::SafetensorsFile io(golden / "io.safetensors");
    const auto ids = test::load<std::int32_t>(io, "input_ids");
    std::string list;
    for (std::size_t i = 0; i < 10; ++i) list += (i > 0 ? "," : "") + std::to_string(ids[i]);
    for (const auto& [rank, tensor] : {std::pair("4", "logits"), std::pair("2", "logits_rank2")}) {
      const auto result = run("evaluate", "--model " + quoted(golden) + " --base-format float32 --adapter " + quoted(golden / "adapter") +
                                              " --rank " + rank + " --ids " + list + " --logits " + quoted(folder / "logits"));
      CAPTURE(name, rank, result.err);
      REQUIRE(result.status == 0);
      const auto logits = qd::SafetensorsFile(folder / "logits").matrix("logits");
      const auto expected = test::load<float>(io, tensor);  // [2, 10, 48], the first sequence
      REQUIRE(logits.rows() == 10);
      REQUIRE(logits.cols() == 48);
      double worst = 0.0;
      for (Index i = 0; i < logits.size(); ++i)
        worst = std::max(worst, std::fabs(static_cast<double>(logits.data()[i] - expected[static_cast<std::size_t>(i)])));
      CHECK(worst < 1e-4);
    }
  }
}

TEST_CASE("programs: quantize writes bitsandbytes' keys and copies the rest") {
  if (!built("quantize")) SKIP("quantize has not been built");
  const test::TemporaryFolder folder;
  const auto weight = test::normal_matrix<float>(96, 128, 5);
  const auto bias = test::normal_matrix<float>(1, 96, 6);
  qd::SafetensorsWriter writer;
  writer.add("a.weight", weight.view());
  writer.add("a.bias", qd::DType::F32, {96}, std::as_bytes(bias.span()));
  writer.metadata("format", "pt");
  writer.write(folder / "in.safetensors");
  for (const std::string format : {"nf4", "fp4"})
    for (const std::string nested : {"on", "off"}) {
      const auto result = run("quantize", quoted(folder / "in.safetensors") + " " + quoted(folder / "out.safetensors") + " --format " +
                                              format + " --block-size 128 --double-quant " + nested);
      CAPTURE(result.out, result.err);
      REQUIRE(result.status == 0);
      CHECK(result.out.find("1 matrices") != std::string::npos);
      const qd::SafetensorsFile file(folder / "out.safetensors");
      CHECK(test::load<float>(file, "a.bias") == std::vector<float>(bias.span().begin(), bias.span().end()));
      CHECK(file.metadata().at("format") == "pt");
      CHECK(file.contains("a.weight.quant_state.bitsandbytes__" + format));
      CHECK(file.contains("a.weight.nested_absmax") == (nested == "on"));
      const auto loaded = qd::load_bnb_4bit(file, "a.weight");
      double error = 0.0, size = 0.0;
      loaded.visit([&]<class View>(const View& view) {
        if constexpr (requires { typename View::format; }) {
          qd::Matrix<float> decoded(96, 128);
          qd::dequantize(view, decoded.view());
          CHECK(view.block_size == 128);
          for (Index i = 0; i < decoded.size(); ++i) {
            error += std::pow(static_cast<double>(decoded.data()[i] - weight.data()[i]), 2);
            size += std::pow(static_cast<double>(weight.data()[i]), 2);
          }
        }
      });
      CHECK(size > 0.0);
      CHECK(error / size < (format == "nf4" ? 0.012 : 0.02));
    }
}

TEST_CASE("programs: a folder's blocks are quantized as loading would, nothing else is, and it is read back as it is") {
  if (!built("quantize")) SKIP("quantize has not been built");
  for (const std::string name : {"qwen2", "mistral", "falcon_40b"})
    for (const auto& options :
         {qd::BaseOptions{}, qd::BaseOptions{.format = qd::BaseFormat::fp4, .double_quant = false, .block_size = 32}}) {
      CAPTURE(name, options.double_quant);
      const test::TemporaryFolder folder;
      const auto source = test::golden(name), out = folder / "out";
      const auto said = succeeds("quantize", quoted(source) + " " + quoted(out) + " --format " + std::string(qd::name(options.format)) +
                                                 " --double-quant " + (options.double_quant ? "on" : "off") + " --block-size " +
                                                 std::to_string(options.block_size));
      CHECK((said.find("transformers 5") != said.npos) == (name == "falcon_40b"));
      // The codes that loading the float weights makes are those that are read, whatever format is asked for.
      const auto direct = qd::load_hugging_face(source, options), read = qd::load_hugging_face(out, {.format = qd::BaseFormat::float32});
      const auto linears = direct->config.linears();
      for (std::size_t b = 0; b < direct->blocks.size(); ++b)
        for (std::size_t l = 0; l < linears.size(); ++l) {
          const auto &expected = *direct->blocks[b]->linear[l], &found = *read->blocks[b]->linear[l];
          CAPTURE(b, linears[l].name);
          CHECK(found.storage().index() == expected.storage().index());
          expected.visit([&]<class View>(const View& view) {
            if constexpr (requires { view.codes; })
              found.visit([&]<class Other>(const Other& other) {
                if constexpr (std::is_same_v<View, Other>) {
                  CHECK(other.block_size == view.block_size);
                  CHECK(std::equal(view.codes, view.codes + qd::code_bytes<typename View::format>(view.rows * view.cols), other.codes));
                }
              });
          });
          qd::Matrix<float> x(expected.rows(), expected.cols()), y(expected.rows(), expected.cols());
          qd::decode(expected, x.view(), qd::Cpu{});
          qd::decode(found, y.view(), qd::Cpu{});
          CHECK(test::same_bits(x.view(), y.view()));
        }
      // Whatever is no linear weight of a block has its bytes; so have the files beside, but for the one key.
      const qd::SafetensorsFile before(source / "model.safetensors"), after(out / "model.safetensors");
      std::size_t copied = 0;
      for (const auto& t : before.tensors()) {
        if (qd::is_bnb_4bit(after, t.name)) continue;
        CAPTURE(t.name);
        REQUIRE(after.contains(t.name));
        CHECK(after.info(t.name).dtype == t.dtype);
        const auto x = before.bytes(t.name), y = after.bytes(t.name);
        CHECK(std::equal(x.span().begin(), x.span().end(), y.span().begin(), y.span().end()));
        ++copied;
      }
      CHECK(before.tensors().size() - copied == direct->blocks.size() * linears.size());
      CHECK(after.metadata() == before.metadata());
      auto config = qd::read_json(out / "config.json");
      const auto& quantization = config.at("quantization_config");
      CHECK(quantization.at("bnb_4bit_quant_type") == qd::name(options.format));
      CHECK(quantization.at("bnb_4bit_use_double_quant") == options.double_quant);
      CHECK(quantization.at("bnb_4bit_compute_dtype") == config.at("dtype"));
      config.erase("quantization_config");
      CHECK(config == qd::read_json(source / "config.json"));
    }
}

TEST_CASE("programs: shards are quantized each for itself; what is quantized, of another shape or there already is not") {
  if (!built("quantize") || !built("merge")) SKIP("quantize or merge has not been built");
  const test::TemporaryFolder folder;
  const auto model = folder / "model";
  std::filesystem::copy(test::golden("mistral"), model);
  test::write_file(model / "tokenizer.json", "{}");
  std::filesystem::create_directory(model / "original");
  const auto quantize = [&](const std::filesystem::path& in, const std::string& out) {
    return run("quantize", quoted(in) + " " + quoted(folder / out));
  };
  REQUIRE(quantize(model, "whole").status == 0);
  const auto move_to_shards = [&] {
    const qd::SafetensorsFile file(model / "model.safetensors");
    std::vector<qd::Buffer<std::byte>> bytes;
    for (const auto& t : file.tensors()) bytes.push_back(file.bytes(t.name));
    qd::Json map = qd::Json::object();
    for (std::size_t shard = 0; shard < 3; ++shard) {
      const auto name = "model-0000" + std::to_string(shard + 1) + "-of-00003.safetensors";
      qd::SafetensorsWriter writer;
      for (std::size_t i = shard; i < bytes.size(); i += 3) {
        const auto& t = file.tensors()[i];
        writer.add(t.name, t.dtype, t.shape, bytes[i].span());
        map[t.name] = name;
      }
      writer.write(model / name);
    }
    test::write_file(model / "model.safetensors.index.json", qd::Json({{"metadata", {{"total_size", 1}}}, {"weight_map", map}}).dump());
    std::filesystem::remove(model / "model.safetensors");
  };
  move_to_shards();
  REQUIRE(quantize(model, "shards").status == 0);
  const qd::SafetensorsFolder whole(folder / "whole"), shards(folder / "shards");
  CHECK(shards.files().size() == 3);
  const auto index = qd::read_json(folder / "shards" / "model.safetensors.index.json");
  std::uint64_t size = 0;
  for (const auto& t : whole.files().front().tensors()) {
    CAPTURE(t.name);
    const auto x = whole.files().front().bytes(t.name), y = shards.file_of(t.name).bytes(t.name);
    CHECK(std::equal(x.span().begin(), x.span().end(), y.span().begin(), y.span().end()));
    CHECK(index.at("weight_map").at(t.name) == std::filesystem::path(shards.file_of(t.name).name()).filename().string());
    size += t.size();
  }
  CHECK(index.at("weight_map").size() == whole.files().front().tensors().size());
  CHECK(index.at("metadata").at("total_size") == size);
  CHECK(test::read_file(folder / "shards" / "tokenizer.json") == "{}");
  CHECK_FALSE(std::filesystem::exists(folder / "shards" / "io.safetensors"));

  const auto refused = [&](const Run& result, const std::string& word) {
    CAPTURE(result.err, word);
    CHECK(result.status == 2);
    CHECK(result.err.find(word) != std::string::npos);
  };
  refused(quantize(model, "model"), "written over");
  refused(quantize(folder / "whole", "again"), "quantized already");
  refused(quantize(model, "whole"), "another model that lies there");  // which has no shards
  refused(quantize(folder / "none", "again"), "none");
  auto config = qd::read_json(model / "config.json");
  config["intermediate_size"] = 48;
  test::write_file(model / "config.json", config.dump());
  refused(quantize(model, "again"), "tensor 'model.layers.0.mlp.gate_proj.weight': expected [48, 32], found [40, 32]");
  // 4 bits of which config.json does not know.
  config = qd::read_json(folder / "whole" / "config.json");
  config.erase("quantization_config");
  test::write_file(folder / "whole" / "config.json", config.dump());
  refused(quantize(folder / "whole", "again"), "model.layers.0.");
  CHECK_FALSE(std::filesystem::exists(folder / "again"));
}

TEST_CASE("programs: transformers loads what quantize and merge wrote in 4 bits, and has the logits that evaluate has", "[python]") {
  for (const char* program : {"quantize", "merge", "evaluate"})
    if (!built(program)) SKIP(program << " has not been built");
  if (!test::has_python("torch, bitsandbytes, accelerate, transformers, safetensors.torch"))
    SKIP("no Python with torch, bitsandbytes, accelerate, transformers and safetensors ($QDYLORA_PYTHON)");
  const test::TemporaryFolder models, folder;
  REQUIRE(test::run_python("make_models.py", models.path()) == 0);
  const std::string ids = "1,2,3,5,8,13,21,34,47";
  const std::vector<std::int32_t> numbers{1, 2, 3, 5, 8, 13, 21, 34, 47};
  qd::SafetensorsWriter writer;
  writer.add("ids", qd::DType::I32, {static_cast<Index>(numbers.size())}, std::as_bytes(std::span(numbers)));
  writer.write(folder / "ids.safetensors");
  const auto evaluate = [&](const std::string& name) {
    succeeds("evaluate",
             "--model " + quoted(folder / name) + " --ids " + ids + " --logits " + quoted(folder / (name + ".safetensors")));
  };
  for (const std::string options : {"--format nf4 --double-quant on", "--format nf4 --double-quant off", "--format fp4 --double-quant on",
                                    "--format fp4 --double-quant off", "--format nf4 --double-quant on --block-size 32"})
    for (const std::string type : {"float32", "bfloat16"}) {
      const auto name = type + " " + options;
      succeeds("quantize", quoted(models / type) + " " + quoted(folder / name) + " " + options);
      evaluate(name);
    }
  for (const std::string model : {"qwen2", "falcon_7b", "falcon_40b"})
    for (const std::string options : {"--format nf4 --double-quant on", "--format fp4 --double-quant off"}) {
      const auto name = model + " " + options;
      succeeds("quantize", quoted(models / model) + " " + quoted(folder / name) + " " + options);
      evaluate(name);
    }
  const auto base = quoted(test::golden("llama_tiny_bnb4")), adapter = quoted(test::golden("llama_tiny_adapter"));
  succeeds("merge", base + " " + adapter + " " + quoted(folder / "merged"));
  evaluate("merged");
  CHECK(test::run_python("check_quantized.py", folder.path()) == 0);
}

TEST_CASE("programs: an adapter moves llama.cpp's logits as it moves ours", "[python]") {
  for (const char* program : {"finetune", "adapter", "evaluate"})
    if (!built(program)) SKIP(program << " has not been built");
  const auto model = test::smollm2();
  if (!model) SKIP(test::no_smollm2);
  if (!test::has_python("llama_cpp, numpy")) SKIP("no Python with llama_cpp and numpy ($QDYLORA_PYTHON)");
  const test::TemporaryFolder folder;
  std::filesystem::create_symlink(*model, folder / "model.gguf");
  std::string examples;
  for (int i = 0; i < 16; ++i) examples += R"({"prompt": "What comes after )" + std::to_string(i) + R"(?", "response": ")" + std::to_string(i + 1) + "\"}\n";
  test::write_file(folder / "data.jsonl", examples);
  const std::string base = "--model " + quoted(folder / "model.gguf");
  succeeds("finetune", base + " --data " + quoted(folder / "data.jsonl") + " --out " + quoted(folder / "run") +
                           " --steps 12 --batch 2 --seq-len 64 --eval-examples 2 --answers 0 --lr 0.02 --ranks 2,8");
  succeeds("adapter", "gguf " + quoted(folder / "run" / "adapter") + " " + base + " " + quoted(folder / "adapter.gguf"));
  const std::vector<std::int32_t> ids{1, 504, 2365, 282, 260, 5354, 314, 624, 7042, 281};
  const Index shape[] = {static_cast<Index>(ids.size())};
  qd::write_npy(folder / "ids.npy", qd::DType::I32, shape, std::as_bytes(std::span(ids)));
  std::string list;
  for (const auto id : ids) list += (list.empty() ? "" : ",") + std::to_string(id);
  const auto logits = base + " --base-format float32 --ids " + list + " --logits ";
  succeeds("evaluate", logits + quoted(folder / "base.npy"));
  succeeds("evaluate", logits + quoted(folder / "adapted.npy") + " --adapter " + quoted(folder / "run" / "adapter"));
  CHECK(test::run_python("check_gguf_adapter.py", folder.path()) == 0);
}

TEST_CASE("programs: a model whose embedding and head are in 4 bits as well is read") {
  if (!built("quantize") || !built("evaluate")) SKIP("quantize or evaluate has not been built");
  const test::TemporaryFolder folder;
  const auto source = test::golden("llama_tiny_bnb4");
  std::filesystem::copy_file(source / "config.json", folder / "config.json");
  REQUIRE(run("quantize", quoted(source / "model.safetensors") + " " + quoted(folder / "model.safetensors")).status == 0);
  CHECK(qd::is_bnb_4bit(qd::SafetensorsFile(folder / "model.safetensors"), "lm_head.weight"));
  const auto logits = [&](const std::filesystem::path& model, const char* out) {
    REQUIRE(run("evaluate", "--model " + quoted(model) + " --ids 1,5,9 --logits " + quoted(folder / out)).status == 0);
    return qd::SafetensorsFile(folder / out).matrix("logits");
  };
  const auto exact = logits(source, "exact"), coarse = logits(folder.path(), "coarse");
  double error = 0.0, size = 0.0;
  for (Index i = 0; i < exact.size(); ++i) {
    error += std::pow(static_cast<double>(coarse.data()[i] - exact.data()[i]), 2);
    size += std::pow(static_cast<double>(exact.data()[i]), 2);
  }
  CHECK(error > 0.0);
  CHECK(error < 0.1 * size);
}

TEST_CASE("programs: adapter shows, truncates and resizes") {
  if (!built("adapter")) SKIP("adapter has not been built");
  const test::TemporaryFolder folder;
  const auto source = quoted(test::golden("llama_tiny_adapter"));
  const auto info = run("adapter", "info " + source);
  CHECK(info.status == 0);
  CHECK(info.out.find("14 modules, rank 8") != std::string::npos);
  CHECK(info.out.find("model.layers.1.mlp.down_proj") != std::string::npos);

  REQUIRE(run("adapter", "truncate " + source + " --rank 3 " + quoted(folder / "cut")).status == 0);
  REQUIRE(run("adapter", "resize " + source + " --rank 3 " + quoted(folder / "best")).status == 0);
  REQUIRE(run("adapter", "resize " + source + " --rank 8 " + quoted(folder / "whole")).status == 0);
  const auto full = qd::load_peft_adapter(test::golden("llama_tiny_adapter"));
  const auto cut = qd::load_peft_adapter(folder / "cut"), best = qd::load_peft_adapter(folder / "best"),
             whole = qd::load_peft_adapter(folder / "whole");
  const auto product = [](const qd::PeftModule& m, double scale) {  // scale * B^T A, flattened
    std::vector<double> result(static_cast<std::size_t>(m.in() * m.out()));
    for (Index r = 0; r < m.rank(); ++r)
      for (Index o = 0; o < m.out(); ++o)
        for (Index i = 0; i < m.in(); ++i)
          result[static_cast<std::size_t>(o * m.in() + i)] += scale * static_cast<double>(m.b(r, o)) * static_cast<double>(m.a(r, i));
    return result;
  };
  const auto distance = [](const std::vector<double>& x, const std::vector<double>& y) {
    double sum = 0.0;
    for (std::size_t i = 0; i < x.size(); ++i) sum += std::pow(x[i] - y[i], 2);
    return std::sqrt(sum);
  };
  for (std::size_t i = 0; i < full.modules.size(); ++i) {
    const auto& f = full.modules[i];
    const auto expected = product(f, f.alpha / static_cast<double>(f.rank()));
    const auto size = distance(expected, std::vector<double>(expected.size()));
    const auto of = [&](const qd::PeftModule& m) { return product(m, m.alpha / static_cast<double>(m.rank())); };
    CHECK(cut.modules[i].rank() == 3);
    CHECK(distance(of(whole.modules[i]), expected) < 1e-5 * size);  // nothing is lost at full rank
    CHECK(distance(of(best.modules[i]), expected) < distance(of(cut.modules[i]), expected));
  }
}

TEST_CASE("programs: what is read is not written over, by whatever path it is named") {
  if (!built("quantize") || !built("adapter") || !built("evaluate")) SKIP("quantize, adapter or evaluate has not been built");
  const test::TemporaryFolder folder;
  std::filesystem::copy(test::golden("llama_tiny_bnb4"), folder / "model");
  std::filesystem::copy(test::golden("llama_tiny_adapter"), folder / "adapter");
  std::filesystem::create_symlink(folder.path(), folder / "link");
  const auto model = folder / "model" / "model.safetensors", other = folder / "link" / "model" / "model.safetensors";
  const auto before = test::read_file(model);
  const auto refused = [&](const std::string& program, const std::string& arguments) {
    const auto result = run(program, arguments);
    CAPTURE(program, arguments, result.err);
    CHECK(result.status == 2);
    CHECK(result.err.find("written over") != std::string::npos);
  };
  refused("quantize", quoted(model) + " " + quoted(model));
  refused("quantize", quoted(model) + " " + quoted(other));
  refused("evaluate", "--model " + quoted(folder / "model") + " --ids 1 --logits " + quoted(other));
  CHECK(test::read_file(model) == before);
  const auto weights = test::read_file(folder / "adapter" / "adapter_model.safetensors");
  refused("adapter", "truncate " + quoted(folder / "adapter") + " --rank 1 " + quoted(folder / "link" / "adapter"));
  CHECK(test::read_file(folder / "adapter" / "adapter_model.safetensors") == weights);
}

TEST_CASE("programs: weights that are not finite are named") {
  if (!built("quantize") || !built("adapter")) SKIP("quantize or adapter has not been built");
  const test::TemporaryFolder folder;
  auto weight = test::normal_matrix<float>(4, 64, 5);
  auto broken = qd::clone(weight.view());
  broken(2, 7) = std::numeric_limits<float>::quiet_NaN();
  qd::SafetensorsWriter writer;
  writer.add("a.weight", broken.view());
  writer.write(folder / "in.safetensors");
  const auto result = run("quantize", quoted(folder / "in.safetensors") + " " + quoted(folder / "out.safetensors"));
  CHECK(result.status == 2);
  CHECK(result.err == "quantize: " + (folder / "in.safetensors").native() + ": tensor 'a.weight': weight [2, 7] is not finite\n");
  CHECK_FALSE(std::filesystem::exists(folder / "out.safetensors"));

  std::filesystem::copy(test::golden("peft_linear"), folder / "adapter");
  const auto path = folder / "adapter" / "adapter_model.safetensors";
  const qd::SafetensorsFile file(path);
  qd::SafetensorsWriter damaged;
  std::vector<qd::Matrix<float>> matrices;
  for (const auto& tensor : file.tensors()) matrices.push_back(file.matrix(tensor.name));
  matrices.front()(0, 0) = std::numeric_limits<float>::infinity();
  for (std::size_t i = 0; i < matrices.size(); ++i) damaged.add(file.tensors()[i].name, matrices[i].view());
  damaged.write(path);
  const auto info = run("adapter", "info " + quoted(folder / "adapter"));
  CAPTURE(info.out, info.err);
  CHECK(info.status == 0);
  CHECK(info.out.find("NOT FINITE") != std::string::npos);
  CHECK(info.out.find("modules are not finite") != std::string::npos);
}

TEST_CASE("programs: a Hugging Face folder is evaluated on text by its own tokenizer.json") {
  if (!built("evaluate")) SKIP("evaluate has not been built");
  const test::TemporaryFolder folder;
  write_letters_model(folder / "model");
  test::write_file(folder / "data.jsonl", R"({"prompt":"in","response":"inn"})");
  const auto result =
      run("evaluate", "--model " + quoted(folder / "model") + " --data " + quoted(folder / "data.jsonl") + " --seq-len 16 --answers 0");
  CAPTURE(result.out, result.err);
  CHECK(result.status == 0);
  CHECK(result.out.find(", on 1 examples") != std::string::npos);
}

TEST_CASE("programs: evaluate scores questions and answers at every rank, and compare does so for each recipe") {
  if (!built("evaluate") || !built("compare")) SKIP("evaluate or compare has not been built");
  const test::TemporaryFolder folder;
  write_words_model(folder / "model");
  const auto model = "--model " + quoted(folder / "model"), adapter = " --adapter " + quoted(test::golden("llama_tiny_adapter"));
  std::string questions, data;
  for (int i = 0; i < 12; ++i) {
    const std::string q(2, static_cast<char>('a' + i));
    questions += R"({"question": ")" + q + R"(?", "choices": ["x", "y", "z"], "answer": )" + std::to_string(i % 3) + "}\n";
    data += R"({"question": ")" + q + R"(?", "answer": ["ab cd ef gh", "x"]})" + "\n";
  }
  test::write_file(folder / "q.jsonl", questions);
  test::write_file(folder / "d.jsonl", data);
  const auto out = succeeds("evaluate", model + adapter + " --choices " + quoted(folder / "q.jsonl") + " --shots 1 --ranks 0,2,8 --data " +
                                            quoted(folder / "d.jsonl") + " --bleu --max-new-tokens 6 --seq-len 60 --out " +
                                            quoted(folder / "out"));
  const auto report = qd::read_json(folder / "out" / "report.json");
  REQUIRE(report.at("ranks").size() == 3);
  REQUIRE(report.at("right_choices").size() == 11);  // one is shown
  CHECK(report.at("right_choices")[0] == 1);
  std::vector<std::vector<double>> right_of;  // of each question 1 or 0, at each rank
  for (std::size_t i = 0; i < 3; ++i) {
    const auto& r = report.at("ranks")[i];
    const auto rank = r.at("rank").get<Index>();
    CHECK(rank == std::vector<Index>{0, 2, 8}[i]);
    auto& scores = right_of.emplace_back();
    for (std::size_t q = 0; q < 11; ++q) scores.push_back(r.at("chosen").at(q) == report.at("right_choices")[q] ? 1.0 : 0.0);
    const auto right = std::count(scores.begin(), scores.end(), 1.0);
    CHECK(r.at("right") == right);
    for (const char* difference : {"accuracy_above_first", "match_above_first", "bleu_above_first", "loss_above_first"})
      CHECK(r.contains(difference) == (i > 0));
    if (i > 0) {
      const auto expected = qd::paired_difference(scores, right_of[0]);
      CHECK(r.at("accuracy_above_first") == qd::Json{{"value", expected.value}, {"low", expected.low}, {"high", expected.high}});
      const auto loss = r.at("loss_above_first").at("value").get<double>();
      CHECK(loss == Approx(r.at("loss").get<double>() - report.at("ranks")[0].at("loss").get<double>()));
      for (const std::string of : {": loss ", ": exact match ", ": BLEU ", ": accuracy "}) {
        const auto begin = out.find("rank " + std::to_string(rank) + of);
        CHECK(out.substr(begin, out.find('\n', begin) - begin).ends_with("] above rank 0"));
      }
    }
    CHECK(r.at("accuracy").at("value").get<double>() == Approx(static_cast<double>(right) / 11.0));
    const auto texts = r.at("texts").get<std::vector<std::string>>();
    REQUIRE(texts.size() == 12);
    CHECK(r.at("answers") == 12);
    const auto bleu = qd::corpus_bleu(texts, std::vector<std::vector<std::string>>(12, {"ab cd ef gh", "x"}));
    CHECK(r.at("bleu").at("score").get<double>() == Approx(bleu.score));
    if (i > 0)
      CHECK(r.at("bleu_above_first").at("value").get<double>() ==
            Approx(bleu.score - report.at("ranks")[0].at("bleu").at("score").get<double>()).margin(1e-9));
    CHECK(out.find("rank " + std::to_string(rank) + ": accuracy " + std::to_string(right) + " of 11") != std::string::npos);
    CHECK(out.find("rank " + std::to_string(rank) + ": BLEU ") != std::string::npos);
    CHECK(out.find("rank " + std::to_string(rank) + ": exact match ") != std::string::npos);
  }
  CHECK(report.at("ranks")[0].at("loss") != report.at("ranks")[2].at("loss"));
  for (const std::string measure : {"loss", "exact_match", "bleu", "accuracy"}) CHECK(report.at("over_ranks").contains(measure));
  for (const std::string name : {"loss", "exact match", "BLEU", "accuracy"}) CHECK(out.find("\n  " + name + ": mean over ranks ") != out.npos);
  CHECK(report.at("ranks")[2].at("bytes") == tensor_bytes(test::golden("llama_tiny_adapter") / "adapter_model.safetensors"));
  const auto csv = test::read_file(folder / "out" / "report.csv");
  CHECK(std::count(csv.begin(), csv.end(), '\n') == 4);
  for (const auto& line : {std::string("rank,loss"), std::string("\n0,"), std::string("\n2,"), std::string("\n8,")})
    CHECK(csv.find(line) != std::string::npos);

  // An adapter that does not say which ranks it is for is measured at powers of two; one question alone is refused where it is too long.
  const auto every = succeeds("evaluate", model + adapter + " --choices " + quoted(folder / "q.jsonl") + " --choice-score answers");
  for (const std::string rank : {"0", "1", "2", "4", "8"}) CHECK(every.find("rank " + rank + ": accuracy ") != std::string::npos);
  const auto longer = run("evaluate", model + " --choices " + quoted(folder / "q.jsonl") + " --shots 11");
  CHECK(longer.status == 2);
  CHECK(longer.err.find("q.jsonl: line 12: the prompt and its longest choice have") != std::string::npos);
  CHECK(longer.err.find("context is 64") != std::string::npos);

  const auto comparison = model + " --data " + quoted(folder / "d.jsonl") + " --recipes qlora,qdylora --seeds 0 --ranks 1,4 --steps 2 " +
                          "--batch 2 --seq-len 60 --eval-rows 2 --answers 2 --max-new-tokens 4 --choices " + quoted(folder / "q.jsonl") +
                          " --results " + quoted(folder / "runs.jsonl");
  const auto compared = succeeds("compare", comparison);
  const std::string intervals = "| difference to qdylora, mean over seeds, 95 % over examples |";
  for (const std::string table : {"held-out loss", "exact match", "BLEU", "accuracy"}) {
    const auto begin = compared.find("| " + table + ", mean over seeds |");
    REQUIRE(begin != std::string::npos);
    const auto end = compared.find(", mean over seeds |", compared.find(", by seed |", begin));
    CHECK(compared.substr(begin, end - begin).find(intervals) != std::string::npos);
  }
  const auto runs = test::read_file(folder / "runs.jsonl");
  std::vector<qd::Json> lines;
  std::istringstream in(runs);
  for (std::string line; std::getline(in, line);) lines.push_back(qd::parse_json(line, {}));
  REQUIRE(lines.size() == 2);
  for (auto& line : lines) {
    // Another key than that of earlier versions would have their runs done again.
    CHECK(line.at("key") == qd::Json{{"model", "model"},          {"data", "d.jsonl"}, {"base", "nf4"},    {"ranks", "1,4"},
                                     {"alpha", 64.0},             {"lr", 3e-3},        {"steps", 2},       {"batch", 2},
                                     {"alpha_over_rank", 16.0},   {"seq_len", 60},     {"eval_rows", 2},   {"answers", 2},
                                     {"max_new_tokens", 4},       {"shots", 0},        {"shots_file", ""}, {"choices", "q.jsonl"},
                                     {"choice_score", "letters"}});
    for (const std::string score : {"exact match", "BLEU", "accuracy"}) CHECK(line.at("scores").at(score).size() == 3);
    // What stands for each example has the scores of the whole.
    const auto tokens = line.at("example_tokens").get<std::vector<double>>();
    REQUIRE(tokens.size() == 2);
    REQUIRE(line.at("bleu_counts").size() == 3);
    for (std::size_t i = 0; i < 3; ++i) {
      qd::BleuCounts sums;
      for (const auto& answer : line.at("bleu_counts").at(i)) {
        for (std::size_t n = 0; n < 4; ++n) {
          sums.matched[n] += answer.at(n).get<Index>();
          sums.total[n] += answer.at(4 + n).get<Index>();
        }
        sums.hypothesis_words += answer.at(8).get<Index>();
        sums.reference_words += answer.at(9).get<Index>();
      }
      CHECK(sums.reference_words > 0);
      CHECK(qd::bleu_of(sums).score == Approx(line.at("scores").at("BLEU").at(i).get<double>()));
      const auto losses = line.at("examples").at("held-out loss").at(i).get<std::vector<double>>();
      REQUIRE(losses.size() == 2);
      CHECK((tokens[0] * losses[0] + tokens[1] * losses[1]) / (tokens[0] + tokens[1]) == Approx(line.at("losses").at(i).get<double>()));
      for (const std::string score : {"exact match", "accuracy"}) {
        const auto right = line.at("examples").at(score).at(i).get<std::vector<double>>();
        REQUIRE(right.size() == (score == "accuracy" ? 12 : 2));
        CHECK(100.0 * std::accumulate(right.begin(), right.end(), 0.0) / static_cast<double>(right.size()) ==
              Approx(line.at("scores").at(score).at(i).get<double>()));
      }
    }
  }
  // Runs that stand there are not done again.
  CHECK(succeeds("compare", comparison) == compared);
  CHECK(test::read_file(folder / "runs.jsonl") == runs);
  // Nor those of earlier versions, which kept no examples: their means are the same.
  std::string earlier;
  for (auto& line : lines) {
    for (const char* key : {"examples", "example_tokens", "bleu_counts"}) line.erase(key);
    earlier += line.dump() + "\n";
  }
  test::write_file(folder / "runs.jsonl", earlier);
  const auto again = succeeds("compare", comparison);
  CHECK(test::read_file(folder / "runs.jsonl") == earlier);
  CHECK(again.find(intervals) == std::string::npos);
  CHECK(again.substr(0, again.find("| exact match")) == compared.substr(0, compared.find("\n" + intervals)) + "\n");
}

TEST_CASE("programs: compare trains a run for each rank beside the recipes, and 16-bit products where they are asked for") {
  if (!built("compare")) SKIP("compare has not been built");
  const test::TemporaryFolder folder;
  write_letters_model(folder / "model");
  write_letters_data(folder / "d.jsonl");
  const auto table = [&](const std::string& options) {
    std::map<std::string, std::string> rows;  // of losses, by recipe
    std::istringstream lines(succeeds("compare", "--model " + quoted(folder / "model") + " --data " + quoted(folder / "d.jsonl") +
                                                     " --seeds 0 --ranks 1,4 --steps 2 --batch 2 --seq-len 16 --eval-rows 2 --lr 1e-1 " +
                                                     "--alpha 16 --results " + quoted(folder / "runs.jsonl") + " " + options));
    for (std::string line; std::getline(lines, line);)
      if (const auto at = line.find(" (1) | "); at != std::string::npos) rows.emplace(line.substr(2, at - 2), line.substr(at + 7));
    return rows;
  };
  const auto loss = [](const std::string& row, int column) {
    std::istringstream in(row);
    double x = 0.0;
    for (std::string bar; column-- >= 0; in >> bar) in >> x;
    return x;
  };
  const auto rows = table("--recipes qlora,separate --against separate");
  REQUIRE(rows.size() == 2);
  // The run of the largest rank is plain QLoRA with the same scale; that of rank 1 is no adapter cut.
  CHECK(loss(rows.at("separate"), 1) == loss(rows.at("qlora"), 1));
  CHECK(loss(rows.at("separate"), 0) != loss(rows.at("qlora"), 0));
  // Another arithmetic is another comparison.
  const auto before = test::read_file(folder / "runs.jsonl");
  CHECK(table("--recipes qlora --compute exact").size() == 1);
  CHECK(table("--recipes qlora --compute bits16").size() == 1);
  const auto after = test::read_file(folder / "runs.jsonl");
  CHECK(std::count(after.begin(), after.end(), '\n') == std::count(before.begin(), before.end(), '\n') + 2);
  CHECK(after.find("\"compute\":\"bits16\"") != std::string::npos);
}

TEST_CASE("programs: compare sets full fine-tuning of the model in bfloat16 beside the recipes, one value for all ranks") {
  if (!built("compare")) SKIP("compare has not been built");
  const test::TemporaryFolder folder;
  write_letters_model(folder / "model", "qwen2", 48, 'L');
  write_letters_data(folder / "d.jsonl");
  const auto told = [&](const std::string& options) {
    return run("compare", "--model " + quoted(folder / "model") + " --data " + quoted(folder / "d.jsonl") + " --ranks 1,4 --steps 3 --batch 2" +
                              " --seq-len 16 --eval-rows 2 --answers 1 --max-new-tokens 3 --lr 3e-2 --results " + quoted(folder / "runs.jsonl") +
                              " " + options);
  };
  const auto first = told("--recipes qlora,full --seeds 0 --base-format bfloat16");
  CAPTURE(first.out, first.err);
  REQUIRE(first.status == 0);
  CHECK(table_row(first.out, "full (1)")[1] == table_row(first.out, "full (1)")[2]);
  const auto text = test::read_file(folder / "runs.jsonl");
  std::istringstream lines(text);
  std::string line;
  std::vector<qd::Json> runs;
  while (std::getline(lines, line)) runs.push_back(qd::parse_json(line, {}));
  REQUIRE(runs.size() == 2);
  const auto losses = runs[1].at("losses").get<std::vector<double>>();
  REQUIRE(losses.size() == 3);
  CHECK(losses[0] == losses[1]);
  CHECK(std::abs(losses[0] - losses[2]) > 1e-3);
  CHECK(losses[2] == Approx(runs[0].at("losses")[2].get<double>()).epsilon(1e-5));  // the base in bfloat16 is the model that all weights train of
  CHECK(runs[1].at("scores").at("BLEU").size() == 3);
  CHECK(runs[1].at("examples").at("held-out loss").size() == 3);
  // Another seed has other rows; what stands there is not trained again.
  const auto second = told("--recipes full --against full --seeds 0,1 --base-format bfloat16");
  CAPTURE(second.out, second.err);
  CHECK(second.status == 0);
  CHECK(second.err.find("full, seed 0") == std::string::npos);
  CHECK(second.err.find("full, seed 1") != std::string::npos);
  CHECK(test::read_file(folder / "runs.jsonl").starts_with(text));
}

TEST_CASE("programs: compare puts methods, their variants and bases of their own into one table, and says what each trained") {
  if (!built("compare")) SKIP("compare has not been built");
  const test::TemporaryFolder folder;
  write_letters_model(folder / "model", "qwen2", 48, 'L');
  write_letters_data(folder / "d.jsonl");
  const auto file = folder / "runs.jsonl";
  const std::vector<std::string> names{"qlora",   "qlora+dora", "qlora+lora-plus=16", "qlora*0.5", "qlora@nf4", "houlsby:qlora",
                                       "parallel", "alpha",      "alpha@binary1*2",    "full"};
  const auto told = [&](std::size_t count) {
    std::string recipes;
    for (std::size_t i = 0; i < count; ++i) recipes += (i > 0 ? "," : "") + names[i];
    return succeeds("compare", "--model " + quoted(folder / "model") + " --data " + quoted(folder / "d.jsonl") +
                                   " --ranks 1,4 --steps 3 --batch 2 --seq-len 16 --eval-rows 2 --lr 3e-2 --base-format bfloat16" +
                                   " --seeds 0 --against qlora --recipes '" + recipes + "' --results " + quoted(file));
  };
  const auto lines_of = [&] {
    std::map<std::string, qd::Json> lines;
    std::istringstream text(test::read_file(file));
    for (std::string line; std::getline(text, line);) {
      const auto json = qd::parse_json(line, {});
      CHECK(lines.emplace(json.at("recipe").get<std::string>(), json).second);  // none is trained twice
    }
    return lines;
  };
  told(2);
  const auto begun = test::read_file(file);
  const auto out = told(names.size());
  CHECK(test::read_file(file).starts_with(begun));
  auto runs = lines_of();
  REQUIRE(runs.size() == names.size());
  const auto loss = [&](const std::string& name, std::size_t at) { return runs.at(name).at("losses").at(at).get<double>(); };
  constexpr std::size_t rank_1 = 0, rank_4 = 1, base = 2;
  std::set<double> trained;
  for (const auto& name : names) {
    CAPTURE(name);
    trained.insert(loss(name, rank_4));
    CHECK(loss(name, rank_4) != loss(name, base));
    CHECK((loss(name, rank_4) == loss(name, rank_1)) == (name.starts_with("alpha") || name == "full"));
    CHECK(table_row(out, name + " (1)").size() == 4);
  }
  CHECK(trained.size() == names.size());  // no two of them are one run
  for (const std::string name : {"qlora+dora", "qlora+lora-plus=16", "qlora*0.5", "houlsby:qlora", "parallel"})
    CHECK(loss(name, base) == loss("qlora", base));
  CHECK(loss("qlora@nf4", base) != loss("qlora", base));
  CHECK(loss("alpha", base) != loss("alpha@binary1*2", base));

  const auto config = qd::hugging_face_config(folder / "model" / "config.json");
  Index ins = 0, outs = 0;
  for (const auto& linear : config.linears()) {
    ins += config.layers * linear.in;
    outs += config.layers * linear.out;
  }
  const auto parameters = [&](const std::string& name) { return runs.at(name).at("parameters").get<Index>(); };
  CHECK(parameters("qlora") == 4 * (ins + outs));
  CHECK(parameters("qlora+dora") == 4 * (ins + outs) + outs);
  CHECK(parameters("houlsby:qlora") == 2 * config.layers * 4 * 2 * config.width);
  CHECK(parameters("parallel") == config.layers * 4 * 2 * config.width);
  CHECK(parameters("alpha") == outs);
  CHECK(parameters("full") > config.linear_weights());
  const auto bits = [&](const std::string& name) { return runs.at(name).at("base_bits").get<double>(); };
  CHECK(bits("qlora") == 16.0);
  CHECK(bits("qlora@nf4") < 6.0);
  CHECK(bits("full") == 16.0);
  CHECK(bits("alpha") == Approx(3.0 * bits("alpha@binary1*2")));
  const std::string costs = "\n| at rank 4 | parameters trained | bits of a base weight |\n";
  CHECK(table_row(out, "parallel", costs) == std::vector<std::string>{"parallel", std::to_string(parameters("parallel")), "16.00"});

  // Runs that stand there are not done again, nor are those of earlier versions, which did not say what they trained.
  const auto finished = test::read_file(file);
  CHECK(told(names.size()) == out);
  CHECK(test::read_file(file) == finished);
  std::string earlier;
  for (auto& [name, line] : runs) {
    line.erase("parameters");
    line.erase("base_bits");
    earlier += line.dump() + "\n";
  }
  test::write_file(file, earlier);
  CHECK(told(names.size()) == out.substr(0, out.find(costs)));
  CHECK(test::read_file(file) == earlier);
}

TEST_CASE("programs: compare writes prompts as --chat-template says, beside a plain text too, and does not mix such runs with others") {
  if (!built("compare")) SKIP("compare has not been built");
  const test::TemporaryFolder folder;
  write_words_model(folder / "model");
  test::write_file(folder / "q.jsonl", R"({"question": "a", "choices": ["x", "y"], "answer": 0})");
  std::string text;
  for (int i = 0; i < 600; ++i) text += static_cast<char>('a' + i * i % 26);
  test::write_file(folder / "t.txt", text);
  const auto arguments = "--model " + quoted(folder / "model") + " --data " + quoted(folder / "t.txt") +
                         " --recipes qlora --against qlora --seeds 0 --ranks 1 --steps 1 --batch 1 --seq-len 8 --eval-rows 1 --choices " +
                         quoted(folder / "q.jsonl") + " --results " + quoted(folder / "runs.jsonl") + " ";
  const auto plain = succeeds("compare", arguments);
  CHECK(plain.find("the model has no chat template") != std::string::npos);
  const auto unknown = run("compare", arguments + "--chat-template llama3");  // whose marks this vocabulary has not
  CHECK(unknown.status == 2);
  CHECK(unknown.err.find("bos") != std::string::npos);
  const auto runs = [&] {
    const auto lines = test::read_file(folder / "runs.jsonl");
    return std::count(lines.begin(), lines.end(), '\n');
  };
  CHECK(runs() == 1);
  CHECK(succeeds("compare", arguments + "--no-chat-template").find("chat") == std::string::npos);
  CHECK(runs() == 2);
}

TEST_CASE("programs: optimizers trains with each, and paged moments change no bit") {
  if (!built("optimizers")) SKIP("optimizers has not been built");
  const test::TemporaryFolder folder;
  std::string text;
  for (int i = 0; i < 300; ++i) text += std::to_string(i * i % 97) + " and ";
  test::write_file(folder / "text.txt", text);
  const auto arguments = llama2c_model(folder) + " --tokenizer " + quoted(folder / "tokenizer.bin") + " --data " +
                         quoted(folder / "text.txt") + " --ranks 64,1 --steps 6 --every 4 --batch 2 --seq-len 16 --eval-rows 2 --lr 0.1 --lion-lr 0.03";
  const auto out = succeeds("optimizers", arguments + " --paged " + quoted(folder / ""));
  CAPTURE(out);
  CHECK(table_row(out, "training loss, mean over steps").size() == 3);
  CHECK(out.find("| 1–4 | 5–6 |") != std::string::npos);
  CHECK(out.find("| held-out loss at rank | 1 | 64 |") != std::string::npos);
  std::vector<std::vector<std::string>> losses, trajectories, memory;
  for (const std::string name : {"adamw", "adamw8bit", "lion"}) {
    for (const std::string paged : {"", ", paged"}) {
      trajectories.push_back(table_row(out, name + paged, "training loss"));
      losses.push_back(table_row(out, name + paged, "held-out loss"));
      memory.push_back(table_row(out, name + paged, "memory, MB"));
      trajectories.back()[0] = losses.back()[0] = "";
      REQUIRE(memory.back().size() == 5);
    }
    CHECK(losses.back() == losses[losses.size() - 2]);
    CHECK(trajectories.back() == trajectories[trajectories.size() - 2]);
    CHECK(memory.back()[4] == "the bits of the run before");
    CHECK(memory.back()[2] == memory.back()[1]);
    CHECK(memory[memory.size() - 2][2] == "0.00");
  }
  CHECK(losses[0] != losses[2]);
  CHECK(losses[0] != losses[4]);
  const auto moments = [&](std::size_t i) { return std::stod(memory[i][1]); };
  CHECK(moments(4) == Approx(moments(0) / 2).margin(0.011));
  CHECK(moments(2) < 0.35 * moments(0));  // small parameters' stay floats
  CHECK(moments(2) > 0.25 * moments(0));

  const auto nowhere = run("optimizers", arguments + " --paged /no/such/folder --optimizers lion");
  CHECK(nowhere.status == 2);
  CHECK(nowhere.err.find("/no/such/folder") != std::string::npos);
}

TEST_CASE("programs: an adapter and a tokenizer of another model are named") {
  if (!built("evaluate")) SKIP("evaluate has not been built");
  const test::TemporaryFolder folder;
  const auto tiny = "--model " + quoted(test::golden("llama_tiny_bnb4"));
  const auto adapter =
      run("evaluate", tiny + " --adapter " + quoted(test::golden("peft_linear")) + " --ids 1 --logits " + quoted(folder / "l"));
  CHECK(adapter.status == 2);
  CHECK(adapter.err.find("peft_linear: is of another model") != std::string::npos);

  test::Bytes gguf;  // one token more than the model's 64
  gguf.raw("GGUF").u32(3).u64(0).u64(4).text("tokenizer.ggml.model").u32(8).text("gpt2").text("tokenizer.ggml.pre").u32(8).text("smollm");
  gguf.text("tokenizer.ggml.merges").u32(9).u32(8).u64(0).text("tokenizer.ggml.tokens").u32(9).u32(8).u64(65);
  for (int i = 0; i < 65; ++i) gguf.text(std::string(1, static_cast<char>('!' + i)));
  test::write_file(folder / "tokenizer.gguf", gguf.pad(32));
  const auto tokenizer =
      run("evaluate", tiny + " --tokenizer " + quoted(folder / "tokenizer.gguf") + " --ids 1 --logits " + quoted(folder / "l"));
  CAPTURE(tokenizer.err);
  CHECK(tokenizer.status == 2);
  CHECK(tokenizer.err.find("tokenizer.gguf: a tokenizer of 65 tokens") != std::string::npos);
}

TEST_CASE("programs: formats has the losses that evaluate has on a base in each format") {
  if (!built("formats") || !built("evaluate")) SKIP("formats or evaluate has not been built");
  const test::TemporaryFolder folder;
  const auto model = llama2c_model(folder) + " --tokenizer " + quoted(folder / "tokenizer.bin");
  std::string text;
  for (int i = 0; i < 60; ++i) text += "line " + std::to_string(i * i) + " of a text\n";
  test::write_file(folder / "text.txt", text);
  const auto data = " --seq-len 129 --data " + quoted(folder / "text.txt");
  const auto table = succeeds("formats", model + data + " --formats nf4,fp4,int4,fp8_e4m3,e3m0 --block-sizes 64 --own-text 5");
  const struct {
    std::string evaluate, formats;
    std::size_t column;
  } cases[] = {
      {"float32", "float32 | –", 3}, {"nf4", "nf4 | 64", 6}, {"fp4", "fp4 | 64", 6}, {"int4", "int4 | 64", 6}, {"fp8", "fp8_e4m3 | 64", 6}};
  for (const auto& c : cases) {
    CAPTURE(c.formats, table);
    const auto said = succeeds("evaluate", model + data + " --base-format " + c.evaluate);
    const std::string before = "loss ";
    const auto expected = std::stod(said.substr(said.find(before) + before.size()));
    CHECK(std::stod(table_row(table, c.formats, "| text.txt |").at(c.column)) == Approx(expected).margin(1.5e-4));
  }
  // Blocks of 64 with float32 scales, and with those in 8 bits: 1/16 of a byte and its share of 21 other numbers more.
  CHECK(table_row(table, "nf4 | 64", "| model.bin |").at(2) == "4.500");
  CHECK(std::stod(table_row(table, "nf4 | 64", "| model.bin |").at(5)) == Approx(4.127).margin(0.02));
  CHECK(std::stod(table_row(table, "fp8_e4m3 | 64", "| model.bin |").at(2)) == 8.5);
  // On its own text no format's loss is below the model's, but by chance; far from it where rounding is coarse.
  const auto own = [&](const std::string& first, std::size_t column) {
    return std::stod(table_row(table, first, "the model's own text").at(column));
  };
  CHECK(own("e3m0 | 64", 6) > own("float32 | –", 3));
  CHECK(std::fabs(own("fp8_e4m3 | 64", 6) - own("float32 | –", 3)) < own("e3m0 | 64", 6) - own("float32 | –", 3));
  // A difference is that of the losses beside it, within its interval.
  const auto row = table_row(table, "int4 | 64", "| text.txt |");
  double value = 0.0, low = 0.0, high = 0.0;
  REQUIRE(std::sscanf(row.at(9).c_str(), "%lf [%lf, %lf]", &value, &low, &high) == 3);
  CHECK(value == Approx(std::stod(row.at(6)) - std::stod(table_row(table, "nf4 | 64", "| text.txt |").at(6))).margin(1.5e-4));
  CHECK((low <= value && value <= high && low < high));
}

TEST_CASE("programs: memory measures what it plans, and plans what QLoRA and QDyLoRA say") {
  if (!built("memory")) SKIP("memory has not been built");
  const auto megabytes = [](const std::string& table, const std::string& part) {
    const auto row = table_row(table, part);
    return std::pair(std::stod(row.at(1)), std::stod(row.at(2)));
  };
  const test::TemporaryFolder folder;
  for (const std::string more :
       {"", " --gradient-checkpointing --optimizer adamw8bit --no-double-quant", " --dtype bfloat16", " --dtype bfloat16 --base-format fp8",
        " --dtype float16", " --base-format bfloat16", " --dtype bfloat16 --base-format bfloat16"}) {
    const auto table = succeeds("memory", llama2c_model(folder) + " --tokenizer " + quoted(folder / "tokenizer.bin") +
                                              " --rank 64 --batch 4 --seq-len 120 --threads 2" + more);
    CAPTURE(more, table);
    for (const std::string part :
         {"linear weights: codes, scales, scales of scales", "embedding, head", "adapters", "their gradients", "moments"}) {
      const auto [planned, measured] = megabytes(table, part);
      CAPTURE(part);
      CHECK(measured > 0.0);
      CHECK(measured == Approx(planned).margin(0.0011));  // the last digit
    }
    for (const std::string part :
         {"a step: checkpoints, activations, workspace, logits, threads' scratch", "all that is asked for, with norms and biases"}) {
      const auto [planned, measured] = megabytes(table, part);
      CAPTURE(part);
      CHECK(measured == Approx(planned).epsilon(0.05));
    }
  }
  const auto gigabytes = [](const std::string& cell) { return std::stod(cell); };
  const auto plan = succeeds("memory", "--shapes llama-65b,falcon-40b --dtype bfloat16 --gradient-checkpointing --paged");
  CHECK(gigabytes(table_row(plan, "parameters, 10^9").at(1)) == Approx(65.3).epsilon(0.001));
  const auto full = table_row(plan, "full fine-tuning: weights and gradients in 16 bits, moments in 32");
  CHECK(gigabytes(full.at(1)) > 780.0);  // QLoRA's "more than 780 GB"
  const auto total = table_row(plan, "**the device's in all**");
  CHECK(gigabytes(total.at(1)) < 48.0);  // and one card of 48 GB
  CHECK(gigabytes(total.at(2)) < 32.0);  // QDyLoRA's card of 32 GB
  // 65.0e9 linear weights at 0.373 bits
  CHECK(gigabytes(table_row(plan, "without double quantization").at(1)) - gigabytes(total.at(1)) == Approx(3.02).margin(0.02));
  CHECK(gigabytes(table_row(plan, "without paging").at(1)) - gigabytes(total.at(1)) ==
        Approx(gigabytes(table_row(plan, "moments, on the host").at(1))).margin(0.011));
  const auto offloaded = succeeds("memory", "--shapes llama-65b,falcon-40b --dtype bfloat16 --gradient-checkpointing --paged --offload");
  CHECK(gigabytes(total.at(2)) - gigabytes(table_row(offloaded, "**the device's in all**").at(2)) ==
        Approx(gigabytes(table_row(offloaded, "offloaded, on the host").at(2))).margin(0.011));
}

}  // namespace programs_test
