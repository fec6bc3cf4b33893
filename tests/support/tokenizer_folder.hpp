// Folders with a tokenizer.json: the golden ones, and such as were changed and must be refused; and a vocabulary of bytes.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include <qdylora/io/json.hpp>
#include <qdylora/model/tokenizer_json.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"

namespace test::tokenizers {

inline const std::filesystem::path golden = std::filesystem::path(QDYLORA_GOLDEN_DIR) / "tokenizers";

inline qdylora::Json read(const std::filesystem::path& path) {
  return qdylora::parse_json(qdylora::read_text(path), {.file = path.string()}, {.json_depth = 16});
}

/// A vocabulary of GPT-2's bytes, then `marks` as control tokens, of which the first two are bos and eos.
inline qdylora::TokenizerData byte_data(const std::vector<std::string>& marks) {
  qdylora::TokenizerData data;
  for (const char32_t letter : qdylora::detail::byte_alphabet) qdylora::append_utf8(data.tokens.emplace_back(), letter);
  data.token_types.assign(256, 1);
  for (const auto& mark : marks) {
    data.tokens.push_back(mark);
    data.token_types.push_back(3);
  }
  data.pre_tokenizer = "gpt-2";
  data.bos = 256;
  data.eos = 257;
  return data;
}

/// What loading the folder `name` ends in, once `edit` has changed its tokenizer.json.
template <class Edit>
void check_refused(const std::string& name, qdylora::Errc code, const std::string& part, Edit edit) {
  CAPTURE(name, part);
  const TemporaryFolder folder;
  auto json = read(golden / name / "tokenizer.json");
  edit(json);
  write_file(folder / "tokenizer.json", json.dump());
  const auto error = error_of([&] { (void)qdylora::load_tokenizer_json(folder.path()); });
  REQUIRE(error);
  CHECK(error->code() == code);
  CHECK(error->file() == (folder / "tokenizer.json").string());
  CHECK(std::string(error->what()).find(part) != std::string::npos);
}

}  // namespace test::tokenizers
