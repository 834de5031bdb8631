// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Runs a compiled policy for one branch: feeds it where the run stands, reads its decision back.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "freewheel/model.h"
#include "freewheel/policy_spec.h"
#include "pacer.h"
#include "schedule.h"
#include "small_tensors.h"

namespace freewheel {

/// One decision. `mix` holds the factors of past residuals, newest first; it points into memory
/// that the next decision overwrites.
struct DecisionRecord {
  bool compute = true;
  double distance = 0.0;  ///< Accumulated distance after the decision; NaN where there is none.
  const float* mix = nullptr;
};

/// The compiled policy of one branch, with its state in small tensors. Signals and features are
/// bound by address: one call is bound per arrangement of rotating buffers, ahead of the run.
class Decider {
 public:
  static Result<std::unique_ptr<Decider>> create(
      Model& model, const PolicyEntry& policy,
      const std::map<std::string, std::vector<double>>& parameters, const Guard& guard,
      const std::vector<Tensors>& arrangements);

  /// Starts a run of these steps: every state tensor gets its initial value.
  /// @param schedule Valid during the run.
  void reset(const Schedule& schedule);

  /// Decides about the coming step.
  /// @param computed_steps Indices of the residuals held, newest first, `held` of them.
  Result<DecisionRecord> decide(std::int64_t step_index, const std::int64_t* computed_steps,
                                std::int64_t held, std::size_t arrangement,
                                const Pace& pace) noexcept;

  std::int64_t mix_size() const noexcept { return mix_.shape.elements(); }

 private:
  struct Carried {
    Tensor state, next;
  };

  const PolicySpec* spec_ = nullptr;
  Memory* memory_ = nullptr;
  std::vector<std::int64_t> exact_steps_;  // sorted
  SmallTensors values_;
  std::vector<std::unique_ptr<BoundCall>> calls_;
  std::vector<Carried> carried_;
  const Schedule* schedule_ = nullptr;
  Tensor step_index_, exact_, timestep_, sigma_;
  Tensor computed_steps_, computed_timesteps_, computed_sigmas_;
  Tensor seconds_left_, computed_seconds_, reused_seconds_;
  Tensor compute_, mix_, distance_;
};

}  // namespace freewheel
