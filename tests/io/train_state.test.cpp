#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/io/collect.hpp>
#include <qdylora/optim/adamw.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"

namespace train_state_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using test::code_of;
using test::error_of;

namespace {

// A run with all that a checkpoint must hold.
struct Run {
  qd::LoRAAdapter<float> up{6, 8, {.max_rank = 4, .seed = 1, .name = "up", .gated_ranks = {2, 4}}};
  qd::LoRAAdapter<float> down{8, 6, {.max_rank = 2, .seed = 2, .name = "down", .dora = true}};
  qd::Parameters<float> weights, gates;
  qd::AdamW<float> optimizer, gate_optimizer;
  qd::Rng rng{11};
  qd::RankSampler ranks{qd::RankSet{1, 2, 4}, rng, {.granularity = qd::SamplerOptions::Granularity::row}};
  std::int64_t step = 0;
  double loss = 0.0;
  std::string config = "alpha = 16\nrecipe = auto";

  Run()
      : weights(qd::parameters(up, down)),
        gates(up.gate_parameters()),
        optimizer(weights, {.untouched_rows = qd::AdamWOptions::UntouchedRows::strict}),
        gate_optimizer(gates, {.lr = 0.1}) {
    up.start_collecting();
  }

  void train(int steps) {
    for (int i = 0; i < steps; ++i, ++step) {
      const auto plan = ranks.next(3);
      for (auto* optimizer_of : {&optimizer, &gate_optimizer}) {
        optimizer_of->zero_grad();
        for (const auto& p : optimizer_of->parameters()) {
          const Index rows = std::min(plan.max_rank(), p->value.rows());
          for (float& g : p->gradient.span().first(static_cast<std::size_t>(rows * p->value.cols()))) g = rng.normal();
          p->touch(0, rows);
        }
        optimizer_of->set_lr(0.1 / static_cast<double>(step + 1));
        optimizer_of->step();
      }
      for (float& x : up.moment_a.span()) x += rng.uniform();
      for (float& x : up.moment_b.span()) x += rng.uniform();
      if (step == 2) weights[1]->row_lr = {1.0f, 0.5f, 0.25f, 0.125f};
      loss = static_cast<double>(weights[0]->value(0, 0)) / 3.0;
    }
  }

  qd::TrainState state() const {
    qd::TrainState s;
    collect(s, "up", up);
    collect(s, "down", down);
    collect(s, "adamw", optimizer);
    collect(s, "adamw_gates", gate_optimizer);
    collect(s, "ranks", ranks);
    collect(s, "rng", rng);
    s.add_integer("step", step);
    s.add_number("loss", loss);
    s.add_text("config", config);
    return s;
  }
  void restore_from(qd::TrainState s) {
    restore(s, "up", up);
    restore(s, "down", down);
    restore(s, "adamw", optimizer);
    restore(s, "adamw_gates", gate_optimizer);
    restore(s, "ranks", ranks);
    restore(s, "rng", rng);
    step = s.integer("step");
    loss = s.number("loss");
    config = s.text("config");
    s.expect_all_used();
  }
};

std::string bytes_of(const qd::TrainState& state) {
  test::TemporaryFolder folder;
  qd::save_train_state(folder / "state", state);
  return test::read_file(folder / "state");
}

qd::TrainState state_of(const std::string& bytes) {
  test::TemporaryFolder folder;
  test::write_file(folder / "state", bytes);
  return qd::load_train_state(folder / "state");
}

// A small state with every kind of section.
qd::TrainState small_state(const qd::Matrix<float>& matrix) {
  qd::TrainState s;
  s.add_matrix("m", matrix.view());
  s.add_integers("i", {1, -2, std::numeric_limits<std::int64_t>::min()});
  s.add_number("n", 0.1);
  s.add_text("t", std::string("a\0\xFF", 3));
  return s;
}

bool is_small_state(qd::TrainState& s, const qd::Matrix<float>& matrix) {
  const auto m = s.matrix("m", matrix.rows(), matrix.cols());
  return s.size() == 4 && std::memcmp(m.data, matrix.data(), matrix.span().size_bytes()) == 0 &&
         s.integers("i") == qd::TrainState::Integers{1, -2, std::numeric_limits<std::int64_t>::min()} && s.number("n") == 0.1 &&
         s.text("t") == std::string("a\0\xFF", 3);
}

qd::Matrix<float> small_matrix() {
  qd::Matrix<float> matrix(2, 3);
  for (Index i = 0; i < 6; ++i) matrix.data()[i] = static_cast<float>(i) - 0.3f;
  return matrix;
}

}  // namespace

