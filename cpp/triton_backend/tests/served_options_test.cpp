// SPDX-License-Identifier: Apache-2.0
#include "served_options.h"

#include <gtest/gtest.h>

namespace freewheel::triton {
namespace {

std::string config(const std::string& name, const std::string& value) {
  return R"({"name": "m", "parameters": {")" + name + R"(": {"string_value": ")" + value +
         R"("}}})";
}

TEST(ServedOptionsTest, DefaultsHoldWhereNothingIsSaid) {
  const auto parsed = ServedOptions::parse(R"({"name": "m"})", "model 'm'");
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  EXPECT_EQ(parsed->max_pixels, 81LL * 720 * 1280);
  EXPECT_FALSE(parsed->allow_compile);
}

TEST(ServedOptionsTest, ReadsWhatIsSaid) {
  EXPECT_EQ(ServedOptions::parse(config("threads", "3"), "m")->threads, 3);
  EXPECT_EQ(ServedOptions::parse(config("backend", "openvino"), "m")->backend, "openvino");
  EXPECT_EQ(ServedOptions::parse(config("lora_folder", "/a/loras"), "m")->lora_folder, "/a/loras");
  EXPECT_TRUE(ServedOptions::parse(config("allow_compile", "true"), "m")->allow_compile);
  EXPECT_TRUE(ServedOptions::parse(config("cuda_graphs", "true"), "m")->cuda_graphs);
  EXPECT_TRUE(ServedOptions::parse(config("offload", "true"), "m")->offload);
}

TEST(ServedOptionsTest, CountsInstancesOfAllGroups) {
  const auto parsed =
      ServedOptions::parse(R"({"instance_group": [{"count": 2}, {"count": 3}, {}]})", "m");
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  EXPECT_EQ(parsed->instances, 6);
  EXPECT_EQ(ServedOptions::parse("{}", "m")->instances, 1);
}

TEST(ServedOptionsTest, RefusesWhatItDoesNotKnow) {
  const auto unknown = ServedOptions::parse(config("thread", "3"), "model 'm'");
  ASSERT_FALSE(unknown.ok());
  EXPECT_NE(unknown.status().hint().find("did you mean 'threads'"), std::string::npos);
  EXPECT_FALSE(ServedOptions::parse(config("threads", "-1"), "m").ok());
  EXPECT_FALSE(ServedOptions::parse(config("threads", "two"), "m").ok());
  EXPECT_FALSE(ServedOptions::parse(config("max_pixels", "0"), "m").ok());
  EXPECT_FALSE(ServedOptions::parse(config("allow_compile", "yes"), "m").ok());
  EXPECT_FALSE(ServedOptions::parse("{", "m").ok());
}

}  // namespace
}  // namespace freewheel::triton
