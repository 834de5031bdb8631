// SPDX-License-Identifier: Apache-2.0
#pragma once

/// One of the things that a run samples on its way from noise to result, between the model's calls.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "freewheel/session.h"

namespace freewheel {

/// What the model is given at each step, and what the sampler makes of its outputs: host float32.
/// Nothing is allocated after `create`.
class Denoising {
 public:
  /// @param latents Noise now, the result after `write`: host float32, outlives the run.
  /// @param condition Further channels of every input, or empty; likewise.
  /// @param table Outlives the run.
  /// @param memory Of the model's outputs.
  static Result<Denoising> create(const Tensor& latents, const Tensor& condition,
                                  const SamplerTable& table, Memory& memory);

  /// Steps done.
  std::int64_t step_index() const noexcept { return step_index_; }

  /// The sample that this step starts from.
  const Tensor& sample() const noexcept { return samples_[newest()].view(); }

  /// What the model is given at this step: the sample, and the condition behind its channels.
  Tensor input() const noexcept;

  /// Takes a branch's output of this step: side 0 is `cond`, 1 `uncond`.
  /// @return Its values in host memory, until the branch's next step.
  Result<Tensor> take(std::size_t side, const Tensor& output);

  /// Makes the model output of what was taken; with both sides guided by `scale`.
  const Tensor& guided(double scale) noexcept;

  /// Ends the step: the next sample, by the sampler's table.
  void advance() noexcept;

  /// Checks that the last sample is finite.
  /// @param name What is sampled.
  Status check(const std::string& name) const;

  /// Writes the last sample over the latents.
  void write() const noexcept;

 private:
  Denoising(const Tensor& latents, const Tensor& condition, const SamplerTable& table,
            Memory& memory)
      : latents_(latents), condition_(condition), table_(&table), memory_(&memory) {}
  Status allocate();
  std::size_t window() const noexcept { return samples_.size(); }
  std::size_t newest() const noexcept { return static_cast<std::size_t>(step_index_) % window(); }

  Tensor latents_, condition_;
  const SamplerTable* table_;
  Memory* memory_;
  std::int64_t step_index_ = 0;
  std::vector<Buffer> samples_, outputs_;  // rings: a step's stand at its index modulo the window
  std::vector<const float*> past_samples_, past_outputs_;
  Buffer input_;                // empty without a condition
  std::vector<Buffer> staged_;  // of each side; none where the model's outputs lie in host memory
  Tensor taken_[2];
};

}  // namespace freewheel