TEST_CASE("a run that is saved and restored goes on as if it had not stopped") {
  Run whole, first;
  whole.train(10);
  first.train(5);
  const std::string bytes = bytes_of(first.state());

  Run second;
  second.train(1);  // another state, which must leave no trace
  second.restore_from(state_of(bytes));
  CHECK((bytes_of(second.state()) == bytes));
  second.train(5);
  CHECK((bytes_of(second.state()) == bytes_of(whole.state())));
  CHECK(second.optimizer.step_count() == 10);

  // A row's learning rate that is set later than the checkpoint is unset again.
  Run third;
  const std::string start = bytes_of(third.state());
  third.train(5);
  third.restore_from(state_of(start));
  CHECK((bytes_of(third.state()) == start));
}

TEST_CASE("moments in 8 bits are saved and restored to the bit, and are not taken for floats") {
  struct Run8 {
    qd::LoRAAdapter<float> large{600, 40, {.max_rank = 8, .seed = 1, .name = "large"}};  // A in 8 bits, B in floats: it is small
    qd::AdamW8bit<float> optimizer{large.parameters(), {.lr = 1e-2}};
    qd::Rng rng{3};

    void train(int steps) {
      for (int i = 0; i < steps; ++i) {
        optimizer.zero_grad();
        for (const auto& p : optimizer.parameters()) {
          for (float& g : p->gradient.span()) g = rng.normal();
          p->touch(0, p->value.rows());
        }
        optimizer.step();
      }
    }
    std::string bytes() const {
      qd::TrainState s;
      collect(s, "large", large);
      collect(s, "adamw", optimizer);
      collect(s, "rng", rng);
      return bytes_of(s);
    }
    void restore_from(qd::TrainState s) {
      restore(s, "large", large);
      restore(s, "adamw", optimizer);
      restore(s, "rng", rng);
      s.expect_all_used();
    }
  };
  Run8 whole, first, second;
  REQUIRE_FALSE(whole.optimizer.states()[0].in_floats());
  REQUIRE(whole.optimizer.states()[1].in_floats());
  whole.train(6);
  first.train(3);
  second.train(1);
  second.restore_from(state_of(first.bytes()));
  CHECK((second.bytes() == first.bytes()));
  second.train(3);
  CHECK((second.bytes() == whole.bytes()));
  // A quarter of the floats' size, and no other's state.
  qd::AdamW<float> floats(whole.large.parameters());
  CHECK(whole.optimizer.bytes() < floats.bytes() / 3);
  auto state = state_of(whole.bytes());
  CHECK(code_of([&] { restore(state, "adamw", floats); }) == Errc::missing_tensor);
  qd::LoRAAdapter<float> other(601, 40, {.max_rank = 8, .name = "large"});
  qd::AdamW8bit<float> larger(other.parameters());
  CHECK(code_of([&] { restore(state, "adamw", larger); }) == Errc::shape_mismatch);
}

TEST_CASE("all that is saved is kept to the bit") {
  auto matrix = small_matrix();
  matrix(0, 0) = std::numeric_limits<float>::quiet_NaN();
  matrix(0, 1) = -0.0f;
  matrix(0, 2) = std::numeric_limits<float>::denorm_min();
  auto loaded = state_of(bytes_of(small_state(matrix)));
  CHECK(is_small_state(loaded, matrix));
  CHECK_FALSE(code_of([&] { loaded.expect_all_used(); }));

  // A matrix with gaps between its rows; nothing at all; a generator in an odd place.
  const qd::Rng rng(qd::Rng::State{~0ull, ~0ull - 1, 7, ~0u, 9});
  qd::TrainState s;
  s.add_matrix("part", matrix.view().left_cols(2));
  s.add_matrix("empty", qd::Matrix<float>(0, 5));
  s.add_integers("none", {});
  s.add_text("", "");
  collect(s, "rng", rng);
  auto again = state_of(bytes_of(s));
  CHECK(again.matrix("part", 2, 2)(1, 0) == matrix(1, 0));
  CHECK(again.matrix("empty", 0, 5).empty());
  CHECK(again.integers("none").empty());
  CHECK(again.text("").empty());
  qd::Rng restored;
  restore(again, "rng", restored);
  CHECK(restored.state() == rng.state());
}

TEST_CASE("who lends a section is told each time that it has been gone through, before the next is read") {
  const test::TemporaryFolder folder;
  const qd::Matrix<float> m(3, 5);
  std::vector<std::string> read;
  qd::TrainState state;
  state.add_matrix("a", m.view(), [&] { read.push_back("a"); });
  state.add_matrix("b", m.view());
  state.add_text_view("c", "codes", [&] { read.push_back("c"); });
  CHECK(read.empty());
  qd::save_train_state(folder / "state", state);
  // Checksums, then the file, whose wide types come first.
  CHECK(read == std::vector<std::string>{"a", "c", "a", "c"});
}

