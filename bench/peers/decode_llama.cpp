// One-token greedy decoding with llama.cpp: DECODE_LLAMA MODEL.gguf THREADS [WORK_FOLDER]
// 128 tokens from the token 1, nothing before it. With a work folder also from the same model requantized to Q4_0, which llama.cpp repacks
// for this processor (it has no such layout for Q4_1).
#include "decode.hpp"

#include <filesystem>
#include <string>

#include <llama.h>

namespace {

void run_model(const std::string& file, int threads, const char* kernel) {
  llama_model* const model = llama_model_load_from_file(file.c_str(), llama_model_default_params());
  if (model == nullptr) std::exit(1);
  const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
  auto options = llama_context_default_params();
  options.n_ctx = 256;
  options.n_threads = options.n_threads_batch = threads;
  llama_context* const context = llama_init_from_model(model, options);
  if (context == nullptr) std::exit(1);
  decode::report(kernel, threads, [&](int count) {
    llama_memory_clear(llama_get_memory(context), true);
    std::vector<std::int32_t> ids;
    llama_token token = decode::first_token;
    for (int i = 0; i < count; ++i) {
      if (llama_decode(context, llama_batch_get_one(&token, 1)) != 0) std::exit(1);
      const float* const logits = llama_get_logits(context);
      token = static_cast<llama_token>(std::max_element(logits, logits + vocabulary) - logits);
      ids.push_back(token);
    }
    return ids;
  });
  llama_free(context);
  llama_model_free(model);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  const std::string model = argv[1];
  const int threads = std::atoi(argv[2]);
  llama_log_set(
      [](ggml_log_level level, const char* text, void*) {
        if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
      },
      nullptr);
  llama_backend_init();
  run_model(model, threads, "llama.cpp Q4_1");
  if (argc > 3) {
    const std::string repacked = std::string(argv[3]) + "/requantized.Q4_0.gguf";
    if (!std::filesystem::exists(repacked)) {
      auto options = llama_model_quantize_default_params();
      options.ftype = LLAMA_FTYPE_MOSTLY_Q4_0;
      options.allow_requantize = true;
      options.token_embedding_type = GGML_TYPE_Q8_0;  // as it was: it is the head too
      if (llama_model_quantize(model.c_str(), (repacked + ".part").c_str(), &options) != 0) return 1;
      std::filesystem::rename(repacked + ".part", repacked);
    }
    run_model(repacked, threads, "llama.cpp Q4_0");
  }
  llama_backend_free();
}
