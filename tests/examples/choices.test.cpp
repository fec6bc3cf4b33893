// Multiple-choice questions: files, prompts, tokens, and what models choose.
#include <cstdint>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/model/chat_templates.hpp>
#include <qdylora/model/trainer.hpp>

#include "common/choices.hpp"
#include "common/evaluation.hpp"
#include "common/model.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/tokenizer_folder.hpp"

namespace choices_test {

namespace qd = qdylora;
namespace ex = qdylora::examples;
using qd::Errc;
using qd::Index;
using Strings = std::vector<std::string>;

namespace {

bool holds(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

ex::ChoiceFile lines(std::string_view text) { return ex::read_choices("q.jsonl", text, ".jsonl"); }
ex::ChoiceFile rows(std::string_view text) { return ex::read_choices("q.csv", text, ".csv", "high_school_physics"); }

template <class Read>
void refuses(Read read, std::string_view text, Errc code, std::string_view says) {
  const auto error = test::error_of([&] { read(text); });
  CAPTURE(std::string(text));
  REQUIRE(error);
  CAPTURE(std::string(error->what()));
  CHECK(error->code() == code);
  CHECK(error->file().starts_with("q."));
  CHECK(holds(error->what(), says));
}

// Bytes; " A" is a token of its own as most vocabularies have it, and so are the marks of the chat template.
qd::Tokenizer tokenizer(bool adds_bos = false) {
  auto data = test::tokenizers::byte_data({"<|im_start|>", "<|im_end|>"});
  for (const char* letter : {"A", "B", "C", "D"}) {
    data.tokens.push_back(std::string("\u0120") + letter);
    data.token_types.push_back(1);
    data.merges.push_back(std::string("\u0120 ") + letter);
  }
  data.adds_bos = adds_bos;
  return qd::Tokenizer(data);
}

constexpr std::string_view four =
    R"({"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "elementary_mathematics"}
{"question": "2 + 1?", "choices": ["1", "2", "3"], "answer": "C", "subject": "elementary_mathematics"}
{"question": "Red?", "choices": ["a color", "a tree"], "answer": "A", "subject": "art"}
{"question": "3 + 1?", "choices": ["4", "5", "6", "7"], "answer": 0, "subject": "elementary_mathematics"}
)";

}  // namespace

TEST_CASE("questions are read from JSON lines, arrays and MMLU's CSV", "[choices]") {
  const auto found = lines(four).questions;
  REQUIRE(found.size() == 4);
  CHECK(found[0].question == "1 + 1?");
  CHECK(found[0].choices == Strings{"1", "2", "3", "4"});
  CHECK(found[0].answer == 1);
  CHECK(found[0].subject == "elementary_mathematics");
  CHECK(found[1].answer == 2);
  CHECK(found[2].answer == 0);
  CHECK(found[3].where == "line 4");
  const auto array =
      ex::read_choices("q.json", R"([{"question": "q", "choices": ["x", "y"], "answer": "B", "more": 1}])", ".json").questions;
  REQUIRE(array.size() == 1);
  CHECK(array[0].answer == 1);
  CHECK(array[0].subject.empty());

  const auto csv =
      rows("What?,one,two,three,four,C\r\n\n\"A \"\"quoted\"\", long\nquestion\",\"a,b\",\"\"\"b\"\"\",c d,\"e\",A\nLast,x,y,z,w,D")
          .questions;
  REQUIRE(csv.size() == 3);
  CHECK(csv[0].choices == Strings{"one", "two", "three", "four"});
  CHECK(csv[0].answer == 2);
  CHECK(csv[0].subject == "high_school_physics");
  CHECK(csv[1].question == "A \"quoted\", long\nquestion");
  CHECK(csv[1].choices == Strings{"a,b", "\"b\"", "c d", "e"});
  CHECK(csv[1].where == "line 3");
  CHECK(csv[2].where == "line 5");

  const test::TemporaryFolder folder;
  for (const std::string part : {"_test", "_dev", "_val", ""}) {
    test::write_file(folder / ("us_history" + part + ".csv"), "Q,a,b,c,d,A\n");
    CHECK(ex::load_choices(folder / ("us_history" + part + ".csv")).questions.at(0).subject == "us_history");
  }
}