TEST_CASE("whatever single byte of a checkpoint changes, it is refused or read as it was") {
  const auto matrix = small_matrix();
  const std::string bytes = bytes_of(small_state(matrix));
  test::TemporaryFolder folder;
  std::map<Errc, int> codes;
  int same = 0;
  test::write_file(folder / "state", bytes);
  std::fstream file(folder / "state", std::ios::binary | std::ios::in | std::ios::out);
  const auto put = [&](std::size_t at, char byte) { file.seekp(static_cast<std::streamoff>(at)).put(byte).flush(); };
  for (std::size_t at = 0; at < bytes.size(); ++at) {
    // Every bit, and what makes one kind of section another (F32 -> I32, I64 -> F64 ...).
    for (const int change : {1, 2, 4, 8, 16, 32, 64, 128, 'F' ^ 'I', '6' ^ '3', ' ' ^ '\t', '0' ^ '9', 255}) {
      put(at, static_cast<char>(bytes[at] ^ change));
      qd::TrainState state;
      const auto code = code_of([&] { state = qd::load_train_state(folder / "state"); });
      if (code) {
        ++codes[*code];
      } else {
        INFO("byte " << at << " xor " << change);
        REQUIRE(is_small_state(state, matrix));
        ++same;
      }
    }
    put(at, bytes[at]);
  }
  CHECK(codes[Errc::read] >= 13 * 6 * 4);  // each byte of data: the checksum
  CHECK(same <= 13 * 8);                   // blanks that pad the header
}

TEST_CASE("a checkpoint cut anywhere is refused") {
  const auto matrix = small_matrix();
  const std::string bytes = bytes_of(small_state(matrix));
  for (std::size_t size = 0; size < bytes.size(); ++size) CHECK(code_of([&] { state_of(bytes.substr(0, size)); }));
  CHECK(code_of([&] { state_of(bytes + '\0'); }) == Errc::trailing);
}

