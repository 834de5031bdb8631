// SPDX-License-Identifier: Apache-2.0
#include "progress.h"

#include <cmath>
#include <nlohmann/json.hpp>

namespace freewheel::triton {

void StepProgress::add(const BranchEvent& event) {
  branches_.push_back({std::string(event.branch), event.computed, event.distance, event.seconds});
}

std::string StepProgress::take(const SampleEvent& event, double elapsed) {
  nlohmann::json branches = nlohmann::json::object();
  for (const Branch& branch : branches_) {
    branches[branch.name] = {{"decision", branch.computed ? "compute" : "reuse"},
                             {"seconds", branch.seconds},
                             {"distance", nullptr}};
    if (std::isfinite(branch.distance)) branches[branch.name]["distance"] = branch.distance;
  }
  branches_.clear();
  return nlohmann::json{{"event", "step"},           {"step_index", event.step_index},
                        {"steps", event.steps},      {"timestep", event.timestep},
                        {"sigma", event.sigma},      {"branches", std::move(branches)},
                        {"elapsed_seconds", elapsed}}
      .dump();
}

std::string summary_json(const RunStatistics& run, std::optional<std::uint64_t> seed,
                         double seconds) {
  nlohmann::json summary = nlohmann::json::parse(run.json());
  summary["event"] = "done";
  summary["seed"] = seed ? nlohmann::json(*seed) : nlohmann::json();
  summary["total_seconds"] = seconds;
  for (const BranchStatistics& branch : run.branches) {
    summary["branches"][branch.name]["computed_steps"] = branch.count(Decision::kComputed);
    summary["branches"][branch.name]["reused_steps"] = branch.count(Decision::kReused);
  }
  return summary.dump();
}

}  // namespace freewheel::triton
