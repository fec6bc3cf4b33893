// What the programs share: the command line's errors and numbers. A wrong argument or file gives one clear line and exit status 2.
#pragma once

#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include <qdylora/core/error.hpp>
#include <qdylora/nn/ranks.hpp>

namespace qdylora::examples {

/// Parses the command line and runs `body`; errors go to stderr as "program: message".
template <class Body>
int run_program(CLI::App& app, int argc, char** argv, Body&& body) {
  const auto fail = [&](const std::string& message) {
    std::fprintf(stderr, "%s: %s\n", app.get_name().c_str(), message.c_str());
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

/// "1,2,4" as a rank set.
inline RankSet parse_ranks(const std::string& text) {
  std::vector<Index> ranks;
  std::size_t begin = 0;
  while (begin <= text.size()) {
    const auto end = std::min(text.find(',', begin), text.size());
    const auto item = text.substr(begin, end - begin);
    QDYLORA_EXPECTS(!item.empty() && item.size() <= 6 && item.find_first_not_of("0123456789") == std::string::npos, bad_argument,
                    "--ranks: expected numbers like 1,2,4,8, found '" + printable(text) + "'");
    ranks.push_back(std::stol(item));
    begin = end + 1;
  }
  return RankSet(std::move(ranks));
}

}  // namespace qdylora::examples
