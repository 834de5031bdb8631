// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Tables that blocks make of the timesteps with weights of their own, once per run for all steps.

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "buffer_set.h"
#include "freewheel/model.h"

namespace freewheel {

/// What the stages' `modulation` graphs make, and the current step's row of it. A graph that reads
/// the timesteps' tables alone makes the same in each branch: one object serves all. Where it reads
/// the prompt too, each branch has an object, and a table a row for each step and element of the
/// batch.
class BlockTables {
 public:
  /// @param expert Whose weights.
  /// @param dims Sizes of the rows' named dimensions.
  /// @param by_prompt Whether to serve the graphs that read the prompt, or those that do not.
  static Result<std::unique_ptr<BlockTables>> create(Model& model, std::size_t expert,
                                                     const Dims& dims, bool by_prompt);

  /// Runs every block's graph with all steps in one batch.
  /// @param tables The run's tables, [steps, …].
  /// @param prompt The prompt's inputs and what `prompt` made of them, [batch, …].
  Status compute(const Tensors& tables, std::int64_t steps, const Tensors& prompt);

  /// Puts a step's rows where the bound calls read them.
  Status select(std::int64_t step_index) noexcept;

  /// The rows that a block of a stage reads, by its graph's inputs; empty where it reads none.
  const Tensors& rows(std::size_t stage, std::int64_t block) const;

 private:
  /// A block's rows, and the tables that they are of.
  struct Block {
    Tensors rows, tables;
  };

  Result<Tensor> whole(const std::string& value, const Tensors& tables, std::int64_t steps,
                       const Tensors& prompt, BufferSet& buffers);
  Status compute_block(const StageEntry& stage, std::int64_t block, const Tensors& values,
                       Block& made);

  Model* model_ = nullptr;
  std::size_t expert_ = 0;
  std::int64_t batch_ = 1;
  BufferSet row_buffers_, table_buffers_;
  std::map<std::pair<std::size_t, std::int64_t>, Block> blocks_;  // by stage and block
};

}  // namespace freewheel
