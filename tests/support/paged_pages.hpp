// What of PagedMemory's blocks is in this process' memory, as /proc/self/smaps has it.
#pragma once

#include <cstddef>
#include <fstream>
#include <sstream>
#include <string>

namespace test {

struct PagedPages {
  std::size_t mapped = 0, resident = 0;  // bytes
};

/// Zeros where the system has no such file.
inline PagedPages paged_pages() {
  std::ifstream maps("/proc/self/smaps");
  PagedPages pages;
  bool paged = false;
  for (std::string line, key; std::getline(maps, line);) {
    std::istringstream words(line);
    std::size_t kilobytes = 0;
    words >> key;
    if (key.back() != ':') paged = line.find("/qdylora-paged-") != std::string::npos;  // the first line of a mapping
    else if (paged && (key == "Size:" || key == "Rss:") && words >> kilobytes)
      (key == "Rss:" ? pages.resident : pages.mapped) += 1024 * kilobytes;
  }
  return pages;
}

}  // namespace test
