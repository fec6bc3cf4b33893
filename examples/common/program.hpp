// What the programs share: the command line's errors and limits. A wrong argument or file gives one clear line and exit status 2.
#pragma once

#include <cstdio>
#include <exception>
#include <filesystem>
#include <new>
#include <set>
#include <sstream>
#include <string>
#include <system_error>
#include <type_traits>

#include <CLI/CLI.hpp>

#include <qdylora/core/error.hpp>
#include <qdylora/core/scalar.hpp>
#include <qdylora/cpu/run.hpp>
#include <qdylora/model/chat_templates.hpp>

#include "folder.hpp"
#include "text.hpp"

namespace qdylora::examples {

/// Parses the command line and runs `body`; errors go to stderr as "program: message".
template <class Body>
int run_program(CLI::App& app, int argc, char** argv, Body&& body) {
  const auto fail = [&](const std::string& message) {
    std::fprintf(stderr, "%s: %s\n", app.get_name().c_str(), printable_utf8(message).c_str());
    return 2;
  };
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& success) {
    return app.exit(success);  // --help
  } catch (const CLI::ParseError& error) {
    return fail(std::string(error.what()) + "; see --help");
  }
  try {
    return body();
  } catch (const Error& error) {
    return fail(error.what());
  } catch (const std::bad_alloc&) {
    return fail("not enough memory");
  } catch (const std::exception& error) {
    return fail(error.what());
  }
}

// An option beyond these is a slip, and would take all memory or time before anybody noticed.
inline constexpr Index most_rank = 65535;
inline constexpr Index most_steps = 10'000'000;
inline constexpr Index most_batch = 4096;
inline constexpr Index most_tokens = Index{1} << 20;  // of a sequence; the model's context is less
inline constexpr Index most_new_tokens = 4096;        // each takes its place in the caches beforehand
inline constexpr Index most_examples = 1'000'000;
inline constexpr int most_threads = 1024;

/// A check that a number is in [least, most], which NaN is not.
template <class T>
CLI::Validator in_range(T least, T most) {
  return {[=](std::string& text) {
            T value{};
            if (CLI::detail::lexical_cast(text, value) && value >= least && value <= most) return std::string();
            std::ostringstream message;
            message << "expected " << least << " ... " << most << ", found '" << text << "'";
            return message.str();
          },
          ""};
}

/// An option whose value is a number in [least, most]; --help shows its default.
template <class T, class Bound = std::conditional_t<std::is_floating_point_v<T>, double, T>>
CLI::Option* add_number(CLI::App& app, const std::string& name, T& value, const std::string& text, std::type_identity_t<Bound> least,
                        std::type_identity_t<Bound> most) {
  return app.add_option(name, value, text)->check(in_range<Bound>(least, most))->capture_default_str();
}

/// What the report calls enough of an adapter.
inline CLI::Option* add_keep(CLI::App& app, double& keep) {
  return add_number(app, "--keep", keep,
                    "the share of what the best rank gains over the base, in loss and in each task's score, that the report names the "
                    "smallest rank for",
                    0.01, 1.0);
}

/// In what type activations are.
inline void add_dtype(CLI::App& app, std::string& dtype) {
  app.add_option("--dtype", dtype, "of activations: float32, or bfloat16 or float16 (for a GPU without bfloat16) in half the memory")
      ->check(CLI::IsMember({"float32", "bfloat16", "float16"}))
      ->capture_default_str();
}
/// f(std::type_identity<T>) with the type of a name that --dtype takes.
template <class F>
int with_dtype(const std::string& dtype, F&& f) {
  if (dtype == "bfloat16") return f(std::type_identity<bfloat16>());
  if (dtype == "float16") return f(std::type_identity<half>());
  return f(std::type_identity<float>());
}

/// Where the arithmetic is done, and in what type activations are.
inline void add_device(CLI::App& app, std::string& device, std::string& dtype) {
  app.add_option("--device", device, "cpu, or cuda in a program that was built with it")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  add_dtype(app, dtype);
}

/// The arithmetic of products on the CPU; int8 is for programs that do not train.
inline void add_compute(CLI::App& app, std::string& compute, bool trains) {
  std::string text = "products on the CPU: exact, in float32; bits16, 16-bit factors, up to twice as fast; ";
  std::set<std::string> names = {"automatic", "exact", "bits16"};
  if (!trains) {
    text += "int8, 8-bit activations; ";
    names.insert("int8");
  }
  app.add_option("--compute", compute, text + "automatic: bits16 where activations are bfloat16, else exact")
      ->check(CLI::IsMember(names))
      ->capture_default_str();
}

/// Of a name that --compute takes. Throws Errc::unsupported for another arithmetic than a GPU's own.
inline Compute compute_of(const std::string& name, const std::string& device = "cpu") {
  QDYLORA_EXPECTS(device == "cpu" || name == "automatic", unsupported, "--compute " + name + ": is the CPU's, not for --device " + device);
  return name == "exact" ? Compute::exact : name == "bits16" ? Compute::bits16 : name == "int8" ? Compute::int8 : Compute::automatic;
}

/// What prompts are written in: OpenModel::chat, by choose_chat_template.
inline void add_chat_template(CLI::App& app, std::string& choice) {
  std::string names;
  for (const char* name : chat_template_names) names += (names.empty() ? "" : ", ") + std::string(name);
  auto* named = app.add_option("--chat-template", choice,
                               "how prompts are written: model, as its files say, or plain text where that is none of these; " + names +
                                   "; none: plain text")
                    ->capture_default_str();
  app.add_flag_callback(
         "--no-chat-template", [&choice] { choice = "none"; }, "the same as --chat-template none")
      ->excludes(named);
}

/// A check against the empty text that a shell makes of a variable nobody set.
inline CLI::Validator not_empty() {
  return {[](std::string& text) { return text.empty() ? std::string("expected a name, found ''") : std::string(); }, ""};
}

/// Multiple-choice questions, and how they are asked; returns the first of the options.
inline CLI::Option* add_choices(CLI::App& app, std::string& choices, Index& shots, std::string& shots_file, std::string& score) {
  auto* option = app.add_option("--choices", choices,
                                "multiple-choice questions, asked as MMLU's are: JSON lines of question, choices, answer and maybe subject, "
                                "or MMLU's CSV; sample: 50 simple ones of our own");
  option->check(not_empty());
  auto* shown = add_number(app, "--shots", shots, "answered questions of the same subject before each of --choices", 0, most_examples);
  shown->needs(option);
  app.add_option("--shots-file", shots_file, "where those are from; default: the first of --choices, which are not asked then")
      ->check(not_empty())
      ->needs(shown);
  app.add_option("--choice-score", score,
                 "what decides: letters, the likelihood of \" A\", \" B\" ... behind the listed choices; answers, that of each choice's text, "
                 "which is not listed, per character")
      ->check(CLI::IsMember({"letters", "answers"}))
      ->capture_default_str()
      ->needs(option);
  return option;
}

}  // namespace qdylora::examples
