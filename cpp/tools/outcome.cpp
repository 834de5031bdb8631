// SPDX-License-Identifier: Apache-2.0
#include "outcome.h"

#include <cstdio>
#include <fstream>
#include <utility>
#include <vector>

namespace {

using freewheel::Decision;
using freewheel::RunStatistics;

std::vector<std::pair<const char*, double>> phases(const PhaseSeconds& seconds) {
  return {{"load", seconds.load},
          {"encode", seconds.encode},
          {"denoise", seconds.denoise},
          {"decode", seconds.decode}};
}

double steps_per_second(const RunStatistics& statistics, const PhaseSeconds& seconds) {
  return seconds.denoise > 0.0 ? static_cast<double>(statistics.steps) / seconds.denoise : 0.0;
}

void show_branches(const RunStatistics& statistics) {
  std::fprintf(stderr, "\n%-8s %9s %7s %9s %9s %9s\n", "branch", "computed", "reused", "dist p50",
               "dist max", "seconds");
  for (const freewheel::BranchStatistics& branch : statistics.branches) {
    std::vector<double> reused;
    double seconds = 0.0;
    for (std::size_t step = 0; step < branch.decisions.size(); ++step) {
      seconds += branch.seconds[step];
      if (branch.decisions[step] == Decision::kReused) reused.push_back(branch.distance[step]);
    }
    std::fprintf(stderr, "%-8s %9lld %7lld %9.4f %9.4f %9.3f\n", branch.name.c_str(),
                 static_cast<long long>(branch.count(Decision::kComputed)),
                 static_cast<long long>(branch.count(Decision::kReused)),
                 freewheel::percentile(reused, 50), freewheel::percentile(reused, 100), seconds);
  }
}

}  // namespace

std::optional<std::int64_t> peak_memory_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    long long kibibytes = 0;
    if (std::sscanf(line.c_str(), "VmHWM: %lld kB", &kibibytes) == 1) return kibibytes << 10;
  }
  return std::nullopt;
}

void show_outcome(const RunStatistics& statistics, const Outcome& outcome) {
  show_branches(statistics);
  std::fprintf(stderr, "seconds by segment:");
  for (int segment = 0; segment < freewheel::kSegments; ++segment) {
    std::fprintf(stderr, " %s %.3f",
                 freewheel::segment_name(static_cast<freewheel::Segment>(segment)),
                 statistics.seconds[static_cast<std::size_t>(segment)]);
  }
  std::fprintf(stderr, "\n");
  if (const double speedup = statistics.estimated_speedup(); speedup > 0.0) {
    std::fprintf(stderr, "speedup: %.2f estimated, %.2f ideal\n", speedup,
                 statistics.ideal_speedup());
  }
  std::fprintf(stderr, "whole run on %s:", outcome.backend.c_str());
  for (const auto& [phase, seconds] : phases(outcome.seconds)) {
    std::fprintf(stderr, " %s %.2f s,", phase, seconds);
  }
  std::fprintf(stderr, " total %.2f s; %.2f steps/s", outcome.seconds.total(),
               steps_per_second(statistics, outcome.seconds));
  if (outcome.peak_memory_bytes) {
    std::fprintf(stderr, "; peak memory %.2f GiB",
                 static_cast<double>(*outcome.peak_memory_bytes) / (1 << 30));
  }
  std::fprintf(stderr, "\n");
}

nlohmann::json outcome_json(const RunStatistics& statistics, const Outcome& outcome) {
  nlohmann::json report = nlohmann::json::parse(statistics.json());
  report["backend"] = outcome.backend;
  for (const auto& [phase, seconds] : phases(outcome.seconds)) {
    report["phase_seconds"][phase] = seconds;
  }
  report["total_seconds"] = outcome.seconds.total();
  report["steps_per_second"] = steps_per_second(statistics, outcome.seconds);
  report["peak_memory_bytes"] = nullptr;
  if (outcome.peak_memory_bytes) report["peak_memory_bytes"] = *outcome.peak_memory_bytes;
  return report;
}
