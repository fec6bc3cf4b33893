// Streams, events and graphs of the emulated device.
//
// As a rule work is done when a call returns. Machine::late puts off the work of some streams until something waits for it, as late as a
// GPU may do it: a wait that is missing between two streams then shows in the results. A stream that is recorded (cudaStreamBeginCapture)
// takes down its work instead of doing it; what a GPU refuses meanwhile is refused, and spoils the recording. The default stream's work
// comes behind that of all streams that block.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "support/cuda_emulator/fault.hpp"
#include "support/cuda_emulator/global_memory.hpp"
#include "support/cuda_emulator/machine.hpp"

namespace test::emulator {

using Work = std::function<void()>;

/// Work that is done in order.
class Line {
 public:
  void add(Work work) { queue_.push_back(std::move(work)); }
  bool empty() const { return queue_.empty(); }
  void run_all() {
    while (!queue_.empty()) run_next();
  }
  /// Until `passed`, which some of the work sets.
  void run_until(const bool& passed) {
    while (!passed) {
      if (queue_.empty()) throw Fault({"cudaStreamWaitEvent"}, "waits for an event that will not come");
      run_next();
    }
  }

 private:
  void run_next() {
    const Work next = std::move(queue_.front());
    queue_.pop_front();
    next();
  }

  std::deque<Work> queue_;
};

/// A moment of a line.
struct Point {
  std::shared_ptr<Line> line;
  bool passed = false;

  void wait() const {
    if (!passed) line->run_until(passed);
  }
};

/// The kinds of nodes that somebody asks for.
enum class NodeKind { work, allocation, release };

/// What was taken down, and can be done any number of times.
class Recording {
 public:
  ~Recording() {
    for (const auto& [begin, bytes] : memory_) global_memory().release(begin);
  }

  struct Node {
    enum class Step { work, record, wait } step;
    std::size_t line;
    std::size_t point = 0;
    NodeKind kind = NodeKind::work;
    Work work = {};
  };
  std::vector<Node> nodes;
  std::size_t lines = 1;  // the first is the one that the recording began on
  std::size_t points = 0;
  bool begun = false;  // a run of it

  std::byte* allocate(std::size_t line, std::size_t bytes) {
    std::byte* const begin = global_memory().allocate(bytes);
    if (begin == nullptr) return nullptr;
    memory_.emplace(begin, bytes);
    live_.emplace(begin, bytes);
    nodes.push_back({Node::Step::work, line, 0, NodeKind::allocation, [begin, bytes] { std::memset(begin, 0xFF, bytes); }});
    return begin;
  }
  /// Whether it was memory of this recording's.
  bool release(std::size_t line, void* pointer) {
    const auto found = live_.find(static_cast<std::byte*>(pointer));
    if (found == live_.end()) return false;
    std::byte* const begin = found->first;
    const std::size_t bytes = found->second;
    live_.erase(found);
    nodes.push_back({Node::Step::work, line, 0, NodeKind::release, [begin, bytes] { std::memset(begin, 0xFF, bytes); }});
    return true;
  }
  /// Memory that was not given back is the caller's from now on.
  void close() {
    leaves_memory_ = !live_.empty();
    for (const auto& left : live_) memory_.erase(left.first);
  }
  bool leaves_memory() const { return leaves_memory_; }

  void run() const {
    std::vector<std::shared_ptr<Line>> all(lines);
    for (auto& line : all) line = std::make_shared<Line>();
    std::vector<Point> at(points);
    for (const Node& node : nodes) {
      const auto& line = all[node.line];
      Point* const point = node.step == Node::Step::work ? nullptr : &at[node.point];
      if (node.step == Node::Step::record) {
        point->line = line;
        line->add([point] { point->passed = true; });
      } else if (node.step == Node::Step::wait) {
        line->add([point] { point->wait(); });
      } else {
        line->add(node.work);
      }
      if (!is_late(node.line == 0)) line->run_all();
    }
    for (const auto& line : all) line->run_all();
  }

 private:
  std::map<std::byte*, std::size_t> memory_, live_;
  bool leaves_memory_ = false;
};

/// A recording under way.
struct Capture {
  std::shared_ptr<Recording> recording = std::make_shared<Recording>();
  std::vector<CUstream_st*> streams;  // whose work it takes
  bool valid = true;

  /// Whether what the other streams did is waited for by the first, or by one that is.
  bool joined() const {
    using Step = Recording::Node::Step;
    const auto& nodes = recording->nodes;
    for (std::size_t line = 1; line < recording->lines; ++line) {
      std::size_t last = nodes.size();
      for (std::size_t i = 0; i < nodes.size(); ++i)
        if (nodes[i].line == line) last = i;
      const bool awaited = last < nodes.size() && nodes[last].step == Step::record &&
                           std::any_of(nodes.begin() + static_cast<std::ptrdiff_t>(last), nodes.end(), [&](const Recording::Node& node) {
                             return node.step == Step::wait && node.line != line && node.point == nodes[last].point;
                           });
      if (!awaited) return false;
    }
    return true;
  }
};

inline std::vector<std::shared_ptr<Capture>>& captures() {
  static std::vector<std::shared_ptr<Capture>> active;
  return active;
}
inline void spoil_captures() {
  for (const auto& capture : captures()) capture->valid = false;
}

}  // namespace test::emulator

