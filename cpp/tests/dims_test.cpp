// SPDX-License-Identifier: Apache-2.0
#include "freewheel/dims.h"

#include <gtest/gtest.h>

#include "tiny_bundle.h"

namespace freewheel {
namespace {

using nlohmann::json;

class DimsTest : public ::testing::Test {
 protected:
  testing::TemporaryFolder folder_;
  json manifest_ = testing::write_tiny_bundle(folder_);
};

TEST_F(DimsTest, AConfigOfAnotherSizeIsWarnedOfAndFarBeyondRefused) {
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

TEST_F(DimsTest, ASizeBeyondTheModelsTablesIsRefusedWithItsPlace) {
  manifest_["limits"]["height"] = {{"most", 4}, {"where", "module 'rope' (model.py:3)"}};
  const auto parsed = Manifest::parse(manifest_.dump(), "manifest.json");
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  EXPECT_TRUE(latent_shape(*parsed, 5, 32, 48).ok());
  const auto refused = latent_shape(*parsed, 5, 48, 48);
  ASSERT_EQ(refused.status().code(), Code::kRequest);
  EXPECT_EQ(refused.status().message(),
            "dimension 'height': is 6, the model has positions for 4: module 'rope' (model.py:3); "
            "choose a smaller size");
}

TEST_F(DimsTest, LatentsTakeTheShapeThatTheModelGives) {
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

TEST_F(DimsTest, FramesOfHalfAPatchAreRefused) {
  manifest_["latent_scale"] = {{"frames", 4}, {"pixels", 8}};
  manifest_["dims"]["tokens"] = json::array(
      {json::array({"frames", 2}), json::array({"height", 1}), json::array({"width", 1})});
  const auto video = Manifest::parse(manifest_.dump(), "manifest.json");
  ASSERT_TRUE(video.ok()) << video.status().message();
  EXPECT_TRUE(latent_shape(*video, 5, 8, 8).ok());
  EXPECT_TRUE(latent_shape(*video, 13, 8, 8).ok());
  EXPECT_EQ(latent_shape(*video, 9, 8, 8).status().message(),
            "frames: are 9, expected 5 more than a multiple of 8: 2 latent frames are a patch; "
            "ask for 13");
  EXPECT_EQ(latent_shape(*video, 1, 8, 8).status().hint(), "ask for 5");
  EXPECT_EQ(latent_shape(*video, 32769, 8, 8).status().hint(), "ask for 32765");
  manifest_["latent_scale"]["frames"] = 1;  // sound, whose latents are frames
  const auto sound = Manifest::parse(manifest_.dump(), "manifest.json");
  ASSERT_TRUE(sound.ok()) << sound.status().message();
  EXPECT_TRUE(latent_shape(*sound, 2, 8, 8).ok());
  EXPECT_EQ(latent_shape(*sound, 81, 8, 8).status().message(),
            "frames: are 81, expected a multiple of 2: 2 latent frames are a patch; ask for 82");
  EXPECT_EQ(latent_shape(*sound, 1, 8, 8).status().hint(), "ask for 2");
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

TEST_F(DimsTest, ASumIsOfDimensionsPaddedOnesAndNumbers) {
  manifest_["sums"] = {{"joint", {json::array({"text_tokens", 32}), "tokens", 3}}};
  const auto parsed = Manifest::parse(manifest_.dump(), "manifest.json");
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  const Dims sizes = {{"batch", 1}, {"frames", 1}, {"height", 4}, {"width", 6}};
  EXPECT_EQ(derive_dims(*parsed, sizes)->count("joint"), 0u);
  Dims all = sizes;
  all["text_tokens"] = 33;
  const Dims found = *derive_dims(*parsed, all);
  EXPECT_EQ(found.at("joint"), 64 + found.at("tokens") + 3);
  manifest_["sums"] = {{"poses", {"frames", "frames", -3}}};
  const auto less = Manifest::parse(manifest_.dump(), "manifest.json");
  ASSERT_TRUE(less.ok()) << less.status().message();
  EXPECT_EQ(derive_dims(*less, {{"frames", 3}})->at("poses"), 3);
  EXPECT_EQ(derive_dims(*less, sizes).status().message(),
            "dimension 'poses': is -1, and follows from the sizes of the run; choose larger ones, "
            "such as more frames");
  for (const json& term : {json(0), json(1.5), json::array({"tokens", 0}), json::array({1, 2})}) {
    manifest_["sums"] = {{"joint", json::array({term})}};
    EXPECT_FALSE(Manifest::parse(manifest_.dump(), "manifest.json").ok()) << term;
  }
}

}  // namespace
}  // namespace freewheel
