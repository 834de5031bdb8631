// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Between our `Status` and Triton's errors.

#include "freewheel/status.h"
#include "triton_api.h"

namespace freewheel::triton {

/// Makes Triton's error of a failure, with the three-part message; null for success.
[[nodiscard]] TRITONSERVER_Error* error_from_status(const Status& status);

/// Takes an error that a Triton function returned, and deletes it.
/// @param call What was called, for the message.
Status status_from_error(TRITONSERVER_Error* error, const char* call);

}  // namespace freewheel::triton

/// Calls a Triton function; returns from the calling function where it fails.
#define FREEWHEEL_TRITON_TRY(function, ...) \
  FREEWHEEL_TRY(::freewheel::triton::status_from_error(function(__VA_ARGS__), #function))
