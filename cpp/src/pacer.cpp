// SPDX-License-Identifier: Apache-2.0
#include "pacer.h"

#include <algorithm>

namespace freewheel {

double Pacer::Window::median() const noexcept {
  if (count == 0) return 0.0;
  std::array<double, 8> sorted = seconds;
  const std::size_t size = held();
  std::sort(sorted.begin(), sorted.begin() + static_cast<std::ptrdiff_t>(size));
  return (sorted[(size - 1) / 2] + sorted[size / 2]) / 2.0;
}

double Pacer::Window::most() const noexcept {
  return count == 0 ? 0.0
                    : *std::max_element(seconds.begin(),
                                        seconds.begin() + static_cast<std::ptrdiff_t>(held()));
}

void Pacer::begin(std::optional<double> deadline, double now) noexcept {
  deadline_ = deadline;
  began_ = step_began_ = now;
  was_computed_.reset();
  noted_ = 0;
}

Pace Pacer::begin_step(double now, double prepared) noexcept {
  if (was_computed_) {
    branches_ = noted_;
    (*was_computed_ ? computed_ : reused_).add((now - prepared - step_began_) / branches_);
  }
  step_began_ = now - prepared;
  was_computed_.reset();
  noted_ = 0;
  if (!deadline_) return {};
  const double computed = branches_ * computed_.median(), reused = branches_ * reused_.median();
  const double left = *deadline_ - (now - began_) - (branches_ * computed_.most() - computed);
  return {std::min(left, Pace::kNoDeadline / 2.0), std::max(computed, reused), reused};
}

void Pacer::note(bool computed) noexcept {
  ++noted_;
  if (!was_computed_) was_computed_ = computed;
}

}  // namespace freewheel
