// SPDX-License-Identifier: Apache-2.0
#pragma once

/// The cache of one branch: residual history, signals, and the compiled policy that reads them.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "body.h"
#include "decider.h"
#include "freewheel/model.h"
#include "resolved_setting.h"
#include "ring.h"
#include "signal_buffers.h"

namespace freewheel {

/// Everything one branch remembers between steps of a run.
class BranchCache {
 public:
  /// Allocates history, signal and feature buffers; binds `delta`, `reuse` and the policy.
  static Result<std::unique_ptr<BranchCache>> create(Model& model, const ResolvedSetting& resolved,
                                                     Body& body, const Tensors& shared,
                                                     const Dims& dims);

  /// Forgets the last run; takes every decision of the coming one now, if they fold.
  /// @param tables Per-run tables in the backend's memory, valid during the run.
  /// @param schedule Likewise.
  Status reset(const Tensors& tables, const Schedule& schedule);

  /// Forgets what came before a gap: the branch computes at step `first` and caches from there.
  Status rejoin(std::int64_t first);

  /// Computes in place of a decision that mixes more residuals than are held: a table of mixes, or
  /// another branch's decision, knows nothing of this branch's gaps.
  DecisionRecord affordable(DecisionRecord decision) const noexcept;

  /// Decides about the coming step; `hidden` holds its input already. A policy that looks at what
  /// the first blocks add runs them for it.
  Result<DecisionRecord> decide(std::int64_t step_index, const Pace& pace,
                                const Cancellation& cancellation) noexcept;

  /// Runs what the decision left of the body; writes the residual to the ring's next slot, for
  /// `keep`.
  Status compute(std::int64_t step_index, const Cancellation& cancellation) noexcept;

  /// Whether what `compute` wrote and `keep` has not taken yet is finite, of every stream.
  bool is_computed_finite() const noexcept { return depth_ == 0 || ring_.is_next_finite(); }

  /// Takes the residual that `compute` wrote into the history.
  Status keep() noexcept;

  /// Takes what `finish` gave after a computation, where the policy looks at it.
  Status keep_output(const Tensor& model_output) noexcept;

  /// Writes hidden states as the mix of past residuals has them; runs what follows at every step.
  Status reuse(const DecisionRecord& decision, const Cancellation& cancellation) noexcept;

  std::int64_t depth() const noexcept { return depth_; }

 private:
  using Calls = std::vector<std::unique_ptr<BoundCall>>;

  Status find_signal_graph();
  Status bind_history(const Sections* sections, const Tensors& shared);
  Status bind_gram();
  Status bind_signal(const Tensors& shared, const Dims& dims);
  Status bind_feature(const Dims& dims);
  std::vector<Tensors> arrangements();
  Status forget();
  Result<DecisionRecord> ask(std::int64_t step_index, const Pace& pace,
                             const Cancellation& cancellation) noexcept;
  Status take_signal(std::int64_t step_index, const Cancellation& cancellation) noexcept;
  void note_computed(std::int64_t step_index) noexcept;
  bool is_tapped() const noexcept { return spec_->wants_feature && !spec_->wants_model_output; }
  /// Which of the two features is the last computed step's, and which the next one's.
  int last_feature() const noexcept { return static_cast<int>((computed_count_ + 1) % 2); }
  int next_tap() const noexcept { return is_tapped() ? static_cast<int>(computed_count_ % 2) : -1; }

  Model* model_ = nullptr;
  Body* body_ = nullptr;
  const PolicySpec* spec_ = nullptr;
  const SignalEntry* signal_ = nullptr;
  bool is_folded_ = false;
  std::int64_t depth_ = 0;
  const Schedule* schedule_ = nullptr;
  std::int64_t first_ = 0;  // step of the first folded decision
  BufferSet buffers_;
  ResidualRing ring_;
  std::vector<Calls>
      deltas_;  // by slot: of the streams that begin ahead of blocks, then of each other
  Calls reuse_;
  Tensor factors_, gram_;  // of all slots, where the policy keeps it
  std::vector<float> host_factors_;
  std::unique_ptr<BoundCall> gram_call_;
  std::string signal_graph_;     // empty where the signal is copied from a table or an input
  bool is_divided_ = false;      // the signal is what the first blocks add
  std::vector<Tensor> signals_;  // flattened to [rows, width]
  SignalBuffers roles_;
  std::vector<std::unique_ptr<BoundCall>> signal_calls_;
  std::vector<Tensor> features_;  // two, or none
  std::unique_ptr<Decider> decider_;
  std::vector<std::size_t> arrangement_of_;   // by stand of the signals
  Tensor source_;                             // of a copied signal: this step's, or the run's table
  std::vector<std::int64_t> computed_steps_;  // newest first, `depth_` of them at most
  std::int64_t computed_count_ = 0;
  std::vector<DecisionRecord> folded_;
  std::vector<float> folded_mix_;
};

}  // namespace freewheel
