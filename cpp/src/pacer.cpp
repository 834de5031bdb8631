// SPDX-License-Identifier: Apache-2.0
#include "pacer.h"

#include <algorithm>
#include <numeric>

namespace freewheel {

double Pacer::Window::mean() const noexcept {
  const std::size_t size = held();
  return size == 0 ? 0.0 : std::accumulate(seconds.begin(), seconds.begin() + size, 0.0) / size;
}

double Pacer::Window::most_of_newest() const noexcept {
  double most = 0.0;
  for (std::size_t age = 1; age <= std::min(held(), kNewest); ++age)
    most = std::max(most, seconds[(count - age) % seconds.size()]);
  return most;
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
  const double computed = branches_ * computed_.mean(), reused = branches_ * reused_.mean();
  const double reserve = std::max(branches_ * computed_.most_of_newest() - computed, 0.0);
  const double left = *deadline_ - (now - began_) - reserve;
  return {std::min(left, Pace::kNoDeadline / 2.0), std::max(computed, reused), reused};
}

void Pacer::note(bool computed) noexcept {
  ++noted_;
  if (!was_computed_) was_computed_ = computed;
}

}  // namespace freewheel
