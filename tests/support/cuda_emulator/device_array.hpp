// Memory of the emulated device that a test fills and reads.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "support/cuda_emulator/global_memory.hpp"

namespace test {

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t size)
      : data_(reinterpret_cast<T*>(emulator::global_memory().allocate(size * sizeof(T)))), size_(size) {}
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { emulator::global_memory().release(data_); }

  T* data() { return data_; }
  template <class Range>
  void set(const Range& values) {
    std::copy(values.begin(), values.end(), data_);
  }
  std::vector<T> host() const { return {data_, data_ + size_}; }

 private:
  T* data_;
  std::size_t size_;
};

}  // namespace test
