// What compare's --recipes may list, and what becomes of it.
#include <string>

#include "common/compared_method.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"

namespace compared_method_test {

namespace qd = qdylora;
namespace ex = qdylora::examples;
using qd::AdapterMethod;

namespace {

ex::ComparedMethod method(const std::string& text) { return ex::compared_method("--recipes", text); }

}  // namespace

TEST_CASE("every recipe is an entry of its own name, of low-rank updates on the common base at the common rate", "[comparison]") {
  for (const auto name : qd::recipe_names) {
    const auto m = method(std::string(name));
    CHECK(m.name == name);
    CHECK(m.method == AdapterMethod::lora);
    CHECK(m.recipe.name == name);
    CHECK_FALSE(m.separate);
    CHECK_FALSE(m.dora);
    CHECK(m.lora_plus == 1.0);
    CHECK_FALSE(m.base.has_value());
    CHECK(m.lr == 1.0);
  }
}

TEST_CASE("an entry may name a method, changes, a base and its learning rate", "[comparison]") {
  const auto all = method("lora:qdylora+frozen+dora+geometric+lora-plus=16@bfloat16*0.25");
  CHECK(all.name == "lora:qdylora+frozen+dora+geometric+lora-plus=16@bfloat16*0.25");
  CHECK(all.method == AdapterMethod::lora);
  CHECK(all.recipe.name == "qdylora+frozen+geometric");
  CHECK(all.dora);
  CHECK(all.lora_plus == 16.0);
  REQUIRE(all.base.has_value());
  CHECK(all.base->format == qd::BaseFormat::bfloat16);
  CHECK(all.lr == 0.25);

  CHECK(method("qlora+alpha/sqrt(b)*2").recipe.scale == qd::ScalePolicy::over_sqrt_rank);
  CHECK(method("houlsby").method == AdapterMethod::houlsby);
  CHECK(method("houlsby").recipe.draw_ranks);  // its auto is per-row
  CHECK_FALSE(method("houlsby").base.has_value());
  CHECK(method("parallel:qlora+lora-plus=4").lora_plus == 4.0);
  CHECK(method("lora").recipe.name == "auto");

  CHECK(method("separate").separate);
  CHECK(method("separate").recipe.name == "qlora");
  CHECK(method("parallel:separate@fp8").separate);
  CHECK(method("parallel:separate@fp8").method == AdapterMethod::parallel);
}

TEST_CASE("what has no ranks has a base of its own, and full a tenth of the learning rate", "[comparison]") {
  const auto full = method("full");
  CHECK(full.method == AdapterMethod::full);
  REQUIRE(full.base.has_value());
  CHECK(full.base->format == qd::BaseFormat::bfloat16);
  CHECK(full.lr == 0.1);
  CHECK(method("full*0.3").lr == 0.3);
  CHECK(method("full@float32").base->format == qd::BaseFormat::float32);

  const auto alpha = method("alpha");
  CHECK(alpha.lr == 1.0);
  REQUIRE((alpha.base && alpha.base->binary));
  CHECK(alpha.base->binary->planes == 3);
  CHECK(method("alpha@binary4").base->binary->planes == 4);
}

TEST_CASE("an entry that is none is named, with what there is", "[comparison]") {
  const auto refuses = [](const std::string& text, qd::Errc code, const std::string& reason) {
    CAPTURE(text, reason);
    const auto error = test::error_of([&] { (void)method(text); });
    REQUIRE(error.has_value());
    const std::string what = error->what();
    CAPTURE(what);
    CHECK(error->code() == code);
    CHECK(what.starts_with("--recipes " + text + ": "));
    CHECK(what.find(reason) != std::string::npos);
    CHECK(what.find("[METHOD:]RECIPE[+CHANGE]...[@FORMAT][*FACTOR]") != std::string::npos);
  };
  using enum qd::Errc;
  refuses("best", bad_argument, "no recipe 'best'; there are auto, ");
  refuses("", bad_argument, "no recipe ''");
  refuses("prefix:auto", bad_argument, "no adapter method 'prefix'; there are lora, houlsby, parallel, alpha, full");
  refuses(":auto", bad_argument, "no adapter method ''");
  refuses("houlsby:best", bad_argument, "no recipe 'best'");
  refuses("qdylora+best", bad_argument, "no change '+best'");
  refuses("qdylora+", bad_argument, "no change '+'");
  refuses("auto@int5", bad_argument, "no base format 'int5'; there are nf4, ");
  refuses("auto@", bad_argument, "no base format ''");
  for (const std::string factor : {"", "0", "-1", "nan", "1e4", "fast", "0.5@nf4"})
    refuses("auto*" + factor, bad_argument, "'*' expects a number, 0.001 ... 1000, found '" + factor + "'");
  refuses("auto+lora-plus=", bad_argument, "'+lora-plus=' expects a number");
  refuses("auto+lora-plus=4+lora-plus=4", bad_argument, "second of its kind");
  refuses("auto+dora+dora", bad_argument, "second of its kind");
  refuses("full@nf4", bad_argument, "bfloat16 or float32, not in nf4");
  refuses("alpha@nf4", bad_argument, "binary1 ... binary8, not 'nf4'");
  refuses("alpha@binary9", bad_argument, "not 'binary9'");
  refuses("auto@binary3", bad_argument, "no base format 'binary3'");
  refuses("alpha:qdylora", unsupported, "of which alpha has none; auto fits");
  refuses("houlsby:qlora-svd", unsupported, "recipes that fit are qdylora");
  refuses("full:separate", unsupported, "full has no ranks to train separately");
  refuses("alpha+lora-plus=16", unsupported, "alpha has no B");
  refuses("parallel+dora", unsupported, "not parallel");
}

}  // namespace compared_method_test
