// SPDX-License-Identifier: Apache-2.0
#pragma once

/// One set of buffers over a loaded model: runs the denoise loop with any compiled policy.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "freewheel/bundle.h"
#include "freewheel/model.h"
#include "freewheel/policy_spec.h"
#include "freewheel/statistics.h"
#include "freewheel/status.h"
#include "freewheel/tensor.h"

namespace freewheel {

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

/// A whole run.
struct RunRequest {
  /// Host float32 [batch, channels, frames, height, width]: noise when the run begins, the result
  /// when it ends. Left as it was where the run fails or is cancelled.
  Tensor latents;
  /// Further channels that are appended to the latents at every step (image-to-video); else empty.
  Tensor condition;
  /// Branch (`cond`, and with guidance `uncond`) → per-prompt inputs, host tensors of any float
  /// dtype.
  std::map<std::string, Tensors> prompts;
  std::int64_t steps = 0;
  double guidance_scale = 1.0;  ///< 1 or less runs `cond` alone.
  /// Of bundles with two experts: the scale from the second expert's first step on; else the same.
  std::optional<double> guidance_scale_2;
  std::string sampler;               ///< Empty takes the pipeline's own.
  std::optional<double> flow_shift;  ///< Nothing takes the default config's.
  CacheSetting cache;
  std::function<void(const BranchEvent&)> on_branch_step;
  std::function<void(const SampleEvent&)> on_step;
  /// Asks the run to stop, if given; checked between engine calls. `Session::cancel` does as well.
  const std::atomic<bool>* cancelled = nullptr;

  bool is_guided() const noexcept { return guidance_scale > 1.0; }

  /// The shape that the model is given: of latents and condition together.
  Result<Shape> input_shape() const;
};

/// Checks everything about a run that is known before it: latents, condition, guidance, sampler,
/// cache setting, and that each branch has a prompt (whose tensors may still be null: a prompt that
/// is yet to be encoded). `Session::run` checks it too.
Status check_run(const Bundle& bundle, const RunRequest& request);

/// A per-step input by name.
struct NamedTensor {
  std::string_view name;
  Tensor tensor;
};

/// Runs the model calls of a denoise loop. One thread at a time, except `cancel`; any number of
/// sessions may share a model. Order of use: `run`, or `begin` once per run, `set_prompt` per
/// branch, then `step` for every branch of every step. A run resets all state. Every buffer is
/// allocated when the shapes are known; the steps after the first of a shape and policy allocate
/// nothing.
class Session {
 public:
  static Result<std::unique_ptr<Session>> create(std::shared_ptr<Model> model);
  ~Session();

  Model& model() noexcept;
  const RunStatistics& statistics() const noexcept;

  /// Denoises `request.latents` in place.
  Status run(const RunRequest& request);

  /// Stops the run in progress, if there is one, before its next engine call. From any thread.
  void cancel() noexcept;

  /// Starts a run: forgets all state, computes what depends on timesteps alone.
  /// @param sigmas Noise level that each step starts from, as a sampler's table has them; empty
  /// takes a flow model's, timestep / 1000.
  Status begin(const std::vector<double>& timesteps, const CacheSetting& setting,
               const std::vector<double>& sigmas = {});

  /// Gives a branch its prompt (host tensors); its context is computed unless the prompt is the
  /// same as before.
  Status set_prompt(const std::string& branch, const Tensors& states);

  /// Allocates and binds everything for inputs of these shapes, so that the first step does not.
  Status prepare(const NamedTensor* inputs, std::size_t count);

  /// Runs one step of one branch. A branch may leave steps out, as guidance intervals do: it
  /// computes on its return, and caches from there. After a step that failed, `begin` comes next.
  /// @param inputs Per-step inputs in host memory, of the declared dtypes.
  /// @return The model output, in the backend's memory: a buffer that the branch's next step
  ///   overwrites.
  Result<Tensor> step(std::string_view branch, std::int64_t step_index, const NamedTensor* inputs,
                      std::size_t count);

 private:
  class Impl;
  explicit Session(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace freewheel