TEST_CASE("bad questions are errors with file, line and what was expected", "[choices]") {
  const std::string good = "{\"question\": \"q\", \"choices\": [\"a\", \"b\"], \"answer\": 0}\n";
  const auto bad = [&](const std::string& line, Errc code, std::string_view says) {
    refuses(lines, good + "\n" + line + "\n", code, says);
    refuses(lines, good + "\n" + line + "\n", code, "line 3: ");
  };
  bad(R"({"choices": ["a", "b"], "answer": 0})", Errc::json, "a field 'question'");
  bad(R"({"question": "q", "answer": 0})", Errc::json, "a field 'choices'");
  bad(R"({"question": "q", "choices": ["a", "b"]})", Errc::json, "a field 'answer'");
  bad(R"({"question": 1, "choices": ["a", "b"], "answer": 0})", Errc::json, "'question' to be a string, found number");
  bad(R"({"question": "q", "choices": "ab", "answer": 0})", Errc::json, "'choices' to be a list, found string");
  bad(R"({"question": "q", "choices": ["a", 2], "answer": 0})", Errc::json, "a list of strings, found number");
  bad(R"({"question": "q", "choices": ["a", "b"], "answer": 0.5})", Errc::json, "a number or a letter");
  bad(R"({"question": "q", "choices": ["a", "b"], "answer": 0, "subject": 3})", Errc::json, "'subject' to be a string");
  bad(R"({"question": "q", "choices": ["a", "b"], "answer": 2})", Errc::bad_config, "A ... B or 0 ... 1, found '2'");
  bad(R"({"question": "q", "choices": ["a", "b"], "answer": -1})", Errc::bad_config, "found '-1'");
  bad(R"({"question": "q", "choices": ["a", "b"], "answer": "C"})", Errc::bad_config, "found 'C'");
  bad(R"({"question": "q", "choices": ["a", "b"], "answer": "a"})", Errc::bad_config, "found 'a'");
  bad(R"({"question": "q", "choices": ["a", "b"], "answer": "1"})", Errc::bad_config, "found '1'");
  bad(R"({"question": "q", "choices": ["a", "b"], "answer": "AB"})", Errc::bad_config, "found 'AB'");
  bad(R"({"question": "q", "choices": ["a"], "answer": 0})", Errc::bad_config, "2 ... 26 choices, found 1");
  bad(R"({"question": "q", "choices": ["a", " "], "answer": 0})", Errc::bad_config, "choice B");
  bad(R"({"question": " ", "choices": ["a", "b"], "answer": 0})", Errc::bad_config, "the question");
  bad("[1]", Errc::json, "an object, found array");
  bad("{", Errc::json, "syntax error");
  refuses(lines, "\n", Errc::bad_config, "found an empty file");

  const std::string row = "Q,a,b,c,d,A\n";
  refuses(rows, row + "Q,a,A\n", Errc::bad_config, "line 2: expected a question, two choices or more and a letter, found 3 fields");
  refuses(rows, row + "Q,a,b,c,d,E\n", Errc::bad_config, "line 2: expected an answer of A ... D");
  refuses(rows, row + row + "Q,a,b,c,,A\n", Errc::bad_config, "line 3: expected text in choice D");
  refuses(rows, row + "\"Q,a,b\nc,d,A\n", Errc::bad_config, "line 2: expected a closing quote");
  refuses(rows, row + "\"Q\"x,a,b,c,d,A\n", Errc::bad_config, "line 2: expected a comma");
  refuses(rows, "Q\xFF,a,b,c,d,A\n", Errc::utf8, "q.csv");
  refuses(rows, "", Errc::bad_config, "found an empty file");
  CHECK(test::code_of([] { ex::load_choices("/no/such/file.jsonl"); }) == Errc::open);
}

