// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Divides the block loop: first blocks that always run, those that are cached, last ones that
/// always run. As `bundle/sections.py` does.

#include <cstdint>
#include <string>
#include <vector>

#include "freewheel/manifest.h"

namespace freewheel {

/// Which calls of the block loop run when.
struct Sections {
  std::int64_t first_blocks = 1;     ///< Run before the decision, at every step.
  std::int64_t last_blocks = 0;      ///< Run behind the reused ones, at every step.
  std::int64_t blocks = 1;           ///< All that pass `hidden` on.
  std::size_t begin = 0;             ///< Calls before the first that is cached.
  std::size_t end = 0;               ///< Calls before the first of the last ones.
  std::vector<std::string> streams;  ///< Those that the cached calls change and something behind
                                     ///< them reads, `hidden` first.

  /// Part of the blocks that a reused step runs, 0 to below 1.
  double always_run() const noexcept {
    return static_cast<double>(first_blocks + last_blocks) / static_cast<double>(blocks);
  }

  friend bool operator==(const Sections& a, const Sections& b) {
    return a.first_blocks == b.first_blocks && a.last_blocks == b.last_blocks;
  }
};

/// Finds where the body of a manifest divides; refuses what leaves no block between, and last
/// blocks that read what a reused step does not have.
Result<Sections> divide(const Manifest& manifest, std::int64_t first_blocks,
                        std::int64_t last_blocks);

}  // namespace freewheel
