// SPDX-License-Identifier: Apache-2.0
#pragma once

/// What a served request asks for beside its tensors.

#include <cstdint>
#include <set>
#include <string>

#include "freewheel/request.h"

namespace freewheel::triton {

/// Request parameters as they came: name and value. Text may hold a number or a list as JSON.
using Parameters = Overrides;

struct RequestOptions {
  Request request;                ///< Without tensors.
  std::int64_t stream = 0;        ///< A response every so many steps; 0 sends the result alone.
  bool preview = false;           ///< Whether those responses carry the predicted clean sample.
  std::set<std::string> outputs;  ///< Empty sends every output that the client asked for.

  /// Sorts parameters by what they are for: `stream`, `preview`, `outputs`, those of a `Request`,
  /// and overrides of the cache setting (with `policy.` before a name that a request has too).
  static Result<RequestOptions> read(const Parameters& parameters);
};

}  // namespace freewheel::triton
