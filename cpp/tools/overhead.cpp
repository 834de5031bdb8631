// SPDX-License-Identifier: Apache-2.0
/// overhead: how much of a step is spent outside engines. Prints one JSON object.

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "freewheel/sampler.h"
#include "freewheel/session.h"

namespace {

using freewheel::Result;
using freewheel::Status;
using Clock = std::chrono::steady_clock;

double engine_seconds = 0.0;

/// A call that adds its time to `engine_seconds`.
class TimedCall final : public freewheel::BoundCall {
 public:
  explicit TimedCall(std::unique_ptr<freewheel::BoundCall> inner) : inner_(std::move(inner)) {}
  Status run() noexcept override {
    const auto began = Clock::now();
    Status status = inner_->run();
    engine_seconds += std::chrono::duration<double>(Clock::now() - began).count();
    return status;
  }

 private:
  std::unique_ptr<freewheel::BoundCall> inner_;
};

class TimedEngine final : public freewheel::Engine {
 public:
  explicit TimedEngine(std::shared_ptr<freewheel::Engine> inner)
      : Engine(inner->name(), inner->record()), inner_(std::move(inner)) {}

 protected:
  Result<std::unique_ptr<freewheel::BoundCall>> bind_checked(
      const freewheel::Tensors& bindings) override {
    auto call = inner_->bind(bindings);
    if (!call.ok()) return std::move(call).status();
    return std::unique_ptr<freewheel::BoundCall>(
        std::make_unique<TimedCall>(std::move(call).value()));
  }

 private:
  std::shared_ptr<freewheel::Engine> inner_;
};

class TimedBackend final : public freewheel::Backend {
 public:
  explicit TimedBackend(std::shared_ptr<freewheel::Backend> inner) : inner_(std::move(inner)) {}
  const char* name() const noexcept override { return inner_->name(); }
  freewheel::Memory& memory() noexcept override { return inner_->memory(); }
  Result<std::shared_ptr<freewheel::Engine>> load(const std::string& folder) override {
    return timed(inner_->load(folder));
  }
  Result<std::shared_ptr<freewheel::Engine>> compile(const std::string& onnx,
                                                     const std::string& graph,
                                                     const std::string& precision) override {
    return timed(inner_->compile(onnx, graph, precision));
  }

 private:
  static Result<std::shared_ptr<freewheel::Engine>> timed(
      Result<std::shared_ptr<freewheel::Engine>> loaded) {
    if (!loaded.ok()) return loaded;
    return std::shared_ptr<freewheel::Engine>(
        std::make_shared<TimedEngine>(std::move(loaded).value()));
  }
  std::shared_ptr<freewheel::Backend> inner_;
};

double median(std::vector<double> values) { return freewheel::percentile(std::move(values), 50); }

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return std::fprintf(stderr, "usage: overhead BUNDLE POLICY\n"), 2;
  auto inner = freewheel::create_backend("openvino", {});
  if (!inner.ok()) return std::fprintf(stderr, "%s\n", inner.status().message().c_str()), 1;
  freewheel::ModelOptions options;
  options.custom_backend = std::make_shared<TimedBackend>(*inner);
  auto model = freewheel::Model::load(argv[1], options);
  if (!model.ok()) return std::fprintf(stderr, "%s\n", model.status().message().c_str()), 1;
  auto session = freewheel::Session::create(*model);
  std::vector<float> latents(16 * 5 * 12 * 12), text(24 * 128, 0.1f), empty(24 * 128, -0.1f);
  freewheel::RunRequest request;
  using freewheel::DType;
  request.latents = {latents.data(), DType::kFloat32, {1, 16, 5, 12, 12}};
  request.prompts["cond"]["text_states"] = {text.data(), DType::kFloat32, {1, 24, 128}};
  request.prompts["uncond"]["text_states"] = {empty.data(), DType::kFloat32, {1, 24, 128}};
  request.steps = 30;
  request.guidance_scale = 3.0;
  request.cache.policy = argv[2];
  std::vector<double> computed, reused;
  double before = 0.0;
  request.on_branch_step = [&](const freewheel::BranchEvent& event) {
    const double outside = event.seconds - (engine_seconds - before);
    before = engine_seconds;
    if (event.step_index > 0) (event.computed ? computed : reused).push_back(outside * 1e6);
  };
  for (int run = 0; run < 5; ++run) {
    freewheel::gaussian_noise(1, latents.data(), static_cast<std::int64_t>(latents.size()));
    before = engine_seconds = 0.0;
    const Status status = (*session)->run(request);
    if (!status.ok()) return std::fprintf(stderr, "%s\n", status.message().c_str()), 1;
    if (run == 0) computed.clear(), reused.clear();
  }
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  std::printf(
      "{\"policy\": \"%s\", \"computed_us\": %.1f, \"reused_us\": %.1f, \"peak_mib\": %.0f}\n",
      argv[2], median(computed), reused.empty() ? 0.0 : median(reused),
      static_cast<double>(usage.ru_maxrss) / 1024.0);
  return 0;
}
