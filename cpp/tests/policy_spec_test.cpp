// SPDX-License-Identifier: Apache-2.0
#include "freewheel/policy_spec.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace freewheel {
namespace {

PolicySpec sample() {
  PolicySpec spec;
  spec.name = "teacache";
  ParameterSpec threshold;
  threshold.default_value = 0.2;
  threshold.minimum = 0.0;
  threshold.meaning = "a distance, >= 0";
  ParameterSpec coefficients;
  coefficients.default_value = std::vector<double>{1.0, 0.0};
  coefficients.shape = Shape{4};
  coefficients.pad_front = true;
  coefficients.meaning = "highest power first";
  ParameterSpec skips = coefficients;
  skips.dtype = DType::kInt64;
  skips.pad_front = false;
  skips.default_value = std::vector<std::int64_t>{3, 2};
  ParameterSpec variant;
  variant.default_value = std::string("taylor");
  variant.choices = {"taylor", "newton"};
  spec.parameters = {{"threshold", threshold},
                     {"coefficients", coefficients},
                     {"skips", skips},
                     {"variant", variant}};
  return spec;
}

std::string fault(const std::map<std::string, Value>& given) {
  const auto resolved = sample().resolve(given);
  return resolved.ok() ? "ok" : resolved.status().message();
}

TEST(PolicySpec, FillsDefaultsInAndPads) {
  const auto resolved = sample().resolve({{"variant", std::string("newton")}});
  ASSERT_TRUE(resolved.ok());
  EXPECT_EQ(resolved->at("threshold"), std::vector<double>{0.2});
  EXPECT_EQ(resolved->at("coefficients"), (std::vector<double>{0, 0, 1, 0}));
  EXPECT_EQ(resolved->at("skips"), (std::vector<double>{3, 2, 2, 2}));
  EXPECT_EQ(resolved->at("variant"), std::vector<double>{1});
}

TEST(PolicySpec, ValuesThatAListDoesNotHoldAreRefusedByName) {
  PolicySpec spec = sample();
  ParameterSpec count;
  count.dtype = DType::kInt64;
  count.default_value = std::int64_t{3};
  count.listed_in = "skips";
  spec.parameters["count"] = count;
  EXPECT_TRUE(spec.resolve({{"count", std::int64_t{2}}}).ok());
  const auto resolved = spec.resolve({{"count", std::int64_t{4}}});
  EXPECT_EQ(resolved.status().message(),
            "parameter 'count': 4 is none of 'skips'; give one of 3, 2");
}

TEST(PolicySpec, ADeadlineIsSecondsAboveZero) {
  const PolicySpec spec = sample();
  CacheSetting setting;
  for (const Value& value : {Value(20.0), Value(std::int64_t{20}), Value(std::string("20s"))}) {
    setting.deadline.reset();
    EXPECT_TRUE(apply_override("deadline", value, spec, setting).ok());
    EXPECT_EQ(setting.deadline, 20.0);
  }
  for (const Value& value :
       {Value(0.0), Value(true), Value(std::string("s")), Value(std::string("20m")),
        Value(std::numeric_limits<double>::infinity())}) {
    EXPECT_EQ(apply_override("deadline", value, spec, setting).where(), "parameter 'deadline'");
  }
}

TEST(PolicySpec, SpeaksAsPythonDoes) {
  EXPECT_EQ(fault({{"treshold", 0.1}}),
            "parameter 'treshold' of policy 'teacache': is not known; did you mean 'threshold'? "
            "known: coefficients, skips, threshold, variant");
  EXPECT_EQ(fault({{"threshold", -1.0}}),
            "parameter 'threshold': -1.0 is outside [0.0, inf]; a distance, >= 0");
  EXPECT_EQ(fault({{"threshold", true}}),
            "parameter 'threshold': expected a number, found True; a distance, >= 0");
  EXPECT_EQ(fault({{"threshold", std::string("x")}}),
            "parameter 'threshold': expected a number, found 'x'; a distance, >= 0");
  EXPECT_EQ(fault({{"skips", std::vector<double>{1, 0.5}}}),
            "parameter 'skips'[0]: expected an integer, found 1.0; highest power first");
  EXPECT_EQ(fault({{"coefficients", std::vector<double>(5, 1.0)}}),
            "parameter 'coefficients': has 5 values, at most 4 fit; highest power first");
  EXPECT_EQ(fault({{"variant", std::string("newtn")}}),
            "parameter 'variant': unknown choice 'newtn'; did you mean 'newton'? known: newton, "
            "taylor");
}

TEST(PolicySpec, RefusesWhatIsNotFinite) {
  EXPECT_NE(fault({{"threshold", std::nan("")}}), "ok");
  EXPECT_NE(fault({{"threshold", std::numeric_limits<double>::infinity()}}), "ok");
  EXPECT_NE(fault({{"coefficients", std::vector<double>{1, std::nan("")}}}), "ok");
}

TEST(Value, IsReadFromText) {
  EXPECT_EQ(std::get<double>(*value_from_text("0.25")), 0.25);
  EXPECT_EQ(std::get<std::int64_t>(*value_from_text("3")), 3);
  EXPECT_EQ(std::get<bool>(*value_from_text("true")), true);
  EXPECT_EQ(std::get<std::string>(*value_from_text("newton")), "newton");
  EXPECT_EQ(std::get<std::vector<std::int64_t>>(*value_from_text("[1, 2]")).size(), 2u);
  EXPECT_FALSE(value_from_text("{\"a\": 1}").ok());
}

PolicySpec spec_with_signal() {
  PolicySpec spec = sample();
  spec.signals = {"temb"};
  return spec;
}

TEST(Overrides, ReachGuardAndSignal) {
  const PolicySpec spec = spec_with_signal();
  CacheSetting setting;
  setting.guard.limits = {{"first_exact", 1}, {"last_exact", 0}};
  ASSERT_TRUE(apply_override("last_exact", std::int64_t{2}, spec, setting).ok());
  ASSERT_TRUE(apply_override("exact_steps", std::vector<std::int64_t>{3, 5}, spec, setting).ok());
  ASSERT_TRUE(apply_override("signal", std::string("temb"), spec, setting).ok());
  EXPECT_EQ(setting.guard.limits["last_exact"], 2);
  EXPECT_EQ(setting.guard.exact_steps.size(), 2u);
  EXPECT_EQ(*setting.signal, "temb");
  EXPECT_FALSE(apply_override("first_exact", -1.0, spec, setting).ok());
  EXPECT_FALSE(apply_override("signal", std::string("latents"), spec, setting).ok());
  for (const char* name : {"first", "guard.first_exact"}) {
    const std::string message = apply_override(name, std::int64_t{1}, spec, setting).message();
    EXPECT_NE(message.find("did you mean 'first_exact'"), std::string::npos) << message;
  }
}

TEST(Overrides, SpellListsAsCommandLinesDo) {
  const PolicySpec spec = spec_with_signal();
  CacheSetting setting;
  ASSERT_TRUE(apply_override("exact_steps", std::string("4,7"), spec, setting).ok());
  EXPECT_EQ(setting.guard.exact_steps, (std::vector<std::int64_t>{4, 7}));
  ASSERT_TRUE(apply_override("exact_steps", std::int64_t{4}, spec, setting).ok());
  EXPECT_EQ(setting.guard.exact_steps, (std::vector<std::int64_t>{4}));
  ASSERT_TRUE(apply_override("coefficients", std::string("0.5,1.5"), spec, setting).ok());
  EXPECT_EQ(setting.parameters.at("coefficients"), Value(std::vector<double>{0.5, 1.5}));
  EXPECT_FALSE(apply_override("coefficients", std::string("1,2,3,4,5"), spec, setting).ok());
}

TEST(Overrides, HoldInEveryBranch) {
  CacheSetting setting;
  setting.branches["uncond"]["threshold"] = 0.5;
  ASSERT_TRUE(apply_override("threshold", 0.25, spec_with_signal(), setting).ok());
  EXPECT_EQ(setting.for_branch("uncond").parameters.at("threshold"), Value(0.25));
}

TEST(Nearest, SurvivesHostileNames) {
  EXPECT_EQ(nearest(std::string(100000, 'a'), {"a"}), "known: a");
  EXPECT_EQ(nearest("", {}), "known: ");
}

}  // namespace
}  // namespace freewheel
