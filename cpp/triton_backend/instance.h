// SPDX-License-Identifier: Apache-2.0
#pragma once

/// One instance of a model: a session of its own, one request at a time.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>

#include "freewheel/session.h"
#include "job.h"
#include "received_request.h"
#include "responder.h"
#include "served_model.h"
#include "triton_api.h"

namespace freewheel::triton {

/// Called by the one thread that the server keeps for it.
class Instance {
 public:
  /// @param model Outlives the instance.
  static Result<std::unique_ptr<Instance>> create(TRITONBACKEND_ModelInstance* handle,
                                                  ServedModel& model);

  /// Serves a request to its last response, reports its statistics, and releases it.
  void execute(TRITONBACKEND_Request* request) noexcept;

 private:
  /// Nanoseconds of the server's clock around a request.
  struct Times {
    std::uint64_t start = 0, compute_start = 0, compute_end = 0, end = 0;
  };

  /// Tensors of the last response, and what they point into beside the job.
  struct Outputs {
    Buffer frames;
    Tensors tensors;
  };

  Instance(TRITONBACKEND_ModelInstance* handle, ServedModel& model,
           std::unique_ptr<Session> session)
      : handle_(handle), model_(model), session_(std::move(session)) {}

  Status serve(TRITONBACKEND_Request* request, Responder& responder, Times& times);
  Status run(Job& job, Responder& responder);
  Result<Outputs> outputs_of(const Job& job);
  void count(const Status& status);
  void report(TRITONBACKEND_Request* request, bool success, const Times& times);

  TRITONBACKEND_ModelInstance* handle_;
  ServedModel& model_;
  std::unique_ptr<Session> session_;
  bool has_stepped_ = false;  ///< Whether the session's statistics are this request's.
};

}  // namespace freewheel::triton
