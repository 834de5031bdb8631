// SPDX-License-Identifier: Apache-2.0
#pragma once

/// What a run took and did, for people and as JSON; `freewheel run` tells the same.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "freewheel/statistics.h"

/// Seconds of a run's phases.
struct PhaseSeconds {
  double load = 0.0;    ///< Model and session.
  double encode = 0.0;  ///< Prompts, and all else before the first step.
  double denoise = 0.0;
  double decode = 0.0;  ///< To the finished file.

  double total() const noexcept { return load + encode + denoise + decode; }
};

struct Outcome {
  std::string backend;
  PhaseSeconds seconds;
  std::optional<std::int64_t> peak_memory_bytes;
};

/// The most host memory that this process has held, mapped files that it read included; nothing
/// where the system doesn't tell.
std::optional<std::int64_t> peak_memory_bytes();

/// Prints decisions and distances by branch, seconds, speedups and memory to stderr.
void show_outcome(const freewheel::RunStatistics& statistics, const Outcome& outcome);

/// `statistics` as JSON, and the outcome by the keys that `freewheel run --json` has for it.
nlohmann::json outcome_json(const freewheel::RunStatistics& statistics, const Outcome& outcome);
