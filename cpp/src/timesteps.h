// SPDX-License-Identifier: Apache-2.0
#pragma once

/// The timesteps that a model is given at each step of a run, by the names of its inputs.

#include <map>
#include <string>
#include <vector>

#include "freewheel/manifest.h"
#include "schedule.h"

namespace freewheel {

/// Input of the graphs that run once per run -> its values of all steps.
using TimestepInputs = std::map<std::string, std::vector<float>>;

/// What the graphs that run once per run are given: `timesteps` itself, [steps], and each input
/// that is a timestep, [steps], or a vector of them, [steps * length], step after step. The next
/// step's is 0 behind the last; latents that the schedule says nothing of have the first's.
TimestepInputs timestep_inputs(const Manifest& manifest, const Schedule& schedule);

}  // namespace freewheel
