// SPDX-License-Identifier: Apache-2.0
#include "freewheel/codec.h"

#include <gtest/gtest.h>

namespace freewheel {
namespace {

/// A manifest with both ends of a pipeline, as far as checks look.
Manifest with_ends() {
  Manifest manifest;
  manifest.graphs["text_encoder"] = {};
  manifest.vocabulary_size = 128;
  manifest.graphs["vae_decode"].inputs["latents"].shape = {
      std::int64_t{1}, std::int64_t{16}, std::int64_t{2}, std::int64_t{4}, std::int64_t{4}};
  return manifest;
}

TEST(Codec, TokenIdsLieInTheVocabulary) {
  const Manifest manifest = with_ends();
  EXPECT_TRUE(check_token_ids(manifest, {0, 5, 127}, 16).ok());
  for (const std::int64_t stray : {std::int64_t{-5}, std::int64_t{128}, std::int64_t{99999}}) {
    const Status status = check_token_ids(manifest, {5, stray, 1}, 16);
    EXPECT_EQ(status.code(), Code::kRequest);
    EXPECT_EQ(status.message(), "token ids: hold " + std::to_string(stray) +
                                    ", expected 0 to 127; take them from the pipeline's own "
                                    "tokenizer");
  }
  EXPECT_FALSE(check_token_ids(manifest, {}, 16).ok());
  EXPECT_FALSE(check_token_ids(manifest, {1, 1, 1}, 2).ok());
  EXPECT_NE(check_token_ids(Manifest(), {1}, 16).message().find("--with-text-encoder"),
            std::string::npos);
}

TEST(Codec, TheDecodersSizeIsKnownAhead) {
  const Manifest manifest = with_ends();
  EXPECT_TRUE(check_decodes(manifest, Shape{1, 16, 2, 4, 4}).ok());
  EXPECT_EQ(check_decodes(manifest, Shape{1, 16, 3, 4, 4}).message(),
            "VAE decoder: latents are [1, 16, 3, 4, 4], it was compiled for [1, 16, 2, 4, 4]; ask "
            "for the size that the bundle was built for, or for latents alone");
  EXPECT_NE(check_decodes(Manifest(), Shape{1}).message().find("--with-vae"), std::string::npos);
}

}  // namespace
}  // namespace freewheel
