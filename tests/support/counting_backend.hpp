// A third backend: the CPU's operations, counted. An ordinary class with the members that the Backend concept lists, no base and
// nothing registered; it is also the shortest example of what a backend of one's own takes.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include <qdylora/cpu/cpu.hpp>

namespace test {

class CountingBackend {
 public:
  using Memory = qdylora::HostMemory;

  /// A dense weight that a product read, or a gradient that one added to.
  struct Touched {
    const void* data = nullptr;
    qdylora::Index rows = 0;
    qdylora::Index cols = 0;
    bool operator==(const Touched&) const = default;
  };
  struct Counts {
    int quantize = 0;                        // calls
    int dequantize = 0;                      // calls
    int matmul_quantized = 0;                // x . W^T
    int matmul_transposed_quantized = 0;     // dy . W
    std::vector<Touched> dense_reads = {};   // by either product
    std::vector<Touched> gradients = {};
    qdylora::Index adamw_elements = 0, squared_elements = 0, filled_elements = 0;

    qdylora::Index dense_elements() const {
      qdylora::Index sum = 0;
      for (const auto& read : dense_reads) sum += read.rows * read.cols;
      return sum;
    }
  };

  explicit CountingBackend(qdylora::Cpu cpu = {}) : cpu_(std::move(cpu)), counts_(std::make_shared<Counts>()) {}

  /// Shared by all copies.
  const Counts& counts() const { return *counts_; }
  void forget() const { *counts_ = {}; }

  // memory
  template <class T>
  void fill(qdylora::MatrixView<T> y, std::type_identity_t<T> value) const {
    counts_->filled_elements += y.size();
    cpu_.fill(y, value);
  }
  template <class X, class Y>
  void copy(qdylora::MatrixView<X> x, qdylora::MatrixView<Y> y) const {
    cpu_.copy(x, y);
  }
  template <class T>
  void upload(qdylora::In<T> x, qdylora::MatrixView<T> y) const {
    cpu_.upload(x, y);
  }
  template <class T>
  void download(qdylora::In<T> x, qdylora::MatrixView<T> y) const {
    cpu_.download(x, y);
  }
  void synchronize() const { cpu_.synchronize(); }

  // frozen weights
  template <qdylora::CodeFormat Format, class Scales, class T>
  auto quantize(qdylora::MatrixView<T> weight, qdylora::QuantizeOptions options) const {
    ++counts_->quantize;
    return cpu_.quantize<Format, Scales>(weight, options);
  }
  template <class Weight, class T>
  void dequantize(const Weight& weight, qdylora::MatrixView<T> y) const {
    ++counts_->dequantize;
    cpu_.dequantize(weight, y);
  }

  // products
  template <class T, class W, class Y>
  void matmul(qdylora::MatrixView<T> x, const W& w, qdylora::MatrixView<Y> y, qdylora::Update update) const {
    count(w, counts_->matmul_quantized);
    cpu_.matmul(x, w, y, update);
  }
  template <class T, class W, class Y>
  void matmul_transposed(qdylora::MatrixView<T> x, const W& w, qdylora::MatrixView<Y> y, qdylora::Update update) const {
    count(w, counts_->matmul_transposed_quantized);
    cpu_.matmul_transposed(x, w, y, update);
  }
  template <class U, class T, class S>
  void weight_gradient(qdylora::MatrixView<U> u, qdylora::MatrixView<T> x, qdylora::MatrixView<S> g, qdylora::Update update) const {
    counts_->gradients.push_back({g.data, g.rows, g.cols});
    cpu_.weight_gradient(u, x, g, update);
  }

  // elementwise
  template <class T>
  void add(qdylora::In<T> x, qdylora::MatrixView<T> y) const {
    cpu_.add(x, y);
  }
  template <class T>
  void add_row(qdylora::In<qdylora::Accumulator<T>> row, qdylora::MatrixView<T> y) const {
    cpu_.add_row(row, y);
  }
  template <class T>
  void scale_columns(qdylora::In<T> x, std::span<const qdylora::Accumulator<T>> factors, qdylora::MatrixView<T> y) const {
    cpu_.scale_columns(x, factors, y);
  }
  template <class T, class U, class S>
  void column_products(qdylora::MatrixView<T> first, qdylora::MatrixView<U> second, qdylora::MatrixView<S> sums) const {
    cpu_.column_products(first, second, sums);
  }
  template <class T>
  void dropout(qdylora::In<T> x, float probability, qdylora::DropoutKey key, qdylora::MatrixView<T> y,
               qdylora::Update update) const {
    cpu_.dropout(x, probability, key, y, update);
  }

  // rows
  template <class T>
  void gather_rows(qdylora::In<T> x, std::span<const qdylora::Index> rows, qdylora::MatrixView<T> y) const {
    cpu_.gather_rows(x, rows, y);
  }
  template <class T>
  void scatter_rows(qdylora::In<T> x, std::span<const qdylora::Index> rows, qdylora::MatrixView<T> y) const {
    cpu_.scatter_rows(x, rows, y);
  }

  // optimizer
  template <class S>
  void adamw(qdylora::MatrixView<S> value, qdylora::In<S> gradient, qdylora::MatrixView<S> m, qdylora::MatrixView<S> v,
             const qdylora::AdamWUpdate& update) const {
    counts_->adamw_elements += value.size();
    cpu_.adamw(value, gradient, m, v, update);
  }
  template <class S>
  double sum_squares(qdylora::MatrixView<S> x) const {
    counts_->squared_elements += x.size();
    return cpu_.sum_squares(x);
  }

 private:
  template <qdylora::CodeFormat Format, class Scales>
  void count(const qdylora::QuantizedView<Format, Scales>&, int& calls) const {
    ++calls;
  }
  template <class S>
  void count(const qdylora::MatrixView<S>& weight, int&) const {
    counts_->dense_reads.push_back({weight.data, weight.rows, weight.cols});
  }

  qdylora::Cpu cpu_;
  std::shared_ptr<Counts> counts_;
};

static_assert(qdylora::Backend<CountingBackend, float> && qdylora::Backend<CountingBackend, double> &&
              qdylora::Backend<CountingBackend, qdylora::bfloat16> && qdylora::Backend<CountingBackend, qdylora::half>);
static_assert(!qdylora::TransformerBackend<CountingBackend, float>);

}  // namespace test
