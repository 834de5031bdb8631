// SPDX-License-Identifier: Apache-2.0
#include "block_tables.h"

#include "try.h"

namespace freewheel {

Result<std::unique_ptr<BlockTables>> BlockTables::create(Model& model, std::size_t expert,
                                                         const Dims& dims, bool by_prompt) {
  auto made = std::make_unique<BlockTables>();
  made->model_ = &model;
  made->expert_ = expert;
  const Manifest& manifest = model.manifest();
  const auto batch = dims.find("batch");
  if (by_prompt && batch != dims.end()) made->batch_ = batch->second;
  for (std::size_t index = 0; index < manifest.stages.size(); ++index) {
    const StageEntry& stage = manifest.stages[index];
    if (!stage.modulation || manifest.reads_prompt(*stage.modulation) != by_prompt) continue;
    const auto& read = manifest.graphs.at(stage.block).inputs;
    for (std::int64_t block = stage.first; block < stage.first + stage.count; ++block) {
      Tensors& rows = made->blocks_[{index, block}].rows;
      for (const auto& [name, table] : manifest.graphs.at(*stage.modulation).outputs) {
        FREEWHEEL_TRY(made->row_buffers_.allocate(model.memory(), name, read.at(name), dims, rows));
      }
    }
  }
  return made;
}

/// A value as the graphs take it: a table's rows once for each element of the batch, the prompt's
/// once for each step.
Result<Tensor> BlockTables::whole(const std::string& value, const Tensors& tables,
                                  std::int64_t steps, const Tensors& prompt, BufferSet& buffers) {
  const auto table = tables.find(value);
  if (table != tables.end() && batch_ == 1) return table->second;
  const Tensor& source = table != tables.end() ? table->second : prompt.at(value);
  if (source.shape.rank() == 0 || source.shape[0] < 1) {
    return Status(Code::kBundle, "value '" + value + "'",
                  "has no rows, of which blocks make tables", "build the bundle again");
  }
  const std::int64_t pieces = table != tables.end() ? source.shape[0] : 1;
  const std::int64_t times = table != tables.end() ? batch_ : steps;
  Io io;
  io.dtype = source.dtype;
  io.shape.assign(source.shape.begin(), source.shape.end());
  io.shape[0] = source.shape[0] * times;
  Tensors made;
  FREEWHEEL_TRY(buffers.allocate(model_->memory(), value, io, {}, made));
  const std::size_t bytes = source.bytes() / static_cast<std::size_t>(pieces);
  auto* target = made.at(value).as<std::uint8_t>();
  for (std::int64_t piece = 0; piece < pieces; ++piece) {
    const auto* from = source.as<std::uint8_t>() + static_cast<std::size_t>(piece) * bytes;
    for (std::int64_t time = 0; time < times; ++time, target += bytes) {
      FREEWHEEL_TRY(model_->memory().copy(target, from, bytes));
    }
  }
  return made.at(value);
}

Status BlockTables::compute(const Tensors& tables, std::int64_t steps, const Tensors& prompt) {
  table_buffers_ = {};
  for (auto& [place, block] : blocks_) block.tables.clear();
  BufferSet expanded;  // until every graph has run
  Tensors known;
  for (auto& [place, block] : blocks_) {
    const StageEntry& stage = model_->manifest().stages[place.first];
    Tensors values;
    for (const auto& [name, io] : model_->manifest().graphs.at(*stage.modulation).inputs) {
      const auto own = stage.reads.find(name);
      const std::string& value =
          own == stage.reads.end()
              ? name
              : own->second[static_cast<std::size_t>(place.second - stage.first)];
      if (known.count(value) == 0) {
        FREEWHEEL_ASSIGN(known[value], whole(value, tables, steps, prompt, expanded));
      }
      values[name] = known.at(value);
    }
    FREEWHEEL_TRY(compute_block(stage, place.second, values, block));
    for (const auto& [name, row] : block.rows) {
      if (block.tables.at(name).bytes() != row.bytes() * static_cast<std::size_t>(steps)) {
        return Status(Code::kBundle, "graph '" + *stage.modulation + "', output '" + name + "'",
                      "has rows of another size than graph '" + stage.block + "' takes",
                      "build the bundle again");
      }
    }
  }
  return model_->memory().synchronize();
}

Status BlockTables::compute_block(const StageEntry& stage, std::int64_t block,
                                  const Tensors& values, Block& made) {
  const std::int64_t rows = values.begin()->second.shape[0];
  const auto& outputs = model_->manifest().graphs.at(*stage.modulation).outputs;
  FREEWHEEL_TRY(table_buffers_.allocate(model_->memory(), outputs, {{"steps", rows}}, made.tables));
  Tensors bound = values;
  for (const auto& [name, table] : made.tables) bound[name] = table;
  FREEWHEEL_ASSIGN(const std::unique_ptr<BoundCall> call,
                   model_->bind(*stage.modulation, bound, block, expert_));
  FREEWHEEL_TRY(call->run());
  return model_->memory().synchronize();  // the call may not go while it is enqueued
}

Status BlockTables::select(std::int64_t step_index) noexcept {
  for (auto& [place, block] : blocks_) {
    for (const auto& [name, row] : block.rows) {
      const std::size_t bytes = row.bytes();
      const auto* source =
          block.tables.at(name).as<std::uint8_t>() + static_cast<std::size_t>(step_index) * bytes;
      FREEWHEEL_TRY(model_->memory().copy(row.data, source, bytes));
    }
  }
  return {};
}

const Tensors& BlockTables::rows(std::size_t stage, std::int64_t block) const {
  static const Tensors kNone;
  const auto found = blocks_.find({stage, block});
  return found == blocks_.end() ? kNone : found->second.rows;
}

}  // namespace freewheel
