// SPDX-License-Identifier: Apache-2.0
#pragma once

/// One set of buffers over a loaded model: runs the denoise loop with any compiled policy.

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "freewheel/model.h"
#include "freewheel/request.h"
#include "freewheel/statistics.h"
#include "freewheel/status.h"
#include "freewheel/tensor.h"

namespace freewheel {

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

  /// Has the runs to come use these LoRAs, and no others: copies of the weights that they change
  /// take the place of the bundle's, which come back, bit for bit, with none. Does nothing where
  /// they are the same as before. After a failure the weights are the bundle's, or those before.
  Status use_loras(const std::vector<LoraUse>& loras);

  /// Denoises `request.latents` in place, with the LoRAs of `request`.
  Status run(const RunRequest& request);

  /// Stops the run in progress, if there is one, before its next engine call. From any thread.
  void cancel() noexcept;

  /// Starts a run: forgets all state, computes what depends on timesteps alone.
  /// @param sigmas Noise level that each step starts from, as a sampler's table has them; empty
  /// takes a flow model's, timestep / 1000.
  /// @param beside Latents beside the first -> their timesteps, where those are others.
  Status begin(const std::vector<double>& timesteps, const CacheSetting& setting,
               const std::vector<double>& sigmas = {},
               const std::map<std::string, std::vector<double>>& beside = {});

  /// Gives a branch its prompt (host tensors); its context is computed unless the prompt is the
  /// same as before.
  Status set_prompt(const std::string& branch, const Tensors& states);

  /// Allocates and binds everything for inputs of these shapes, so that the first step does not.
  Status prepare(const NamedTensor* inputs, std::size_t count);

  /// Runs one step of one branch. A branch may leave steps out, as guidance intervals do: it
  /// computes on its return, and caches from there. After a step that failed, `begin` comes next.
  /// @param inputs Per-step inputs in host memory, of the declared dtypes.
  /// @return The model output for `latents`, in the backend's memory: a buffer that the branch's
  ///   next step overwrites. `outputs` has those for others.
  Result<Tensor> step(std::string_view branch, std::int64_t step_index, const NamedTensor* inputs,
                      std::size_t count);

  /// What the branch's last step gave: latents → model output; empty before its first. They are
  /// buffers that its next step overwrites.
  const Tensors& outputs(std::string_view branch) const noexcept;

 private:
  class Impl;
  explicit Session(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace freewheel