TEST_CASE("prompts are those of MMLU's program, with the first questions of the same subject before them", "[choices]") {
  const auto file = lines(four);
  const auto zero = ex::choice_prompts(file, nullptr, 0, ex::ChoiceScore::letters);
  REQUIRE(zero.size() == 4);
  CHECK(zero[0].text ==
        "The following are multiple choice questions (with answers) about  elementary mathematics.\n\n"
        "1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:");
  CHECK(zero[0].choices == Strings{"A", "B", "C", "D"});
  CHECK(zero[0].answer == 1);
  CHECK(zero[1].choices == Strings{"A", "B", "C"});
  CHECK(zero[2].text == "The following are multiple choice questions (with answers) about  art.\n\nRed?\nA. a color\nB. a tree\nAnswer:");

  // Of a file of their own.
  const auto dev = lines(std::string(four) + R"({"question": "Blue?", "choices": ["a color", "a tree"], "answer": 0, "subject": "art"})");
  const auto two = ex::choice_prompts(file, &dev, 2, ex::ChoiceScore::letters);
  REQUIRE(two.size() == 4);
  CHECK(two[3].text ==
        "The following are multiple choice questions (with answers) about  elementary mathematics.\n\n"
        "1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        "2 + 1?\nA. 1\nB. 2\nC. 3\nAnswer: C\n\n"
        "3 + 1?\nA. 4\nB. 5\nC. 6\nD. 7\nAnswer:");
  CHECK(two[2].text ==
        "The following are multiple choice questions (with answers) about  art.\n\n"
        "Red?\nA. a color\nB. a tree\nAnswer: A\n\nBlue?\nA. a color\nB. a tree\nAnswer: A\n\nRed?\nA. a color\nB. a tree\nAnswer:");

  // Of the file itself: the questions shown are not asked.
  const auto own =
      ex::choice_prompts({"q.jsonl", {file.questions[0], file.questions[1], file.questions[3]}}, nullptr, 2, ex::ChoiceScore::letters);
  REQUIRE(own.size() == 1);
  CHECK(own[0].text == two[3].text);
  CHECK(own[0].answer == 0);

  // Without a list of choices.
  const auto answers = ex::choice_prompts(file, &dev, 1, ex::ChoiceScore::answers);
  CHECK(answers[3].text ==
        "The following are questions (with answers) about  elementary mathematics.\n\n1 + 1?\nAnswer: 2\n\n3 + 1?\nAnswer:");
  CHECK(answers[3].choices == Strings{"4", "5", "6", "7"});
  const auto none =
      ex::choice_prompts(lines(R"({"question": "q", "choices": ["a", "b"], "answer": 0})"), nullptr, 0, ex::ChoiceScore::letters);
  CHECK(none[0].text == "The following are multiple choice questions (with answers).\n\nq\nA. a\nB. b\nAnswer:");
}

TEST_CASE("a subject with fewer questions than shots is an error with file and line", "[choices]") {
  const auto file = lines(four);
  const auto says = [&](const ex::ChoiceFile* dev, Index shots) {
    const auto error = test::error_of([&] { ex::choice_prompts(file, dev, shots, ex::ChoiceScore::letters); });
    REQUIRE(error);
    CHECK(error->code() == Errc::bad_argument);
    return std::string(error->what());
  };
  CHECK(says(nullptr, 2) == "q.jsonl: line 3: expected 2 questions of the subject 'art' in the file, and others to ask, found 1");
  CHECK(holds(says(nullptr, 1), "line 3"));
  CHECK(holds(says(nullptr, -1), "shots"));
  const auto dev = ex::read_choices("dev.jsonl", four, ".jsonl");
  CHECK(says(&dev, 2) == "q.jsonl: line 3: expected 2 questions of the subject 'art' in dev.jsonl, found 1");
  CHECK(holds(says(&dev, 4), "line 1: expected 4 questions of the subject 'elementary_mathematics' in dev.jsonl, found 3"));
  CHECK_NOTHROW(ex::choice_prompts(file, &dev, 1, ex::ChoiceScore::letters));
}

