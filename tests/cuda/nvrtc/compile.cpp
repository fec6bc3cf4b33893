// Compiles a file of kernels with NVRTC, as a program that makes kernels while it runs would.
//
//   compile SOURCE STAND_INS ARCHITECTURE INCLUDE ...
//
// NVRTC has no standard library: STAND_INS, a header, takes the place of each header of it.
#include <nvrtc.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

std::string contents(const char* path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// The first has the text, the others include it.
constexpr const char* headers[] = {"stand_ins", "algorithm", "array",   "atomic",      "bit",         "cmath",   "concepts",
                                   "cstddef",   "cstdint",   "cstring", "limits",      "new",         "memory",  "optional",
                                   "span",      "stdexcept", "string",  "string_view", "type_traits", "utility", "vector"};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) return std::fprintf(stderr, "compile SOURCE STAND_INS ARCHITECTURE INCLUDE ...\n"), 2;
  const std::string source = contents(argv[1]), stand_ins = contents(argv[2]);
  std::vector<std::string> options{"-std=c++20", "-default-device", "-arch=sm_" + std::string(argv[3])};
  for (int i = 4; i < argc; ++i) options.push_back("-I" + std::string(argv[i]));
  std::vector<const char*> arguments, texts(std::size(headers), "#include <stand_ins>");
  texts[0] = stand_ins.c_str();
  for (const auto& option : options) arguments.push_back(option.c_str());
  nvrtcProgram program = nullptr;
  nvrtcResult result = nvrtcCreateProgram(&program, source.c_str(), argv[1], static_cast<int>(texts.size()), texts.data(), headers);
  if (result == NVRTC_SUCCESS) result = nvrtcCompileProgram(program, static_cast<int>(arguments.size()), arguments.data());
  std::size_t size = 0;
  nvrtcGetProgramLogSize(program, &size);
  std::string log(size, '\0');
  nvrtcGetProgramLog(program, log.data());
  if (result != NVRTC_SUCCESS) return std::fprintf(stderr, "%s\n%s\n", nvrtcGetErrorString(result), log.c_str()), 1;
  nvrtcGetCUBINSize(program, &size);
  std::string code(size, '\0');
  nvrtcGetCUBIN(program, code.data());
  nvrtcDestroyProgram(&program);
  std::printf("sm_%s: %zu bytes\n", argv[3], size);
  return code.find(".text.") != std::string::npos ? 0 : 1;  // a kernel has a section of this name
}
