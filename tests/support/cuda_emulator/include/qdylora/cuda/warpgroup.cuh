// The names of the library's <qdylora/cuda/warpgroup.cuh> with their meaning on a CPU. A product lands when it is waited for, the last moment
// a GPU may take: until then its sums are NaN, its left operand must stay as it is, and nobody may write where it reads shared memory. Warps
// are not held together as groups: each makes its own 16 rows.
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include <qdylora/cuda/swizzle.cuh>

namespace qdylora::device {

class ProductRows {
 public:
  explicit ProductRows(Shared<SwizzledRows> rows) : rows_(rows) {}
  ProductRows from(int i) const { return ProductRows(rows_.from(i)); }
  std::ptrdiff_t offset() const { return rows_.offset(); }

 private:
  Shared<SwizzledRows> rows_;
};

inline void publish_to_products() { Running::running().publish(); }

template <int count>
void begin_products(Words<4> (&)[count]) {
  Running::running().begin_products();
}

namespace emulated {

/// A warp's share of a product, from its beginning until it lands.
template <class T, int sums>
struct WarpProduct {
  static constexpr int tokens = 2 * sums;
  struct Sums {
    std::array<std::array<float, sums>, warp_size> of{};
    int products = 0;  // that are still to land
  };

  static inline std::vector<std::pair<const float*, std::weak_ptr<Sums>>> pending;  // by where the sums of lane 0 are

  std::array<const Words<4>*, warp_size> a;
  std::array<Words<4>, warp_size> a_before;
  std::array<float*, warp_size> d;
  std::shared_ptr<Sums> results;  // shared by products that add to the same sums
  bool accumulate;
  std::ptrdiff_t rows;
  int step;

  /// A row is 128 bytes; of an address in 128-byte swizzle, bits 4 to 6 are exclusive-ored with bits 7 to 9.
  template <class F>
  void for_each_piece(F f) const {
    for (int i = 0; i < tokens; ++i)
      for (int p = 2 * step; p < 2 * step + 2; ++p) {
        const std::ptrdiff_t at = rows + 128 * i + 16 * p;
        f(i, p, at ^ (at >> 3 & 0x70));
      }
  }

  void land() const {
    Running& block = Running::running();
    for (std::size_t l = 0; l < warp_size; ++l)
      if (std::memcmp(a[l], &a_before[l], sizeof(Words<4>)) != 0) block.fail("the left operand of a product was changed before it was waited for");
    const auto value = [](std::uint32_t word, int part) -> double {
      return static_cast<float>(T::from_bits(static_cast<std::uint16_t>(word >> (16 * part))));
    };
    double left[16][16], right[tokens][16];
    for (int l = 0; l < warp_size; ++l)
      for (int w = 0; w < 4; ++w)
        for (int part = 0; part < 2; ++part)
          left[l / 4 + 8 * (w % 2)][2 * (l % 4) + part + 8 * (w / 2)] = value(a_before[static_cast<std::size_t>(l)].word[w], part);
    for_each_piece([&](int i, int p, std::ptrdiff_t at) {
      block.end_reading(at, 16);
      Words<4> piece;
      std::memcpy(&piece, block.shared_begin() + at, 16);
      for (int k = 0; k < 8; ++k) right[i][8 * (p % 2) + k] = value(piece.word[k / 2], k % 2);
    });
    for (int l = 0; l < warp_size; ++l)
      for (int i = 0; i < sums; ++i) {
        const int row = l / 4 + 8 * (i % 4 / 2), col = 8 * (i / 4) + 2 * (l % 4) + i % 2;
        float& result = results->of[static_cast<std::size_t>(l)][static_cast<std::size_t>(i)];
        double sum = accumulate ? static_cast<double>(result) : 0.0;
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[col][k];
        result = static_cast<float>(sum);
      }
    if (--results->products > 0) return;  // a later product adds to them
    for (std::size_t l = 0; l < warp_size; ++l) std::copy(results->of[l].begin(), results->of[l].end(), d[l]);
  }
};

}  // namespace emulated

template <class T, bool accumulate, int sums>
void multiply_async(float (&d)[sums], const Words<4>& a, const ProductRows& rows, int step, int line = __builtin_LINE()) {
  static_assert(std::same_as<T, bfloat16> || std::same_as<T, half>);
  static_assert(sums == 16 || sums == 32);
  using Product = emulated::WarpProduct<T, sums>;
  Running& block = Running::running();
  if (!block.has_begun_products()) block.fail("multiply_async with no begin_products since the last commit_products or wait_products");
  if (rows.offset() % 1024 != 0) block.fail("multiply_async of rows that are not aligned to 1024 bytes");
  struct Own {
    float* d;
    const Words<4>* a;
    std::ptrdiff_t rows;
  } own{d, &a, rows.offset()};
  block.collective("multiply_async", all_lanes, line, own, [&](const std::array<Own*, warp_size>& lanes) {
    auto& pending = Product::pending;
    std::erase_if(pending, [](const auto& p) { return p.second.expired(); });
    Product product{};
    product.accumulate = accumulate;
    product.rows = own.rows;
    product.step = step;
    const auto before = std::find_if(pending.begin(), pending.end(), [&](const auto& p) { return p.first == lanes[0]->d; });
    const bool first = before == pending.end();
    if (!first && !accumulate) block.fail("multiply_async overwrites sums that have not been waited for");
    product.results = first ? std::make_shared<typename Product::Sums>() : before->second.lock();
    if (first) pending.emplace_back(lanes[0]->d, product.results);
    ++product.results->products;
    for (std::size_t l = 0; l < warp_size; ++l) {
      if (lanes[l]->rows != own.rows) block.fail("multiply_async: lanes name different rows");
      product.a[l] = lanes[l]->a;
      product.a_before[l] = *lanes[l]->a;
      product.d[l] = lanes[l]->d;
      if (first && accumulate) std::copy_n(lanes[l]->d, sums, product.results->of[l].begin());
      std::fill_n(lanes[l]->d, sums, std::numeric_limits<float>::quiet_NaN());
    }
    product.for_each_piece([&](int, int, std::ptrdiff_t at) { block.begin_reading(at, 16); });
    block.defer_product([product = std::make_shared<const Product>(std::move(product))] { product->land(); });
  });
}

inline void commit_products(int line = __builtin_LINE()) { Running::running().commit_products(line); }
template <int pending, int sums>
void wait_products(float (&)[sums], int line = __builtin_LINE()) {
  Running::running().wait_products(pending, line);
}

}  // namespace qdylora::device
