// SPDX-License-Identifier: Apache-2.0
#pragma once

/// A bundle of a few numbers, and a backend of plain functions that runs it: the runtime's logic is
/// tested without any engine.

#include <atomic>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "freewheel/engine.h"
#include "freewheel/session.h"

namespace freewheel::testing {

/// A folder that is removed with its content.
class TemporaryFolder {
 public:
  TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  ~TemporaryFolder();
  const std::string& path() const { return path_; }
  void write(const std::string& name, const std::string& text) const;

 private:
  std::string path_;
};

/// Counts what the engines were asked for.
struct Calls {
  std::atomic<int> head{0}, block{0}, tapped{0}, delta{0}, reuse{0}, finish{0}, decide{0},
      prompt{0};
  std::atomic<bool> fail_finish{false};
  /// A graph whose first output becomes infinite in every call.
  std::string overflows;
  /// Called inside every engine call.
  std::function<void(const std::string&)> on_call;
  /// Called with what a policy looks at: signal, previous and computed one, feature.
  std::function<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&)> on_decide;
  /// Called by "interval" with timestep and sigma of the step, of the last computed one, and of the
  /// one before that.
  std::function<void(const std::vector<float>&)> on_schedule;
  /// Called by "alike" with the four inner products that it is given.
  std::function<void(const std::vector<float>&)> on_gram;
};

/// The manifest of the tiny bundle; `write_tiny_bundle` puts it with its files into a folder.
/// Policies: "off"; "interval" (computes every `interval` steps, keeps 2 residuals, reports a
/// distance); "motion" (looks at the feature); "signal" (looks at the hidden states); "probe" (at
/// what the first block adds to them); "follow" (at latents and output, one decision for all
/// branches); "alike" (at the inner products of two residuals; computes every other step).
nlohmann::json write_tiny_bundle(const TemporaryFolder& folder);

/// Adds a sound that is sampled beside the video, `audio_latents` [batch, audio_tokens, 3]; the
/// prompt's `audio_places` tell how long it is.
void add_sound(nlohmann::json& manifest);

/// Writes a changed manifest over the bundle's.
void write_manifest(const TemporaryFolder& folder, const nlohmann::json& manifest);

/// A backend called "plain" over functions written here.
std::shared_ptr<Backend> plain_backend(std::shared_ptr<Calls> calls);

/// A loaded model of the bundle in `folder` on the plain backend.
Result<std::shared_ptr<Model>> load_tiny(const TemporaryFolder& folder,
                                         std::shared_ptr<Calls> calls);

/// Latents and prompts of the tiny bundle, and the request that points at them.
struct TinyRun {
  explicit TinyRun(std::int64_t frames = 2, std::int64_t size = 4);
  std::vector<float> latents, cond, uncond;
  RunRequest request;
};

}  // namespace freewheel::testing
