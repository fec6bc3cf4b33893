// LoRAAdapter: the trainable pair A, B of a low-rank update (Hu et al. 2021) whose first b rows are the update of rank b (DyLoRA,
// Valipour et al. 2022):  delta W_b = s_b * sum_{i < b} g_b[i] * B[i, :]^T A[i, :].
//
// A is [r, in] and B is kept transposed, [r, out]: both rank-major, so rank b is the first b rows of values, gradients, moments and files.
#pragma once

#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <qdylora/nn/parameter.hpp>
#include <qdylora/nn/ranks.hpp>
#include <qdylora/core/random.hpp>

namespace qdylora {

/// The scale s_b at rank b, for an adapter of maximal rank r.
enum class ScalePolicy {
  constant,         // alpha / r: a row means the same at every rank
  over_rank,        // alpha / b: DyLoRA and QDyLoRA as published
  over_sqrt_rank,   // alpha / sqrt(b): rsLoRA (Kalajdzievski 2023)
};

/// Which rows a rank trains. prefix: all rows of the rank. last_row: only row b - 1 (DyLoRA's "frozen" variant).
enum class GradientRows { prefix, last_row };

struct LoRAOptions {
  Index max_rank = 8;
  float alpha = 16.0f;
  ScalePolicy scale = ScalePolicy::constant;
  GradientRows gradient_rows = GradientRows::prefix;
  float dropout = 0.0f;          // on the adapter's input only; see DynamicLoRALinear::set_training
  std::uint64_t seed = 0;        // of A's initial values and of dropout masks
  std::uint32_t layer = 0;       // tells layers of one seed apart
  std::string name = "adapter";
  std::vector<Index> gated_ranks = {};  // ranks with a gate vector g_b of their own; empty: none
  bool dora = false;                    // a trained magnitude for each output (nn/magnitude.hpp)
  bool train_bias = false;              // the layer's bias trains too, where it has one (PEFT's bias = "lora_only")
};

constexpr std::string_view name(ScalePolicy policy) noexcept {
  switch (policy) {
    case ScalePolicy::constant: return "alpha/r";
    case ScalePolicy::over_rank: return "alpha/b";
    case ScalePolicy::over_sqrt_rank: return "alpha/sqrt(b)";
  }
  return "unknown";
}

template <class S, MemoryResource Memory = HostMemory>
class LoRAAdapter {
 public:
  using Param = Parameter<S, Memory>;

  /// A uniform in +-1/sqrt(in) (torch's kaiming_uniform_ with a = sqrt(5), as PEFT), B zero; on a device, both as initialize leaves them.
  /// A magnitude begins as the base's, which a layer knows: here it is zero.
  /// Throws Errc::rank_range unless 1 <= max_rank <= 65535, Errc::unsupported for gates on a device.
  LoRAAdapter(Index in, Index out, LoRAOptions options) : options_(std::move(options)) {
    const Index r = options_.max_rank;
    QDYLORA_EXPECTS(r >= 1 && r <= 65535, rank_range, options_.name + ": max_rank " + std::to_string(r) + " is not in 1 ... 65535");
    QDYLORA_EXPECTS(std::isfinite(options_.alpha) && options_.alpha > 0.0f, bad_argument, options_.name + ": alpha must be positive");
    QDYLORA_EXPECTS(options_.dropout >= 0.0f && options_.dropout < 1.0f, bad_argument, options_.name + ": dropout is not in [0, 1)");
    a_ = std::make_shared<Param>(options_.name + ".lora_A", r, in);
    b_ = std::make_shared<Param>(options_.name + ".lora_B", r, out);
    QDYLORA_EXPECTS(Memory::host || options_.gated_ranks.empty(), unsupported, options_.name + ": gates are for adapters in host memory");
    if (!options_.gated_ranks.empty()) {
      const RankSet ranks = [this] {
        try {
          return RankSet{options_.gated_ranks};
        } catch (const Error& error) {
          throw Error(error.code(), options_.name + ": gated_ranks: " + error.what());
        }
      }();
      QDYLORA_EXPECTS(ranks.max() <= r, rank_range, options_.name + ": gated rank " + std::to_string(ranks.max()) + " is above max_rank");
      options_.gated_ranks.assign(ranks.begin(), ranks.end());
      gates_ = std::make_shared<Param>(options_.name + ".lora_gates", ranks.size(), r);
      if constexpr (Memory::host)
        for (S& g : gates_->value.span()) g = S{1};
    }
    if (options_.dora) magnitude_ = std::make_shared<Param>(options_.name + ".lora_magnitude_vector", 1, out);
    if constexpr (Memory::host) draw_a(a_->value.span());
  }

