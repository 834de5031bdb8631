// SPDX-License-Identifier: Apache-2.0
#pragma once

/// The residual history of one branch: a ring in one device buffer a stream that is never shifted.

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "freewheel/status.h"
#include "freewheel/tensor.h"

namespace freewheel {

/// The last K residuals. `delta` writes the next one straight into the oldest slot, by binding that
/// slot's address; what moves is the index of the newest. A history is bound whole to `reuse`, and
/// the mix is permuted from age to slot. All streams move together.
class ResidualRing {
 public:
  ResidualRing() = default;

  /// @param residuals Stream -> the shape of its residual.
  static Result<ResidualRing> create(Memory& memory, std::int64_t slots, DType dtype,
                                     const std::map<std::string, Shape>& residuals);

  std::int64_t slots() const noexcept { return slots_; }
  const Tensor& history(const std::string& stream) const {
    return streams_.at(stream).history.view();
  }
  const Tensor& mix() const noexcept { return mix_.view(); }

  /// Where the residual of a slot is written: the slot, or a tensor beside the ring where slots are
  /// not aligned as engines want addresses, which no model of real width has.
  Tensor slot(const std::string& stream, std::int64_t index) const {
    return streams_.at(stream).slot(index);
  }

  /// Slot that the next residual goes to.
  std::int64_t next_slot() const noexcept { return (newest_ + 1) % slots_; }

  /// Whether what was written for `next_slot` is finite in every stream.
  bool is_next_finite() const noexcept;

  /// Records that a residual was written to `next_slot`.
  Status push() noexcept;

  /// Forgets everything; zeros, since 0 · NaN of an old run would be NaN.
  Status reset() noexcept;

  /// Writes the factors of slots that make what `gram` multiplies, [slots, slots]: row 0 is the
  /// newest residual, row k that of age k - 1 minus that of age k, zeros what is not held.
  void differences(float* factors) const noexcept;

  /// Sets the factors of the next reuse, given newest first.
  Status set_mix(const float* mix, std::int64_t count) noexcept;

 private:
  struct Stream {
    Shape residual;
    Buffer history, beside;

    Tensor place(std::int64_t index) const noexcept;
    Tensor slot(std::int64_t index) const noexcept {
      return beside.empty() ? place(index) : beside.view();
    }
  };

  Memory* memory_ = nullptr;
  std::int64_t slots_ = 0, newest_ = -1, held_ = 0;
  std::map<std::string, Stream> streams_;
  Buffer mix_;
  std::vector<float> host_mix_;
};

}  // namespace freewheel
