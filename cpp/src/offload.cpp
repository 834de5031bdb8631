// SPDX-License-Identifier: Apache-2.0
#include "offload.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "try.h"

namespace freewheel {
namespace {

constexpr std::size_t kSlabs = 2;
constexpr std::size_t kAlignment = 256;  // of every address that an engine is given

}  // namespace

/// One block's weights in host memory, in one piece and locked, so that one copy moves all of them.
class HostBlock {
 public:
  explicit HostBlock(Memory& memory) : memory_(memory) {}
  HostBlock(const HostBlock&) = delete;
  HostBlock& operator=(const HostBlock&) = delete;
  ~HostBlock() {
    if (is_locked_) memory_.unlock(piece_.view().data);
  }

  Status fill(const std::map<std::string, Tensor>& tensors) {
    std::size_t bytes = 0;
    for (const auto& [name, tensor] : tensors) {
      places_[name] = {bytes, tensor};
      bytes += (tensor.bytes() + kAlignment - 1) / kAlignment * kAlignment;
    }
    FREEWHEEL_ASSIGN(piece_, Buffer::create(host_memory(), DType::kUint8,
                                            Shape{static_cast<std::int64_t>(bytes)}));
    FREEWHEEL_TRY(memory_.lock(piece_.view().data, bytes));
    is_locked_ = true;
    for (const auto& [name, place] : places_) {
      std::memcpy(piece_.view().as<char>() + place.offset, place.tensor.data, place.tensor.bytes());
    }
    return {};
  }

  const void* data() const noexcept { return piece_.view().data; }
  std::size_t bytes() const noexcept { return piece_.view().bytes(); }

  /// A weight as it lies in a slab that the block was copied to.
  Tensor view(const std::string& name, void* slab) const {
    const Place& place = places_.at(name);
    return {static_cast<char*>(slab) + place.offset, place.tensor.dtype, place.tensor.shape};
  }

 private:
  struct Place {
    std::size_t offset = 0;
    Tensor tensor;
  };

  Memory& memory_;
  Buffer piece_;
  bool is_locked_ = false;
  std::map<std::string, Place> places_;
};

/// Blocks of equal weights in the order in which they were bound, and the slabs that they take in
/// turn.
class OffloadedWeights::Lane {
 public:
  explicit Lane(Memory& memory) : memory_(memory) {}

  std::mutex mutex;

  bool has(std::int64_t block) const { return turns_.count(block) != 0; }

  /// Takes a block's weights.
  Status add(std::int64_t block, std::shared_ptr<HostBlock> stored) {
    if (slabs_.size() < kSlabs) {
      FREEWHEEL_ASSIGN(std::unique_ptr<Slab> slab, memory_.slab(stored->bytes()));
      slabs_.push_back({std::move(slab), -1});
    }
    turns_[block] = static_cast<std::int64_t>(blocks_.size());
    blocks_.push_back(std::move(stored));
    return {};
  }

  Tensor weight(std::int64_t block, const std::string& pattern) {
    const std::int64_t turn = turns_.at(block);
    return blocks_[static_cast<std::size_t>(turn)]->view(pattern, held_in(turn).slab->data());
  }

  /// Has a block's weights in place before what the engines' stream is given next.
  Status take(std::int64_t block) noexcept {
    const std::int64_t turn = turns_.at(block);
    FREEWHEEL_TRY(fetch(turn));
    return held_in(turn).slab->take();
  }

  /// Notes that the block is enqueued, and fetches the next one's weights meanwhile.
  Status release(std::int64_t block) noexcept {
    const std::int64_t turn = turns_.at(block);
    FREEWHEEL_TRY(held_in(turn).slab->release());
    return fetch((turn + 1) % static_cast<std::int64_t>(blocks_.size()));
  }

 private:
  struct Held {
    std::unique_ptr<Slab> slab;
    std::int64_t turn = -1;  ///< Whose weights it holds; -1 for none.
  };

  Held& held_in(std::int64_t turn) { return slabs_[static_cast<std::size_t>(turn) % kSlabs]; }

