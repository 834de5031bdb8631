// SPDX-License-Identifier: Apache-2.0
#include "ring.h"

#include <algorithm>

#include "try.h"

namespace freewheel {
namespace {

constexpr std::size_t kAlignment = 256;  // of every address that an engine is bound to

}  // namespace

Result<ResidualRing> ResidualRing::create(Memory& memory, std::int64_t slots, DType dtype,
                                          const Shape& residual) {
  ResidualRing ring;
  ring.memory_ = &memory;
  ring.slots_ = slots;
  ring.residual_ = residual;
  Shape whole{slots};
  for (std::int64_t size : residual) whole.push_back(size);
  FREEWHEEL_ASSIGN(ring.history_, Buffer::create(memory, dtype, whole));
  if (slots > 1 && Tensor{nullptr, dtype, residual}.bytes() % kAlignment != 0) {
    FREEWHEEL_ASSIGN(ring.beside_, Buffer::create(memory, dtype, residual));
  }
  FREEWHEEL_ASSIGN(ring.mix_, Buffer::create(memory, DType::kFloat32, Shape{slots}));
  ring.host_mix_.resize(static_cast<std::size_t>(slots));
  return ring;
}

Tensor ResidualRing::slot(std::int64_t index) const noexcept {
  return beside_.empty() ? place(index) : beside_.view();
}

Tensor ResidualRing::place(std::int64_t index) const noexcept {
  Tensor view{nullptr, history().dtype, residual_};
  view.data = history().as<std::uint8_t>() + static_cast<std::size_t>(index) * view.bytes();
  return view;
}

Status ResidualRing::push() noexcept {
  newest_ = next_slot();
  held_ = std::min(held_ + 1, slots_);
  if (beside_.empty()) return {};
  const Tensor target = place(newest_);
  return memory_->copy(target.data, beside_.view().data, target.bytes());
}

Status ResidualRing::reset() noexcept {
  newest_ = -1;
  held_ = 0;
  return memory_->zero(history().data, history().bytes());
}

void ResidualRing::differences(float* factors) const noexcept {
  std::fill(factors, factors + slots_ * slots_, 0.0f);
  for (std::int64_t age = 0; age < held_; ++age) {
    const std::int64_t slot = ((newest_ - age) % slots_ + slots_) % slots_;
    factors[age * slots_ + slot] = age == 0 ? 1.0f : -1.0f;
    if (age + 1 < held_) factors[(age + 1) * slots_ + slot] = 1.0f;
  }
}

Status ResidualRing::set_mix(const float* mix, std::int64_t count) noexcept {
  std::fill(host_mix_.begin(), host_mix_.end(), 0.0f);
  for (std::int64_t age = 0; age < std::min(held_, count); ++age) {
    const std::int64_t slot = ((newest_ - age) % slots_ + slots_) % slots_;
    host_mix_[static_cast<std::size_t>(slot)] = mix[age];
  }
  return memory_->upload(this->mix().data, host_mix_.data(), this->mix().bytes());
}

}  // namespace freewheel
