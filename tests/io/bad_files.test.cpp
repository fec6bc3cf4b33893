// Files that are wrong in one way each, and all files near a good one: every prefix, and every flipped bit of the header.
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include <qdylora/io/gguf.hpp>
#include <qdylora/io/safetensors.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"

namespace bad_files_test {

namespace qd = qdylora;
using qd::Errc;
using test::Bytes;
using test::error_of;
using test::safetensors_bytes;

namespace {

struct BadFile {
  std::string what;
  std::string bytes;
  Errc code;
  std::optional<std::uint64_t> offset = {};
  qd::Limits limits = {};
};

template <class File>
void check_all(const std::vector<BadFile>& files) {
  const test::TemporaryFolder folder;
  for (const BadFile& bad : files) {
    CAPTURE(bad.what);
    test::write_file(folder / "bad", bad.bytes);
    const auto error = error_of([&] { File(folder / "bad", bad.limits); });
    REQUIRE(error);
    CAPTURE(error->what());
    CHECK(qd::name(error->code()) == qd::name(bad.code));
    if (bad.offset) CHECK(error->offset() == bad.offset);
    CHECK(error->file() == (folder / "bad").native());
    for (const char c : std::string(error->what())) CHECK((c >= 0x20 && c < 0x7F));
  }
}

// One tensor "a" of the given fields, with eight bytes of data.
std::string one(const std::string& fields) { return safetensors_bytes("{\"a\":{" + fields + "}}", "01234567"); }
std::string info(const std::string& name, const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
}
std::string two(const std::string& first, const std::string& second) {
  return safetensors_bytes("{" + first + "," + second + "}", "0123456789abcdef");
}

Bytes gguf(std::uint64_t tensors, std::uint64_t entries, std::uint32_t version = 3) {
  return Bytes().raw("GGUF").u32(version).u64(tensors).u64(entries);
}
// A file with one metadata entry "k" whose type and value are `value`.
Bytes entry(const Bytes& value) { return gguf(0, 1).text("k").raw(value); }
// A tensor's record.
Bytes tensor(const std::string& name, const std::vector<std::uint64_t>& extents, std::uint32_t type, std::uint64_t offset) {
  Bytes bytes;
  bytes.text(name).u32(static_cast<std::uint32_t>(extents.size()));
  for (const std::uint64_t n : extents) bytes.u64(n);
  bytes.u32(type).u64(offset);
  return bytes;
}
// A file of these tensors with `data` bytes of data.
std::string tensors(const std::vector<Bytes>& records, std::size_t data) {
  Bytes bytes = gguf(records.size(), 0);
  for (const Bytes& record : records) bytes.raw(record);
  bytes.pad(32).append(data, 'x');
  return bytes;
}

constexpr std::uint64_t huge = ~std::uint64_t{0};

}  // namespace

TEST_CASE("safetensors files that are wrong in one way end in the error of that way") {
  const std::string good = info("a", "F32", "[2]", "[0,8]");
  const std::string dtype = "\"dtype\":\"F32\"";
  const std::string shape = "\"shape\":[2]";
  const std::string offsets = "\"data_offsets\":[0,8]";
  const test::TemporaryFolder folder;
  test::write_file(folder / "good", safetensors_bytes("{" + good + "}", "01234567"));
  REQUIRE_FALSE(error_of([&] { qd::SafetensorsFile(folder / "good"); }));
  test::write_file(folder / "good", one(offsets + " , " + dtype + ",\n" + shape));
  REQUIRE_FALSE(error_of([&] { qd::SafetensorsFile(folder / "good"); }));

  check_all<qd::SafetensorsFile>({
      {"empty file", "", Errc::truncated, 0},
      {"seven bytes", std::string(7, '\0'), Errc::truncated, 0},
      {"no header", Bytes().u64(0), Errc::magic, 8},
      {"header longer than the file", Bytes().u64(3).raw("{}"), Errc::truncated, 8},
      {"header of 100000001 bytes", Bytes().u64(100'000'001).raw("{}"), Errc::header_size, 0},
      {"header of 2^64 - 1 bytes", Bytes().u64(huge).raw("{}"), Errc::header_size, 0},
      {"header longer than the limit", safetensors_bytes("{  }"), Errc::header_size, 0, {.header_bytes = 3}},
      {"blank before the header", safetensors_bytes(" {}"), Errc::magic, 8},
      {"byte order mark", safetensors_bytes("\xEF\xBB\xBF{}"), Errc::magic, 8},
      {"an array", safetensors_bytes("[]"), Errc::magic, 8},
      {"unfinished", safetensors_bytes("{"), Errc::json, 9},
      {"text after the object", safetensors_bytes("{} {}"), Errc::json, 11},
      {"padded with NUL", safetensors_bytes(std::string("{}\0\0", 4)), Errc::json, 10},
      {"not UTF-8", safetensors_bytes("{\"\xFF\":1}"), Errc::utf8, 10},
      {"tensor is a number", safetensors_bytes("{\"a\":1}"), Errc::json},
      {"tensor is null", safetensors_bytes("{\"a\":null}"), Errc::json},
      {"tensor is an array", safetensors_bytes("{\"a\":[]}"), Errc::json},
      {"tensor is a text", safetensors_bytes("{\"a\":\"F32\"}"), Errc::json},
      {"metadata is a text", safetensors_bytes("{\"__metadata__\":\"x\"}"), Errc::json},
      {"metadata with a number", safetensors_bytes("{\"__metadata__\":{\"a\":1}}"), Errc::json},
      {"metadata with an object", safetensors_bytes("{\"__metadata__\":{\"a\":{}}}"), Errc::json},
      {"metadata twice", safetensors_bytes("{\"__metadata__\":{},\"__metadata__\":{}}"), Errc::duplicate},
      {"metadata key twice", safetensors_bytes("{\"__metadata__\":{\"a\":\"1\",\"a\":\"1\"}}"), Errc::duplicate},
      {"no dtype", one(shape + "," + offsets), Errc::json},
      {"no shape", one(dtype + "," + offsets), Errc::json},
      {"no offsets", one(dtype + "," + shape), Errc::json},
      {"nothing", one(""), Errc::json},
      {"dtype twice", one(dtype + "," + dtype + "," + shape + "," + offsets), Errc::duplicate},
      {"unknown key", one(dtype + "," + shape + "," + offsets + ",\"x\":1"), Errc::json},
      {"unknown dtype", safetensors_bytes("{" + info("a", "F31", "[2]", "[0,8]") + "}", "01234567"), Errc::dtype},
      {"dtype in small letters", safetensors_bytes("{" + info("a", "f32", "[2]", "[0,8]") + "}", "01234567"), Errc::dtype},
      {"dtype is a number", one("\"dtype\":1"), Errc::json},
      {"shape is a number", one("\"shape\":2"), Errc::json},
      {"negative extent", one("\"shape\":[-2]"), Errc::json},
      {"extent 2.0", one("\"shape\":[2.0]"), Errc::json},
      {"extent 1e0", one("\"shape\":[1e0]"), Errc::json},
      {"extent is a text", one("\"shape\":[\"2\"]"), Errc::json},
      {"nested shape", one("\"shape\":[[2]]"), Errc::json},
      {"extent beyond int64", one("\"shape\":[9223372036854775808]"), Errc::overflow},
      {"extent beyond 64 bits", one("\"shape\":[18446744073709551616]"), Errc::json},
      {"nine dimensions", one("\"shape\":[1,1,1,1,1,1,1,1,2]"), Errc::limit},
      {"one offset", one(dtype + "," + shape + ",\"data_offsets\":[0]"), Errc::json},
      {"three offsets", one(dtype + "," + shape + ",\"data_offsets\":[0,8,8]"), Errc::json},
      {"no offsets in the list", one(dtype + "," + shape + ",\"data_offsets\":[]"), Errc::json},
      {"offset true", one(dtype + "," + shape + ",\"data_offsets\":[0,true]"), Errc::json},
      {"offsets fall", one(dtype + "," + shape + ",\"data_offsets\":[8,0]"), Errc::offset},
      {"product wraps to 0", safetensors_bytes("{" + info("a", "F32", "[4294967296,4294967296]", "[0,0]") + "}"), Errc::overflow},
      {"product wraps to 2",
       safetensors_bytes("{" + info("a", "F32", "[9223372036854775807,9223372036854775807,2]", "[0,8]") + "}", "01234567"),
       Errc::overflow},
      {"bytes wrap to 8", safetensors_bytes("{" + info("a", "F32", "[4611686018427387906]", "[0,8]") + "}", "01234567"),
       Errc::overflow},
      {"size and shape differ", safetensors_bytes("{" + info("a", "F32", "[3]", "[0,8]") + "}", "01234567"), Errc::shape},
      {"empty tensor with data", safetensors_bytes("{" + info("a", "F32", "[0]", "[0,8]") + "}", "01234567"), Errc::shape},
      {"half a byte", safetensors_bytes("{" + info("a", "F4", "[3]", "[0,1]") + "}", "0"), Errc::shape},
      {"data cut off", safetensors_bytes("{" + good + "}", "0123456"), Errc::truncated},
      {"data behind the last tensor", safetensors_bytes("{" + good + "}", "012345678"), Errc::trailing},
      {"data without tensors", safetensors_bytes("{}", "x"), Errc::trailing, 10},
      {"hole at the start", safetensors_bytes("{" + info("a", "F32", "[1]", "[4,8]") + "}", "01234567"), Errc::hole},
      {"hole between", two(info("a", "F32", "[1]", "[0,4]"), info("b", "F32", "[2]", "[8,16]")), Errc::hole},
      {"overlap", two(info("a", "F32", "[3]", "[0,12]"), info("b", "F32", "[2]", "[8,16]")), Errc::overlap},
      {"the same place", two(info("a", "F32", "[4]", "[0,16]"), info("b", "F32", "[4]", "[0,16]")), Errc::overlap},
      {"empty tensor inside another", two(info("a", "F32", "[4]", "[0,16]"), info("b", "F32", "[0]", "[8,8]")), Errc::overlap},
      {"empty tensor behind the end", two(info("a", "F32", "[4]", "[0,16]"), info("b", "F32", "[0]", "[17,17]")), Errc::hole},
      {"end at 2^64 - 1", two(info("a", "F32", "[2]", "[0,8]"), info("b", "U8", "[9]", "[8,18446744073709551615]")), Errc::shape},
      {"name twice", two(info("a", "F32", "[2]", "[0,8]"), info("a", "F32", "[2]", "[8,16]")), Errc::duplicate},
      {"name twice, once escaped", two(info("a", "F32", "[2]", "[0,8]"), info("\\u0061", "F32", "[2]", "[8,16]")), Errc::duplicate},
      {"long name", safetensors_bytes("{" + info(std::string(1025, 'n'), "F32", "[0]", "[0,0]") + "}"), Errc::limit},
      {"too many tensors",
       two(info("a", "F32", "[2]", "[0,8]"), info("b", "F32", "[2]", "[8,16]")),
       Errc::limit,
       {},
       {.tensors = 1}},
      {"too much metadata",
       safetensors_bytes("{\"__metadata__\":{\"a\":\"1\",\"b\":\"1\"}}"),
       Errc::limit,
       {},
       {.metadata_entries = 1}},
      {"long metadata", safetensors_bytes("{\"__metadata__\":{\"a\":\"12345\"}}"), Errc::limit, {}, {.string_bytes = 4}},
      {"deep", safetensors_bytes("{\"a\":{\"shape\":" + std::string(100'000, '[')), Errc::json},
  });
}

TEST_CASE("GGUF files that are wrong in one way end in the error of that way") {
  const Bytes f32 = tensor("a", {8}, 0, 0);
  const auto aligned = [](std::uint32_t type, const Bytes& value) {
    return gguf(0, 1).text("general.alignment").u32(type).raw(value);
  };
  const test::TemporaryFolder folder;
  test::write_file(folder / "good", tensors({f32, tensor("b", {8}, 0, 32)}, 64));
  REQUIRE_FALSE(error_of([&] { qd::GgufFile(folder / "good"); }));

  check_all<qd::GgufFile>({
      // the header
      {"empty file", "", Errc::truncated, 0},
      {"three bytes", "GGU", Errc::truncated, 0},
      {"another magic", "GGML" + std::string(20, '\0'), Errc::magic, 0},
      {"version 0", gguf(0, 0, 0), Errc::version, 4},
      {"version 1", gguf(0, 0, 1), Errc::version, 4},
      {"version 4", gguf(0, 0, 4), Errc::version, 4},
      {"big-endian", gguf(0, 0, 0x03000000), Errc::version, 4},
      {"counts cut off", gguf(0, 0).substr(0, 20), Errc::truncated, 16},
      {"2^64 - 1 tensors", gguf(huge, 0), Errc::limit, 24},
      {"1000000 tensors of which there is none", gguf(1'000'000, 0), Errc::truncated, 24},
      {"2^64 - 1 metadata entries", gguf(0, huge), Errc::limit, 24},
      {"65536 metadata entries of which there is none", gguf(0, 65'536), Errc::truncated, 24},
      {"more tensors than the limit", tensors({f32}, 32), Errc::limit, 24, {.tensors = 0}},
      {"header longer than the limit", entry(Bytes().u32(8).text(std::string(100, 'x'))), Errc::limit, {}, {.header_bytes = 64}},
      // metadata
      {"empty key", gguf(0, 1).text("").u32(0).u8(1).u8(0), Errc::bad_config, 24},
      {"key with NUL", gguf(0, 1).text(std::string_view("a\0b", 3)).u32(0).u8(1), Errc::utf8, 24},
      {"key that is not UTF-8", gguf(0, 1).text("\xC0\x80").u32(0).u8(1), Errc::utf8, 24},
      {"key of 2^64 - 1 bytes", gguf(0, 1).u64(huge).u64(0), Errc::limit, 24},
      {"key longer than the file", gguf(0, 1).u64(100).u64(0), Errc::truncated, 32},
      {"key twice", gguf(0, 2).text("kk").u32(0).u8(1).text("kk").u32(0).u8(1), Errc::duplicate, 39},
      {"value type 13", entry(Bytes().u32(13).u64(0)), Errc::dtype, 33},
      {"value type 2^32 - 1", entry(Bytes().u32(0xFFFFFFFF).u64(0)), Errc::dtype, 33},
      {"value cut off", entry(Bytes().u32(10).u32(0)), Errc::truncated, 37},
      {"boolean 2", entry(Bytes().u32(7).u8(2)), Errc::code_range, 37},
      {"array with boolean 255", entry(Bytes().u32(9).u32(7).u64(3).u8(0).u8(1).u8(255)), Errc::code_range, 51},
      {"string of 2^64 - 1 bytes", entry(Bytes().u32(8).u64(huge)), Errc::limit, 37},
      {"string of 2^64 - 8 bytes", entry(Bytes().u32(8).u64(huge - 7)), Errc::limit, 37},
      {"string longer than the file", entry(Bytes().u32(8).u64(5).raw("four")), Errc::truncated, 45},
      {"string longer than the limit", entry(Bytes().u32(8).text("12345")), Errc::limit, 37, {.string_bytes = 4}},
      {"array of arrays", entry(Bytes().u32(9).u32(9).u64(1).u32(0).u64(1).u8(1)), Errc::unsupported, 37},
      {"array of unknown type", entry(Bytes().u32(9).u32(13).u64(1).u64(0)), Errc::dtype, 37},
      {"array of 2^64 - 1 numbers", entry(Bytes().u32(9).u32(10).u64(huge)), Errc::limit, 41},
      {"array whose bytes wrap to 0", entry(Bytes().u32(9).u32(10).u64(std::uint64_t{1} << 61)), Errc::limit, 41},
      {"array whose bytes wrap, without a limit",
       entry(Bytes().u32(9).u32(10).u64(std::uint64_t{1} << 61)),
       Errc::overflow,
       49,
       {.array_elements = huge}},
      {"array longer than the file", entry(Bytes().u32(9).u32(4).u64(3).u32(1).u32(2)), Errc::truncated, 49},
      {"array of 2^26 strings of which there is none", entry(Bytes().u32(9).u32(8).u64(1 << 26)), Errc::truncated, 49},
      {"array of strings cut off", entry(Bytes().u32(9).u32(8).u64(2).text("abcdefgh").u64(1)), Errc::truncated, 73},
      {"array longer than the limit", entry(Bytes().u32(9).u32(0).u64(3).raw("abc")), Errc::limit, 41, {.array_elements = 2}},
      {"alignment 0", aligned(4, Bytes().u32(0)), Errc::alignment},
      {"alignment 24", aligned(4, Bytes().u32(24)), Errc::alignment},
      {"alignment 2^31", aligned(4, Bytes().u32(0x80000000)), Errc::alignment},
      {"alignment of another type", aligned(10, Bytes().u64(32)), Errc::bad_config},
      {"alignment is a text", aligned(8, Bytes().text("32")), Errc::bad_config},
      // tensors
      {"tensor name cut off", gguf(1, 0).u64(30).raw(std::string(20, 'n')), Errc::truncated, 32},
      {"tensor name of 2^63 bytes", gguf(1, 0).u64(huge / 2 + 1).raw(std::string(20, 'n')), Errc::limit, 24},
      {"tensor name longer than the limit", tensors({tensor(std::string(1025, 'n'), {8}, 0, 0)}, 32), Errc::limit, 24},
      {"tensor name that is not UTF-8", tensors({tensor("\xFF", {8}, 0, 0)}, 32), Errc::utf8, 24},
      {"tensor twice", tensors({f32, tensor("a", {8}, 0, 32)}, 64), Errc::duplicate},
      {"five dimensions", tensors({tensor("a", {8, 1, 1, 1, 1}, 0, 0)}, 32), Errc::shape, 33},
      {"2^32 - 1 dimensions", gguf(1, 0).text("a").u32(0xFFFFFFFF).u64(1).u64(1), Errc::shape, 33},
      {"extent beyond int64", tensors({tensor("a", {huge / 2 + 1}, 0, 0)}, 32), Errc::overflow, 37},
      {"extent -1", tensors({tensor("a", {huge}, 0, 0)}, 32), Errc::overflow, 37},
      {"product wraps to 0", tensors({tensor("a", {std::uint64_t{1} << 32, std::uint64_t{1} << 32}, 0, 0)}, 32), Errc::overflow,
       45},
      {"product wraps to 8", tensors({tensor("a", {8, (std::uint64_t{1} << 61) + 1}, 0, 0)}, 32), Errc::overflow, 45},
      {"bytes wrap to 32", tensors({tensor("a", {8, (std::uint64_t{1} << 59) + 1}, 0, 0)}, 32), Errc::overflow, 53},
      {"type that is not known", tensors({tensor("a", {8}, 99, 0)}, 32), Errc::unsupported, 45},
      {"type that was removed", tensors({tensor("a", {32}, 4, 0)}, 32), Errc::unsupported, 45},
      {"row that is not whole blocks", tensors({tensor("a", {33}, 2, 0)}, 64), Errc::shape, 45},
      {"row of less than a block", tensors({tensor("a", {128, 2}, 12, 0)}, 256), Errc::shape, 53},
      {"scalar of a block type", tensors({tensor("a", {}, 8, 0)}, 64), Errc::shape, 37},
      {"first offset is not 0", tensors({tensor("a", {8}, 0, 32)}, 64), Errc::offset, 49},
      {"offset 2^64 - 1", tensors({tensor("a", {8}, 0, huge)}, 64), Errc::offset, 49},
      {"offset without padding", tensors({tensor("a", {1}, 0, 0), tensor("b", {1}, 0, 4)}, 64), Errc::offset},
      {"offset with a hole", tensors({tensor("a", {1}, 0, 0), tensor("b", {1}, 0, 64)}, 128), Errc::offset},
      {"offset that overlaps", tensors({tensor("a", {16}, 0, 0), tensor("b", {1}, 0, 32)}, 128), Errc::offset},
      {"padded size wraps", tensors({tensor("a", {huge / 2, 2}, 24, 0), tensor("b", {1}, 0, 0)}, 64), Errc::overflow},
      {"sum of sizes wraps",
       tensors({tensor("a", {huge / 2}, 24, 0), tensor("b", {huge / 2}, 24, huge / 2 + 1), tensor("c", {1}, 0, 0)}, 64),
       Errc::overflow},
      {"data section wraps",
       tensors({tensor("a", {huge / 2}, 24, 0), tensor("b", {huge / 2 - 31}, 24, huge / 2 + 1), tensor("c", {0}, 24, huge - 31)},
               64),
       Errc::truncated},
      // data
      {"no data", gguf(1, 0).raw(f32), Errc::truncated},
      {"data cut off", tensors({f32}, 31), Errc::truncated},
      {"second tensor cut off", tensors({f32, tensor("b", {8}, 0, 32)}, 63), Errc::truncated},
      {"empty tensor behind the end", tensors({tensor("a", {0}, 0, 0)}, 0).substr(0, 60), Errc::truncated},
      {"begin and size wrap", tensors({tensor("a", {huge / 2, 2}, 24, 0)}, 64), Errc::truncated},
      {"exabytes", tensors({tensor("a", {std::uint64_t{1} << 58}, 0, 0)}, 32), Errc::truncated},
  });
}

namespace {

/// Opens a file that may be anything and reads all of it. Either all succeeds, or a call ends in a qdylora::Error.
template <class File>
bool opens(const std::filesystem::path& path) {
  return !error_of([&] {
    const File file(path);
    for (const auto& tensor : file.tensors()) {
      qd::Buffer<std::byte> bytes(static_cast<qd::Index>([&] {
        if constexpr (std::is_same_v<File, qd::GgufFile>) return tensor.size;
        else return tensor.size();
      }()));
      file.read(tensor.name, bytes.span());
      error_of([&] { file.matrix(tensor.name); });
    }
  });
}

/// All proper prefixes and all files with one flipped bit among the first `header` bytes; `needed` bytes make a whole file.
template <class File>
void check_neighbours(const std::string& good, std::size_t header, std::size_t needed) {
  const test::TemporaryFolder folder;
  const auto path = folder / "f";
  test::write_file(path, good);
  REQUIRE(opens<File>(path));
  for (std::size_t size = 0; size < good.size(); ++size) {
    test::write_file(path, good.substr(0, size));
    if (opens<File>(path) != (size >= needed)) FAIL_CHECK("a prefix of " << size << " bytes");
  }
  std::size_t accepted = 0;
  for (std::size_t bit = 0; bit < 8 * header; ++bit) {
    std::string flipped = good;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
    test::write_file(path, flipped);
    accepted += opens<File>(path);
  }
  // Bits of names, texts and numbers that are free to change are accepted; bits of the structure are not.
  CHECK(accepted < 8 * header);
  CHECK(accepted > 0);
}

}  // namespace

TEST_CASE("no prefix and no flipped bit of a safetensors file is more than a typed error") {
  const std::string good = test::read_file(test::golden("container_edge.safetensors"));
  check_neighbours<qd::SafetensorsFile>(good, 8 + 840, good.size());
}

TEST_CASE("no prefix and no flipped bit of a GGUF file is more than a typed error") {
  const auto path = test::golden("tiny.gguf");
  const qd::GgufFile file(path);
  const qd::GgufTensor& last = file.tensors().back();
  check_neighbours<qd::GgufFile>(test::read_file(path), file.tensors().front().begin, last.begin + last.size);
}

}  // namespace bad_files_test