TEST_CASE("a checkpoint of another run is refused by the name of what does not fit") {
  Run run;
  run.train(3);
  const auto fails = [](const qd::TrainState& state, Errc code, const std::string& section) {
    CAPTURE(section);
    Run target;
    const std::string before = bytes_of(target.state());
    const std::string bytes = bytes_of(state);
    const auto error = error_of([&] { target.restore_from(state_of(bytes)); });
    REQUIRE(error);
    CHECK(error->code() == code);
    CHECK(error->tensor() == section);
    return bytes_of(target.state()) == before;
  };
  auto s = run.state();
  s.add_text("extra", "x");
  fails(s, Errc::unexpected_tensor, "extra");

  qd::TrainState empty;
  CHECK(fails(empty, Errc::missing_tensor, "up.collecting"));

  qd::LoRAAdapter<float> other(6, 8, {.max_rank = 3, .name = "up", .gated_ranks = {2, 3}});
  qd::TrainState narrower;
  collect(narrower, "up", other);
  CHECK(fails(narrower, Errc::shape_mismatch, "up.0.up.lora_A"));

  qd::LoRAAdapter<float> renamed(6, 8, {.max_rank = 4, .name = "gate", .gated_ranks = {2, 4}});
  qd::TrainState names;
  collect(names, "up", renamed);
  CHECK(fails(names, Errc::missing_tensor, "up.0.up.lora_A"));

  qd::LoRAAdapter<float> ungated(6, 8, {.max_rank = 4, .name = "up"});
  qd::TrainState no_gates;
  collect(no_gates, "up", ungated);
  CHECK(fails(no_gates, Errc::missing_tensor, "up.2.up.lora_gates"));  // and A and B were not touched

  qd::TrainState set;
  collect(set, "ranks", qd::RankSampler(qd::RankSet{1, 2, 3}, qd::Rng(1)));
  auto loaded = state_of(bytes_of(set));
  CHECK(code_of([&] { restore(loaded, "ranks", run.ranks); }) == Errc::bad_config);

  qd::TrainState kinds;
  kinds.add_number("x", 1.0);
  kinds.add_integers("y", {1, 2});
  CHECK(code_of([&] { kinds.integer("x"); }) == Errc::dtype);
  CHECK(code_of([&] { kinds.text("x"); }) == Errc::dtype);
  CHECK(code_of([&] { kinds.matrix("x", 1, 1); }) == Errc::dtype);
  CHECK(code_of([&] { kinds.integer("y"); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { kinds.number("z"); }) == Errc::missing_tensor);
  CHECK(code_of([&] { kinds.add_text("x", ""); }) == Errc::duplicate);
  qd::Rng rng;
  kinds.add_integers("rng", {1, 2, 3, 1ll << 32, 5});
  CHECK(code_of([&] { restore(kinds, "rng", rng); }) == Errc::overflow);
}

TEST_CASE("a file that is no checkpoint is refused") {
  test::TemporaryFolder folder;
  const float value = 1.0f;
  const auto load = [&](std::map<std::string, std::string> metadata, qd::DType dtype, std::vector<Index> shape) {
    qd::SafetensorsWriter writer;
    for (const auto& [key, text] : metadata) writer.metadata(key, text);
    writer.add("x", dtype, std::move(shape), std::as_bytes(std::span(&value, 1)));
    writer.write(folder / "state");
    return code_of([&] { qd::load_train_state(folder / "state"); });
  };
  using qd::DType;
  const std::string format = "qdylora.train_state", sum = "xxh64.x";
  CHECK(load({{"format", "pt"}}, DType::F32, {1, 1}) == Errc::magic);
  CHECK(load({{"format", format}, {"version", "2"}}, DType::F32, {1, 1}) == Errc::version);
  CHECK(load({{"format", format}, {"version", "1"}}, DType::F32, {1, 1}) == Errc::missing_tensor);
  CHECK(load({{"format", format}, {"version", "1"}, {sum, "00"}}, DType::F32, {1, 1}) == Errc::read);
  CHECK(load({{"format", format}, {"version", "1"}, {sum, "00"}, {"xxh64.y", "00"}}, DType::F32, {1, 1}) == Errc::missing_tensor);
  CHECK(load({{"format", format}, {"version", "1"}, {sum, "00"}, {"more", "00"}}, DType::F32, {1, 1}) == Errc::missing_tensor);
  CHECK(load({{"format", format}, {"version", "1"}, {sum, "00"}}, DType::F32, {1}) == Errc::dtype);
  CHECK(load({{"format", format}, {"version", "1"}, {sum, "00"}}, DType::I32, {1}) == Errc::dtype);
  CHECK(code_of([&] { qd::load_train_state(folder / "absent"); }) == Errc::open);
}

TEST_CASE("a checkpoint that cannot be written whole leaves the old one") {
  test::TemporaryFolder folder;
  const auto matrix = small_matrix();
  qd::save_train_state(folder / "state", small_state(matrix));
  qd::TrainState large;
  large.add_matrix("large", qd::Matrix<float>(512, 512));
  struct rlimit old {};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &old) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  struct rlimit small = old;
  small.rlim_cur = 4096;
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  const auto code = code_of([&] { qd::save_train_state(folder / "state", large); });
  ::setrlimit(RLIMIT_FSIZE, &old);
  std::signal(SIGXFSZ, handler);
  CHECK(code == Errc::write);
  CHECK(folder.count() == 1);
  auto loaded = qd::load_train_state(folder / "state");
  CHECK(is_small_state(loaded, matrix));
  CHECK(code_of([&] { qd::save_train_state(folder / "no folder" / "state", large); }) == Errc::open);
}

TEST_CASE("a process killed while it saves leaves a whole checkpoint") {
  test::TemporaryFolder folder;
  const auto path = folder / "state";
  const auto save = [&](std::int64_t generation) {
    qd::Matrix<float> m(64, 64);
    std::ranges::fill(m.span(), static_cast<float>(generation));
    qd::TrainState s;
    s.add_matrix("m", m.view());
    s.add_integer("generation", generation);
    qd::save_train_state(path, s);
  };
  save(0);
  std::int64_t last = 0;
  qd::Rng rng(3);
  for (int round = 0; round < 20; ++round) {
    int ends[2];
    REQUIRE(::pipe(ends) == 0);
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      try {
        for (std::int64_t g = last + 1;; ++g) {
          save(g);
          if (::write(ends[1], "", 1) != 1) break;
        }
      } catch (...) {
      }
      ::_exit(1);
    }
    ::close(ends[1]);
    char byte;
    const bool saved = ::read(ends[0], &byte, 1) == 1;
    ::usleep(rng.below(3000));
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    ::close(ends[0]);
    REQUIRE(saved);
    auto state = qd::load_train_state(path);
    const auto generation = state.integer("generation");
    CHECK(generation > last);
    CHECK(state.matrix("m", 64, 64)(63, 63) == static_cast<float>(generation));
    last = generation;
  }
}

}  // namespace train_state_test