TEST_CASE("what is scored are the tokens behind what all choices share", "[choices]") {
  const auto prompt = ex::choice_prompts(lines(four), nullptr, 0, ex::ChoiceScore::letters).at(0);
  const auto text = [&](const qd::Tokenizer& t, const std::vector<std::int32_t>& ids) { return t.decode(ids); };
  const auto plain = ex::choice_ids(prompt, tokenizer(), nullptr, 512, "q.jsonl");
  CHECK(text(tokenizer(), plain.prompt) == prompt.text);
  REQUIRE(plain.texts.size() == 4);
  for (std::size_t i = 0; i < 4; ++i) CHECK(plain.texts[i] == std::vector<std::int32_t>{static_cast<std::int32_t>(258 + i)});  // " A" ...

  const auto with_bos = ex::choice_ids(prompt, tokenizer(true), nullptr, 512, "q.jsonl");
  CHECK(with_bos.prompt.front() == 256);
  CHECK(with_bos.prompt.size() == plain.prompt.size() + 1);

  const auto bytes = *ex::toy_model({}, qd::Cpu{}).tokenizer;  // the space is a token, which all share
  const auto alone = ex::choice_ids(prompt, bytes, nullptr, 512, "q.jsonl");
  CHECK(text(bytes, alone.prompt) == prompt.text + " ");
  CHECK(text(bytes, alone.texts[3]) == "D");

  const auto chatml = qd::chat_template("chatml");
  const auto chat = ex::choice_ids(prompt, tokenizer(), &chatml, 512, "q.jsonl");
  CHECK(text(tokenizer(), chat.prompt) == "<|im_start|>user\n" + prompt.text + "<|im_end|>\n<|im_start|>assistant\n");
  CHECK(text(tokenizer(), chat.texts[1]) == "B");
  const auto falcon = qd::chat_template("falcon");  // begins an answer with a space
  const auto spaced = ex::choice_ids(prompt, tokenizer(), &falcon, 512, "q.jsonl");
  CHECK(text(tokenizer(), spaced.prompt).ends_with("Answer:\n\nAssistant:"));
  CHECK(spaced.texts[1] == std::vector<std::int32_t>{259});  // " B"

  // One choice may begin another, or be the same.
  const ex::ChoicePrompt alike{"q\nAnswer:", {"one", "one two", "one"}, 0, "", "line 7"};
  const auto shared = ex::choice_ids(alike, bytes, nullptr, 512, "q.jsonl");
  CHECK(text(bytes, shared.prompt) == "q\nAnswer: on");
  CHECK(text(bytes, shared.texts[0]) == "e");
  CHECK(text(bytes, shared.texts[1]) == "e two");

  const auto needed = static_cast<Index>(shared.prompt.size() + 5 - 1);
  CHECK_NOTHROW(ex::choice_ids(alike, bytes, nullptr, needed, "q.jsonl"));
  const auto error = test::error_of([&] { ex::choice_ids(alike, bytes, nullptr, needed - 1, "q.jsonl"); });
  REQUIRE(error);
  CHECK(error->code() == Errc::bad_argument);
  CHECK(std::string(error->what()) == "q.jsonl: line 7: the prompt and its longest choice have " + std::to_string(needed) +
                                          " tokens, the model's context is " + std::to_string(needed - 1));
}

TEST_CASE("the likeliest choice is taken, the first of equals, and whole answers count by character", "[choices]") {
  ex::ChoiceTask task{ex::ChoiceScore::letters, {{"p", {"A", "B", "C"}, 0, "", ""}}, {}};
  const auto chosen = [&](std::vector<double> scores) { return task.choose(0, scores); };
  CHECK(chosen({-3, -1, -2}) == 1);
  CHECK(chosen({-3, -2, -2}) == 1);
  CHECK(chosen({-2, -3, -2}) == 0);
  task.score = ex::ChoiceScore::answers;
  task.prompts[0].choices = {"ab", "\u00e4\u00f6\u00fc\u00df", "abcdefgh"};  // 2, 4 and 8 characters
  CHECK(chosen({-4, -6, -16}) == 1);
  CHECK(chosen({-4, -8.1, -15.9}) == 2);
}

