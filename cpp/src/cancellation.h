// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Asks a run to stop: read between engine calls, set from any thread.

#include <atomic>

#include "freewheel/status.h"

namespace freewheel {

/// The session's own flag, and the one that a request may bring.
struct Cancellation {
  enum State : int { kIdle = 0, kRunning = 1, kStopping = 2 };

  std::atomic<int> state{kIdle};
  const std::atomic<bool>* requested = nullptr;

  bool is_wanted() const noexcept {
    return state.load(std::memory_order_relaxed) == kStopping ||
           (requested != nullptr && requested->load(std::memory_order_relaxed));
  }
};

/// The status of a run that was stopped.
inline Status cancelled() { return Status(Code::kCancelled, "run", "was cancelled"); }

}  // namespace freewheel
