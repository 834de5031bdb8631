// SPDX-License-Identifier: Apache-2.0
#pragma once

/// What a request asks for beside its tensors.

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "freewheel/policy_spec.h"
#include "freewheel/status.h"

namespace freewheel::triton {

/// Request parameters as they came: name and value. Text may hold a number or a list as JSON.
using Parameters = std::vector<std::pair<std::string, Value>>;

struct RequestOptions {
  std::string policy;   ///< A config or policy of the bundle; empty takes the default config.
  std::string sampler;  ///< Empty takes the pipeline's own.
  std::optional<std::int64_t> steps, seed, height, width, frames;
  std::optional<double> guidance_scale, flow_shift;
  std::int64_t stream = 0;        ///< A response every so many steps; 0 sends the result alone.
  bool preview = false;           ///< Whether those responses carry the predicted clean sample.
  std::set<std::string> outputs;  ///< Empty sends every output that the client asked for.
  /// What is left: parameters of the policy, limits of its guard, "signal".
  Parameters overrides;

  /// Sorts parameters by what they are for. Whether the overrides are known is up to the policy.
  static Result<RequestOptions> read(const Parameters& parameters);

  /// Names that `read` knows, for messages.
  static std::vector<std::string> names();
};

}  // namespace freewheel::triton
