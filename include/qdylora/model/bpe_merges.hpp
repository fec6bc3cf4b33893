// Byte-pair merging (Sennrich et al. 2016) within a word: neighbours merge by rank, the lowest first, then from the left, until none can.
// Where the ranks come from, a list of merges or the scores of the products, is the tokenizer's affair.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include <qdylora/core/scalar.hpp>

namespace qdylora::detail {

class BpeMerges {
  struct Merge {
    std::int32_t rank;
    std::int32_t product;
  };
  // A word is a doubly linked list of symbols; a symbol merged into its left neighbour has token -1.
  struct Symbol {
    std::int32_t token;
    Index previous;
    Index next;
  };
  // A merge that was possible when it was found: valid while both tokens still stand at their places.
  struct Candidate {
    Merge merge;
    Index left;
    Index right;
    std::int32_t left_token;
    std::int32_t right_token;
    // The heap's top is its largest: the lowest rank, then the leftmost.
    bool operator<(const Candidate& other) const noexcept {
      return merge.rank != other.merge.rank ? merge.rank > other.merge.rank : left > other.left;
    }
  };

 public:
  /// The word that is being merged; kept between words for its capacity.
  class Word {
   public:
    void clear() noexcept { symbols_.clear(); }
    void push(std::int32_t token) {
      const auto place = static_cast<Index>(symbols_.size());
      symbols_.push_back({token, place - 1, place + 1});
    }

   private:
    friend class BpeMerges;
    std::vector<Symbol> symbols_;
    std::vector<Candidate> heap_;
  };

  void reserve(std::size_t merges) { merges_.reserve(merges); }

  /// Returns false where the pair has a merge already, which stays. Merges of one rank go from the left.
  bool add(std::int32_t left, std::int32_t right, std::int32_t rank, std::int32_t product) {
    return merges_.emplace(key(left, right), Merge{rank, product}).second;
  }

  /// Merges the word and appends what is left of it to `ids`. A heap of candidates instead of a search per merge keeps a megabyte without
  /// a space at O(n log n).
  void merge(Word& word, std::vector<std::int32_t>& ids) const {
    auto& symbols = word.symbols_;
    auto& heap = word.heap_;
    const auto at = [&](Index place) -> Symbol& { return symbols[static_cast<std::size_t>(place)]; };
    const auto size = static_cast<Index>(symbols.size());
    const auto offer = [&](Index left, Index right) {
      if (left < 0 || right >= size) return;
      const auto found = merges_.find(key(at(left).token, at(right).token));
      if (found == merges_.end()) return;
      heap.push_back({found->second, left, right, at(left).token, at(right).token});
      std::push_heap(heap.begin(), heap.end());
    };
    for (Index place = 1; place < size; ++place) offer(place - 1, place);
    while (!heap.empty()) {
      std::pop_heap(heap.begin(), heap.end());
      const Candidate best = heap.back();
      heap.pop_back();
      Symbol& left = at(best.left);
      Symbol& right = at(best.right);
      // Tokens only grow, so equal tokens at both places mean that nothing between or inside of them has changed.
      if (left.token != best.left_token || right.token != best.right_token) continue;
      left.token = best.merge.product;
      left.next = right.next;
      right.token = -1;
      if (right.next < size) at(right.next).previous = best.left;
      offer(left.previous, best.left);
      offer(best.left, left.next);
    }
    for (const Symbol& symbol : symbols)
      if (symbol.token >= 0) ids.push_back(symbol.token);
  }

 private:
  static std::uint64_t key(std::int32_t left, std::int32_t right) noexcept {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 | static_cast<std::uint32_t>(right);
  }
  // Keys are pairs of small integers: mixed (the finalizer of splitmix64), so that they spread whatever the map's modulus is.
  struct Hash {
    std::size_t operator()(std::uint64_t key) const noexcept {
      key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9ull;
      key = (key ^ (key >> 27)) * 0x94D049BB133111EBull;
      return static_cast<std::size_t>(key ^ (key >> 31));
    }
  };

  std::unordered_map<std::uint64_t, Merge, Hash> merges_;
};

}  // namespace qdylora::detail
