// PagedMemory: blocks in files, their errors, and that memory can be without their pages.
#include <cstring>
#include <filesystem>
#include <string>
#include <utility>

#include <sys/statvfs.h>

#include <qdylora/core/matrix.hpp>
#include <qdylora/core/paged_memory.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/paged_pages.hpp"

namespace paged_memory_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using qd::PagedMemory;

TEST_CASE("a paged matrix starts at zero and keeps its elements while memory is without them") {
  const test::TemporaryFolder folder;
  for (const auto& memory : {PagedMemory(), PagedMemory(folder.path())}) {
    CAPTURE(memory.has_folder());
    qd::Matrix<float, PagedMemory> x(300, 700, memory);
    bool zeros = true, kept = true;
    for (const float value : x.span()) zeros = zeros && value == 0.0f;
    CHECK(zeros);
    for (Index i = 0; i < x.size(); ++i) x.data()[i] = static_cast<float>(i);
    auto moved = std::move(x);
    memory.page_out(moved.data(), moved.capacity_bytes());
    for (Index i = 0; i < moved.size(); ++i) kept = kept && moved.data()[i] == static_cast<float>(i);
    CHECK(kept);
    moved.resize(400, 700);  // a new block; the old one is given back
    moved(399, 699) = 1.0f;
  }
  CHECK(folder.count() == 0);  // the files have no names
}

TEST_CASE("pages of a file come to memory when they are touched and leave it when told") {
  if (!std::filesystem::exists("/proc/self/smaps")) SKIP("this system has no /proc/self/smaps");
  const test::TemporaryFolder folder;
  const PagedMemory memory(folder.path());
  {
    qd::Matrix<float, PagedMemory> x(256, 1024, memory);
    CHECK(test::paged_pages().mapped == 1 << 20);
    CHECK(test::paged_pages().resident == 0);  // nobody has written the zeros
    std::memset(x.data(), 1, x.capacity_bytes());
    CHECK(test::paged_pages().resident == 1 << 20);
    memory.page_out(x.data(), x.capacity_bytes());
    CHECK(test::paged_pages().resident == 0);
  }
  CHECK(test::paged_pages().mapped == 0);
}

TEST_CASE("a paged block that cannot be had is an error that names folder and bytes") {
  const test::TemporaryFolder folder;
  const auto absent = (folder / "absent").native();
  const auto error = test::error_of([&] { qd::Matrix<float, PagedMemory>(10, 10, PagedMemory(absent)); });
  REQUIRE(error);
  CHECK(error->code() == Errc::open);
  CHECK(error->file() == absent);
  CHECK(std::string(error->what()).find("400 bytes") != std::string::npos);
}

TEST_CASE("a full disk is an error when the block is asked for, and nothing stays behind") {
  struct statvfs disk {};  // one that refuses at once what is larger than itself, instead of filling up
  const std::string folder = "/dev/shm";
  const std::size_t bytes = std::size_t{1} << 50;
  if (::statvfs(folder.c_str(), &disk) != 0 || disk.f_blocks == 0 || disk.f_blocks > bytes / disk.f_frsize)
    SKIP("there is no small file system in /dev/shm");
  const auto descriptors = [] { return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), {}); };
  const auto before = descriptors();
  const auto error = test::error_of([&] { PagedMemory(folder).allocate(bytes); });
  REQUIRE(error);
  CHECK(error->code() == Errc::no_space);
  CHECK(error->file() == folder);
  CHECK(std::string(error->what()).find(std::to_string(bytes) + " bytes") != std::string::npos);
  CHECK(descriptors() == before);
}

}  // namespace paged_memory_test
