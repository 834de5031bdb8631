// SPDX-License-Identifier: Apache-2.0
/// merge_loras: how long a LoRA's file takes to open, and its merge. Prints one JSON object.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "freewheel/lora.h"

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point began) {
  return std::chrono::duration<double>(Clock::now() - began).count();
}

int fail(const freewheel::Status& status) {
  return std::fprintf(stderr, "%s\n", status.message().c_str()), 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return std::fprintf(stderr, "usage: merge_loras BUNDLE LORA THREADS\n"), 2;
  auto bundle = freewheel::Bundle::open(argv[1]);
  if (!bundle.ok()) return fail(bundle.status());
  std::vector<double> opened, merged;
  std::size_t bytes = 0;
  for (int round = 0; round < 7; ++round) {
    const auto began = Clock::now();
    auto loras = freewheel::open_loras(**bundle, {{argv[2], 1.0, 0}});
    if (!loras.ok()) return fail(loras.status());
    opened.push_back(seconds_since(began));
    auto weights = freewheel::merge_loras(**bundle, *loras, std::atoi(argv[3]));
    if (!weights.ok()) return fail(weights.status());
    merged.push_back(seconds_since(began) - opened.back());
    bytes = 0;
    for (const auto& [name, weight] : *weights) bytes += weight.view().bytes();
  }
  std::sort(opened.begin(), opened.end());
  std::sort(merged.begin(), merged.end());
  std::printf("{\"open_seconds\": %.4f, \"merge_seconds\": %.4f, \"merged_bytes\": %zu}\n",
              opened[opened.size() / 2], merged[merged.size() / 2], bytes);
  return 0;
}
