// SPDX-License-Identifier: Apache-2.0
#pragma once

/// What a run starts from: latents that were given, or noise in the size that was asked for.

#include <string>

#include "freewheel/request.h"

namespace freewheel {

/// Checks that a tensor that was given holds finite values.
Status check_finite(const Tensor& tensor, const std::string& where, const char* hint);

/// Checks that the model takes the latents of a run and gives its outputs in their shapes.
Status check_latents(const Manifest& manifest, const RunRequest& request);

/// Gives the run its latents, once their size is known to be one that may run. Its prompts are
/// there already: they tell the sizes of latents beside the first, where nobody gives them.
Status settle_latents(const Manifest& manifest, const Request& request,
                      const GenerationDefaults& defaults, PreparedRun& prepared);

}  // namespace freewheel
