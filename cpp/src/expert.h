// SPDX-License-Identifier: Apache-2.0
#pragma once

/// One transformer of a bundle with buffers and caches of its own: runs the steps of its branches.

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "body.h"
#include "branch_cache.h"
#include "cancellation.h"
#include "freewheel/model.h"
#include "freewheel/session.h"
#include "freewheel/statistics.h"
#include "pacer.h"
#include "timesteps.h"

namespace freewheel {

/// The status of a run that made values that are not finite.
/// @param where Segment, or branch and step.
Status not_finite(const std::string& where);

/// Most bundles have one. Nothing is shared between two but the model, so no cache of one is ever
/// used by the other.
class Expert {
 public:
  /// @param index Of the manifest's experts; whose weights it runs.
  /// @param statistics Gets what each step did; outlives the expert.
  /// @param cancellation Asked between engine calls; outlives the expert.
  static Result<std::unique_ptr<Expert>> create(Model& model, std::size_t index,
                                                RunStatistics& statistics,
                                                const Cancellation& cancellation);

  /// Starts a run over those timesteps that it denoises, maybe none: forgets all state.
  /// @param first Step of the whole run that its first one is.
  Status begin(Schedule schedule, std::int64_t first, const CacheSetting& setting);

  Status set_prompt(const std::string& branch, const Tensors& states);
  Status prepare(const NamedTensor* inputs, std::size_t count);

  /// Runs one step of one branch.
  /// @param step_index Of its own steps; the session has checked their order. A branch that left
  /// steps out computes.
  Result<Tensor> step(std::string_view branch, std::int64_t step_index, const NamedTensor* inputs,
                      std::size_t count);

  /// What a branch's last step gave: latents -> model output; null where it ran none in this run.
  const Tensors* outputs(std::string_view branch) const noexcept;

  /// Steps of the current run.
  std::int64_t steps() const noexcept { return schedule_.steps(); }

  /// Its step that `branch` ran last in this run, or -1.
  std::int64_t last_step(std::string_view branch) const noexcept;

 private:
  /// A branch's prompt, and what is bound for it once shapes are known.
  struct Branch {
    std::string name;
    std::vector<Buffer> prompt_buffers;
    Tensors prompt;  // host, of the declared dtypes
    BufferSet output_buffers;
    Tensors outputs;      // latents -> the model output for them
    Tensor model_output;  // for the first
    std::unique_ptr<Body> body;
    std::unique_ptr<BranchCache> cache;
    std::unique_ptr<BoundCall> head, finish;
    std::int64_t last_step = -1;

    void unbind() {
      cache.reset();
      head.reset();
      finish.reset();
      body.reset();
      outputs.clear();
      output_buffers = {};
    }
  };

  /// The current row of one per-run table.
  struct Row {
    std::string name;
    Tensor row, table;
  };

  /// A per-step input and the buffer that engines read it from.
  struct StepInput {
    std::string name;
    const InputEntry* entry;
    Tensor buffer;
  };

  Expert(Model& model, std::size_t index, RunStatistics& statistics,
         const Cancellation& cancellation)
      : model_(model), index_(index), statistics_(statistics), cancellation_(cancellation) {}

  const Manifest& manifest() const { return model_.manifest(); }
  Result<std::unique_ptr<BoundCall>> bind(const std::string& graph, const Tensors& values) {
    return model_.bind(graph, values, 0, index_);
  }
  Status initialise();
  Status compute_tables();
  Status select_row(Branch& branch, std::int64_t step_index);
  Status place(const NamedTensor* inputs, std::size_t count);
  Status allocate(const NamedTensor* inputs, std::size_t count);
  Result<Branch*> ready_branch(std::string_view name);
  Status bind_branch(Branch& branch);
  Status check_finite(const Branch& branch, bool computed) const noexcept;
  Result<DecisionRecord> decide(Branch& branch, std::int64_t step_index) noexcept;
  BranchStatistics& statistics_of(const Branch& branch);

  Model& model_;
  std::size_t index_;
  RunStatistics& statistics_;
  const Cancellation& cancellation_;
  CacheSetting setting_;
  Schedule schedule_;  // of the current run
  Pacer pacer_;
  Pace pace_;  // before the step that some branch began last
  std::int64_t first_ = 0;
  TimestepInputs timesteps_;  // that the tables are of
  BufferSet table_buffers_, row_buffers_, shared_buffers_;
  Tensors tables_, rows_views_, shared_;
  Tensors begun_;                              // cached streams, as `head` begins them
  std::unique_ptr<BlockTables> block_tables_;  // those that see no prompt
  std::vector<Row> rows_;
  std::int64_t row_ = -1;
  bool is_one_decision_ = false;
  std::int64_t shared_step_ =
      -1;  // that all branches share a decision about; its mix lies with the
  DecisionRecord shared_decision_;  // branch that decided, until that one decides again
  std::vector<StepInput> step_inputs_;
  Dims dims_;
  std::vector<std::unique_ptr<Branch>> branches_;
};

}  // namespace freewheel
