// SPDX-License-Identifier: Apache-2.0
#include "request_options.h"

#include <gtest/gtest.h>

namespace freewheel::triton {
namespace {

using std::string;

Value text(const char* value) { return string(value); }

TEST(RequestOptionsTest, SortsParametersByWhatTheyAreFor) {
  const auto read = RequestOptions::read({{"policy", text("teacache")},
                                          {"steps", std::int64_t{20}},
                                          {"guidance_scale", std::int64_t{3}},
                                          {"stream", std::int64_t{2}},
                                          {"preview", true},
                                          {"lora", text("style:0.5,other")},
                                          {"outputs", text("latents,progress")},
                                          {"threshold", 0.2},
                                          {"first_exact", std::int64_t{2}}});
  ASSERT_TRUE(read.ok()) << read.status().message();
  EXPECT_EQ(read->request.cache, "teacache");
  EXPECT_EQ(read->request.steps, 20);
  EXPECT_EQ(read->request.guidance_scale, 3.0);
  EXPECT_EQ(read->request.lora, "style:0.5,other");
  EXPECT_EQ(read->stream, 2);
  EXPECT_TRUE(read->preview);
  EXPECT_EQ(read->outputs, (std::set<string>{"latents", "progress"}));
  ASSERT_EQ(read->request.overrides.size(), 2u);
  EXPECT_EQ(read->request.overrides[0].first, "threshold");
}

TEST(RequestOptionsTest, TextSpellsNumbersAndLists) {
  const auto read = RequestOptions::read({{"steps", text("20")},
                                          {"flow_shift", text("3.5")},
                                          {"seed", text("7")},
                                          {"preview", text("false")},
                                          {"stream", text("2")},
                                          {"policy.steps", text("[1, 0.5]")}});
  ASSERT_TRUE(read.ok()) << read.status().message();
  EXPECT_EQ(read->request.steps, 20);
  EXPECT_EQ(read->request.flow_shift, 3.5);
  EXPECT_EQ(read->request.seed, 7);
  EXPECT_EQ(read->stream, 2);
  EXPECT_EQ(read->request.overrides.at(0), Overrides::value_type("steps", text("[1, 0.5]")))
      << "read by the policy's declaration";
}

TEST(RequestOptionsTest, ParametersOfTheProtocolSayNothing) {
  const auto read =
      RequestOptions::read({{"triton_enable_empty_final_response", true}, {"priority", 1.0}});
  ASSERT_TRUE(read.ok());
  EXPECT_TRUE(read->request.overrides.empty());
}

TEST(RequestOptionsTest, RefusesValuesThatMeanNothing) {
  const std::vector<std::pair<string, Value>> bad = {
      {"steps", text("many")},         {"seed", std::int64_t{-1}},   {"outputs", 3.0},
      {"preview", std::int64_t{1}},    {"stream", std::int64_t{-1}}, {"stream", text("often")},
      {"guidance_scale", text("nan")}, {"stream", std::int64_t{-1}}};
  for (const auto& parameter : bad) {
    const auto read = RequestOptions::read({parameter});
    ASSERT_FALSE(read.ok()) << parameter.first << " " << value_text(parameter.second);
    EXPECT_NE(read.status().where().find(parameter.first), string::npos);
    EXPECT_FALSE(read.status().hint().empty());
  }
}

TEST(RequestOptionsTest, APreviewNeedsAStream) {
  EXPECT_FALSE(RequestOptions::read({{"preview", true}}).ok());
  EXPECT_TRUE(RequestOptions::read({{"preview", true}, {"stream", std::int64_t{1}}}).ok());
}

}  // namespace
}  // namespace freewheel::triton
