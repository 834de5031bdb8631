// SPDX-License-Identifier: Apache-2.0
#include "denoising.h"

#include <cstring>

#include "freewheel/sampler.h"
#include "try.h"

namespace freewheel {

Result<Denoising> Denoising::create(const Tensor& latents, const Tensor& condition,
                                    const SamplerTable& table, Memory& memory) {
  Denoising run(latents, condition, table, memory);
  FREEWHEEL_TRY(run.allocate());
  std::memcpy(run.sample().data, latents.data, latents.bytes());
  return run;
}

Status Denoising::allocate() {
  const auto add = [](const Shape& shape, std::vector<Buffer>& buffers) -> Status {
    FREEWHEEL_ASSIGN(Buffer buffer, Buffer::create(host_memory(), DType::kFloat32, shape));
    buffers.push_back(std::move(buffer));
    return {};
  };
  const Shape& shape = latents_.shape;
  for (std::int64_t age = 0; age < table_->window; ++age) {
    FREEWHEEL_TRY(add(shape, samples_));
    FREEWHEEL_TRY(add(shape, outputs_));
  }
  past_samples_.resize(window());
  past_outputs_.resize(window());
  if (condition_.data != nullptr) {
    FREEWHEEL_ASSIGN(const Shape whole, joined_shape(latents_, condition_));
    FREEWHEEL_ASSIGN(input_, Buffer::create(host_memory(), DType::kFloat32, whole));
  }
  for (int side = 0; side < 2 && !memory_->is_host(); ++side) FREEWHEEL_TRY(add(shape, staged_));
  return {};
}

Tensor Denoising::input() const noexcept {
  if (input_.empty()) return sample();
  const auto batch = static_cast<std::size_t>(sample().shape[0]);
  auto* target = input_.view().as<std::uint8_t>();
  for (std::size_t index = 0; index < batch; ++index) {
    for (const Tensor& part : {sample(), condition_}) {
      const std::size_t bytes = part.bytes() / batch;
      std::memcpy(target, part.as<std::uint8_t>() + index * bytes, bytes);
      target += bytes;
    }
  }
  return input_.view();
}

Result<Tensor> Denoising::take(std::size_t side, const Tensor& output) {
  taken_[side] = output;
  if (staged_.empty()) return output;
  taken_[side] = staged_[side].view();
  FREEWHEEL_TRY(memory_->download(taken_[side].data, output.data, output.bytes()));
  return taken_[side];
}

const Tensor& Denoising::guided(double scale) noexcept {
  const Tensor& output = outputs_[newest()].view();
  if (taken_[1].data == nullptr) {
    std::memcpy(output.data, taken_[0].data, output.bytes());
  } else {
    guide(taken_[0].as<float>(), taken_[1].as<float>(), static_cast<float>(scale),
          output.as<float>(), output.shape.elements());
  }
  return output;
}

void Denoising::advance() noexcept {
  for (std::size_t age = 0; age < window(); ++age) {
    const std::size_t slot = (newest() + window() - age) % window();
    past_samples_[age] = samples_[slot].view().as<float>();
    past_outputs_[age] = outputs_[slot].view().as<float>();
  }
  const Tensor& next = samples_[(newest() + 1) % window()].view();
  freewheel::advance(*table_, step_index_, past_samples_.data(), past_outputs_.data(),
                     next.as<float>(), next.shape.elements());
  ++step_index_;
}

Status Denoising::check(const std::string& name) const {
  if (is_finite(sample())) return {};
  return Status(Code::kFailed, name, "are not finite after the last step",
                "compare with --cache off, and with a float32 build");
}

void Denoising::write() const noexcept {
  std::memcpy(latents_.data, sample().data, sample().bytes());
}

}  // namespace freewheel
