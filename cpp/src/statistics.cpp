// SPDX-License-Identifier: Apache-2.0
#include "freewheel/statistics.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>

namespace freewheel {
namespace {

/// Steps up to which a checkpoint is taken for a distilled one, as in `runtime/statistics.py`.
constexpr std::int64_t kFewSteps = 8;

nlohmann::json number_or_null(double value) {
  return std::isfinite(value) ? nlohmann::json(value) : nlohmann::json();
}

/// Seconds of the steps that were decided so.
std::vector<double> seconds_of(const RunStatistics& run, Decision decision) {
  std::vector<double> found;
  for (const BranchStatistics& branch : run.branches) {
    for (std::size_t step = 0; step < branch.decisions.size(); ++step) {
      if (branch.decisions[step] == decision) found.push_back(branch.seconds[step]);
    }
  }
  return found;
}

/// Computed steps of a branch; where branches differ, their mean. An integer where it is whole.
nlohmann::json mean_computed(const RunStatistics& run) {
  const auto branches = static_cast<std::int64_t>(run.branches.size());
  std::int64_t computed = 0;
  for (const BranchStatistics& branch : run.branches) computed += branch.count(Decision::kComputed);
  if (branches == 0 || computed % branches == 0)
    return computed / std::max<std::int64_t>(branches, 1);
  return static_cast<double>(computed) / static_cast<double>(branches);
}

nlohmann::json branch_json(const BranchStatistics& branch) {
  nlohmann::json computed = nlohmann::json::array(), distance = nlohmann::json::array();
  nlohmann::json mix = nlohmann::json::array();
  std::vector<double> reused;
  for (std::size_t step = 0; step < branch.decisions.size(); ++step) {
    const Decision decision = branch.decisions[step];
    const bool is_reused = decision == Decision::kReused;
    computed.push_back(decision == Decision::kSkipped
                           ? nlohmann::json()
                           : nlohmann::json(decision == Decision::kComputed));
    distance.push_back(number_or_null(branch.distance[step]));
    const float* factors = branch.mix.data() + step * static_cast<std::size_t>(branch.depth);
    mix.push_back(is_reused ? std::vector<float>(factors, factors + branch.depth)
                            : std::vector<float>());
    if (is_reused && std::isfinite(branch.distance[step])) reused.push_back(branch.distance[step]);
  }
  nlohmann::json percentiles;
  if (!reused.empty()) {
    percentiles = {{"min", percentile(reused, 0)},
                   {"p25", percentile(reused, 25)},
                   {"p50", percentile(reused, 50)},
                   {"p75", percentile(reused, 75)},
                   {"max", percentile(reused, 100)}};
  }
  return {
      {"computed", computed}, {"distance", distance}, {"mix", mix}, {"percentiles", percentiles}};
}

/// Warnings, one per cause: the request's, too few steps, or nothing reused.
std::vector<std::string> warnings_of(const RunStatistics& run) {
  std::vector<std::string> warnings = run.warnings;
  if (run.policy == "off") return warnings;
  if (run.deadline && run.loop_seconds > *run.deadline) {
    char text[64];
    std::snprintf(text, sizeof text, "the steps took %.3g s, and their deadline was %.3g s",
                  run.loop_seconds, *run.deadline);
    warnings.push_back(std::string(text) + ": the fewest steps that policy '" + run.policy +
                       "' may compute take longer, or the last ones took longer than those before; "
                       "ask for fewer steps, or more seconds");
  }
  std::string idle;
  for (const BranchStatistics& branch : run.branches) {
    if (branch.count(Decision::kComputed) == 0 || branch.count(Decision::kReused) > 0) continue;
    idle += (idle.empty() ? "branch '" : " and '") + branch.name + "'";
  }
  const std::string outcome = "policy '" + run.policy + "' reused nothing in " + idle;
  if (run.steps > 1 && run.steps <= kFewSteps) {
    warnings.push_back(std::to_string(run.steps) +
                       " steps is few-step sampling: there is little to reuse and much to lose" +
                       (idle.empty() ? "" : "; " + outcome) + "; compare with --cache off");
  } else if (!idle.empty()) {
    warnings.push_back(outcome +
                       ": every step was computed; raise its threshold or interval, or look at "
                       "'guard' limits");
  }
  return warnings;
}

}  // namespace

const char* segment_name(Segment segment) noexcept {
  constexpr const char* kNames[kSegments] = {"prepare", "prompt", "head",   "decide",
                                             "body",    "reuse",  "finish", "sampler"};
  return kNames[static_cast<std::size_t>(segment)];
}

std::int64_t BranchStatistics::count(Decision decision) const noexcept {
  return std::count(decisions.begin(), decisions.end(), decision);
}

double RunStatistics::ideal_speedup() const noexcept {
  std::int64_t done = 0, computed = 0;
  for (const BranchStatistics& branch : branches) {
    computed += branch.count(Decision::kComputed);
    done += branch.count(Decision::kComputed) + branch.count(Decision::kReused);
  }
  const double paid =
      static_cast<double>(computed) + static_cast<double>(done - computed) * always_run;
  return computed > 0 ? static_cast<double>(done) / paid : 1.0;
}

double RunStatistics::estimated_speedup() const {
  const std::vector<double> computed = seconds_of(*this, Decision::kComputed);
  const std::vector<double> reused = seconds_of(*this, Decision::kReused);
  double taken = 0.0;
  for (double seconds : computed) taken += seconds;
  for (double seconds : reused) taken += seconds;
  if (policy == "off" || computed.empty() || taken <= 0.0) return 0.0;
  return percentile(computed, 50) * static_cast<double>(computed.size() + reused.size()) / taken;
}

std::string RunStatistics::json() const {
  nlohmann::json found = {{"policy", policy},
                          {"folded", is_folded},
                          {"steps", steps},
                          {"always_run", always_run},
                          {"ideal_speedup", ideal_speedup()},
                          {"deadline", deadline ? nlohmann::json(*deadline) : nlohmann::json()},
                          {"loop_seconds", loop_seconds},
                          {"branches", nlohmann::json::object()},
                          {"seconds", nlohmann::json::object()}};
  for (const BranchStatistics& branch : branches) {
    found["branches"][branch.name] = branch_json(branch);
  }
  const double speedup = estimated_speedup();
  found["estimated_speedup"] = speedup > 0.0 ? nlohmann::json(speedup) : nlohmann::json();
  found["computed_steps"] = mean_computed(*this);
  for (int segment = 0; segment < kSegments; ++segment) {
    found["seconds"][segment_name(static_cast<Segment>(segment))] =
        seconds[static_cast<std::size_t>(segment)];
  }
  const auto median = [&](Decision decision) {
    return number_or_null(percentile(seconds_of(*this, decision), 50));
  };
  found["step_seconds"] = {{"computed", median(Decision::kComputed)},
                           {"reused", median(Decision::kReused)}};
  found["warnings"] = warnings_of(*this);
  return found.dump();
}

double percentile(std::vector<double> values, double q) {
  if (values.empty()) return std::numeric_limits<double>::quiet_NaN();
  std::sort(values.begin(), values.end());
  const double place = q / 100.0 * static_cast<double>(values.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, values.size() - 1);
  return values[below] + (place - static_cast<double>(below)) * (values[above] - values[below]);
}

}  // namespace freewheel
