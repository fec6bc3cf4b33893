// AdamW and Lion with moments in the host's pinned memory (Dettmers et al., "QLoRA", 2023: paged optimizers, here with explicit copies in
// place of page faults). Results are those of moments on the device, bit for bit: the same kernels work on them, part by part.
#pragma once

#include <array>
#include <cstdint>

#include <qdylora/cuda/adamw8.cuh>
#include <qdylora/cuda/paging.cuh>

namespace qdylora::detail {

template <class T>
PagedRows paged_rows(MatrixView<T> x) {
  QDYLORA_EXPECTS(x.contiguous(), unsupported, "paged moments: rows of moments must follow each other");
  return {x.data, x.cols * static_cast<Index>(sizeof(T))};
}

template <class S>
void adamw_paged(const CudaContext& context, MatrixView<S> p, MatrixView<const S> g, MatrixView<S> m, MatrixView<S> v,
                 const AdamWUpdate& update) {
  expect_adamw(p, g, m, v, update);
  context.pager().pass(std::array{paged_rows(m), paged_rows(v)}, p.rows, [&](Index begin, Index count, const std::array<void*, 2>& at) {
    adamw(context, p.middle_rows(begin, count), g.middle_rows(begin, count), MatrixView<S>(static_cast<S*>(at[0]), count, p.cols),
          MatrixView<S>(static_cast<S*>(at[1]), count, p.cols), middle_rows(update, begin, count));
  });
}

template <class S>
void lion_paged(const CudaContext& context, MatrixView<S> p, MatrixView<const S> g, MatrixView<S> m, const LionUpdate& update) {
  expect_lion(p, g, m, update);
  context.pager().pass(std::array{paged_rows(m)}, p.rows, [&](Index begin, Index count, const std::array<void*, 1>& at) {
    lion(context, p.middle_rows(begin, count), g.middle_rows(begin, count), MatrixView<S>(static_cast<S*>(at[0]), count, p.cols),
         middle_rows(update, begin, count));
  });
}

inline void adamw_paged(const CudaContext& context, MatrixView<float> p, MatrixView<const float> g, const Moments8View& moments,
                        const AdamWUpdate& update) {
  expect_adamw(p, g, moments, update);
  const std::array arrays{paged_rows(moments.m), paged_rows(moments.v), paged_rows(moments.m_absmax), paged_rows(moments.v_absmax)};
  const Index blocks = moments.m_absmax.cols;
  context.pager().pass(arrays, p.rows, [&](Index begin, Index count, const std::array<void*, 4>& at) {
    const Moments8View staged{{static_cast<std::uint8_t*>(at[0]), count, p.cols},
                              {static_cast<std::uint8_t*>(at[1]), count, p.cols},
                              {static_cast<float*>(at[2]), count, blocks},
                              {static_cast<float*>(at[3]), count, blocks}};
    adamw(context, p.middle_rows(begin, count), g.middle_rows(begin, count), staged, middle_rows(update, begin, count));
  });
}

}  // namespace qdylora::detail
