// SPDX-License-Identifier: Apache-2.0
#pragma once

/// What a fallible call returns: a `Status`, or a `Result<T>` that holds a value or a status.

#include <memory>
#include <string>
#include <utility>
#include <variant>

namespace freewheel {

/// Kinds of failure, one per thing a caller would do about it. The values are those of the C ABI.
enum class Code : int {
  kOk = 0,
  kFailed = 1,     ///< Something failed while running.
  kBundle = 2,     ///< A bundle can't be read, or is not what its manifest says.
  kConfig = 3,     ///< A policy name, parameter or signal is wrong.
  kRequest = 4,    ///< A run was asked for something that the bundle can't do.
  kBackend = 5,    ///< The wanted backend can't be used here.
  kOutput = 6,     ///< A file can't be written.
  kCancelled = 7,  ///< The run was cancelled.
  kInternal = 8,   ///< A broken invariant: our bug.
  kNotFinite = 9,  ///< A run made values that are not finite.
};

/// Spells a code as Python does: "bundle", "config", ….
const char* code_name(Code code) noexcept;

/// Success, or a failure with a message in three parts. Success owns nothing.
class [[nodiscard]] Status {
 public:
  Status() noexcept = default;

  /// @param where The file, graph, tensor or field at fault.
  /// @param what What was found and what was expected.
  /// @param hint What to do.
  Status(Code code, std::string where, std::string what, std::string hint = {});

  Status(Status&&) noexcept = default;
  Status& operator=(Status&&) noexcept = default;
  Status(const Status& other);
  Status& operator=(const Status& other);
  ~Status() = default;

  bool ok() const noexcept { return detail_ == nullptr; }
  Code code() const noexcept { return detail_ ? detail_->code : Code::kOk; }
  const std::string& where() const noexcept;
  const std::string& what() const noexcept;
  const std::string& hint() const noexcept;

  /// "where: what; hint", or "ok".
  std::string message() const;

 private:
  struct Detail {
    Code code;
    std::string where, what, hint;
  };
  std::unique_ptr<Detail> detail_;
};

/// A value, or why there is none.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : held_(std::in_place_index<0>, std::move(value)) {}         // NOLINT
  Result(Status status) : held_(std::in_place_index<1>, std::move(status)) {}  // NOLINT

  bool ok() const noexcept { return held_.index() == 0; }

  /// The value; only where `ok()`.
  T& value() & { return *std::get_if<0>(&held_); }
  const T& value() const& { return *std::get_if<0>(&held_); }
  T&& value() && { return std::move(*std::get_if<0>(&held_)); }
  T* operator->() { return std::get_if<0>(&held_); }
  const T* operator->() const { return std::get_if<0>(&held_); }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }

  /// The failure; only where not `ok()`.
  const Status& status() const& { return *std::get_if<1>(&held_); }
  Status&& status() && { return std::move(*std::get_if<1>(&held_)); }

 private:
  std::variant<T, Status> held_;
};

}  // namespace freewheel
