// SPDX-License-Identifier: Apache-2.0
#pragma once

/// One request, checked and ready to run. Knows nothing of Triton's interface.

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "freewheel/model.h"
#include "freewheel/session.h"
#include "request_options.h"
#include "served_options.h"

namespace freewheel::triton {

/// Names of tensors, as config.pbtxt declares them. Prompt inputs have the bundle's own names, and
/// those of the negative prompt `negative_` before them.
inline constexpr char kTokenIds[] = "token_ids", kNegativeTokenIds[] = "negative_token_ids";
inline constexpr char kTextInput[] = "text_input", kNegativeTextInput[] = "negative_text_input";
inline constexpr char kSeed[] = "seed", kLatents[] = "latents", kCondition[] = "condition";
inline constexpr char kFrames[] = "frames", kProgress[] = "progress", kPreview[] = "preview";
inline constexpr char kNegative[] = "negative_";

struct Job {
  PreparedRun prepared;
  std::int64_t stream = 0;
  std::vector<std::string> wanted_latents;
  bool wants_frames = false, wants_preview = false;
};

/// Makes the run that a request asks for, as `prepare_run` does.
/// @param tensors The request's inputs by name, without a batch axis; they must outlive the job.
/// @param texts Likewise, those that are text.
/// @param outputs What the client asked for.
Result<Job> make_job(Model& model, const ServedOptions& served, const RequestOptions& options,
                     const Tensors& tensors, const std::map<std::string, std::string>& texts,
                     const std::set<std::string>& outputs);

/// Predicts the clean sample of a step, as small as the latents.
/// @return With a VAE decoder uint8 [frames, height, width, 3], each pixel the mean of those that a
///   latent stands for; else float32 [channels, frames, height, width].
Result<Buffer> preview_of(Model& model, const SampleEvent& event);

/// Returns a view without its first axis, which is 1.
Tensor without_batch(Tensor tensor);

}  // namespace freewheel::triton
