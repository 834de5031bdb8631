// SPDX-License-Identifier: Apache-2.0
#pragma once

/// What the server hands over for one request, in our types.

#include <map>
#include <set>
#include <string>
#include <vector>

#include "freewheel/tensor.h"
#include "request_options.h"
#include "triton_api.h"

namespace freewheel::triton {

/// A request's parameters, the outputs it names, and copies of its tensors: inputs may come in
/// parts, and unaligned.
struct ReceivedRequest {
  Parameters parameters;
  std::set<std::string> outputs;
  Tensors tensors;
  std::map<std::string, std::string> texts;  ///< Inputs of type BYTES, one element each.
  std::vector<Buffer> buffers;               ///< What the tensors point into.

  /// Reads a request. Fails on tensors in GPU memory, and on elements that nothing here takes.
  static Result<ReceivedRequest> read(TRITONBACKEND_Request* request);
};

}  // namespace freewheel::triton
