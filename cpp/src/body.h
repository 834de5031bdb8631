// SPDX-License-Identifier: Apache-2.0
#pragma once

/// The block loop of one branch, bound once: a computed step is one call per block.

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cancellation.h"
#include "freewheel/model.h"

namespace freewheel {

/// Owns buffers for declared tensors.
class BufferSet {
 public:
  /// Allocates one buffer per entry, and adds its view to `views`.
  Status allocate(Memory& memory, const std::map<std::string, Io>& entries, const Dims& dims,
                  Tensors& views);
  Status allocate(Memory& memory, const std::string& name, const Io& io, const Dims& dims,
                  Tensors& views);

 private:
  std::vector<Buffer> buffers_;
};

/// Prompt context and bound calls of one branch: one per block, or per group of baked blocks.
/// Hidden states go from `hidden` (kept, for the residual) through two alternating buffers that all
/// branches share. Other streams that blocks pass on (`<stream>` in, `<stream>_out` out) go from
/// what `prompt` gave through two buffers of the branch's own.
class Body {
 public:
  /// Allocates the branch's context and binds every block; `set_prompt` fills it.
  static Result<std::unique_ptr<Body>> create(Model& model, const std::string& branch,
                                              const Tensors& shared, const Tensors& prompt,
                                              const Dims& dims);

  /// Computes the context of every block for this prompt (host tensors, of the declared dtypes).
  Status set_prompt(const Tensors& prompt);

  /// Whether another prompt has the shapes that this body was bound for.
  bool fits(const Tensors& prompt) const;

  /// Allocates the feature buffers and binds the tapped block to each of them, once.
  Status bind_taps();
  const std::vector<Tensor>& taps() const noexcept { return taps_; }

  /// Where the last block writes.
  const Tensor& hidden_out() const noexcept { return streams_.at("hidden").now; }

  /// Everything that graphs of this branch may bind: what branches share, the prompt's inputs and
  /// what its graph made of them.
  const Tensors& values() const noexcept { return values_; }

  /// Every named dimension, those of the prompt included.
  const Dims& dims() const noexcept { return dims_; }

  /// Runs every block; `tap` (0 or 1) names the buffer that gets the feature, -1 none.
  Status run(int tap, const Cancellation& cancellation) noexcept;

 private:
  /// Where a stream is now, and the two buffers that it alternates between.
  struct Stream {
    Tensor now, even, odd;
  };

  Status bind_stage(const StageEntry& stage);
  Status advance(const std::string& stream, const Io& io, Tensor& target);
  Status add_call(const std::string& graph, std::int64_t first, std::int64_t count, Tensors values,
                  const std::optional<std::string>& tapped);

  Model* model_ = nullptr;
  Dims dims_;
  BufferSet buffers_;
  Tensors prompt_, values_;
  std::map<std::string, Stream> streams_;
  std::vector<std::unique_ptr<BoundCall>> prompt_calls_, calls_, tapped_;
  std::size_t tapped_at_ = 0;
  std::string tapped_graph_;
  std::int64_t tapped_block_ = 0;
  Tensors tapped_values_;
  std::vector<Tensor> taps_;
};

}  // namespace freewheel
