// SPDX-License-Identifier: Apache-2.0
#pragma once

/// The signal of a branch's current step and those of its past: buffers stay, their roles move.

#include <cstddef>
#include <vector>

namespace freewheel {

/// One buffer for this step's signal and one more for each role of the past that a policy keeps. A
/// signal is written once. At the next step its buffer becomes the previous one's, and the computed
/// one's if the step was computed, whose buffer becomes the older one's then; a buffer without a
/// role takes what comes next.
class SignalBuffers {
 public:
  /// Which buffer holds this step's signal, the last step's, the last computed step's and that of
  /// the computed step before; -1 where that is not kept.
  struct Stand {
    int current = -1, previous = -1, computed = -1, older = -1;
  };

  static constexpr std::size_t kKeys = 625;

  SignalBuffers() = default;
  SignalBuffers(bool keeps_previous, bool keeps_computed, bool keeps_older)
      : keeps_previous_(keeps_previous),
        keeps_computed_(keeps_computed),
        keeps_older_(keeps_older) {
    reset();
  }

  std::size_t count() const noexcept {
    return 1u + keeps_previous_ + keeps_computed_ + keeps_older_;
  }
  const Stand& stand() const noexcept { return stand_; }

  /// Forgets which was which; the caller zeroes the buffers.
  void reset() noexcept;

  /// Moves on to the next step; returns the buffer that its signal goes into.
  std::size_t advance() noexcept;

  /// Notes that this step is computed.
  void mark_computed() noexcept {
    if (keeps_older_) stand_.older = stand_.computed;
    if (keeps_computed_) stand_.computed = stand_.current;
  }

  /// Every way to stand at a decision.
  std::vector<Stand> stands() const;

  /// A number below `kKeys` that tells stands apart.
  static std::size_t key(const Stand& stand) noexcept {
    std::size_t found = 0;
    for (const int buffer : {stand.current, stand.previous, stand.computed, stand.older}) {
      found = found * 5 + static_cast<std::size_t>(buffer + 1);
    }
    return found;
  }

 private:
  bool keeps_previous_ = false, keeps_computed_ = false, keeps_older_ = false;
  Stand stand_;
};

}  // namespace freewheel
