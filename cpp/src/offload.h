// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Block weights that stay in host memory; each block's are copied to the device while the block
/// before it runs.

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "freewheel/engine.h"
#include "freewheel/tensor.h"

namespace freewheel {

/// The weights of every block template of one model, two blocks of each kind on the device.
/// Thread-safe. Outlives its calls.
class OffloadedWeights {
 public:
  /// Reads a tensor by name, where it lies in host memory.
  using Read = std::function<Result<Tensor>(const std::string& name)>;

  OffloadedWeights(Memory& memory, Read read);
  ~OffloadedWeights();

  /// Binds one block of a template. Templates that share their tensors (a block and its tapped
  /// variant) share the copies.
  ///
  /// `bindings` holds everything but the weights; `weights` names them: input → tensor.
  Result<std::unique_ptr<BoundCall>> bind(Engine& engine, Tensors bindings,
                                          const std::map<std::string, std::string>& patterns,
                                          const std::map<std::string, std::string>& weights,
                                          std::int64_t block);

 private:
  friend class OffloadedCall;
  class Lane;

  Memory& memory_;
  Read read_;
  std::mutex mutex_;
  std::map<std::set<std::string>, std::unique_ptr<Lane>> lanes_;
};

}  // namespace freewheel
