// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Engines and weights of one bundle, loaded once and shared by any number of sessions.

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "freewheel/bundle.h"
#include "freewheel/engine.h"
#include "freewheel/lora.h"

namespace freewheel {

class OffloadedWeights;
class Tokenizer;

struct ModelOptions {
  /// A backend that the bundle has engines for; empty takes the first that is compiled in.
  std::string backend;
  BackendOptions backend_options;
  /// Whether engines that don't fit this machine are compiled from the bundle's graphs instead.
  bool allow_compile = false;
  /// Whether runs stop at the first step that makes values that are not finite.
  bool check_finite = true;
  /// Whether the blocks' weights stay in host memory, two blocks of each kind on the device.
  bool offload = false;
  /// The only folder that requests may name LoRAs of; empty takes none.
  std::string lora_folder;
  /// Used in place of the table's, by tests and by programs with a backend of their own.
  std::shared_ptr<Backend> custom_backend;
};

/// A bundle with a backend chosen. Thread-safe. Engines load when first used; weights stay
/// memory-mapped on the CPU and are uploaded once on devices.
class Model {
 public:
  ~Model();

  static Result<std::shared_ptr<Model>> load(std::shared_ptr<const Bundle> bundle,
                                             const ModelOptions& options = {});

  /// Opens the bundle in `folder` and loads it.
  static Result<std::shared_ptr<Model>> load(const std::string& folder,
                                             const ModelOptions& options = {});

  /// The same model, engines and unchanged weights shared, with others in place of some weights.
  /// @param weights Host tensors of the bundle's shapes and dtypes.
  static std::shared_ptr<Model> with_weights(std::shared_ptr<Model> model, Weights weights);

  const Bundle& bundle() const noexcept { return *bundle_; }
  const Manifest& manifest() const noexcept { return bundle_->manifest(); }
  const Backend& backend() const noexcept { return *backend_; }
  Memory& memory() noexcept { return backend_->memory(); }

  bool checks_finite() const noexcept { return check_finite_; }
  const std::string& lora_folder() const noexcept { return lora_folder_; }

  /// CPU threads of one engine call; 0 takes every core.
  int threads() const noexcept { return threads_; }

  /// Loads every engine and touches every weight now, rather than in the first run.
  Status load_all();

  /// The engine of `graph`, loaded the first time.
  Result<std::shared_ptr<Engine>> engine(const std::string& graph);

  /// A weight in the backend's memory, valid as long as the model.
  Result<Tensor> weight(const std::string& name);

  /// Returns the token ids of a prompt, the pipeline's end token included. Refuses text that is no
  /// UTF-8, or that holds what the bundle's tokenizer graph can't tell apart.
  Result<std::vector<std::int64_t>> token_ids(const std::string& text);

  /// Binds `graph` to buffers by name (others are ignored), and to the weights of `block` of the
  /// manifest's expert number `expert`.
  Result<std::unique_ptr<BoundCall>> bind(const std::string& graph, const Tensors& values,
                                          std::int64_t block = 0, std::size_t expert = 0);

 private:
  Model();

  Result<Tensor> host_weight(const std::string& name);
  void offload();

  std::shared_ptr<Model> base_;  ///< Has engines and other weights; null where this is it.
  Weights changed_;              ///< On devices those that are not uploaded yet.
  std::string lora_folder_;
  int threads_ = 0;
  std::shared_ptr<const Bundle> bundle_;
  std::shared_ptr<Backend> backend_;
  const EngineSet* set_ = nullptr;
  bool allow_compile_ = false, check_finite_ = true;
  std::mutex mutex_;
  std::map<std::string, std::shared_ptr<Engine>> engines_;
  std::map<std::string, Buffer> uploaded_;
  std::mutex tokenizer_mutex_;
  std::unique_ptr<Tokenizer> tokenizer_;         ///< Null until the first text.
  std::unique_ptr<OffloadedWeights> offloaded_;  ///< Null where weights are not offloaded.
};

}  // namespace freewheel
