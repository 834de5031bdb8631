// SPDX-License-Identifier: Apache-2.0
#include "promise.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "try.h"

namespace freewheel {
namespace {

std::string number_of(double value, const char* format = "%g") {
  char text[64];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

std::string where_of(const CacheSetting& setting) {
  return "min_psnr " + number_of(*setting.min_psnr);
}

}  // namespace

Status keep_bound(CacheSetting& setting) {
  if (!setting.min_psnr) return {};
  const std::string where = where_of(setting);
  if (setting.deadline) {
    return Status(Code::kConfig, where,
                  "can't be kept beside a deadline, which may compute fewer steps",
                  "give one of the two");
  }
  const auto given = setting.parameters.find("budgets");
  const auto* budgets = given == setting.parameters.end()
                            ? nullptr
                            : std::get_if<std::vector<std::int64_t>>(&given->second);
  if (!setting.promise || budgets == nullptr) {
    return Status(Code::kConfig, where,
                  "can't be kept: the setting tells no quality of runs that nothing was fitted on",
                  "take a 'solved' config of 'freewheel calibrate --hold-out 20'");
  }
  const std::vector<double>& psnr = setting.promise->psnr;
  const std::size_t count = std::min(budgets->size(), psnr.size());
  for (std::size_t index = 0; index < count; ++index) {
    if (psnr[index] < *setting.min_psnr) continue;
    setting.parameters["computed_steps"] = (*budgets)[index];
    return {};
  }
  return Status(Code::kConfig, where,
                "is kept by no number of computed steps: " +
                    number_of(std::round(100.0 * setting.promise->coverage), "%.0f") +
                    " of 100 runs keep " +
                    number_of(*std::max_element(psnr.begin(), psnr.end()), "%.1f") + " dB at most",
                "ask for less, or run uncached");
}

Status check_bound_steps(const CacheSetting& setting, const std::optional<Stretch>& stretch) {
  if (!setting.min_psnr || !stretch || stretch->is_whole()) return {};
  const std::string made = std::to_string(stretch->made), steps = std::to_string(stretch->steps);
  if (stretch->first > 0) {
    return Status(Code::kConfig, where_of(setting),
                  "was measured for whole runs of " + made +
                      " steps, and this one begins at step " + std::to_string(stretch->first) +
                      " of these",
                  "give no bound to a run that begins in the midst");
  }
  return Status(Code::kConfig, where_of(setting),
                "was measured for runs of " + made + " steps, and this one has " + steps,
                "run " + made + " steps, or calibrate with --steps " + steps);
}

Status check_bound_values(const CacheSetting& setting, const GenerationDefaults& made,
                          const GenerationDefaults& asked) {
  if (!setting.min_psnr) return {};
  const auto refuse = [&](const char* name, const std::string& was, const std::string& is) {
    return Status(
        Code::kConfig, where_of(setting),
        "was measured at " + std::string(name) + " " + was + ", and the run asks for " + is,
        "leave " + std::string(name) + " out, or calibrate with it");
  };
  const std::pair<const char*, std::pair<double, double>> numbers[] = {
      {"steps", {made.steps, asked.steps}},
      {"height", {made.height, asked.height}},
      {"width", {made.width, asked.width}},
      {"frames", {made.frames, asked.frames}},
      {"guidance_scale", {made.guidance_scale, asked.guidance_scale}},
      {"flow_shift", {made.flow_shift, asked.flow_shift}}};
  for (const auto& [name, pair] : numbers) {
    if (pair.first != pair.second) {
      return refuse(name, number_of(pair.first), number_of(pair.second));
    }
  }
  if (made.sampler != asked.sampler) return refuse("sampler", made.sampler, asked.sampler);
  return {};
}

}  // namespace freewheel
