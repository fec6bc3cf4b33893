// ResidualStreams: what enters each block of a decoder and what leaves the last, and where it waits for the backward pass: in the backend's
// memory, in files (PagedMemory), or, of a device, in the host's memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include <qdylora/backend.hpp>
#include <qdylora/core/paged_memory.hpp>
#include <qdylora/model/decoder_options.hpp>

namespace qdylora {

namespace detail {

// Where the streams of a backend's go that are offloaded.
template <class Backend>
struct OffloadOf {
  struct Queue {};
  using Memory = HostMemory;
};
template <HasCopyQueue Backend>
struct OffloadOf<Backend> {
  using Queue = std::remove_cvref_t<decltype(std::declval<const Backend&>().copy_queue(1))>;
  using Memory = typename Queue::Memory;
};

}  // namespace detail

/// Streams that are on a device at a time where they are offloaded.
inline constexpr std::size_t offloaded_streams = 3;

/// Offloaded, three streams are on the device at a time, in turns, stream i in place of i - 3 and i + 3. On the way up one is read by a
/// block, one is written by it, and the one before leaves; on the way down one is read, and the two below come:
///
///   work    block 4: reads 4, writes 5      block 5: reads 5, writes 6      ...     block 5's backward pass: reads 5
///   copies  3 leaves                        4 leaves                                4 and 3 come
///
/// The last three need not leave.
template <Scalar T, class Backend>
class ResidualStreams {
 public:
  using Memory = typename Backend::Memory;

  /// Throws Errc::bad_argument where streams are to leave memory although it keeps more than them (DecoderOptions::checkpoint), and
  /// unsupported where the backend's cannot: to files those of the host go, to the host a device's.
  ResidualStreams(const DecoderOptions& options, const Backend& backend)
      : backend_(backend), files_(options.checkpoint_memory), offload_(options.offload_checkpoints) {
    if (files_.has_folder()) {
      QDYLORA_EXPECTS(options.checkpoint, bad_argument, "inputs of blocks go to files only where nothing else is kept: set checkpoint");
      QDYLORA_EXPECTS(in_files, unsupported, "inputs of blocks go to files from the host's memory alone");
    }
    if (offload_) {
      QDYLORA_EXPECTS(options.checkpoint, bad_argument, "inputs of blocks go to the host only where nothing else is kept: set checkpoint");
      QDYLORA_EXPECTS(offloads, unsupported, "inputs of blocks go to the host from a device's memory alone");
    }
  }

  /// For a pass with `count` streams [tokens, width]. Of those of the pass before nothing stays.
  void begin(std::size_t count, Index tokens, Index width) {
    const std::size_t held = offload_ ? std::min(count, offloaded_streams) : count;
    if constexpr (offloads) {
      if (offload_) prepare_offload(count - held, tokens, width);
    }
    if (here_.size() > held) here_.erase(here_.begin() + static_cast<std::ptrdiff_t>(held), here_.end());
    while (here_.size() < held) {
      if constexpr (in_files) here_.emplace_back(0, 0, files_);
      else here_.emplace_back();
    }
    for (auto& stream : here_) stream.resize(tokens, width);
    count_ = count;
  }

  /// Stream i, to be written or read by what the backend is given next. Offloaded, from the first on those come in order that are written,
  /// and from the last on those that are read again.
  MatrixView<T> operator[](std::size_t i) {
    if constexpr (offloads) {
      if (queue_) queue_->wait(place(i));
    }
    return here_[place(i)].view();
  }

  /// On the way up: a block has read stream i, which the backward pass will ask for again.
  void leave(std::size_t i) {
    page_out(i);
    if constexpr (offloads) {
      if (i + here_.size() < count_) queue_->to_host(std::as_const(here_[place(i)]).view(), there_[i].view(), place(i));
    }
  }
  /// On the way down: the pass is done with stream i.
  void release(std::size_t i) {
    page_out(i);
    if constexpr (offloads) {
      if (i >= here_.size()) {
        const std::size_t next = i - here_.size();
        queue_->to_device(std::as_const(there_[next]).view(), here_[place(i)].view(), place(i));
      }
    }
  }

  /// Stream i after a pass, where none is offloaded: else Errc::unsupported.
  MatrixView<const T> kept(std::size_t i) const {
    QDYLORA_EXPECTS(!offload_, unsupported, "what enters a block was offloaded to the host");
    return here_.at(i).view();
  }

  /// Bytes of the backend's memory, unless they are in files.
  std::size_t bytes() const noexcept {
    std::size_t sum = 0;
    if (!files_.has_folder())
      for (const auto& stream : here_) sum += stream.capacity_bytes();
    return sum;
  }

 private:
  static constexpr bool in_files = std::is_same_v<Memory, HostMemory>, offloads = HasCopyQueue<Backend>;

  using Here = Matrix<T, std::conditional_t<in_files, PagedMemory, Memory>>;
  using Offload = detail::OffloadOf<Backend>;

  std::size_t place(std::size_t i) const noexcept { return i % here_.size(); }

  void page_out(std::size_t i) {
    if constexpr (in_files) files_.page_out(here_[i].data(), here_[i].capacity_bytes());
    else static_cast<void>(i);
  }

  // Passes that keep nothing leave the host's memory to those that do.
  void prepare_offload(std::size_t count, Index tokens, Index width) {
    if (queue_ == nullptr) queue_ = std::make_unique<typename Offload::Queue>(backend_.copy_queue(offloaded_streams));
    queue_->wait_for_all();  // a pass that failed may have left some
    while (there_.size() < count) there_.emplace_back();
    for (std::size_t i = 0; i < count; ++i) there_[i].resize(tokens, width);
  }

  Backend backend_;
  PagedMemory files_;
  bool offload_;
  std::size_t count_ = 0;
  std::vector<Here> here_;
  std::vector<Matrix<T, typename Offload::Memory>> there_;
  std::unique_ptr<typename Offload::Queue> queue_;
};

}  // namespace qdylora
