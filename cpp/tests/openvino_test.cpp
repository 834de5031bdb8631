// SPDX-License-Identifier: Apache-2.0
/// The real thing: the bundle that FREEWHEEL_TEST_BUNDLE names, on OpenVINO.

#include <gtest/gtest.h>
#include <malloc.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "freewheel/sampler.h"
#include "freewheel/session.h"
#include "freewheel/settings.h"

namespace freewheel {
namespace {

/// Megabytes of this process that no file backs, without what the allocator only keeps at hand:
/// many shapes in turn fragment it, which is no growth of what is held.
double private_megabytes() {
  malloc_trim(0);
  std::FILE* file = std::fopen("/proc/self/smaps_rollup", "r");
  if (file == nullptr) return 0.0;
  char line[256];
  long long kilobytes = 0, found = 0;
  while (std::fgets(line, sizeof line, file) != nullptr) {
    if (std::sscanf(line, "Anonymous: %lld", &found) == 1) kilobytes += found;
  }
  std::fclose(file);
  return static_cast<double>(kilobytes) / 1024.0;
}

class OpenVinoTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const char* folder = std::getenv("FREEWHEEL_TEST_BUNDLE");
    if (folder == nullptr) GTEST_SKIP() << "FREEWHEEL_TEST_BUNDLE names no bundle";
    ModelOptions options;
    options.backend = "openvino";
    auto model = Model::load(folder, options);
    if (!model.ok() && model.status().code() == Code::kBackend) {
      GTEST_SKIP() << model.status().message();
    }
    ASSERT_TRUE(model.ok()) << model.status().message();
    model_ = *model;
  }

  std::vector<float> run(Session& session, const std::string& policy, std::int64_t frames,
                         std::int64_t size, std::int64_t steps) {
    std::vector<float> latents(static_cast<std::size_t>(16 * frames * size * size));
    gaussian_noise(3, latents.data(), static_cast<std::int64_t>(latents.size()));
    std::vector<float> text(12 * 128, 0.05f), empty(12 * 128, -0.05f);
    RunRequest request;
    request.latents = {latents.data(), DType::kFloat32, Shape{1, 16, frames, size, size}};
    request.prompts["cond"]["text_states"] = {text.data(), DType::kFloat32, Shape{1, 12, 128}};
    request.prompts["uncond"]["text_states"] = {empty.data(), DType::kFloat32, Shape{1, 12, 128}};
    request.steps = steps;
    request.guidance_scale = 3.0;
    request.cache.policy = policy;
    const Status status = session.run(request);
    EXPECT_TRUE(status.ok()) << status.message();
    return latents;
  }

  std::shared_ptr<Model> model_;
};

TEST_F(OpenVinoTest, ConcurrentSessionsGiveWhatTheyGiveAlone) {
  auto session = Session::create(model_);
  const std::vector<float> alone = run(**session, "teacache", 2, 4, 6);
  std::vector<std::vector<float>> found(3);
  std::vector<std::thread> threads;
  for (auto& slot : found) {
    threads.emplace_back([&] {
      auto own = Session::create(model_);
      slot = run(**own, "teacache", 2, 4, 6);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& latents : found) EXPECT_EQ(latents, alone);
}

TEST_F(OpenVinoTest, CompilesAnewWhereAskedTo) {
  const auto backend = create_backend("openvino", {});
  ASSERT_TRUE(backend.ok());
  const auto path = model_->bundle().path(model_->manifest().graphs.at("delta").file);
  const auto engine = (*backend)->compile(*path, "delta", "float32");
  ASSERT_TRUE(engine.ok()) << engine.status().message();
  EXPECT_EQ((*engine)->record().inputs.size(), 2u);
  EXPECT_FALSE((*backend)->compile("/no/such.onnx", "x", "float32").ok());
}

TEST_F(OpenVinoTest, BindingChecksNamesTypesAndShapes) {
  auto engine = model_->engine("delta");
  ASSERT_TRUE(engine.ok());
  std::vector<float> memory(1 * 4 * 256);
  const Tensor good{memory.data(), DType::kFloat32, Shape{1, 4, 256}};
  const Tensor bad{memory.data(), DType::kFloat32, Shape{1, 8, 128}};
  const Tensor typed{memory.data(), DType::kInt32, Shape{1, 4, 256}};
  const Tensor other{memory.data(), DType::kFloat32, Shape{1, 2, 256}};
  EXPECT_FALSE((*engine)->bind({{"hidden", good}, {"hidden_out", good}}).ok());
  for (const Tensor& wrong : {bad, typed, other}) {
    const auto call =
        (*engine)->bind({{"hidden", good}, {"hidden_out", good}, {"residual", wrong}});
    EXPECT_EQ(call.status().code(), Code::kRequest);
  }
  EXPECT_FALSE((*engine)
                   ->bind({{"hidden", good}, {"hidden_out", good}, {"residual", good}, {"x", good}})
                   .ok());
}

TEST_F(OpenVinoTest, SoakDoesNotGrow) {
  const char* asked = std::getenv("FREEWHEEL_SOAK_RUNS");
  const int runs = asked != nullptr ? std::atoi(asked) : 0;
  if (runs == 0) GTEST_SKIP() << "FREEWHEEL_SOAK_RUNS is not set";
  // One thread: what TBB's mailboxes keep for a second one depends on the load of the machine, see
  // docs/explanation/cpp.md.
  const char* threads = std::getenv("FREEWHEEL_SOAK_THREADS");
  ModelOptions options;
  options.backend = "openvino";
  options.backend_options.threads = threads != nullptr ? std::atoi(threads) : 1;
  auto model = Model::load(std::getenv("FREEWHEEL_TEST_BUNDLE"), options);
  ASSERT_TRUE(model.ok()) << model.status().message();
  auto session = Session::create(*model);
  std::vector<std::string> policies;
  for (const auto& [name, policy] : model_->manifest().policies) policies.push_back(name);
  std::vector<double> megabytes;
  for (int index = 0; index < runs; ++index) {
    const std::string& policy = policies[static_cast<std::size_t>(index) % policies.size()];
    run(**session, policy, 1 + index % 3, 4 + 2 * (index % 2), 5);
    megabytes.push_back(private_megabytes());
  }
  for (std::size_t at = 19; at < megabytes.size(); at += 20) {
    std::printf("%zu: %.1f MB\n", at + 1, megabytes[at]);
  }
  const double early = megabytes[static_cast<std::size_t>(runs * 4 / 10)], late = megabytes.back();
  std::printf("private memory after %d runs %.1f MB, after %d runs %.1f MB\n", runs * 4 / 10, early,
              runs, late);
  EXPECT_LT(late, early * 1.05 + 4.0);
}

}  // namespace
}  // namespace freewheel
