// The Backend concept: the only place where layers and devices meet.
//
// A backend is a cheap, copyable handle passed by value. Its operations take views of memory it can reach (Backend::Memory) and are
// stream-ordered: on a device they return before the work is done. Only download, quantize, sum_squares and synchronize wait.
// Results do not depend on the number of threads. Shapes are checked on every call (Errc::shape_mismatch).
//
// The concept is a conjunction of named parts, each requirement with its meaning, so that a compiler names the missing operation.
// T is the compute type of activations, A = Accumulator<T> the type of adapter weights, gradients and statistics.
// Weights W [out, in] are QuantizedView or dense MatrixView<const S>; nn/weight.hpp holds them.
#pragma once

#include <concepts>
#include <cstdint>
#include <span>

#include <qdylora/core/matrix.hpp>
#include <qdylora/core/random.hpp>
#include <qdylora/optimizer_update.hpp>
#include <qdylora/quant/binary_code.hpp>
#include <qdylora/quant/quantize.hpp>

namespace qdylora {

class Cpu;   // cpu/cpu.hpp
class Cuda;  // cuda/cuda.cuh

/// Whether an operation replaces its output or adds to it.
enum class Update { overwrite, accumulate };

/// The identity of a dropout mask: element (i, j) of an activation [tokens, features] is kept where
/// random_word(seed, Purpose::dropout, layer, step, (first_row + i) * features + j) >= probability * 2^32.
struct DropoutKey {
  std::uint64_t seed = 0;
  std::uint32_t layer = 0;
  std::uint32_t step = 0;
  Index first_row = 0;  // tokens of the step before these: micro-batches together have the masks of one big batch
};

/// Which elements of a head rotary embedding rotates together. interleaved: (2i, 2i + 1), as Llama's own weights and GGUF files have
/// them. half_split: (i, i + head_dim / 2), as Hugging Face's checkpoints have them.
enum class RopeLayout { interleaved, half_split };

/// What an adapter adds to a product y of x and a weight: scale * u . b, u [tokens, rank], b [rank, columns of y], rank-major as LoRAAdapter
/// has it. Empty: nothing. Where there is an a [rank, columns of x], u is memory that x . a^T is written to on the way, apart from x and y;
/// else it is read.
template <Scalar T>
struct AdapterTerm {
  MatrixView<Accumulator<T>> u = {};
  MatrixView<const T> b = {};
  Accumulator<T> scale = 1;
  MatrixView<const T> a = {};
};

/// Heads of an attention layer. Query head h reads key-value head h / (heads / kv_heads).
struct HeadShape {
  Index heads = 1;
  Index kv_heads = 1;
  Index head_dim = 64;
};

/// A matrix that a caller of a backend's operations makes and lets go between them: uninitialized, and where the backend has memory in the
/// order of its work, of that.
template <class S, class B>
Matrix<S, typename B::Memory> temporary(const B& backend, Index rows, Index cols) {
  typename B::Memory memory{};
  if constexpr (requires { backend.memory(); }) memory = backend.memory();
  Matrix<S, typename B::Memory> matrix(0, 0, memory);
  matrix.resize(rows, cols);
  return matrix;
}

/// The backend with exact products, where it has others: for what is computed once and kept.
template <class B>
decltype(auto) exact(const B& backend) {
  if constexpr (requires { backend.exact(); }) return backend.exact();
  else return (backend);
}

// ---- the parts -----------------------------------------------------------------------------------------------------------------

/// Memory that the operations reach, and its traffic with the host.
template <class B, class T>
concept HasMemory = MemoryResource<typename B::Memory> && requires(const B b, MatrixView<T> y, MatrixView<const T> x) {
  b.fill(y, T{});      // y[i, j] = value
  b.copy(x, y);        // y = x, both in Backend::Memory; shapes equal
  b.upload(x, y);      // host -> backend; x lives until synchronize, or what waits
  b.download(x, y);    // backend -> host; waits
  b.synchronize();     // waits for all work given so far
};

/// Frozen weights.
template <class B, class T>
concept HasQuantize =
    requires(const B b, MatrixView<const T> x, MatrixView<T> y, QuantizeOptions options, const QuantizedView<NF4, DoubleQuant<>> w) {
      b.template quantize<NF4, DoubleQuant<>>(x, options);  // x [out, in] -> QuantizedTensor, bit-equal to qdylora::quantize
      b.dequantize(w, y);                                   // y [out, in] = decoded w
    };

/// The products of a linear layer, with quantized weights.
template <class B, class T>
concept HasQuantizedMatmul =
    requires(const B b, MatrixView<const T> x, MatrixView<T> y, const QuantizedView<NF4, DoubleQuant<>> w, Update update) {
      b.matmul(x, w, y, update);             // y [tokens, out] (+)= x [tokens, in] . w^T
      b.matmul_transposed(x, w, y, update);  // y [tokens, in] (+)= x [tokens, out] . w
    };

/// The same with dense weights (adapters, embeddings, heads; out or in is the rank), and a weight's gradient.
template <class B, class T>
concept HasGemm = requires(const B b, MatrixView<const T> x, MatrixView<T> y, MatrixView<const Accumulator<T>> w,
                           MatrixView<Accumulator<T>> h, Update update) {
  b.matmul(x, w, h, update);             // h [tokens, r] (+)= x [tokens, in] . w[r, in]^T
  b.matmul_transposed(w, w, y, update);  // y [tokens, out] (+)= h [tokens, r] . w[r, out]
  b.weight_gradient(w, x, h, update);    // h [r, features] (+)= w [tokens, r]^T . x [tokens, features]
};

/// A linear layer's products that take its adapter's along, where a pass over y of its own would cost more; W: a weight's view. Optional.
template <class B, class T, class W>
concept HasAdapterTerm = requires(const B b, MatrixView<const T> x, const W w, MatrixView<T> y, Update update, AdapterTerm<T> adapter, Index rank) {
  { b.takes_adapter(x, w, rank) } -> std::same_as<bool>;             // whether there is, for such an x, a matmul with a term of that rank
  { b.takes_adapter_transposed(x, w, rank) } -> std::same_as<bool>;  // and a matmul_transposed
  { b.recording() } -> std::same_as<bool>;  // whether operations are taken down, to be done later and more than once
  b.matmul(x, w, y, update, adapter);             // y [tokens, out] (+)= x [tokens, in] . w^T + adapter, whose u it may write, in one pass
  b.matmul_transposed(x, w, y, update, adapter);  // y [tokens, in] (+)= x [tokens, out] . w + adapter
};

template <class B, class T>
concept HasElementwise = requires(const B b, MatrixView<const T> x, MatrixView<T> y, MatrixView<const Accumulator<T>> w,
                                  MatrixView<Accumulator<T>> h, std::span<const Accumulator<T>> factors, float p, DropoutKey key) {
  b.add(x, y);                // y += x
  b.add_row(w, y);            // y[i, j] += w[0, j]
  b.scale_columns(w, factors, h);  // h[i, j] = w[i, j] * factors[j], which are the host's
  b.column_products(w, w, h); // h[0, j] += sum_i first[i, j] * second[i, j]
  b.dropout(x, p, key, y, Update::overwrite);  // y (+)= x * mask / (1 - p)
} && (B::Memory::host || requires(const B b, MatrixView<const Accumulator<T>> w, MatrixView<Accumulator<T>> h) {
  b.add_if_finite(w, h, w, h);  // (x, y, a, c): y += x and c += a, or neither where a number of x or a is not finite
});

/// The optimizer's arithmetic.
template <class B, class T>
concept HasAdamW = requires(const B b, MatrixView<Accumulator<T>> p, MatrixView<const Accumulator<T>> g, AdamWUpdate update) {
  b.adamw(p, g, p, p, update);                            // (value, gradient, first moment, second moment), all [rows, cols]
  { b.sum_squares(g) } -> std::convertible_to<double>;    // sum of squares in double, fixed order; waits
};

/// The same with moments in 8 bits. They are decoded, updated, used, and encoded again; 1 - beta is taken in float.
template <class B>
concept HasAdamW8 = requires(const B b, MatrixView<float> p, MatrixView<const float> g, Moments8View moments, AdamWUpdate update) {
  b.adamw(p, g, moments, update);  // (value, gradient, moments)
};

/// Lion's arithmetic.
template <class B, class S>
concept HasLion = requires(const B b, MatrixView<S> p, MatrixView<const S> g, LionUpdate update) {
  b.lion(p, g, p, update);  // (value, gradient, moment), all [rows, cols]
};

/// What magnitudes (DoRA, nn/magnitude.hpp) take on top of Backend. r, h, m, norms, squares, sums, f and g are rows [1, out]. Where
/// they lie in the host's memory, the layer works on them itself.
template <class B, class T>
concept HasMagnitude = HasQuantizedMatmul<B, Accumulator<T>> && HasGemm<B, Accumulator<T>> &&
    requires(const B b, MatrixView<const T> x, MatrixView<Accumulator<T>> h) {
  b.column_products(x, x, h);  // h[0, j] += sum_i first[i, j] * second[i, j]
} && ((B::Memory::host && requires(const B b, MatrixView<const T> x, MatrixView<T> y, std::span<const Accumulator<T>> factors) {
  b.scale_columns(x, factors, y);  // y[i, j] = x[i, j] * factors[j], which are the host's
}) || requires(const B b, MatrixView<const T> x, MatrixView<T> y, MatrixView<const Accumulator<T>> r, MatrixView<Accumulator<T>> h,
               const QuantizedView<NF4, DoubleQuant<>> w, Accumulator<T> number) {
  { b.recording() } -> std::same_as<bool>;  // as HasAdapterTerm has it
  b.scale_columns(x, r, y);               // y[i, j] = x[i, j] * r[0, j]
  b.row_squares(w, h);                    // h[0, o] = sum_k w[o, k]^2, summed in double
  b.row_norms(r, r, number, h);           // (squares, sums, scale, norms): norms = sqrt(max(squares + scale * sums, 0))
  b.magnitude_factors(r, r, number, h);   // (m, norms, less, f): f = m / norms - less, 1 - less where norms is 0
  b.add_over_norms(r, r, h);              // (sums, norms, g): g += sums / norms where norms is not 0
});

/// What AlphaLinear takes of planes of signs. Optional. w [out, in]. A device also has codes of the host, and gives back its own.
template <class B, class T>
concept HasBinaryCodes = (B::Memory::host || requires(const B b, const BinaryCodedTensor<> here, const BinaryCodedTensor<typename B::Memory> there) {
  b.upload(here);
  b.download(there);
}) && requires(const B b, MatrixView<const T> x, MatrixView<T> y, const BinaryCodedView<Accumulator<T>> w,
                                  MatrixView<const Accumulator<T>> d, MatrixView<Accumulator<T>> g, Update update, Index first) {
  b.matmul(x, w, y, update);             // y (+)= x . w^T
  b.matmul_transposed(x, w, y, update);  // y (+)= x . w
  b.dequantize(w, g);                    // g = w
  b.add_sums_of_signs(d, w, first, g);   // g[k * out + first + i, h] += sum over columns j of group h of sign_k[first + i, j] * d[i, j]
};

/// RMS normalization (Zhang & Sennrich 2019): y[i, j] = x[i, j] * r_i * w[0, j],  r_i = 1 / sqrt(mean_j x[i, j]^2 + epsilon).
template <class B, class T>
concept HasNorm = requires(const B b, MatrixView<const T> x, MatrixView<T> y, MatrixView<const Accumulator<T>> w,
                           MatrixView<Accumulator<T>> r, float epsilon, Update update) {
  b.rms_norm(x, w, epsilon, y, r);              // r [tokens, 1] keeps r_i for the backward pass
  b.rms_norm_backward(x, x, w, w, y, update);   // (dy, x, w, r, dx): dx (+)= r (dy w - x r^2 mean_j(dy w x))
};

/// Layer normalization (Ba, Kiros & Hinton 2016): y[i, j] = (x[i, j] - m_i) * r_i * w[0, j] + c[0, j],  m_i = mean_j x[i, j],
/// r_i = 1 / sqrt(mean_j (x[i, j] - m_i)^2 + epsilon).
template <class B, class T>
concept HasLayerNorm = requires(const B b, MatrixView<const T> x, MatrixView<T> y, MatrixView<const Accumulator<T>> w,
                                MatrixView<Accumulator<T>> s, float epsilon, Update update) {
  b.layer_norm(x, w, w, epsilon, y, s);          // (x, w, c, epsilon, y, s): s [tokens, 2] keeps m_i and r_i for the backward pass
  b.layer_norm_backward(x, x, w, w, y, update);  // (dy, x, w, s, dx): with d = dy w and n = (x - m) r,
};                                               // dx (+)= r (d - mean_j(d) - n mean_j(d n))

/// Rotary position embedding (Su et al. 2021), in place: pair i of every head of token t turns by the angle whose cosine and sine are
/// table[positions[t], 2i] and table[positions[t], 2i + 1] (nn/rope.hpp makes the table). Direction -1 turns back: the backward pass.
template <class B, class T>
concept HasRope = requires(const B b, MatrixView<T> x, std::span<const std::int32_t> positions, MatrixView<const Accumulator<T>> table,
                           RopeLayout layout) {
  b.rope(x, positions, table, layout, 1);  // x [tokens, heads * head_dim], table [positions, head_dim]
};

/// Causal attention over sequences laid end to end: sequence s owns rows offsets[s] ... offsets[s + 1] of q, k and v.
/// q, y [tokens, heads * head_dim]; k, v [tokens, kv_heads * head_dim]; scores are scaled by 1 / sqrt(head_dim).
template <class B, class T>
concept HasAttention = requires(const B b, MatrixView<const T> x, MatrixView<T> y, MatrixView<Accumulator<T>> lse,
                                std::span<const Index> offsets, std::span<const MatrixView<const T>> caches,
                                std::span<const MatrixView<T>> ends, HeadShape shape) {
  b.attention(x, x, x, offsets, shape, y, lse);                       // lse [tokens, heads]: log-sum-exp of each row of scores
  b.attention_backward(x, x, x, x, x, lse, offsets, shape, y, y, y);  // (dy, q, k, v, y, lse) -> dq, dk, dv, overwritten
  b.copy_rows(x, ends);                             // ends[s] = x[s], a row each: new keys or values go to their caches
  b.attention_decode(x, caches, caches, shape, y);  // one query row a sequence, caches[s] [length, kv_heads * head_dim]
};

template <class B, class T>
concept HasActivation = requires(const B b, MatrixView<const T> x, MatrixView<T> y) {
  b.swiglu(x, x, y);                 // y = silu(gate) * up,  silu(a) = a / (1 + e^-a)
  b.swiglu_backward(x, x, x, y, y);  // (dy, gate, up) -> dgate, dup; may be in place of gate and up
  b.gelu(x, y);                      // y = x * Phi(x), the exact (erf) form
  b.gelu_backward(x, x, y);          // (dy, x) -> dx; may be in place of x
};

template <class B, class T>
concept HasEmbedding = requires(const B b, std::span<const std::int32_t> ids, MatrixView<const Accumulator<T>> table,
                                const QuantizedView<INT8, Float32Scales> coded, MatrixView<T> y) {
  b.embed(ids, table, y);  // y[i] = table[ids[i]]; an id outside the table is Errc::bad_argument
  b.embed(ids, coded, y);
};

/// What training the weights of a model themselves takes on top: the gradient of an embedding, and of norms' weights. Optional.
template <class B, class T>
concept HasWeightTraining = requires(const B b, std::span<const std::int32_t> ids, MatrixView<const T> x, MatrixView<Accumulator<T>> h) {
  b.embed_backward(ids, x, h);  // h[ids[i]] += x[i], in the order of i; an id outside h is Errc::bad_argument
  b.column_products(x, x, h);   // h[0, j] += sum_i first[i, j] * second[i, j]
};

/// Some rows of an activation: the positions whose loss counts.
template <class B, class T>
concept HasRowSelection = requires(const B b, std::span<const Index> rows, MatrixView<const T> x, MatrixView<T> y) {
  b.gather_rows(x, rows, y);   // y[i] = x[rows[i]]
  b.scatter_rows(x, rows, y);  // y[rows[i]] = x[i], all other rows zero
};

/// Softmax cross-entropy over rows of logits, in nats. A target of -1 is not scored.
template <class B, class T>
concept HasCrossEntropy = requires(const B b, MatrixView<Accumulator<T>> logits, std::span<const std::int32_t> targets,
                                   MatrixView<Accumulator<T>> losses) {
  b.cross_entropy(logits, targets, 1.0, losses);  // losses [rows, 1]; logits become scale * d(loss) / d(logits)
};

/// Copies between the backend's memory and the host's that run beside the operations, in order; Queue: what copy_queue returns. Optional: of
/// a device.
template <class Queue, class T>
concept IsCopyQueue = MemoryResource<typename Queue::Memory> && requires(Queue queue, MatrixView<const T> x, MatrixView<T> y,
                                                                         std::size_t ticket) {
  queue.to_host(x, y, ticket);    // y = x, behind all operations so far; y in Queue::Memory
  queue.to_device(x, y, ticket);  // x in Queue::Memory
  queue.wait(ticket);             // operations given from now on come behind the last copy of that ticket
  queue.wait_for_all();           // or behind all copies
};
template <class B>
concept HasCopyQueue = requires(const B b, std::size_t tickets) {
  { b.copy_queue(tickets) } -> IsCopyQueue<float>;
};

/// Work of the host beside the operations, such as decoding a file's rows.
template <class B>
concept HasHostLoop = requires(const B b, void (*f)(Index)) {
  b.parallel_for(Index{1}, f);  // f(0) ... f(count - 1), each once, on the host's threads; returns when all are done
};

/// What layers and optimizers need.
template <class B, class T>
concept Backend = std::copyable<B> && Scalar<T> && HasMemory<B, T> && HasQuantize<B, T> && HasQuantizedMatmul<B, T> && HasGemm<B, T> &&
                  HasElementwise<B, T> && HasAdamW<B, T>;
/// The same under a name that a template parameter called Backend does not hide: nvcc loses the qualification of qdylora::Backend.
template <class B, class T>
concept BackendFor = Backend<B, T>;

/// What a transformer needs on top.
template <class B, class T>
concept TransformerBackend = Backend<B, T> && HasNorm<B, T> && HasRope<B, T> && HasAttention<B, T> && HasActivation<B, T> &&
                             HasEmbedding<B, T> && HasRowSelection<B, T> && HasCrossEntropy<B, T> && HasHostLoop<B>;

/// What a transformer whose weights all train needs.
template <class B, class T>
concept FullBackend = TransformerBackend<B, T> && HasWeightTraining<B, T>;

}  // namespace qdylora
