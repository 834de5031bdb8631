// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Responses of one request: progress while it runs, then the result or an error.

#include <memory>
#include <string>

#include "freewheel/status.h"
#include "freewheel/tensor.h"
#include "triton_api.h"

namespace freewheel::triton {

/// Sends any number of progress responses and exactly one final one; where nobody sent that, the
/// destructor tells the server that nothing more comes. Used by one thread.
class Responder {
 public:
  static Result<std::unique_ptr<Responder>> create(TRITONBACKEND_Request* request);
  Responder(const Responder&) = delete;
  Responder& operator=(const Responder&) = delete;
  ~Responder();

  /// Whether the client cancelled or went away. Cheap.
  bool is_cancelled() const noexcept;

  /// Sends one response.
  /// @param progress JSON for the output `progress`.
  /// @param tensors Further outputs by name, host memory; copied before this returns.
  Status send(const std::string& progress, const Tensors& tensors, bool is_final);

  /// Sends the final response of a request that failed.
  void send_error(const Status& status);

 private:
  explicit Responder(TRITONBACKEND_ResponseFactory* factory) : factory_(factory) {}
  Status fill(TRITONBACKEND_Response* response, const std::string& progress,
              const Tensors& tensors) const;

  TRITONBACKEND_ResponseFactory* factory_;
  bool is_finished_ = false;
};

}  // namespace freewheel::triton