struct CUstream_st {
  std::shared_ptr<test::emulator::Line> line = std::make_shared<test::emulator::Line>();
  bool first = false;    // of those that live: a context's
  bool blocking = true;  // the default stream waits for it, and it for the default stream
  std::shared_ptr<test::emulator::Capture> capture = {};
  std::size_t captured_line = 0;
};
struct CUevent_st {
  std::shared_ptr<test::emulator::Point> point = {};
  std::weak_ptr<test::emulator::Capture> capture = {};
  std::size_t captured_point = 0;
};
struct CUgraph_st {
  std::shared_ptr<test::emulator::Recording> recording;
};
struct CUgraphExec_st {
  std::shared_ptr<test::emulator::Recording> recording;
};

namespace test::emulator {

inline std::vector<CUstream_st*>& streams() {
  static std::vector<CUstream_st*> living;
  return living;
}
/// The default stream of all threads. That of name null is the same, unless each thread has one of its own, which waits for nothing.
inline CUstream_st* const legacy_stream = reinterpret_cast<CUstream_st*>(1);
inline bool is_default(CUstream_st* stream) { return stream == nullptr || stream == legacy_stream; }
inline bool waits_for_all(CUstream_st* stream) { return stream == legacy_stream || !machine().default_stream_per_thread; }

/// What the default stream waits for.
inline void run_blocking_streams() {
  for (CUstream_st* stream : streams())
    if (stream->blocking) stream->line->run_all();
}

/// A call that is refused while anything is recorded.
inline cudaError_t unless_captured(cudaError_t otherwise = cudaSuccess) {
  if (captures().empty()) return otherwise;
  spoil_captures();
  return cudaErrorStreamCaptureUnsupported;
}

/// Does work in a stream's order, puts it off, or takes it down.
template <class F>
cudaError_t issue(CUstream_st* stream, F&& work) {
  if (is_default(stream)) {
    if (waits_for_all(stream)) {
      if (!captures().empty()) {
        spoil_captures();
        return cudaErrorStreamCaptureImplicit;
      }
      run_blocking_streams();
    }
    work();
  } else if (stream->capture) {
    if (!stream->capture->valid) return cudaErrorStreamCaptureInvalidated;
    stream->capture->recording->nodes.push_back(
        {Recording::Node::Step::work, stream->captured_line, 0, NodeKind::work, Work(std::forward<F>(work))});
  } else if (is_late(stream->first)) {
    stream->line->add(Work(std::forward<F>(work)));
  } else {
    stream->line->run_all();
    work();
  }
  return cudaSuccess;
}

inline cudaError_t record(CUevent_st* event, CUstream_st* stream) {
  if (!is_default(stream) && stream->capture) {
    if (!stream->capture->valid) return cudaErrorStreamCaptureInvalidated;
    Recording& recording = *stream->capture->recording;
    event->capture = stream->capture;
    event->captured_point = recording.points++;
    recording.nodes.push_back({Recording::Node::Step::record, stream->captured_line, event->captured_point});
    return cudaSuccess;
  }
  event->capture.reset();
  event->point = std::make_shared<Point>(Point{is_default(stream) ? nullptr : stream->line});
  return issue(stream, [point = event->point] { point->passed = true; });
}

inline cudaError_t wait(CUstream_st* stream, CUevent_st* event) {
  if (const auto capture = event->capture.lock()) {
    if (is_default(stream)) return unless_captured();
    if (!stream->capture) {  // the stream is recorded from here on
      stream->capture = capture;
      stream->captured_line = capture->recording->lines++;
      capture->streams.push_back(stream);
    }
    if (stream->capture != capture || !capture->valid) {
      spoil_captures();
      return capture->valid ? cudaErrorStreamCaptureMerge : cudaErrorStreamCaptureInvalidated;
    }
    capture->recording->nodes.push_back({Recording::Node::Step::wait, stream->captured_line, event->captured_point});
    return cudaSuccess;
  }
  if (!is_default(stream) && stream->capture) {
    spoil_captures();
    return cudaErrorStreamCaptureIsolation;
  }
  if (event->point == nullptr) return cudaSuccess;
  return issue(stream, [point = event->point] { point->wait(); });
}

inline cudaError_t begin_capture(CUstream_st* stream) {
  if (is_default(stream)) return cudaErrorStreamCaptureUnsupported;
  if (stream->capture) return cudaErrorInvalidValue;
  stream->capture = std::make_shared<Capture>();
  stream->capture->streams.push_back(stream);
  stream->captured_line = 0;
  captures().push_back(stream->capture);
  return cudaSuccess;
}

inline cudaError_t end_capture(CUstream_st* stream, CUgraph_st** graph) {
  *graph = nullptr;
  if (is_default(stream) || !stream->capture || stream->capture->streams.front() != stream) return cudaErrorStreamCaptureUnmatched;
  const auto capture = stream->capture;
  std::erase(captures(), capture);
  for (CUstream_st* member : capture->streams) member->capture.reset();
  if (!capture->valid) return cudaErrorStreamCaptureInvalidated;
  if (!capture->joined()) return cudaErrorStreamCaptureUnjoined;
  capture->recording->close();
  *graph = new CUgraph_st{capture->recording};
  return cudaSuccess;
}

}  // namespace test::emulator
