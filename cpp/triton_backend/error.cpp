// SPDX-License-Identifier: Apache-2.0
#include "error.h"

#include <string>

namespace freewheel::triton {
namespace {

TRITONSERVER_Error_Code triton_code(Code code) noexcept {
  switch (code) {
    case Code::kConfig:
    case Code::kRequest:
      return TRITONSERVER_ERROR_INVALID_ARG;
    case Code::kBundle:
    case Code::kBackend:
      return TRITONSERVER_ERROR_UNAVAILABLE;
    case Code::kCancelled:
      return TRITONSERVER_ERROR_CANCELLED;
    case Code::kOk:
    case Code::kFailed:
    case Code::kNotFinite:
    case Code::kOutput:
    case Code::kInternal:
      return TRITONSERVER_ERROR_INTERNAL;
  }
  return TRITONSERVER_ERROR_UNKNOWN;
}

}  // namespace

TRITONSERVER_Error* error_from_status(const Status& status) {
  if (status.ok()) return nullptr;
  return TRITONSERVER_ErrorNew(triton_code(status.code()), status.message().c_str());
}

Status status_from_error(TRITONSERVER_Error* error, const char* call) {
  if (error == nullptr) return {};
  const std::string reason = TRITONSERVER_ErrorMessage(error);
  TRITONSERVER_ErrorDelete(error);
  return Status(Code::kFailed, call, "the server says: " + reason);
}

}  // namespace freewheel::triton
