// Workers: training by several processes or threads, each on its part of every batch, over whatever engine sums numbers for them.
#pragma once

#include <algorithm>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/core/matrix.hpp>
#include <qdylora/nn/parameter.hpp>

namespace qdylora {

/// One of `count` workers, as it sees the others. All begin with the same parameters and seeds, so that they draw the same ranks and
/// re-order alike; what they must exchange is the sum of their gradients, of the rows of the step's rank alone, gathered in one buffer.
template <class S, MemoryResource Memory = HostMemory>
class Workers {
 public:
  /// Replaces each number by its sum over all workers, to the same bits on all of them, or throws. All workers call it as often, with as
  /// many numbers. They are in Memory; the sum is ordered as the backend's operations are.
  using AllReduce = std::function<void(std::span<S>)>;

  Workers() = default;  // one, alone
  /// Throws Errc::bad_argument unless 0 <= index < count.
  Workers(Index index, Index count, AllReduce all_reduce) : index_(index), count_(count), all_reduce_(std::move(all_reduce)) {
    QDYLORA_EXPECTS(index >= 0 && index < count, bad_argument,
                    "Workers: there is no worker " + std::to_string(index) + " of " + std::to_string(count));
  }

  Index index() const noexcept { return index_; }
  Index count() const noexcept { return count_; }
  bool alone() const noexcept { return count_ == 1; }

  /// `matrices` of Memory, and `numbers` of the host, which travel as S, become their sums over all workers: one call of all_reduce. Waits.
  template <class Backend>
  void sum(std::span<const MatrixView<S>> matrices, std::span<double> numbers, const Backend& backend) {
    if (alone()) return;
    std::vector<S> staged(numbers.size());
    std::ranges::transform(numbers, staged.begin(), [](double x) { return static_cast<S>(x); });
    const auto count = static_cast<Index>(numbers.size());
    Index size = count;
    for (const auto& m : matrices) size += m.size();
    flat_.resize(1, size);
    const auto tail = flat_.view().middle_cols(size - count, count);
    const auto for_each = [&](auto&& f) {
      Index begin = 0;
      for (const auto& m : matrices) {
        f(m, MatrixView<S>(flat_.data() + begin, m.rows, m.cols));
        begin += m.size();
      }
    };
    for_each([&](MatrixView<S> m, MatrixView<S> part) { backend.copy(MatrixView<const S>(m), part); });
    backend.upload(MatrixView<const S>(staged.data(), 1, count), tail);
    all_reduce_({flat_.data(), static_cast<std::size_t>(size)});
    for_each([&](MatrixView<S> m, MatrixView<S> part) { backend.copy(MatrixView<const S>(part), m); });
    backend.download(MatrixView<const S>(tail), MatrixView<S>(staged.data(), 1, count));
    std::ranges::copy(staged, numbers.begin());
  }

  /// Numbers become their means over all workers.
  template <class Backend>
  void average(std::span<double> numbers, const Backend& backend) {
    sum({}, numbers, backend);
    for (double& x : numbers) x /= static_cast<double>(count_);
  }

  /// Between the backward pass and the optimizer's step: sums the gradients of each parameter's first `rows` rows, all that a step of this
  /// rank has, and `numbers` beside them. Rows that any worker has touched are touched.
  template <class Backend>
  void sum_gradients(const Parameters<S, Memory>& parameters, Index rows, std::span<double> numbers, const Backend& backend) {
    if (alone()) return;
    const auto rows_of = [rows](const auto& p) { return std::min(rows, p->gradient.rows()); };
    std::vector<MatrixView<S>> gradients;
    std::vector<double> beside(numbers.begin(), numbers.end());
    for (const auto& p : parameters) {
      gradients.push_back(p->gradient.view().top_rows(rows_of(p)));
      beside.insert(beside.end(), p->touched.begin(), p->touched.begin() + rows_of(p));
    }
    sum(gradients, beside, backend);
    auto at = beside.begin() + static_cast<std::ptrdiff_t>(numbers.size());
    std::copy(beside.begin(), at, numbers.begin());
    for (const auto& p : parameters)
      for (Index i = 0; i < rows_of(p); ++i) p->touched[static_cast<std::size_t>(i)] = *at++ != 0.0;
  }

 private:
  Index index_ = 0, count_ = 1;
  AllReduce all_reduce_;
  Matrix<S, Memory> flat_;
};

}  // namespace qdylora
