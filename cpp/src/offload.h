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

class HostBlock;

/// The weights of every block template of one model, two blocks of each kind on the device.
/// Thread-safe. Outlives its calls.
class OffloadedWeights {
 public:
  /// Reads a tensor by name, where it lies in host memory.
  using Read = std::function<Result<Tensor>(const std::string& name)>;

  /// Tells whether a tensor is not the bundle's.
  using IsChanged = std::function<bool(const std::string& name)>;

  /// @param base Weights of the same bundle, whose copies in host memory serve the blocks that
  ///   nothing changes; null where there are none. Outlives these.
  OffloadedWeights(Memory& memory, Read read, IsChanged is_changed, OffloadedWeights* base);
  ~OffloadedWeights();

  /// Binds one block of a template. Templates that share their tensors (a block and its tapped
  /// variant) share the copies; those whose tensors have other shapes do not.
  ///
  /// `bindings` holds everything but the weights; `weights` names them: input → tensor.
  Result<std::unique_ptr<BoundCall>> bind(Engine& engine, Tensors bindings,
                                          const std::map<std::string, std::string>& patterns,
                                          const std::map<std::string, std::string>& weights,
                                          std::int64_t block);

 private:
  friend class OffloadedCall;
  class Lane;

  /// One block's weights in host memory: shared by those who hold it, where it is the bundle's.
  Result<std::shared_ptr<HostBlock>> host_block(const std::map<std::string, std::string>& weights);

  Memory& memory_;
  Read read_;
  IsChanged is_changed_;
  OffloadedWeights* base_;
  std::mutex mutex_, blocks_mutex_;
  std::map<std::map<std::string, std::string>, std::weak_ptr<HostBlock>> blocks_;
  std::map<std::set<std::string>, std::unique_ptr<Lane>> lanes_;
};

}  // namespace freewheel