  /// No adapter, where a layer is frozen: its one rank is 0, and it has no parameters.
  static LoRAAdapter none(Index in, Index out, const std::string& name) { return LoRAAdapter(Absent{}, in, out, name); }

  /// Gives an adapter in a device's memory the values that one in host memory begins with; a magnitude, none.
  template <class Backend>
  void initialize(const Backend& backend) {
    Matrix<S> a(max_rank(), in());
    draw_a(a.span());
    backend.upload(a.view(), a_->value.view());
    for (const MatrixView<S> zero : {b_->value.view(), a_->gradient.view(), b_->gradient.view()}) backend.fill(zero, S{});
    if (dora()) backend.fill(magnitude_->gradient.view(), S{});
    backend.synchronize();  // a's memory is given back
  }

  const LoRAOptions& options() const noexcept { return options_; }
  /// For writing what passes read: scale, alpha, dropout, gradient_rows ... What the adapter was made of, its rank and whether it has gates, a
  /// magnitude or a bias, stays as it is.
  LoRAOptions& options() noexcept { return options_; }
  Index max_rank() const noexcept { return a_->value.rows(); }
  Index in() const noexcept { return a_->value.cols(); }
  Index out() const noexcept { return b_->value.cols(); }

  Param& a() noexcept { return *a_; }
  const Param& a() const noexcept { return *a_; }
  Param& b() noexcept { return *b_; }
  const Param& b() const noexcept { return *b_; }
  bool gated() const noexcept { return gates_ != nullptr; }
  Param& gates() noexcept { return *gates_; }
  const Param& gates() const noexcept { return *gates_; }

  bool dora() const noexcept { return magnitude_ != nullptr; }
  Param& magnitude() noexcept { return *magnitude_; }
  const Param& magnitude() const noexcept { return *magnitude_; }

  /// A bias that trains: what is added to an output in place of the layer's own at every rank but 0.
  bool biased() const noexcept { return bias_ != nullptr; }
  Param& bias() noexcept { return *bias_; }
  const Param& bias() const noexcept { return *bias_; }
  /// Gives the adapter one [1, out], of zeros on the host and of nothing yet on a device: LoRAOptions::train_bias, for a layer with a bias.
  void add_bias() {
    if (bias_ == nullptr) bias_ = std::make_shared<Param>(options_.name + ".bias", 1, out());  // else it is an optimizer's already
  }

  /// A, B, and the magnitude and bias where there are. For LoRA+ (Hayou et al. 2024) B's learning rate is a multiple of A's:
  /// b().row_lr.assign(max_rank, ratio), which Trainer does by TrainerOptions::b_lr_ratio.
  Parameters<S, Memory> parameters() const {
    if (max_rank() == 0) return {};
    Parameters<S, Memory> all{a_, b_};
    for (const auto& more : {magnitude_, bias_})
      if (more != nullptr) all.push_back(more);
    return all;
  }
  Parameters<S, Memory> gate_parameters() const {
    return gated() ? Parameters<S, Memory>{gates_} : Parameters<S, Memory>{};
  }

  /// s_b. Rank 0 has none.
  S scale(Index rank) const {
    check_rank(rank);
    const double alpha = static_cast<double>(options_.alpha);
    switch (options_.scale) {
      case ScalePolicy::constant: return static_cast<S>(alpha / static_cast<double>(max_rank()));
      case ScalePolicy::over_rank: return static_cast<S>(alpha / static_cast<double>(std::max<Index>(rank, 1)));
      case ScalePolicy::over_sqrt_rank: return static_cast<S>(alpha / std::sqrt(static_cast<double>(std::max<Index>(rank, 1))));
    }
    return S{};
  }

  /// Row of the gate matrix that holds rank's gates; -1 if the rank has none.
  Index gate_row(Index rank) const noexcept {
    const auto& ranks = options_.gated_ranks;
    const auto at = std::lower_bound(ranks.begin(), ranks.end(), rank);
    return at != ranks.end() && *at == rank ? at - ranks.begin() : -1;
  }

