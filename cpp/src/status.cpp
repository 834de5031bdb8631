// SPDX-License-Identifier: Apache-2.0
#include "freewheel/status.h"

namespace freewheel {
namespace {

const std::string& nothing() noexcept {
  static const std::string empty;
  return empty;
}

}  // namespace

const char* code_name(Code code) noexcept {
  switch (code) {
    case Code::kOk:
      return "ok";
    case Code::kFailed:
      return "failed";
    case Code::kBundle:
      return "bundle";
    case Code::kConfig:
      return "config";
    case Code::kRequest:
      return "request";
    case Code::kBackend:
      return "backend";
    case Code::kOutput:
      return "output";
    case Code::kCancelled:
      return "cancelled";
    case Code::kInternal:
      return "internal";
    case Code::kNotFinite:
      return "not_finite";
  }
  return "unknown";
}

Status::Status(Code code, std::string where, std::string what, std::string hint)
    : detail_(new Detail{code, std::move(where), std::move(what), std::move(hint)}) {}

Status::Status(const Status& other)
    : detail_(other.detail_ ? new Detail(*other.detail_) : nullptr) {}

Status& Status::operator=(const Status& other) {
  if (this != &other) detail_.reset(other.detail_ ? new Detail(*other.detail_) : nullptr);
  return *this;
}

const std::string& Status::where() const noexcept { return detail_ ? detail_->where : nothing(); }
const std::string& Status::what() const noexcept { return detail_ ? detail_->what : nothing(); }
const std::string& Status::hint() const noexcept { return detail_ ? detail_->hint : nothing(); }

std::string Status::message() const {
  if (ok()) return "ok";
  std::string text = detail_->where + ": " + detail_->what;
  if (!detail_->hint.empty()) text += "; " + detail_->hint;
  return text;
}

}  // namespace freewheel
