// SPDX-License-Identifier: Apache-2.0
#pragma once

/// What a CPU computes in: the rule for graphs that are compiled here. Engines of a bundle record
/// the precision that `freewheel build` chose by the same rule (bundle.md, `details.computed_in`).

#include <algorithm>
#include <string>
#include <vector>

namespace freewheel {

/// Names the precision to ask OpenVINO for, so that it never takes one of fewer bits on its own: a
/// CPU with bfloat16 alone would compute a float16 graph in bfloat16.
///
/// \param precision `float32`, `bfloat16` or `float16`, as the graph was built.
/// \param capabilities The CPU plugin's `OPTIMIZATION_CAPABILITIES`.
/// \return `precision` where the CPU has its instructions, else `float32`.
inline std::string computed_in(const std::string& precision,
                               const std::vector<std::string>& capabilities) {
  const std::string wanted = precision == "bfloat16"  ? "BF16"
                             : precision == "float16" ? "FP16"
                                                      : "";
  const bool has_it =
      std::find(capabilities.begin(), capabilities.end(), wanted) != capabilities.end();
  return has_it ? precision : "float32";
}

}  // namespace freewheel