  /// What column i of h = x A^T is multiplied with at a rank: s_b * g_b[i] below the rank, 0 from there to `width`.
  std::vector<S> coefficients(Index rank, Index width) const {
    std::vector<S> result(static_cast<std::size_t>(width));
    if (rank == 0) return result;
    const S s = scale(rank);
    std::fill_n(result.begin(), std::min(rank, width), s);
    if constexpr (Memory::host)
      if (const Index row = gate_row(rank); row >= 0)
        for (Index i = 0; i < std::min(rank, width); ++i) result[static_cast<std::size_t>(i)] = s * gates_->value(row, i);
    return result;
  }

  void check_rank(Index rank) const {
    QDYLORA_EXPECTS(rank >= 0 && rank <= max_rank(), rank_range,
                    options_.name + ": rank " + std::to_string(rank) + " is not in 0 ... " + std::to_string(max_rank()));
  }

  // Second moments of z = A x and of dz = B dy, r x r, gathered by the layer's passes while `collecting`; what re-ordering needs.
  bool collecting = false;
  Matrix<S, Memory> moment_a, moment_b;

  void start_collecting() requires(Memory::host) {
    moment_a = Matrix<S, Memory>(max_rank(), max_rank());
    moment_b = Matrix<S, Memory>(max_rank(), max_rank());
    collecting = true;
  }
  /// The same in any memory.
  template <class Backend>
  void start_collecting(const Backend& backend) {
    for (auto* moment : {&moment_a, &moment_b}) {
      moment->resize(max_rank(), max_rank());
      backend.fill(moment->view(), S{});
    }
    collecting = true;
  }
  /// Forgets the moments.
  void stop_collecting() {
    moment_a = {};
    moment_b = {};
    collecting = false;
  }

 private:
  struct Absent {};
  LoRAAdapter(Absent, Index in, Index out, const std::string& name)
      : options_{.max_rank = 0, .name = name},
        a_(std::make_shared<Param>(name + ".lora_A", 0, in)),
        b_(std::make_shared<Param>(name + ".lora_B", 0, out)) {}

  void draw_a(std::span<S> a) const {
    Rng rng(options_.seed, Purpose::init, options_.layer);
    const S bound = S{1} / std::sqrt(static_cast<S>(std::max<Index>(in(), 1)));
    for (S& value : a) value = bound * (S{2} * static_cast<S>(rng.uniform()) - S{1});
  }

  LoRAOptions options_;
  std::shared_ptr<Param> a_, b_, gates_, magnitude_, bias_;
};

/// A copy in host memory, with the moments but without gradients, of an adapter on a device. Waits.
template <class S, MemoryResource Memory, class Backend>
LoRAAdapter<S> to_host(const LoRAAdapter<S, Memory>& adapter, const Backend& backend) {
  LoRAAdapter<S> copy(adapter.in(), adapter.out(), adapter.options());
  backend.download(adapter.a().value.view(), copy.a().value.view());
  backend.download(adapter.b().value.view(), copy.b().value.view());
  if (adapter.dora()) backend.download(adapter.magnitude().value.view(), copy.magnitude().value.view());
  if (adapter.biased()) {
    copy.add_bias();
    backend.download(adapter.bias().value.view(), copy.bias().value.view());
  }
  for (const auto& [from, to] : {std::pair(&adapter.moment_a, &copy.moment_a), std::pair(&adapter.moment_b, &copy.moment_b)}) {
    *to = Matrix<S>(from->rows(), from->cols());
    backend.download(from->view(), to->view());
  }
  return copy;
}

/// Gives an adapter the values of one of its shape in host memory, which may be let go at once.
template <class S, MemoryResource Memory, class Backend>
void assign(LoRAAdapter<S, Memory>& adapter, const LoRAAdapter<S>& values, const Backend& backend) {
  backend.upload(values.a().value.view(), adapter.a().value.view());
  backend.upload(values.b().value.view(), adapter.b().value.view());
  if (adapter.dora()) backend.upload(values.magnitude().value.view(), adapter.magnitude().value.view());
  if (adapter.biased()) backend.upload(values.bias().value.view(), adapter.bias().value.view());
  backend.synchronize();
}

}  // namespace qdylora
