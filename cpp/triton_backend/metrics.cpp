// SPDX-License-Identifier: Apache-2.0
#include "metrics.h"

namespace freewheel::triton {
namespace {

/// Metrics are best effort: without them requests are served all the same.
bool done(TRITONSERVER_Error* error) {
  if (error == nullptr) return true;
  TRITONSERVER_ErrorDelete(error);
  return false;
}

TRITONSERVER_MetricFamily* family(TRITONSERVER_MetricKind kind, const char* name,
                                  const char* description) {
  TRITONSERVER_MetricFamily* made = nullptr;
  return done(TRITONSERVER_MetricFamilyNew(&made, kind, name, description)) ? made : nullptr;
}

}  // namespace

std::unique_ptr<Metrics> Metrics::create() {
  std::unique_ptr<Metrics> metrics(new Metrics());
  metrics->steps_.handle = family(TRITONSERVER_METRIC_KIND_COUNTER, "freewheel_steps_total",
                                  "Steps of a branch by decision");
  metrics->runs_.handle = family(TRITONSERVER_METRIC_KIND_COUNTER, "freewheel_runs_total",
                                 "Requests by outcome: ok, cancelled, failed, refused");
  metrics->seconds_.handle =
      family(TRITONSERVER_METRIC_KIND_COUNTER, "freewheel_segment_seconds_total",
             "Seconds spent in each segment of the denoise loop");
  metrics->hit_rate_.handle = family(TRITONSERVER_METRIC_KIND_GAUGE, "freewheel_hit_rate",
                                     "Reused steps / all steps since the server started");
  return metrics;
}

Metrics::~Metrics() {
  for (Family* family : {&steps_, &runs_, &seconds_, &hit_rate_}) {
    for (const auto& [key, metric] : family->metrics) done(TRITONSERVER_MetricDelete(metric));
    if (family->handle != nullptr) done(TRITONSERVER_MetricFamilyDelete(family->handle));
  }
}

TRITONSERVER_Metric* Metrics::metric(Family& family, const Labels& labels) {
  if (family.handle == nullptr) return nullptr;
  std::string key;
  for (const auto& [name, value] : labels) key += value + '\n';
  const auto known = family.metrics.find(key);
  if (known != family.metrics.end()) return known->second;
  std::vector<const TRITONSERVER_Parameter*> parameters;
  for (const auto& [name, value] : labels) {
    parameters.push_back(
        TRITONSERVER_ParameterNew(name, TRITONSERVER_PARAMETER_STRING, value.c_str()));
  }
  TRITONSERVER_Metric* made = nullptr;
  const bool is_made =
      done(TRITONSERVER_MetricNew(&made, family.handle, parameters.data(), parameters.size()));
  for (const TRITONSERVER_Parameter* parameter : parameters) {
    TRITONSERVER_ParameterDelete(const_cast<TRITONSERVER_Parameter*>(parameter));
  }
  if (is_made) family.metrics[key] = made;
  return is_made ? made : nullptr;
}

void Metrics::add(Family& family, const Labels& labels, double value) {
  TRITONSERVER_Metric* found = metric(family, labels);
  if (found != nullptr) done(TRITONSERVER_MetricIncrement(found, value));
}

void Metrics::count(const std::string& model, const RunStatistics& run, const char* outcome) {
  const std::lock_guard<std::mutex> lock(mutex_);
  double computed = 0.0, saved = 0.0;
  for (const BranchStatistics& branch : run.branches) {
    computed += static_cast<double>(branch.count(Decision::kComputed));
    saved += static_cast<double>(branch.count(Decision::kReused));
  }
  const std::string& policy = run.policy;
  add(runs_, {{"model", model}, {"policy", policy}, {"outcome", outcome}}, 1.0);
  add(steps_, {{"model", model}, {"policy", policy}, {"decision", "compute"}}, computed);
  add(steps_, {{"model", model}, {"policy", policy}, {"decision", "reuse"}}, saved);
  for (int segment = 0; segment < kSegments; ++segment) {
    const char* name = segment_name(static_cast<Segment>(segment));
    add(seconds_, {{"model", model}, {"segment", name}},
        run.seconds[static_cast<std::size_t>(segment)]);
  }
  auto& [reused, steps] = reused_of_[{model, policy}];
  reused += saved;
  steps += computed + saved;
  TRITONSERVER_Metric* rate = metric(hit_rate_, {{"model", model}, {"policy", policy}});
  if (rate != nullptr && steps > 0.0) done(TRITONSERVER_MetricSet(rate, reused / steps));
}

void Metrics::count_without_steps(const std::string& model, const char* outcome) {
  const std::lock_guard<std::mutex> lock(mutex_);
  add(runs_, {{"model", model}, {"policy", ""}, {"outcome", outcome}}, 1.0);
}

}  // namespace freewheel::triton
