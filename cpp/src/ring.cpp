// SPDX-License-Identifier: Apache-2.0
#include "ring.h"

#include <algorithm>

#include "try.h"

namespace freewheel {
namespace {

constexpr std::size_t kAlignment = 256;  // of every address that an engine is bound to

}  // namespace

Result<ResidualRing> ResidualRing::create(Memory& memory, std::int64_t slots, DType dtype,
                                          const std::map<std::string, Shape>& residuals) {
  ResidualRing ring;
  ring.memory_ = &memory;
  ring.slots_ = slots;
  for (const auto& [name, residual] : residuals) {
    Stream& stream = ring.streams_[name];
    stream.residual = residual;
    Shape whole{slots};
    for (std::int64_t size : residual) whole.push_back(size);
    FREEWHEEL_ASSIGN(stream.history, Buffer::create(memory, dtype, whole));
    if (slots > 1 && Tensor{nullptr, dtype, residual}.bytes() % kAlignment != 0) {
      FREEWHEEL_ASSIGN(stream.beside, Buffer::create(memory, dtype, residual));
    }
  }
  FREEWHEEL_ASSIGN(ring.mix_, Buffer::create(memory, DType::kFloat32, Shape{slots}));
  ring.host_mix_.resize(static_cast<std::size_t>(slots));
  return ring;
}

Tensor ResidualRing::Stream::place(std::int64_t index) const noexcept {
  Tensor view{nullptr, history.view().dtype, residual};
  view.data = history.view().as<std::uint8_t>() + static_cast<std::size_t>(index) * view.bytes();
  return view;
}

bool ResidualRing::is_next_finite() const noexcept {
  for (const auto& [name, stream] : streams_) {
    if (!is_finite(stream.slot(next_slot()))) return false;
  }
  return true;
}

Status ResidualRing::push() noexcept {
  newest_ = next_slot();
  held_ = std::min(held_ + 1, slots_);
  for (const auto& [name, stream] : streams_) {
    if (stream.beside.empty()) continue;
    const Tensor target = stream.place(newest_);
    FREEWHEEL_TRY(memory_->copy(target.data, stream.beside.view().data, target.bytes()));
  }
  return {};
}

Status ResidualRing::reset() noexcept {
  newest_ = -1;
  held_ = 0;
  for (const auto& [name, stream] : streams_) {
    const Tensor& history = stream.history.view();
    FREEWHEEL_TRY(memory_->zero(history.data, history.bytes()));
  }
  return {};
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
