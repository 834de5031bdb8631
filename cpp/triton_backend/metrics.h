// SPDX-License-Identifier: Apache-2.0
#pragma once

/// What runs did, on the server's /metrics page.

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "freewheel/statistics.h"
#include "freewheel/status.h"
#include "triton_api.h"

namespace freewheel::triton {

/// Counters of one process, kept when a model is reloaded. Thread-safe. Labels hold names of models
/// and of policies only, never what a client wrote.
class Metrics {
 public:
  /// Registers the families. Where the server was started without metrics nothing is counted.
  static std::unique_ptr<Metrics> create();
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;
  ~Metrics();

  /// Counts a run with the steps and seconds it got to.
  /// @param outcome "ok", "cancelled" or "failed".
  void count(const std::string& model, const RunStatistics& run, const char* outcome);

  /// Counts a request that took no step.
  /// @param outcome "refused" or "cancelled".
  void count_without_steps(const std::string& model, const char* outcome);

 private:
  using Labels = std::vector<std::pair<const char*, std::string>>;

  /// One name on the page with its metrics by label.
  struct Family {
    TRITONSERVER_MetricFamily* handle = nullptr;
    std::map<std::string, TRITONSERVER_Metric*> metrics;
  };

  Metrics() = default;
  TRITONSERVER_Metric* metric(Family& family, const Labels& labels);
  void add(Family& family, const Labels& labels, double value);

  std::mutex mutex_;
  Family steps_, runs_, seconds_, hit_rate_;
  std::map<std::pair<std::string, std::string>, std::pair<double, double>> reused_of_;
};

}  // namespace freewheel::triton