  Status fetch(std::int64_t turn) noexcept {
    Held& held = held_in(turn);
    if (held.turn == turn) return {};
    const HostBlock& block = *blocks_[static_cast<std::size_t>(turn)];
    FREEWHEEL_TRY(held.slab->fetch(block.data(), block.bytes()));
    held.turn = turn;
    return {};
  }

  Memory& memory_;
  std::map<std::int64_t, std::int64_t> turns_;  ///< Block → its place in the order.
  std::vector<std::shared_ptr<HostBlock>> blocks_;
  std::vector<Held> slabs_;  ///< Destroyed first: a copy out of a block may be under way.
};

/// A bound block whose weights arrive before it runs.
class OffloadedCall final : public BoundCall {
 public:
  OffloadedCall(OffloadedWeights::Lane& lane, std::int64_t block, std::unique_ptr<BoundCall> bound)
      : lane_(lane), block_(block), bound_(std::move(bound)) {}

  Status run() noexcept override {
    const std::lock_guard<std::mutex> lock(lane_.mutex);
    FREEWHEEL_TRY(lane_.take(block_));
    FREEWHEEL_TRY(bound_->run());
    return lane_.release(block_);
  }

 private:
  OffloadedWeights::Lane& lane_;
  std::int64_t block_;
  std::unique_ptr<BoundCall> bound_;
};

OffloadedWeights::OffloadedWeights(Memory& memory, Read read, IsChanged is_changed,
                                   OffloadedWeights* base)
    : memory_(memory), read_(std::move(read)), is_changed_(std::move(is_changed)), base_(base) {}

OffloadedWeights::~OffloadedWeights() = default;

Result<std::shared_ptr<HostBlock>> OffloadedWeights::host_block(
    const std::map<std::string, std::string>& weights) {
  const bool is_bundles = std::none_of(weights.begin(), weights.end(), [&](const auto& weight) {
    return is_changed_(weight.second);
  });
  if (is_bundles && base_ != nullptr) return base_->host_block(weights);
  const std::lock_guard<std::mutex> lock(blocks_mutex_);
  std::shared_ptr<HostBlock> found = blocks_[weights].lock();
  if (found != nullptr) return found;
  std::map<std::string, Tensor> tensors;
  for (const auto& [pattern, name] : weights) {
    FREEWHEEL_ASSIGN(tensors[pattern], read_(name));
  }
  found = std::make_shared<HostBlock>(memory_);
  FREEWHEEL_TRY(found->fill(tensors));
  blocks_[weights] = found;
  return found;
}

Result<std::unique_ptr<BoundCall>> OffloadedWeights::bind(
    Engine& engine, Tensors bindings, const std::map<std::string, std::string>& patterns,
    const std::map<std::string, std::string>& weights, std::int64_t block) {
  std::set<std::string> key;
  std::map<std::string, std::string> names;  // pattern → tensor
  for (const auto& [input, pattern] : patterns) {
    names[pattern] = weights.at(input);
    FREEWHEEL_ASSIGN(const Tensor weight, read_(names[pattern]));
    key.insert(pattern + " " + weight.shape.text());
  }
  Lane* lane = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::unique_ptr<Lane>& known = lanes_[key];
    if (known == nullptr) known = std::make_unique<Lane>(memory_);
    lane = known.get();
  }
  const std::lock_guard<std::mutex> lock(lane->mutex);
  if (!lane->has(block)) {
    FREEWHEEL_ASSIGN(std::shared_ptr<HostBlock> stored, host_block(names));
    FREEWHEEL_TRY(lane->add(block, std::move(stored)));
  }
  for (const auto& [input, pattern] : patterns) bindings[input] = lane->weight(block, pattern);
  FREEWHEEL_ASSIGN(std::unique_ptr<BoundCall> bound, engine.bind(bindings));
  return std::unique_ptr<BoundCall>(
      std::make_unique<OffloadedCall>(*lane, block, std::move(bound)));
}

}  // namespace freewheel
