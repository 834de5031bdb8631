// SPDX-License-Identifier: Apache-2.0
#include "freewheel/manifest.h"

#include <gtest/gtest.h>

#include <functional>

#include "tiny_bundle.h"

namespace freewheel {
namespace {

using nlohmann::json;

class ManifestTest : public ::testing::Test {
 protected:
  std::string fault(const std::function<void(json&)>& change) const {
    json changed = manifest_;
    change(changed);
    return text_fault(changed.dump());
  }
  static std::string text_fault(const std::string& text) {
    const auto parsed = Manifest::parse(text, "manifest.json");
    return parsed.ok() ? "ok" : parsed.status().message();
  }

  testing::TemporaryFolder folder_;
  json manifest_ = testing::write_tiny_bundle(folder_);
};

void expect_holds(const std::string& message, const std::string& part) {
  EXPECT_NE(message.find(part), std::string::npos) << message;
}

TEST_F(ManifestTest, ReadsEveryField) {
  const auto parsed = Manifest::parse(manifest_.dump(), "manifest.json");
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  EXPECT_EQ(parsed->stages.at(0).count, 3);
  EXPECT_EQ(parsed->policies.at("interval").spec.history.maximum, 2);
  EXPECT_EQ(parsed->configs.at("plain").generation.guidance_scale, 2.0);
  EXPECT_EQ(parsed->configs.at("plain").generation.seed, 9);
  EXPECT_EQ(parsed->policies.at("interval").setting.guard.limits.at("last_exact"), 1);
  EXPECT_EQ(parsed->latent_scale.frames, 4);
  EXPECT_FALSE(parsed->vocabulary_size);
  EXPECT_EQ(parsed->graphs.at("block").weights.at("weight"), "blocks.{block}.weight");
  EXPECT_EQ(parsed->inputs.at("latents").text(), "[batch, 2, frames, height, width]");
}

TEST_F(ManifestTest, ReadsExpertsAndBranchOverrides) {
  json& cache = manifest_["configs"]["plain"]["cache"];
  cache["branches"] = {{"uncond", {{"interval", 4}}}};
  manifest_["experts"] = {{{"part", "a"}, {"prefix", ""}, {"from_timestep", 875.0}},
                          {{"part", "b"}, {"prefix", "b."}, {"from_timestep", 0}}};
  const auto parsed = Manifest::parse(manifest_.dump(), "manifest.json");
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  ASSERT_EQ(parsed->experts.size(), 2u);
  EXPECT_EQ(parsed->experts[0].from_timestep, 875.0);
  EXPECT_EQ(parsed->experts[1].prefix, "b.");
  const CacheSetting& setting = parsed->configs.at("plain").cache;
  EXPECT_EQ(setting.for_branch("uncond").parameters.at("interval"), Value(std::int64_t{4}));
  EXPECT_EQ(setting.for_branch("cond").parameters.at("interval"), Value(std::int64_t{2}));
  expect_holds(fault([](json& m) { m["experts"][1]["from_timestep"] = 900; }),
               "experts.1.from_timestep' is not below");
  expect_holds(fault([](json& m) { m["experts"][0].erase("from_timestep"); }),
               "experts.0.from_timestep' is missing");
  expect_holds(fault([](json& m) { m["experts"] = json(std::vector<json>(17, json::object())); }),
               "'experts' are 17");
  expect_holds(fault([](json& m) {
                 m["configs"]["plain"]["cache"]["branches"] = {{"uncond", {{"interval", {{}}}}}};
               }),
               "branches.uncond.interval' is no parameter's value");
}

TEST_F(ManifestTest, ReadsWhatAPolicyKeeps) {
  const auto parsed = Manifest::parse(manifest_.dump(), "manifest.json");
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  const PolicySpec& spec = parsed->policies.at("follow").spec;
  EXPECT_TRUE(spec.wants_feature && spec.wants_model_output && spec.is_one_decision);
  EXPECT_TRUE(spec.keeps_computed_signal && spec.keeps_previous_signal);
  EXPECT_FALSE(parsed->policies.at("motion").spec.wants_model_output);
  json& follow = manifest_["policies"]["follow"]["spec"];
  EXPECT_FALSE(spec.keeps_older_signal);
  follow["kept"].push_back("older_signal");
  const auto older = Manifest::parse(manifest_.dump(), "manifest.json");
  ASSERT_TRUE(older.ok()) << older.status().message();
  EXPECT_TRUE(older->policies.at("follow").spec.keeps_older_signal);
  follow["one_decision"] = 1;
  expect_holds(fault([](json&) {}), "one_decision' should be true or false");
  follow["feature"] = "thought";
  expect_holds(fault([](json&) {}), "'thought', which this version can't tap");
}

TEST_F(ManifestTest, NewerSchemasAreRefusedWithTheVersion) {
  expect_holds(fault([](json& m) { m["graphs"].erase("gram"); }),
               "'policies.alike.spec.kept' has 'gram', which no graph 'gram' gives");
  expect_holds(fault([](json& m) { m["policies"]["alike"]["spec"]["history"]["depth"] = 1; }),
               "'policies.alike.spec.history' keeps 'gram' and not all residuals");
  expect_holds(fault([](json& m) { m["schema_version"] = 3; }),
               "has schema_version 3; this Freewheel reads up to 2; update Freewheel");
  expect_holds(fault([](json& m) { m["schema_version"] = 1; }),
               "has schema_version 1; this Freewheel reads 2; build the bundle again");
  expect_holds(fault([](json& m) { m.erase("schema_version"); }), "schema_version");
}

TEST_F(ManifestTest, NoDefaultIsLeftOpen) {
  for (const auto& [name, value] : manifest_["configs"]["plain"]["generation"].items()) {
    const std::string key = name, path = "'configs.plain.generation." + key + "'";
    expect_holds(fault([&](json& m) { m["configs"]["plain"]["generation"].erase(key); }),
                 path + " is missing");
    expect_holds(fault([&](json& m) { m["configs"]["plain"]["generation"][key] = "x"; }), path);
  }
  expect_holds(fault([](json& m) { m.erase("latent_scale"); }), "'latent_scale' is missing");
  expect_holds(fault([](json& m) { m["latent_scale"]["pixels"] = 0; }), "'latent_scale.pixels'");
  expect_holds(fault([](json& m) { m["policies"]["off"].erase("setting"); }),
               "'policies.off.setting' is missing");
  expect_holds(fault([](json& m) { m["vocabulary_size"] = 0; }), "'vocabulary_size'");
  expect_holds(fault([](json& m) { m["graphs"]["text_encoder"] = m["graphs"]["prompt"]; }),
               "'vocabulary_size' is missing");
  expect_holds(
      fault([](json& m) { m["configs"]["plain"]["generation"]["seed"] = 9223372036854775808u; }),
      "generation.seed' is 9223372036854775808");
}

TEST_F(ManifestTest, AConfigOfAnotherSizeIsWarnedOfAndFarBeyondRefused) {
  json& configs = manifest_["configs"];
  configs["wide"] = configs["plain"];
  configs["wide"]["generation"]["width"] = 96;
  configs["huge"] = configs["plain"];
  configs["huge"]["generation"]["height"] = 640;
  const auto parsed = Manifest::parse(manifest_.dump(), "manifest.json");
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  const Shape own = *latent_shape(*parsed, 5, 32, 48), huge = *latent_shape(*parsed, 5, 640, 48);
  EXPECT_EQ(*check_geometry(*parsed, "plain", huge, false), "");
  EXPECT_EQ(*check_geometry(*parsed, "interval", huge, false), "");
  EXPECT_EQ(*check_geometry(*parsed, "wide", *latent_shape(*parsed, 5, 32, 96), false),
            "config 'wide' was made for 96x32, 5 frames, and the bundle's own size is 48x32, 5 "
            "frames: this run has 2 times its latents");
  EXPECT_NE(check_geometry(*parsed, "huge", own, false)->find("1 times its latents"),
            std::string::npos);
  const auto refused = check_geometry(*parsed, "huge", huge, false);
  ASSERT_EQ(refused.status().code(), Code::kRequest);
  EXPECT_EQ(refused.status().hint(),
            "run at the bundle's size: height 32, width 48, frames 5; or run it with 'force'");
  EXPECT_NE(check_geometry(*parsed, "huge", huge, true)->find("20 times"), std::string::npos);
}

TEST_F(ManifestTest, LatentsTakeTheShapeThatTheModelGives) {
  const auto parsed = Manifest::parse(manifest_.dump(), "manifest.json");
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  EXPECT_EQ(*latent_shape(*parsed, 5, 32, 48), (Shape{1, 2, 2, 4, 6}));
  EXPECT_EQ(*latent_shape(*parsed, 1, 8, 8), (Shape{1, 2, 1, 1, 1}));
  // Tokens in a row, as LTX-Video and FLUX have them, at a scale of their own; patches of 2.
  manifest_["latent_scale"] = {{"frames", 8}, {"pixels", 32}};
  manifest_["dims"]["tokens"] = json::array(
      {json::array({"frames", 1}), json::array({"height", 2}), json::array({"width", 2})});
  manifest_["graphs"]["finish"]["outputs"]["model_output"]["shape"] = {"batch", "tokens", 2};
  const auto packed = Manifest::parse(manifest_.dump(), "manifest.json");
  ASSERT_TRUE(packed.ok()) << packed.status().message();
  EXPECT_EQ(*latent_shape(*packed, 9, 64, 128), (Shape{1, 2 * 1 * 2, 2}));
  EXPECT_EQ(latent_shape(*packed, 9, 64, 96).status().message(),
            "width: is 96, expected a multiple of 64 pixels; ask for 64");
  EXPECT_EQ(latent_shape(*packed, 8, 64, 64).status().message(),
            "frames: are 8, expected 1 more than a multiple of 8; ask for 9");
  EXPECT_EQ(latent_shape(*packed, 9, 32832, 64).status().message(),
            "height: is 32832, expected 32768 pixels at most; ask for 32768");
  EXPECT_EQ(latent_shape(*packed, 32769, 64, 64).status().message(),
            "frames: are 32769, expected 32768 at most; ask for 32761");
  for (const std::int64_t absurd : {std::int64_t{-1}, std::int64_t{0}, std::int64_t{1} << 40}) {
    EXPECT_FALSE(latent_shape(*packed, absurd, 64, 64).ok());
    EXPECT_FALSE(latent_shape(*packed, 1, absurd, 64).ok());
  }
}

TEST_F(ManifestTest, UnknownKeysAreIgnored) {
  EXPECT_EQ(fault([](json& m) { m["later"] = {1, 2}; }), "ok");
}

TEST_F(ManifestTest, TextThatIsNoManifestIsRefused) {
  for (const char* text : {"", "{", "[]", "null", "3", "{\"a\": 1} x", "\xff\xfe"}) {
    EXPECT_NE(text_fault(text), "ok") << text;
  }
  expect_holds(text_fault("{\"a\": 1, \"a\": 2}"), "key 'a' is given twice");
  expect_holds(text_fault(std::string(100000, '[')), "nested deeper than 64");
  expect_holds(text_fault("{\"schema_version\": 2}"), "faults: ");
}

TEST_F(ManifestTest, AllFaultsAreReportedAtOnce) {
  const std::string message = fault([](json& m) {
    m["feature_block"] = -1;
    m["family"] = 3;
    m["stages"][0]["count"] = "three";
  });
  for (const char* part : {"3 faults", "feature_block", "family", "stages.0.count"}) {
    expect_holds(message, part);
  }
}

TEST_F(ManifestTest, AbsurdCountsAreRefusedBeforeAllocation) {
  expect_holds(fault([](json& m) { m["stages"][0]["count"] = 1'000'000'000; }), "stages.0.count");
  expect_holds(fault([](json& m) { m["policies"]["off"]["spec"]["history"]["maximum"] = 1 << 30; }),
               "history.maximum");
  expect_holds(fault([](json& m) {
                 m["tensors"].begin().value()["shape"] = {1 << 30, 1 << 30};
               }),
               "absurdly many");
  expect_holds(fault([](json& m) { m["tensors"].begin().value()["offset"] = -1; }), "offset");
  expect_holds(
      fault([](json& m) { m["tensors"].begin().value()["bytes"] = 18446744073709551615u; }),
      "bytes");
  expect_holds(fault([](json& m) {
                 m["policies"]["interval"]["spec"]["state"]["distance"]["shape"] = {1 << 20};
               }),
               "absurdly many");
  expect_holds(fault([](json& m) {
                 m["graphs"]["head"]["inputs"]["latents"]["shape"] = json(std::vector<int>(9, 1));
               }),
               "rank 9");
}

TEST_F(ManifestTest, DanglingNamesAreFaults) {
  expect_holds(fault([](json& m) { m["stages"][0]["block"] = "blok"; }), "graph 'blok'");
  expect_holds(fault([](json& m) { m["default_config"] = "none"; }), "default_config");
  expect_holds(fault([](json& m) { m["graphs"].erase("reuse"); }), "'graphs.reuse' is missing");
  expect_holds(fault([](json& m) { m["graphs"]["head"]["file"] = "x"; }), "not among the files");
  expect_holds(fault([](json& m) { m["tensors"].begin().value()["offset"] = 1 << 20; }),
               "lies outside file");
  expect_holds(fault([](json& m) { m["engines"] = json::array(); }), "'engines' is empty");
}

TEST_F(ManifestTest, ThingsOfTheWrongTypeNeverCrash) {
  // Every member of every object, at every depth, replaced by things it is not.
  const json replacements[] = {nullptr,
                               true,
                               -1,
                               1e300,
                               "x",
                               json::array({1, "a"}),
                               json{{"dtype", 3}},
                               18446744073709551615u};
  std::size_t tried = 0;
  const std::function<void(json&, json&)> visit = [&](json& root, json& node) {
    if (!node.is_structured()) return;
    for (auto& child : node) {
      const json kept = child;
      for (const json& replacement : replacements) {
        child = replacement;
        (void)Manifest::parse(root.dump(), "manifest.json");
        ++tried;
      }
      child = kept;
      if (tried < 20000) visit(root, child);
    }
  };
  json root = manifest_;
  for (const char* key : {"files", "engines"}) root[key] = json::object();
  root["graphs"] = {{"head", manifest_["graphs"]["head"]}};
  visit(root, root);
  EXPECT_GT(tried, 500u);
}

TEST(Dims, MatchDeriveAndShape) {
  Io io;
  io.shape = {std::string("batch"), std::int64_t{2}, std::string("batch")};
  const auto found = match_dims("x", io, Shape{3, 2, 3});
  ASSERT_TRUE(found.ok());
  EXPECT_EQ(found->at("batch"), 3);
  EXPECT_EQ(match_dims("x", io, Shape{3, 2, 4}).status().message(),
            "input 'x': has shape [3, 2, 4], the bundle takes [batch, 2, batch]; give latents and "
            "embeddings of the model that the bundle was built from");
  EXPECT_FALSE(match_dims("x", io, Shape{0, 2, 0}).ok());
  EXPECT_FALSE(match_dims("x", io, Shape{3, 2}).ok());
  Manifest manifest;
  manifest.dims["tokens"] = {{"height", 2}, {"width", 2}};
  EXPECT_EQ(derive_dims(manifest, {{"height", 6}, {"width", 4}})->at("tokens"), 6);
  EXPECT_EQ(derive_dims(manifest, {{"height", 5}, {"width", 4}}).status().where(),
            "dimension 'height'");
  EXPECT_FALSE(shape_of("x", io, {}).ok());
  EXPECT_FALSE(shape_of("x", io, {{"batch", std::int64_t{1} << 40}}).ok());
}

}  // namespace
}  // namespace freewheel
