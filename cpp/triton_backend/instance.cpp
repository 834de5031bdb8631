// SPDX-License-Identifier: Apache-2.0
#include "instance.h"

#include <algorithm>
#include <exception>

#include "error.h"
#include "freewheel/codec.h"
#include "progress.h"
#include "try.h"

namespace freewheel::triton {
namespace {

using Clock = std::chrono::steady_clock;

/// The server's statistics count nanoseconds of this clock.
std::uint64_t now_ns() noexcept {
  return static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch())
          .count());
}

double seconds_since(Clock::time_point began) noexcept {
  return std::chrono::duration<double>(Clock::now() - began).count();
}

const char* outcome(const Status& status) noexcept {
  if (status.ok()) return "ok";
  return status.code() == Code::kCancelled ? "cancelled" : "failed";
}

}  // namespace

Result<std::unique_ptr<Instance>> Instance::create(TRITONBACKEND_ModelInstance* handle,
                                                   ServedModel& model) {
  FREEWHEEL_ASSIGN(std::unique_ptr<Session> session, Session::create(model.model));
  return std::unique_ptr<Instance>(new Instance(handle, model, std::move(session)));
}

void Instance::execute(TRITONBACKEND_Request* request) noexcept {
  Times times;
  times.start = times.compute_start = times.compute_end = now_ns();
  {
    auto responder = Responder::create(request);
    Status status;
    try {
      status = responder.ok() ? serve(request, **responder, times) : responder.status();
    } catch (const std::bad_alloc&) {
      status = Status(Code::kFailed, "request", "the server ran out of memory",
                      "ask for a smaller size, or serve fewer instances");
    } catch (const std::exception& fault) {
      status = Status(Code::kInternal, "request", fault.what(), "report this");
    }
    if (!status.ok() && responder.ok()) (*responder)->send_error(status);
    times.end = now_ns();
    report(request, status.ok(), times);
  }
  (void)status_from_error(TRITONBACKEND_RequestRelease(request, TRITONSERVER_REQUEST_RELEASE_ALL),
                          "RequestRelease");
}

Status Instance::serve(TRITONBACKEND_Request* request, Responder& responder, Times& times) {
  has_stepped_ = false;
  const auto began = Clock::now();
  ReceivedRequest received;
  Job job;
  Outputs outputs;
  const Status status = [&]() -> Status {
    if (responder.is_cancelled()) return Status(Code::kCancelled, "request", "was cancelled");
    FREEWHEEL_ASSIGN(received, ReceivedRequest::read(request));
    times.compute_start = now_ns();
    FREEWHEEL_ASSIGN(const RequestOptions options, RequestOptions::read(received.parameters));
    FREEWHEEL_ASSIGN(job, make_job(*model_.model, model_.options, options, received.tensors,
                                   received.texts, received.outputs));
    FREEWHEEL_TRY(run(job, responder));
    FREEWHEEL_ASSIGN(outputs, outputs_of(job));
    return {};
  }();
  times.compute_end = std::max(now_ns(), times.compute_start);
  // Before the client knows that its run has ended.
  count(status);
  FREEWHEEL_TRY(status);
  const std::string summary =
      summary_json(session_->statistics(), job.prepared.seed, seconds_since(began));
  return responder.send(summary, outputs.tensors, true);
}

void Instance::count(const Status& status) {
  Metrics& metrics = *model_.metrics;
  if (has_stepped_) return metrics.count(model_.name, session_->statistics(), outcome(status));
  const bool is_cancelled = status.code() == Code::kCancelled;
  metrics.count_without_steps(model_.name, is_cancelled ? "cancelled" : "refused");
}

Status Instance::run(Job& job, Responder& responder) {
  std::atomic<bool> cancelled{false};
  Status send_fault;
  StepProgress progress;
  const auto began = Clock::now();
  job.prepared.run.cancelled = &cancelled;
  job.prepared.run.on_branch_step = [&](const BranchEvent& event) {
    has_stepped_ = true;
    if (responder.is_cancelled()) cancelled.store(true);
    progress.add(event);
  };
  job.prepared.run.on_step = [&](const SampleEvent& event) {
    const bool is_due = job.stream > 0 && ((event.step_index + 1) % job.stream == 0 ||
                                           event.step_index + 1 == event.steps);
    const std::string text = progress.take(event, seconds_since(began));
    if (!is_due || cancelled.load()) return;
    send_fault = [&]() -> Status {
      Tensors tensors;
      Buffer preview;
      if (job.wants_preview) {
        FREEWHEEL_ASSIGN(preview, preview_of(*model_.model, event));
        const bool is_rgb = preview.view().dtype == DType::kUint8;
        tensors[kPreview] = is_rgb ? preview.view() : without_batch(preview.view());
      }
      return responder.send(text, tensors, false);
    }();
    if (!send_fault.ok()) cancelled.store(true);
  };
  Status status = session_->run(job.prepared.run);
  return send_fault.ok() ? status : send_fault;
}

Result<Instance::Outputs> Instance::outputs_of(const Job& job) {
  Outputs outputs;
  if (job.wants_frames) {
    FREEWHEEL_ASSIGN(outputs.frames, decode_latents(*model_.model, job.prepared.run.latents));
    outputs.tensors[kFrames] = without_batch(outputs.frames.view());
  }
  const RunRequest& run = job.prepared.run;
  for (const std::string& name : job.wanted_latents) {
    const bool is_first = name == kLatents;
    outputs.tensors[name] = without_batch(is_first ? run.latents : run.beside.at(name).latents);
  }
  return outputs;
}

void Instance::report(TRITONBACKEND_Request* request, bool success, const Times& times) {
  (void)status_from_error(TRITONBACKEND_ModelInstanceReportStatistics(
                              handle_, request, success, times.start, times.compute_start,
                              times.compute_end, times.end),
                          "ReportStatistics");
  if (!success) return;
  (void)status_from_error(
      TRITONBACKEND_ModelInstanceReportBatchStatistics(handle_, 1, times.start, times.compute_start,
                                                       times.compute_end, times.end),
      "ReportBatchStatistics");
}

}  // namespace freewheel::triton
