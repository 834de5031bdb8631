// SPDX-License-Identifier: Apache-2.0
#include "timesteps.h"

#include <gtest/gtest.h>

namespace freewheel {
namespace {

using Values = std::vector<float>;

InputEntry timestep(std::vector<std::string> of) {
  InputEntry input;
  input.runs = "run";
  input.of = std::move(of);
  return input;
}

TEST(TimestepsTest, AVectorOfThemIsStepAfterStep) {
  Manifest manifest;
  manifest.inputs["both"] = timestep({"latents", "audio_latents"});
  const Schedule schedule{{900, 500}, {0.9, 0.5}, {{"audio_latents", {700, 100}}}};
  const TimestepInputs found = timestep_inputs(manifest, schedule);
  EXPECT_EQ(found.at("timesteps"), (Values{900, 500}));
  EXPECT_EQ(found.at("both"), (Values{900, 700, 500, 100}));
}

TEST(TimestepsTest, TheNextStepsIsZeroBehindTheLast) {
  Manifest manifest;
  manifest.inputs["timesteps"] = timestep({"latents"});
  manifest.inputs["next_timesteps"] = timestep({"next"});
  manifest.inputs["text_states"].runs = "prompt";
  const TimestepInputs found = timestep_inputs(manifest, {{900, 500, 100}, {}, {}});
  EXPECT_EQ(found.at("timesteps"), (Values{900, 500, 100}));
  EXPECT_EQ(found.at("next_timesteps"), (Values{500, 100, 0}));
  EXPECT_EQ(found.size(), 2u);
}

TEST(TimestepsTest, LatentsThatNothingIsSaidOfHaveTheFirsts) {
  Manifest manifest;
  manifest.inputs["audio_timesteps"] = timestep({"audio_latents"});
  EXPECT_EQ(timestep_inputs(manifest, {{900, 500}, {}, {}}).at("audio_timesteps"),
            (Values{900, 500}));
}

}  // namespace
}  // namespace freewheel
