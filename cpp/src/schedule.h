// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Timestep and noise level of every step of a run: what is known of all steps before the first.

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace freewheel {

/// Timestep of a flow model at noise level 1.
inline constexpr double kTrainTimesteps = 1000.0;

/// The steps of one run, in order.
struct Schedule {
  std::vector<double> timesteps;  ///< What the model is conditioned on.
  std::vector<double> sigmas;     ///< Noise level that each step starts from.
  /// Latents beside the first -> their timesteps, where those are others.
  std::map<std::string, std::vector<double>> beside;

  std::int64_t steps() const noexcept { return static_cast<std::int64_t>(timesteps.size()); }

  /// The noise level at a timestep of a flow model, which a sampler's table need not have told.
  static double flow_sigma(double timestep) noexcept {
    return static_cast<double>(static_cast<float>(timestep)) / kTrainTimesteps;
  }
};

}  // namespace freewheel