TEST_CASE("the sample has fifty questions of five subjects, five more of each to show, and no letter is right more often", "[choices]") {
  const auto asked = ex::read_choices("sample", ex::sample_questions, ".jsonl"),
             shots = ex::read_choices("sample", ex::sample_shots, ".jsonl");
  CHECK(asked.questions.size() == 50);
  CHECK(shots.questions.size() == 25);
  std::set<std::string> texts, subjects;
  std::vector<int> letters(4);
  for (const auto* file : {&asked, &shots})
    for (const auto& q : file->questions) {
      texts.insert(q.question);
      subjects.insert(q.subject);
      CHECK(q.choices.size() == 4);
      CHECK(std::set<std::string>(q.choices.begin(), q.choices.end()).size() == 4);
      if (file == &asked) ++letters[q.answer];
    }
  CHECK(texts.size() == 75);
  CHECK(subjects.size() == 5);
  for (const int count : letters) CHECK((count == 12 || count == 13));
  CHECK(ex::choice_prompts(asked, &shots, 5, ex::ChoiceScore::letters).size() == 50);
}

TEST_CASE("a model that was taught the letters chooses them at the ranks that learned, the base is at chance", "[choices]") {
  const qd::Cpu cpu;
  auto open = ex::toy_model({.format = qd::BaseFormat::float32}, cpu);
  qd::Decoder<float> model(open.read(open.base), {.lora = {.max_rank = 8, .alpha = 16}}, cpu);
  std::string text;
  for (int i = 0; i < 8; ++i)
    text += "{\"question\": \"" + std::string(3, static_cast<char>('a' + i)) +
            "?\", \"choices\": [\"k\", \"l\", \"m\", \"n\"], \"answer\": " + std::to_string(i * 7 % 4) + "}\n";
  const test::TemporaryFolder folder;
  test::write_file(folder / "q.jsonl", text);
  const auto task = ex::choice_task((folder / "q.jsonl").string(), "", 0, "letters", open);
  REQUIRE(task.prompts.size() == 8);

  // The untaught model on the sample: nothing it could know.
  const auto sample = ex::choice_task("sample", "", 0, "letters", open);
  std::vector<ex::RankResult> chance(1);
  ex::evaluate_choices(model, sample, chance);
  REQUIRE(chance[0].chosen.size() == 50);
  CHECK(qd::accuracy_interval(ex::count_right(chance[0].chosen_right), 50).holds(0.25));

  std::vector<ex::Sample> samples;
  for (std::size_t i = 0; i < task.ids.size(); ++i) {
    const auto& ids = task.ids[i];
    ex::Sample s{ids.prompt, static_cast<Index>(ids.prompt.size())};
    s.ids.push_back(ids.texts[task.prompts[i].answer].front());
    samples.push_back(std::move(s));
  }
  const Index steps = 80;
  qd::Trainer<float> trainer(model, {.recipe = qd::recipe("qdylora"), .ranks = qd::RankSet{4, 8}, .steps = steps, .lr = 3e-3});
  while (!trainer.done()) trainer.step(ex::to_batches(samples, 1024));

  std::vector<ex::RankResult> results(3);
  results[1].rank = 4;
  results[2].rank = 8;
  ex::evaluate_choices(model, task, results);
  CHECK(ex::count_right(results[0].chosen_right) < 6);  // the base, whatever was trained
  CHECK(ex::count_right(results[1].chosen_right) == 8);
  CHECK(ex::count_right(results[2].chosen_right) == 8);
  for (std::size_t i = 0; i < task.prompts.size(); ++i) CHECK(results[2].chosen[i] == task.prompts[i].answer);

  // The same by plain passes over each prompt and letter.
  model.set_ranks(qd::RankPlan::uniform(4));
  for (std::size_t i = 0; i < task.ids.size(); ++i) {
    std::vector<double> scores;
    for (const auto& letter : task.ids[i].texts) {
      auto whole = task.ids[i].prompt;
      whole.insert(whole.end(), letter.begin(), letter.end());
      qd::Batch batch;
      batch.add(whole, static_cast<Index>(task.ids[i].prompt.size()));
      scores.push_back(-model.losses(batch).at(0));
    }
    CHECK(task.choose(i, scores) == results[1].chosen[i]);
  }

  std::vector<ex::RankResult> stopped(1);
  ex::evaluate_choices(model, task, stopped, [] { return true; });
  CHECK(stopped[0].chosen.empty());
}

}  // namespace choices_test
