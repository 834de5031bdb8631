// SPDX-License-Identifier: Apache-2.0
#include "freewheel/bundle.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "tiny_bundle.h"

namespace freewheel {
namespace {

using nlohmann::json;

class BundleTest : public ::testing::Test {
 protected:
  std::string open_fault() const {
    const auto bundle = Bundle::open(folder_.path());
    return bundle.ok() ? "ok" : bundle.status().message();
  }
  testing::TemporaryFolder folder_;
  json manifest_ = testing::write_tiny_bundle(folder_);
};

TEST_F(BundleTest, OpensAndHandsOutWeights) {
  const auto bundle = Bundle::open(folder_.path());
  ASSERT_TRUE(bundle.ok()) << bundle.status().message();
  const auto tensor = (*bundle)->tensor("blocks.1.weight");
  ASSERT_TRUE(tensor.ok());
  EXPECT_FLOAT_EQ(*tensor->as<float>(), 0.99f);
  EXPECT_EQ((*bundle)->tensor("none").status().code(), Code::kBundle);
  EXPECT_NE((*bundle)->engines("plain"), nullptr);
  EXPECT_EQ((*bundle)->engines("none"), nullptr);
}

TEST_F(BundleTest, AFolderWithoutManifestIsNoBundle) {
  std::filesystem::remove(folder_.path() + "/manifest.json");
  EXPECT_NE(open_fault().find("give the folder that 'freewheel build' wrote"), std::string::npos);
}

TEST_F(BundleTest, FilesOfAnotherSizeAreRefused) {
  folder_.write("graphs/all.onnx", "short");
  EXPECT_NE(open_fault().find("has 5 bytes, the manifest says"), std::string::npos);
  std::filesystem::remove(folder_.path() + "/graphs/all.onnx");
  EXPECT_NE(open_fault().find("is missing"), std::string::npos);
}

TEST_F(BundleTest, PathsThatLeaveTheFolderAreRefused) {
  for (const char* name : {"../secret", "/etc/passwd", "a/../../b", "", "a\\b"}) {
    json changed = manifest_;
    changed["files"][name] = {{"bytes", 1}, {"sha256", std::string(64, '0')}};
    testing::write_manifest(folder_, changed);
    EXPECT_NE(open_fault().find("leaves the bundle's folder"), std::string::npos) << name;
  }
  json changed = manifest_;
  changed["engines"][0]["files"]["head"] = "../../elsewhere";
  testing::write_manifest(folder_, changed);
  EXPECT_NE(open_fault().find("leaves the bundle's folder"), std::string::npos);
}

TEST_F(BundleTest, SymbolicLinksMayNotLeaveTheFolder) {
  std::filesystem::create_symlink("/etc/hostname", folder_.path() + "/link");
  json changed = manifest_;
  changed["files"]["link"] = {{"bytes", 1}, {"sha256", std::string(64, '0')}};
  testing::write_manifest(folder_, changed);
  EXPECT_NE(open_fault().find("leaves the bundle's folder"), std::string::npos);
}

TEST_F(BundleTest, SamplersAreFoundByNameShiftAndSteps) {
  const auto bundle = Bundle::open(folder_.path());
  ASSERT_TRUE(bundle.ok());
  const auto table = (*bundle)->sampler("", nullptr, 4);
  ASSERT_TRUE(table.ok()) << table.status().message();
  EXPECT_EQ(table->steps(), 4);
  EXPECT_DOUBLE_EQ(table->row(3)[1], -0.25);
  const double shift = 5.0;
  EXPECT_NE((*bundle)->sampler("euler", &shift, 4).status().what().find("only for 1"),
            std::string::npos);
  EXPECT_NE((*bundle)->sampler("eular", nullptr, 4).status().hint().find("'euler'"),
            std::string::npos);
  for (std::int64_t steps : {0, -1, 5, 1 << 30}) {
    EXPECT_EQ((*bundle)->sampler("euler", nullptr, steps).status().code(), Code::kRequest);
  }
  json changed = manifest_;
  changed["configs"]["plain"]["generation"]["flow_shift"] = shift;
  testing::write_manifest(folder_, changed);
  const auto shifted = Bundle::open(folder_.path());
  ASSERT_TRUE(shifted.ok()) << shifted.status().message();
  const auto missing = (*shifted)->sampler("euler", nullptr, 4);
  ASSERT_FALSE(missing.ok()) << "the default config's shift, not the first table's";
  EXPECT_NE(missing.status().what().find("flow shift 5"), std::string::npos);
}

TEST_F(BundleTest, LatentsBesideTheFirstMayHaveASamplerOfTheirOwnShift) {
  json changed = manifest_;
  json own = changed["samplers"][0];
  own["latents"] = "audio_latents";
  own["flow_shift"] = 3.0;
  changed["samplers"].push_back(own);
  testing::write_manifest(folder_, changed);
  const auto bundle = Bundle::open(folder_.path());
  ASSERT_TRUE(bundle.ok()) << bundle.status().message();
  for (const char* latents : {"latents", "audio_latents", "speech_latents"}) {
    EXPECT_TRUE((*bundle)->sampler("", nullptr, 4, latents).ok()) << latents;
  }
  const double shift = 3.0;
  EXPECT_FALSE((*bundle)->sampler("euler", &shift, 4).ok()) << "that is the sound's";
}

TEST_F(BundleTest, ABundleWithoutSamplersSaysSo) {
  json changed = manifest_;
  changed["samplers"] = json::array();
  testing::write_manifest(folder_, changed);
  const auto bundle = Bundle::open(folder_.path());
  ASSERT_TRUE(bundle.ok()) << bundle.status().message();
  EXPECT_EQ((*bundle)->sampler("", nullptr, 4).status().what(), "has no sampler's table");
}

TEST_F(BundleTest, EnginesForAnotherMachineAreRefused) {
  const std::string folder = folder_.path() + "/engines/plain-here/head";
  const auto record = EngineRecord::read(folder);
  ASSERT_TRUE(record.ok()) << record.status().message();
  EXPECT_TRUE(record->require(folder, "plain", "1", "here").ok());
  EXPECT_NE(record->require(folder, "plain", "1", "there")
                .message()
                .find("compiled for machine 'here', but here it is 'there'; rebuild"),
            std::string::npos);
  EXPECT_FALSE(record->require(folder, "plain", "2", "here").ok());
}

TEST_F(BundleTest, DamagedEngineRecordsAreRefused) {
  const std::string folder = folder_.path() + "/engines/x";
  const std::string rest =
      "\"backend\": \"plain\", \"version\": \"1\", \"machine\": \"\", \"precision\": \"float32\", "
      "\"inputs\": {}, \"outputs\": {}";
  for (const std::string& text :
       {std::string("{"), std::string("{}"), std::string("{\"schema_version\": 9}"),
        "{\"schema_version\": 1, " + rest + "}",
        "{\"schema_version\": 1, " + rest + ", \"files\": {\"../x\": 1}}",
        "{\"schema_version\": 1, " + rest + ", \"files\": {\"gone\": 1}}"}) {
    folder_.write("engines/x/engine.json", text);
    const auto record = EngineRecord::read(folder);
    ASSERT_FALSE(record.ok()) << text;
    EXPECT_EQ(record.status().code(), Code::kBundle);
    EXPECT_FALSE(record.status().hint().empty());
  }
}

}  // namespace
}  // namespace freewheel
