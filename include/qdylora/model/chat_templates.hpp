// The chat templates that the library knows, by name, and which of them a model's own is. A model's files hold its template as a program in
// the Jinja language (chat_template of tokenizer_config.json or of GGUF). There is no interpreter here: a template is known by the
// expressions that write its turns, and one that has others, or more that matter, is not known.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <filesystem>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>

#include <qdylora/core/error.hpp>
#include <qdylora/io/gguf.hpp>
#include <qdylora/io/json.hpp>
#include <qdylora/model/chat.hpp>

namespace qdylora {

/// For chat_template, with the models whose template each is.
inline constexpr std::array chat_template_names = {
    "chatml",        // <|im_start|>role\n...<|im_end|>\n, no system message of its own
    "smollm2",       // the same with that of SmolLM2-Instruct
    "qwen2",         // with that of Qwen2-Instruct
    "qwen2.5",       // with that of Qwen2.5-Instruct
    "llama2",        // Llama-2-chat: [INST] <<SYS>>
    "llama3",        // Meta-Llama-3-Instruct
    "llama3.1",      // Llama-3.1-Instruct: a system turn in any case, which says 26 Jul 2024 for today
    "mistral-v0.1",  // Mistral-7B-Instruct-v0.1 as first published: an answer ends in </s> and a space
    "mistral-v0.2",  // Mistral-7B-Instruct-v0.2 as first published: no space around an answer
    "mistral-v1",    // both as published later, and Mixtral-8x7B: a space before [INST] and before an answer
    "mistral-v3",    // Mistral-7B-Instruct-v0.3: [INST] is a control token, the system message goes to the last question
    "falcon",        // Falcon-7B- and 40B-Instruct: User:, Assistant:
};

/// The template of a name in chat_template_names. Errors: bad_argument.
inline ChatTemplate chat_template(std::string_view name) {
  ChatTemplate chat;
  chat.name = name;
  const auto chatml = [&](std::string_view system_message) {
    chat.system = {"{<|im_start|>}system\n", "{<|im_end|>}\n"};
    chat.user = {"{<|im_start|>}user\n", "{<|im_end|>}\n"};
    chat.ask = "{<|im_start|>}assistant\n";
    chat.after = "{<|im_end|>}\n";
    chat.system_message = system_message;
    return chat;
  };
  if (name == "chatml") return chatml("");
  if (name == "smollm2") return chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face");
  if (name == "qwen2") return chatml("You are a helpful assistant.");
  if (name == "qwen2.5") return chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.");
  if (name == "llama3" || name == "llama3.1") {
    chat.start = "{bos}";
    if (name == "llama3.1") chat.preamble = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";
    chat.system = {"{<|start_header_id|>}system{<|end_header_id|>}\n\n", "{<|eot_id|>}", true};
    chat.user = {"{<|start_header_id|>}user{<|end_header_id|>}\n\n", "{<|eot_id|>}", true};
    chat.ask = "{<|start_header_id|>}assistant{<|end_header_id|>}\n\n";
    chat.after = "{<|eot_id|>}";
    chat.trims = true;
    return chat;
  }
  chat.alternates = true;
  if (name == "llama2") {
    chat.system = {"<<SYS>>\n", "\n<</SYS>>\n\n"};
    chat.user = {"{bos}{?[INST]} ", " {?[/INST]}", true};
    chat.lead = " ";
    chat.after = " {eos}";
    chat.trims = true;
    chat.system_place = SystemPlace::first_user;
    return chat;
  }
  if (name == "falcon") {
    chat.system = {"", "", true};
    chat.user = {"\n\nUser: ", "", true};
    chat.ask = "\n\nAssistant:";
    chat.lead = " ";
    chat.trims = true;
    chat.replaces = {{"\n\n", "\n"}};
    return chat;
  }
  if (name.starts_with("mistral-")) {
    chat.start = "{bos}";
    chat.user = {"{?[INST]} ", " {?[/INST]}"};
    chat.after = "{eos}";
    chat.system_place = SystemPlace::none;
    if (name == "mistral-v0.1") {
      chat.after = "{eos} ";
      return chat;
    }
    if (name == "mistral-v0.2") return chat;
    chat.system = {"", "\n\n"};
    chat.lead = " ";
    if (name == "mistral-v1") {
      chat.user.before = " {?[INST]} ";
      chat.system_place = SystemPlace::first_user;
      return chat;
    }
    if (name == "mistral-v3") {
      chat.user.after = "{?[/INST]}";
      chat.system_place = SystemPlace::last_user;
      chat.trims = true;
      return chat;
    }
  }
  std::string names;
  for (const char* known : chat_template_names) names += (names.empty() ? "" : ", ") + std::string(known);
  throw Error(Errc::bad_argument, "expected a chat template of " + names + "; found '" + printable(name, 64) + "'");
}

namespace detail {

/// A template as one writing of it: tags without white space and comments, strings in single quotes and joined, items in brackets, and
/// between the tags the text that would come out (trim_blocks and lstrip_blocks on, as transformers has them).
inline std::string jinja_essence(std::string_view source) {
  constexpr std::string_view blank = " \t\n";
  const std::string normalized = replaced(replaced(source, "\r\n", "\n"), "\r", "\n");  // as Jinja does
  std::string_view jinja = normalized;
  if (jinja.ends_with('\n')) jinja.remove_suffix(1);
  std::string result;
  char before = '\0';  // what the last tag was: '{', '%' or '#'
  bool cuts = false;   // it ended in "-"
  for (std::size_t at = 0; at < jinja.size();) {
    std::size_t open = at;
    while (open < jinja.size() &&
           !(jinja[open] == '{' && open + 1 < jinja.size() && std::string_view("{%#").find(jinja[open + 1]) != jinja.npos))
      ++open;
    std::string_view text = jinja.substr(at, open - at);
    if (cuts) text.remove_prefix(std::min(text.find_first_not_of(blank), text.size()));
    else if (before == '%' || before == '#') text.remove_prefix(text.starts_with('\n') ? 1 : 0);
    if (open == jinja.size()) return result += text;
    const char kind = jinja[open + 1];
    std::size_t in = open + 2;
    if (in < jinja.size() && jinja[in] == '-') {
      ++in;
      text = text.substr(0, text.find_last_not_of(blank) + 1);
    } else if (kind != '{') {  // white space from the line's beginning on
      std::size_t line = open;
      while (line > at && (jinja[line - 1] == ' ' || jinja[line - 1] == '\t')) --line;
      if (line == 0 || jinja[line - 1] == '\n') text.remove_suffix(std::min(open - line, text.size()));
    }
    result += text;
    std::string tag;
    char quote = '\0', last = '\0';
    const char closing = kind == '{' ? '}' : kind;
    for (; in < jinja.size(); ++in) {
      const char c = jinja[in];
      if (quote == '\0' && c == closing && in + 1 < jinja.size() && jinja[in + 1] == '}') break;
      last = c;
      if (quote != '\0') {
        if (c == '\\' && in + 1 < jinja.size()) tag += jinja[++in] == 'n' ? '\n' : jinja[in] == 'r' ? '\r' : jinja[in];
        else if (c == quote) tag += '\'', quote = '\0';
        else tag += c;
      } else if (kind != '#' && (c == '\'' || c == '"')) {
        quote = c;
        tag += '\'';
      } else if (blank.find(c) == blank.npos) {
        tag += c;
      }
    }
    cuts = last == '-';
    if (cuts) tag.pop_back();
    if (kind != '#') {
      tag = replaced(tag, "'+'", "");
      for (const std::string_view key : {"role", "content"})
        for (const std::string_view object : {"message", "messages[0]"})
          tag = replaced(tag, std::string(object) + "." + std::string(key), std::string(object) + "['" + std::string(key) + "']");
      result += std::string("{") + kind + tag + closing + "}";
    }
    before = kind;
    at = std::min(in + 2, jinja.size());
  }
  return result;
}

/// The system message that ChatML's template brings: the text between its marks. None where there are several.
inline std::optional<std::string> chatml_system_message(std::string_view essence) {
  constexpr std::string_view open = "<|im_start|>system\n", close = "<|im_end|>";
  std::string message;
  for (std::size_t at = essence.find(open); at != essence.npos; at = essence.find(open, at + 1)) {
    const std::size_t begin = at + open.size();
    const auto text = essence.substr(begin, essence.find(close, begin) - begin);
    if (text.find('\'') != text.npos || text.empty()) continue;  // the conversation's
    if (!message.empty() && message != text) return std::nullopt;
    message = text;
  }
  return message;
}

}  // namespace detail

/// Which of the templates above a model's own is; none if it is another one. ChatML is known with any system message.
inline std::optional<ChatTemplate> recognize_chat_template(std::string_view jinja) {
  if (jinja.size() > (std::size_t{1} << 20)) return std::nullopt;
  const std::string essence = detail::jinja_essence(jinja);
  const auto has = [&](std::initializer_list<std::string_view> parts) {
    return std::all_of(parts.begin(), parts.end(), [&](std::string_view part) { return essence.find(part) != essence.npos; });
  };
  const auto has_any = [&](std::initializer_list<std::string_view> parts) {
    return std::any_of(parts.begin(), parts.end(), [&](std::string_view part) { return essence.find(part) != essence.npos; });
  };
  if (has_any({"<think", "</think", "[SYSTEM_PROMPT]", "<|im_sep|>", "strftime_now"})) return std::nullopt;
  const bool trims = has_any({"|trim", ".strip("});
  if (has({"'<|im_start|>assistant\n'"})) {
    if (trims || has_any({"[INST]", "<|start_header_id|>"})) return std::nullopt;
    if (!has_any({"'<|im_start|>'+message['role']+'\n'+message['content']+'<|im_end|>\n'",
                  "'<|im_start|>'+message['role']+'\n'+message['content']}}{%if(loop.lastandadd_generation_prompt)ornotloop.last%}"
                  "{{'<|im_end|>\n'}}"}))
      return std::nullopt;
    const auto system = detail::chatml_system_message(essence);
    if (!system) return std::nullopt;
    ChatTemplate chat = chat_template("chatml");
    for (const char* name : {"smollm2", "qwen2", "qwen2.5"})
      if (chat_template(name).system_message == *system) chat.name = name;
    chat.system_message = *system;
    if (essence.find("bos_token") != essence.npos) {
      if (!essence.starts_with("{{bos_token}}")) return std::nullopt;
      chat.start = "{bos}";
    }
    return chat;
  }
  constexpr std::string_view llama3_turn =
      "'<|start_header_id|>'+message['role']+'<|end_header_id|>\n\n'+message['content']|trim+'<|eot_id|>'";
  if (has({llama3_turn, "'<|start_header_id|>assistant<|end_header_id|>\n\n'"})) {
    if (has({"Cutting Knowledge Date: December 2023\n", "'Today Date: '+date_string+'\n\n'", "setdate_string='26 Jul 2024'",
             "setsystem_message=''", "setsystem_message=messages[0]['content']|trim", "{{bos_token}}"}))
      return chat_template("llama3.1");
    const bool plain = has({"ifloop.index0==0%}{%setcontent=bos_token+content%}"}) && !has_any({"system_message", "Date", "tools"});
    return plain ? std::optional(chat_template("llama3")) : std::nullopt;
  }
  if (has({"[INST]"})) {
    if (has({"<<SYS>>"})) {
      const bool known = has({"bos_token+'[INST] '+content.strip()+' [/INST]'", "' '+content.strip()+' '+eos_token",
                              "'<<SYS>>\n'+system_message+'\n<</SYS>>\n\n'+message"});
      return known && !has({"|trim"}) ? std::optional(chat_template("llama2")) : std::nullopt;
    }
    if (!has({"{{bos_token}}"})) return std::nullopt;
    constexpr std::string_view question = "+message['content']+";
    const auto asks = [&](std::string_view before, std::string_view after) {
      return has({"{{'" + std::string(before) + "'" + std::string(question) + "'" + std::string(after) + "'}}"});
    };
    if (asks("[INST] ", " [/INST]") && !trims && !has({"system_message"})) {
      if (has({"{{message['content']+eos_token+' '}}"})) return chat_template("mistral-v0.1");
      if (has({"{{message['content']+eos_token}}"})) return chat_template("mistral-v0.2");
    }
    if (asks(" [INST] ", " [/INST]") && !trims &&
        has({"{{' '+message['content']+eos_token}}", "loop.firstandsystem_message", "' [INST] '+system_message+'\n\n'+message['content']"}))
      return chat_template("mistral-v1");
    if (asks("[INST] ", "[/INST]") &&
        has({"{{' '+message['content']|trim+eos_token}}", "'[INST] '+system_message+'\n\n'+message['content']+'[/INST]'"}) &&
        has_any({"ifloop.lastandsystem_message", "(message==user_messages[-1])andsystem_message"}))
      return chat_template("mistral-v3");
    return std::nullopt;
  }
  if (has({"{{system_message.strip()}}", "{{'\n\nAssistant:'}}", "setsystem_message=''"})) {
    auto chat = chat_template("falcon");
    const auto writes = [&](const std::string& rest) {
      return has(
          {"{{'\n\nUser: '+message['content'].strip()" + rest + "}}", "{{'\n\nAssistant: '+message['content'].strip()" + rest + "}}"});
    };
    const std::string lines = ".replace('\n\n','\n')";
    if (writes(".replace('\n','\n')" + lines) || writes(lines)) return chat;
    if (writes(".replace('\r\n','\n')" + lines)) return chat.replaces.insert(chat.replaces.begin(), {"\r\n", "\n"}), chat;
    if (writes("")) return chat.replaces.clear(), chat;
  }
  return std::nullopt;
}

/// The template of a GGUF file (key tokenizer.chat_template), in Jinja; "" where it has none.
inline std::string chat_template_text(const GgufFile& file) {
  constexpr std::string_view key = "tokenizer.chat_template";
  return file.metadata().contains(key) ? file.metadata().get<std::string>(key) : std::string();
}

/// The template of a Hugging Face folder, in Jinja: chat_template.jinja, else the key chat_template of tokenizer_config.json, of several the
/// one named "default"; "" where it has none. Errors: those of parse_json; bad_config for a template that is no text.
inline std::string chat_template_text(const std::filesystem::path& folder) {
  if (const auto file = folder / "chat_template.jinja"; std::filesystem::exists(file)) return read_text(file);
  const auto path = folder / "tokenizer_config.json";
  if (!std::filesystem::exists(path)) return "";
  const ErrorPlace place{.file = path.string()};
  const Json config = parse_json(read_text(path), place, {.json_depth = 16});
  const Json* found = detail::find_key(config, "chat_template", place);
  if (found == nullptr) return "";
  if (!found->is_array()) return detail::json_string(*found, "chat_template", place);
  for (const Json& each : *found)
    if (get_string(each, "name", place) == "default") return get_string(each, "template", place);
  return "";
}

}  // namespace qdylora
