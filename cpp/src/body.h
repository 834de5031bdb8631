// SPDX-License-Identifier: Apache-2.0
#pragma once

/// The block loop of one branch, bound once: a computed step is one call per block.

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "block_tables.h"
#include "buffer_set.h"
#include "cancellation.h"
#include "freewheel/model.h"
#include "sections.h"

namespace freewheel {

/// Prompt context and bound calls of one branch: one per block, or per group of baked blocks.
/// Cached streams (`hidden`) go from what `head` gave (kept, for the residual) through two
/// alternating buffers that all branches share. Other streams that blocks pass on (`<stream>` in,
/// `<stream>_out` out) go from what `prompt` gave through two buffers of the branch's own. What a
/// later stage reads (a skip connection) has a buffer of its own in each branch.
class Body {
 public:
  /// Allocates the branch's context and binds every block of an expert; `set_prompt` fills it.
  /// @param tables Those that blocks make without the prompt; outlive the body.
  static Result<std::unique_ptr<Body>> create(Model& model, std::size_t expert,
                                              const std::string& branch, const Tensors& shared,
                                              const Tensors& prompt, const Dims& dims,
                                              const BlockTables& tables);

  /// Computes the context of every block for this prompt (host tensors, of the declared dtypes).
  Status set_prompt(const Tensors& prompt);

  /// Notes that blocks have to make their tables again: the run's, or the prompt, are others.
  void forget_tables() noexcept { is_modulated_ = false; }

  /// Has blocks make their tables of the run's, unless these are known.
  Status modulate(const Tensors& tables, std::int64_t steps);

  /// Puts a step's rows of the blocks' tables where their calls read them.
  Status select_row(std::int64_t step_index) noexcept;

  /// Whether another prompt has the shapes that this body was bound for.
  bool fits(const Tensors& prompt) const;

  /// Allocates the feature buffers and binds the tapped block to each of them, once.
  Status bind_taps();
  const std::vector<Tensor>& taps() const noexcept { return taps_; }

  /// Binds `graph` to buffers and to the weights of a block of this body's expert.
  Result<std::unique_ptr<BoundCall>> bind(const std::string& graph, const Tensors& values,
                                          std::int64_t block = 0) {
    return model_->bind(graph, values, block, expert_);
  }

  /// Lets what the first and the cached blocks leave lie where no block behind them writes. All
  /// blocks together give the same. What was divided otherwise before is forgotten.
  Status divide(const Sections& sections);

  /// A stream of the sections: what the first blocks gave, until the next step, and what the cached
  /// ones gave or a reused step put in its place.
  const Tensor& before(const std::string& stream) const noexcept { return before_.at(stream); }
  const Tensor& after(const std::string& stream) const noexcept { return after_.at(stream); }

  /// Where a cached stream ends.
  const Tensor& result(const std::string& stream) const { return streams_.at(stream).now; }

  /// Whether all cached streams end in finite values.
  bool is_finite() const noexcept;

  /// Everything that graphs of this branch may bind: what branches share, the prompt's inputs and
  /// what its graph made of them.
  const Tensors& values() const noexcept { return values_; }

  /// What the first block that passes `hidden` on reads for itself.
  const Tensors& first() const noexcept { return first_; }

  /// Every named dimension, those of the prompt included.
  const Dims& dims() const noexcept { return dims_; }

  /// Runs every block; `tap` (0 or 1) names the buffer that gets the feature, -1 none.
  Status run(int tap, const Cancellation& cancellation) noexcept {
    return run(tap, cancellation, 0, calls_.size());
  }

  /// Runs the blocks before the decision, those that are cached, and those behind; `divide` was
  /// called.
  Status run_first(int tap, const Cancellation& cancellation) noexcept {
    return run(tap, cancellation, 0, sections_->begin);
  }
  Status run_cached(int tap, const Cancellation& cancellation) noexcept {
    return run(tap, cancellation, sections_->begin, sections_->end);
  }
  Status run_last(int tap, const Cancellation& cancellation) noexcept {
    return run(tap, cancellation, sections_->end, calls_.size());
  }

 private:
  /// Where a stream is now, and the two buffers that it alternates between.
  struct Stream {
    Tensor now, even, odd;
  };

  /// One call of the loop, with what it is bound to, so that it can be bound otherwise.
  struct Call {
    std::string graph;
    std::int64_t block = 0;
    Tensors values, undivided;  // what it is bound to, and was before any `divide`
    std::unique_ptr<BoundCall> bound;
  };

  /// What `divide` makes before it takes effect.
  struct Division {
    std::vector<Tensors> values;  // of each call
    std::set<std::size_t> bound;  // calls that are bound otherwise than undivided
    std::map<std::pair<std::string, std::size_t>, Tensor> left;  // by the call that writes it
    BufferSet buffers;
  };

  Status run(int tap, const Cancellation& cancellation, std::size_t first,
             std::size_t end) noexcept;
  Status bind_stage(std::size_t index, const BlockTables& tables);
  Status bind_tapped();
  Result<Tensor> leave(const std::string& stream, std::size_t at, Division& division) const;
  Status advance(const std::string& stream, const Io& io, Tensor& target);
  Status add_call(const std::string& graph, std::int64_t first, std::int64_t count, Tensors values,
                  const std::optional<std::string>& tapped,
                  std::optional<std::int64_t> place = std::nullopt);
  Status keep(const std::string& stream, std::int64_t place, const Io& io, Tensor& target);

  Model* model_ = nullptr;
  std::size_t expert_ = 0;
  Dims dims_;
  BufferSet buffers_;
  std::vector<std::string> cached_;
  Tensors prompt_, values_, first_;
  std::unique_ptr<BlockTables> tables_;  // those that see the prompt
  bool is_modulated_ = false;
  std::int64_t row_ = -1;
  std::map<std::string, Stream> streams_;
  std::set<std::pair<std::string, std::int64_t>> wanted_;  // streams that later stages read, as a
  std::map<std::pair<std::string, std::int64_t>, Tensor> kept_;  // block at that place leaves them
  std::int64_t blocks_before_ = 0;                               // blocks of earlier stages
  std::vector<std::unique_ptr<BoundCall>> prompt_calls_, tapped_;
  std::vector<Call> calls_;
  std::size_t tapped_at_ = 0;
  std::string tapped_graph_;
  std::vector<Tensor> taps_;
  std::optional<Sections> sections_;
  Tensors before_, after_;
  std::set<std::size_t> rebound_;  // calls bound otherwise than undivided
  BufferSet section_buffers_;
};

}  // namespace freewheel
