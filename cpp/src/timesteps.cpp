// SPDX-License-Identifier: Apache-2.0
#include "timesteps.h"

namespace freewheel {
namespace {

constexpr char kNext[] = "next";  // in the words of a manifest

/// The timestep of a step, of `of`.
double timestep_at(const Schedule& schedule, const std::string& of, std::size_t step) {
  const std::vector<double>& first = schedule.timesteps;
  if (of == kNext) return step + 1 < first.size() ? first[step + 1] : 0.0;
  const auto other = schedule.beside.find(of);
  return other == schedule.beside.end() ? first[step] : other->second[step];
}

}  // namespace

TimestepInputs timestep_inputs(const Manifest& manifest, const Schedule& schedule) {
  TimestepInputs found;
  const std::vector<double>& first = schedule.timesteps;
  found["timesteps"].assign(first.begin(), first.end());
  for (const auto& [name, input] : manifest.inputs) {
    if (input.runs != "run") continue;
    std::vector<float>& values = found[name];
    values.clear();
    for (std::size_t step = 0; step < first.size(); ++step) {
      for (const std::string& of : input.of) {
        values.push_back(static_cast<float>(timestep_at(schedule, of, step)));
      }
    }
  }
  return found;
}

}  // namespace freewheel
