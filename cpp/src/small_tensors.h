// SPDX-License-Identifier: Apache-2.0
#pragma once

/// The small inputs and outputs of a policy in one piece of device memory with a host mirror.

#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "freewheel/manifest.h"
#include "freewheel/status.h"
#include "freewheel/tensor.h"

namespace freewheel {

/// One upload carries all inputs that change from step to step, and one download all outputs; those
/// that stay for a run (`param.` and `guard.`) are carried once they were set. On the CPU the
/// mirror is the memory.
class SmallTensors {
 public:
  /// Lays out tensors of static shape.
  static Result<SmallTensors> create(Memory& memory, const std::map<std::string, Io>& inputs,
                                     const std::map<std::string, Io>& outputs);

  /// Views in the backend's memory, to bind.
  const Tensors& bound() const noexcept { return bound_; }

  /// The host's view of one tensor, or null data where there is no such one.
  Tensor host(const std::string& name) const;

  /// Writes numbers into an input of any dtype; inputs that are not there are left alone.
  void set(const std::string& name, const std::vector<double>& values);
  void set(const std::string& name, double value);

  Status upload() noexcept;
  Status download() noexcept;

 private:
  Memory* memory_ = nullptr;
  Buffer device_;
  Buffer mirror_;                                   // empty on the CPU
  std::size_t steady_bytes_ = 0, input_bytes_ = 0;  // steady inputs lie before all others
  bool is_steady_set_ = true;
  Tensors bound_, host_;
};

/// Writes one number as an element of any dtype but float8, which weights alone have.
void store_number(const Tensor& tensor, std::int64_t index, double value) noexcept;

}  // namespace freewheel
