// What kernels use of the standard library, for NVRTC, which has none: libcu++'s names in std. Of what the host's part of the same headers
// mentions there are declarations alone.
#pragma once

#include <cuda/std/__algorithm_>
#include <cuda/std/array>
#include <cuda/std/atomic>
#include <cuda/std/bit>
#include <cuda/std/cmath>
#include <cuda/std/concepts>
#include <cuda/std/cstddef>
#include <cuda/std/cstdint>
#include <cuda/std/functional>
#include <cuda/std/limits>
#include <cuda/std/optional>
#include <cuda/std/span>
#include <cuda/std/tuple>
#include <cuda/std/type_traits>
#include <cuda/std/utility>

namespace std {

using namespace ::cuda::std;
using ::erfc;  // which libcu++ lacks

struct string_view {
  const char* text;
  ::cuda::std::size_t length = 0;
  constexpr string_view(const char* text_) : text(text_) {
    while (text[length] != 0) ++length;
  }
  constexpr ::cuda::std::size_t size() const { return length; }
  string_view substr(::cuda::std::size_t begin, ::cuda::std::size_t count) const;
  const char* begin() const;
  const char* end() const;
};

struct string {
  string();
  string(const char* text);
  explicit string(string_view text);
  operator string_view() const;
  bool empty() const;
  string& operator+=(char c);
  string& operator+=(const string& text);
  string& append(const string& text);
};
string operator+(const string& a, const string& b);
template <class T>
string to_string(T value);

struct runtime_error {
  explicit runtime_error(const string& what);
  const char* what() const;
};

template <class T>
struct vector {
  vector();
  template <class I>
  vector(I begin, I end);
  T* data();
  const T* data() const;
  ::cuda::std::size_t size() const;
  T* begin();
  T* end();
  T& operator[](::cuda::std::size_t i);
  void resize(::cuda::std::size_t size);
  template <class I>
  void assign(I begin, I end);
};

}  // namespace std
