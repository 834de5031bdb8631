// SPDX-License-Identifier: Apache-2.0
#include "sections.h"

#include <algorithm>
#include <set>

#include "streams.h"
#include "try.h"

namespace freewheel {
namespace {

using Blocks = std::vector<const GraphEntry*>;

bool writes(const GraphEntry& block, const std::string& stream) {
  return block.outputs.count(stream + kOut) != 0;
}

/// The streams but `hidden` that calls from `end` on read as those before left them.
std::vector<std::string> read_behind(const Blocks& blocks, std::size_t end) {
  std::set<std::string> streams, written = {"hidden"};
  for (const GraphEntry* block : blocks) {
    for (const auto& [name, io] : block->outputs) {
      if (const std::string stream = stream_of(name); !stream.empty()) streams.insert(stream);
    }
  }
  std::vector<std::string> found;
  for (std::size_t at = end; at < blocks.size(); ++at) {
    for (const auto& [name, io] : blocks[at]->inputs) {
      const bool is_known = std::find(found.begin(), found.end(), name) != found.end();
      if (streams.count(name) != 0 && written.count(name) == 0 && !is_known) found.push_back(name);
    }
    for (const auto& [name, io] : blocks[at]->outputs) written.insert(stream_of(name));
  }
  return found;
}

/// Refuses last blocks to which a skip connection leads from one that is cached.
Status check_skips(const Manifest& manifest, const Sections& found, const std::string& where) {
  std::size_t place = 0;
  for (const StageEntry& stage : manifest.stages) {
    for (const auto& [name, skip] : stage.skips) {
      for (std::size_t i = 0; i < skip.blocks.size(); ++i) {
        const auto maker = static_cast<std::size_t>(skip.blocks[i]);
        if (place + i < found.end || maker < found.begin || maker >= found.end) continue;
        return Status(Code::kConfig, where,
                      "don't fit: block " + std::to_string(place + i) +
                          " of the loop reads what block " + std::to_string(maker) +
                          " left, which a reused step does not run",
                      "let fewer last blocks run, or as many first ones");
      }
    }
    place += static_cast<std::size_t>(stage.count);
  }
  return {};
}

/// Refuses a stream that is another thing behind the cached blocks than before them.
Status check_stream(const std::string& stream, const Blocks& blocks, const Sections& found,
                    const std::string& where) {
  const Io *begun = nullptr, *last = nullptr;
  bool is_begun = false;
  for (std::size_t at = 0; at < found.end; ++at) {
    if (!writes(*blocks[at], stream)) continue;
    const auto input = blocks[at]->inputs.find(stream);
    const Io& output = blocks[at]->outputs.at(stream + kOut);
    if (at < found.begin) {
      begun = &output;
    } else if (!is_begun && begun == nullptr && input != blocks[at]->inputs.end()) {
      begun = &input->second;
    }
    is_begun = true;
    last = &output;
  }
  if (begun != nullptr && last != nullptr && begun->dtype == last->dtype &&
      begun->shape == last->shape) {
    return {};
  }
  return Status(Code::kConfig, where,
                "don't fit: the last ones read stream '" + stream +
                    "', which begins among the cached ones, or changes its shape there",
                "let fewer last blocks run");
}

}  // namespace

Result<Sections> divide(const Manifest& manifest, std::int64_t first_blocks,
                        std::int64_t last_blocks) {
  Blocks blocks;
  std::vector<std::size_t> passing;
  for (const StageEntry& stage : manifest.stages) {
    const GraphEntry& block = manifest.graphs.at(stage.block);
    for (std::int64_t i = 0; i < stage.count; ++i) {
      if (writes(block, "hidden")) passing.push_back(blocks.size());
      blocks.push_back(&block);
    }
  }
  const std::string where = std::to_string(first_blocks) + " first and " +
                            std::to_string(last_blocks) + " last blocks that always run";
  const auto count = static_cast<std::int64_t>(passing.size());
  if (first_blocks < 1 || last_blocks < 0 || first_blocks >= count ||
      last_blocks >= count - first_blocks) {
    return Status(Code::kConfig, where,
                  "leave none of the model's " + std::to_string(count) + " blocks to be cached",
                  "let at most " + std::to_string(count - 1) + " of them run");
  }
  const std::vector<std::string> cached = manifest.cached();
  Sections found{first_blocks, last_blocks, count, 0, blocks.size(), cached};
  found.begin = passing[static_cast<std::size_t>(first_blocks - 1)] + 1;
  if (last_blocks == 0) return found;
  found.end = passing[static_cast<std::size_t>(count - last_blocks)];
  FREEWHEEL_TRY(check_skips(manifest, found, where));
  for (const std::string& stream : read_behind(blocks, found.end)) {
    const bool is_changed =
        std::any_of(blocks.begin() + static_cast<std::ptrdiff_t>(found.begin),
                    blocks.begin() + static_cast<std::ptrdiff_t>(found.end),
                    [&](const GraphEntry* block) { return writes(*block, stream); });
    const bool is_cached = std::find(cached.begin(), cached.end(), stream) != cached.end();
    if (!is_changed || is_cached) continue;
    FREEWHEEL_TRY(check_stream(stream, blocks, found, where));
    if (manifest.graphs.count("delta." + stream) == 0 ||
        manifest.graphs.count("reuse." + stream) == 0) {
      return Status(Code::kConfig, where + ", stream '" + stream + "'",
                    "has no graphs that keep what cached blocks change of it, and the last blocks "
                    "read it",
                    "build the bundle again");
    }
    found.streams.push_back(stream);
  }
  return found;
}

}  // namespace freewheel
