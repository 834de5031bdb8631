// SPDX-License-Identifier: Apache-2.0
#pragma once

/// What a run is asked for. Every way in fills a `Request` (freewheel-run, the C ABI, Triton);
/// what one may say, its limits and its errors stand here alone.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "freewheel/bundle.h"
#include "freewheel/lora.h"
#include "freewheel/policy_spec.h"
#include "freewheel/status.h"
#include "freewheel/tensor.h"

namespace freewheel {

class Model;

/// Branches by side: guidance goes from the second to the first.
inline constexpr const char* kSides[] = {"cond", "uncond"};

/// One of the things that a model samples beside `latents`, as the sound of a video.
struct Beside {
  /// As `Request::latents` and `RunRequest::latents`.
  Tensor latents;
  std::optional<double> guidance_scale;  ///< Nothing takes that of `latents`.
};

/// A request as it was made. What is not said is the config's.
struct Request {
  std::string cache;    ///< A config or policy of the bundle; empty takes the default config.
  std::string sampler;  ///< Empty takes the pipeline's own.
  /// LoRAs of the model's folder, as "name:0.8,other"; empty is none.
  std::string lora;
  std::optional<std::int64_t> steps, frames, height, width;
  std::optional<std::uint64_t> seed;  ///< Of the start noise, below 2**63.
  std::optional<double> guidance_scale, guidance_scale_2, flow_shift;
  bool force = false;   ///< Runs a config of a size that is `kFarBeyond` times the bundle's own.
  Overrides overrides;  ///< Of the cache setting.
  /// Names that stand beside overrides where they were read, for the hint of an unknown one.
  std::vector<std::string> also_known;
  /// Start noise, host, any float dtype, in place of seed and size. A shape without data: noise of
  /// the seed in that shape. Neither: noise of the seed, of the size.
  Tensor latents;
  Tensor condition;  ///< As in `RunRequest`.
  /// Name of latents beside the first -> what is asked of them. Where noise is drawn and no shape
  /// given, the sizes of latents and prompts tell it.
  std::map<std::string, Beside> beside;
  /// Branch → per-prompt inputs, host, any float dtype. Where `uncond` has none that is no text (a
  /// picture), it has that of `cond`.
  std::map<std::string, Tensors> prompts;
  /// Branch → token ids, in place of its text states.
  std::map<std::string, std::vector<std::int64_t>> token_ids;
  /// Branch → prompt as UTF-8 text, in place of its token ids. Where guidance runs a branch without
  /// any prompt beside a text, that branch's is empty.
  std::map<std::string, std::string> texts;
  bool decodes = false;  ///< Whether the VAE decoder has to take the result.
  /// Frames · height · width that may be asked for.
  std::int64_t max_pixels = std::numeric_limits<std::int64_t>::max();

  /// Sets the field that goes by one of `names`, or the guidance scale of latents beside the first
  /// ("audio_guidance_scale"). Text may spell numbers; a value of another kind is refused.
  Status set(const std::string& name, const Value& value);

  /// "policy" (the field `cache`), "sampler", "lora", "steps", "seed", "frames", "height", "width",
  /// "guidance_scale", "guidance_scale_2", "flow_shift", "force".
  static const std::vector<std::string>& names();

  /// Whether `set` takes a name.
  static bool knows(const std::string& name);
};

/// One step of one branch, as it ends.
struct BranchEvent {
  std::string_view branch;
  std::int64_t step_index = 0, steps = 0;
  bool computed = true;
  double distance = 0.0;  ///< NaN where the policy has none.
  double seconds = 0.0;
};

/// One step of the sampler, as it ends. The tensors are host float32, valid during the call.
struct SampleEvent {
  std::int64_t step_index = 0, steps = 0;
  double timestep = 0.0, sigma = 0.0;
  Tensor sample;        ///< The sample that the step started from.
  Tensor model_output;  ///< After guidance; sample − sigma · model_output predicts the clean one.
};

/// A whole run, with every value settled.
struct RunRequest {
  /// Host float32 [batch, channels, frames, height, width]: noise when the run begins, the result
  /// when it ends. Left as it was where the run fails or is cancelled.
  Tensor latents;
  /// Further channels that are appended to the latents at every step (image-to-video); else empty.
  Tensor condition;
  /// The other latents that the model samples, by name.
  std::map<std::string, Beside> beside;
  /// Branch (`cond`, and with guidance `uncond`) → per-prompt inputs, host tensors of any float
  /// dtype.
  std::map<std::string, Tensors> prompts;
  std::int64_t steps = 0;
  double guidance_scale = 1.0;  ///< Where all scales are 1 or less, `cond` alone runs.
  /// Of bundles with two experts: the scale from the second expert's first step on; else the same.
  std::optional<double> guidance_scale_2;
  std::string sampler;               ///< Empty takes the pipeline's own.
  std::optional<double> flow_shift;  ///< Nothing takes the default config's.
  CacheSetting cache;
  std::vector<LoraUse> loras;  ///< Merged into the weights, in this order.
  /// What the request's maker should know; the run's statistics carry them on.
  std::vector<std::string> warnings;
  std::function<void(const BranchEvent&)> on_branch_step;
  std::function<void(const SampleEvent&)> on_step;
  /// Asks the run to stop, if given; checked between engine calls. `Session::cancel` does as well.
  const std::atomic<bool>* cancelled = nullptr;

  bool is_guided() const noexcept;

  /// The guidance scale of some latents at a step of an expert.
  double scale_of(const std::string& name, std::size_t expert) const noexcept;
};

/// The shape that the model is given: of latents and a condition behind their channels, if there is
/// one.
Result<Shape> joined_shape(const Tensor& latents, const Tensor& condition);

/// Checks everything about a run that is known before it: latents, condition, guidance, sampler,
/// cache setting, and each branch's prompt (whose tensors may still be null: states that are yet to
/// be encoded). `Session::run` checks it too.
Status check_run(const Bundle& bundle, const RunRequest& request);

/// Checks that a branch's prompt has every per-prompt input of the bundle, and each of its shape.
Status check_prompt(const Manifest& manifest, const std::string& branch, const Tensors& states);

/// A run that is ready, and what it points into beside the request's own tensors.
struct PreparedRun {
  RunRequest run;  ///< Without callbacks. Its latents are the run's own: never the request's.
  std::vector<Buffer> buffers;
  std::optional<std::uint64_t> seed;  ///< Of the noise; nothing where latents were given.
};

/// Makes the run that a request asks for: settles every value, checks everything that is known
/// before the first step, then draws noise and encodes texts and token ids.
/// @param request Its tensors must outlive the run.
Result<PreparedRun> prepare_run(Model& model, const Request& request);

/// The shape of the latents of the size that a request asks for.
Result<Shape> requested_shape(const Manifest& manifest, const Request& request);

}  // namespace freewheel
