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
  expect_holds(fault([](json& m) {
                 m["tokenizer"] = {{"file", "tokenizer/model.xml"}};
               }),
               "'tokenizer' is there, and no text encoder");
  expect_holds(fault([](json& m) {
                 m["tokenizer"] = {{"file", "tokenizer/model.xml"}};
               }),
               "'tokenizer.file' 'tokenizer/model.xml' is not among the files");
  expect_holds(fault([](json& m) { m["tokenizer"] = {{"unknown", -1}}; }), "'tokenizer.file'");
  expect_holds(
      fault([](json& m) { m["configs"]["plain"]["generation"]["seed"] = 9223372036854775808u; }),
      "generation.seed' is 9223372036854775808");
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
  const auto skip = [](std::int64_t place, const char* stream, std::size_t count) {
    return [=](json& m) {
      json later = m["stages"][0];
      later["skips"]["hidden_skip"] = {{"stream", stream},
                                       {"blocks", std::vector<std::int64_t>(count, place)}};
      m["stages"].push_back(later);
    };
  };
  expect_holds(fault(skip(0, "hidden", 1)), "names 1 blocks for 3");
  expect_holds(fault(skip(0, "none", 3)), "reads 'none' of block 0, which gives none before");
  expect_holds(fault(skip(3, "hidden", 3)), "of block 3, which gives none before");
  const auto skip_of_a_group = [&](json& m) {
    skip(0, "hidden", 3)(m);
    m["stages"][0]["groups"] = {{{"graph", "block"}, {"first", 0}, {"count", 3}}};
  };
  expect_holds(fault(skip_of_a_group), "reads 'hidden' of block 0, which gives none before");
  const auto read = [](const char* value, std::size_t count, const char* input = "timestep_proj") {
    return
        [=](json& m) { m["stages"][0]["reads"][input] = std::vector<std::string>(count, value); };
  };
  expect_holds(fault(read("temb", 1)), "names 1 values for 3 blocks");
  expect_holds(fault(read("temb", 3, "none")), "reads.none' is no input of the stage's graphs");
  expect_holds(fault(read("hidden", 3)), "names 'hidden', which nothing gives before the blocks");
  const auto modulate = [](const char* takes, const char* gives, const char* runs = "run_block") {
    return [=](json& m) {
      const json table = {{"dtype", "float32"}, {"shape", {"steps", 4}}};
      json& graph = m["graphs"]["modulation"] = m["graphs"]["prompt"];
      graph["runs"] = runs;
      graph["inputs"] = json::object({{takes, table}});
      graph["outputs"] = json::object({{gives, table}});
      m["graphs"]["block"]["inputs"]["emb"] = table;
      m["stages"][0]["modulation"] = "modulation";
    };
  };
  EXPECT_EQ(fault(modulate("temb", "emb")), "ok");
  expect_holds(fault(modulate("temb", "emb", "run")), "runs as 'run', not as 'run_block'");
  expect_holds(fault(modulate("hidden", "emb")),
               "takes 'hidden', which nothing gives before the steps");
  expect_holds(fault(modulate("temb", "odd")),
               "gives 'odd', which the stage's block does not take");
  expect_holds(fault([](json& m) { m["stages"][0]["modulation"] = "none"; }),
               "names graph 'none', which is not there");
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

TEST_F(ManifestTest, WhatIsSampledBesideTheFirstHasAnOutput) {
  expect_holds(fault([](json& m) {
                 m["inputs"]["audio_latents"] = m["inputs"]["latents"];
                 m["inputs"]["audio_latents"]["argument"] = "audio_hidden_states";
               }),
               "'graphs.finish.outputs' lack 'audio_model_output'");
  expect_holds(fault([](json& m) { m["inputs"]["latents"]["runs"] = "prompt"; }),
               "'inputs' lack 'latents'");
}

TEST_F(ManifestTest, ACachedStreamHasItsResidualAndHistory) {
  const std::string found = fault([](json& m) {
    json& outputs = m["graphs"]["reuse"]["outputs"];
    outputs["audio_hidden_out"] = outputs["hidden_out"];
  });
  expect_holds(found, "'graphs.head.outputs' lack 'audio_hidden'");
  expect_holds(found, "'graphs.delta.outputs' lack 'audio_residual'");
  expect_holds(found, "'graphs.reuse.inputs' lack 'audio_history'");
}

TEST_F(ManifestTest, ReadsWhoseEachTimestepIs) {
  json changed = manifest_;
  changed["inputs"]["next_timesteps"] = changed["inputs"]["timesteps"];
  changed["inputs"]["next_timesteps"]["of"] = {"next"};
  const auto read = Manifest::parse(changed.dump(), "manifest.json");
  ASSERT_TRUE(read.ok()) << read.status().message();
  EXPECT_EQ(read->inputs.at("next_timesteps").of, std::vector<std::string>{"next"});
  EXPECT_EQ(read->inputs.at("timesteps").of, std::vector<std::string>{"latents"});
  EXPECT_EQ(read->latents(), std::vector<std::string>{"latents"});
  EXPECT_EQ(read->cached(), std::vector<std::string>{"hidden"});
}

}  // namespace
}  // namespace freewheel
