// The transitions of BlockMap, each checked for its source state, and the conservation laws.
#include "pie/block_map.hpp"

#include <algorithm>

#include "pie/error.hpp"

namespace pie {

BlockMap::BlockMap(std::uint32_t layers, std::uint32_t device_frames, std::uint32_t pool_frames)
    : layers_(layers),
      device_(device_frames, device_frames),
      pool_(pool_frames, 0),
      owners_(device_frames) {}

Sequence& BlockMap::add() {
  const std::uint64_t id = next_id_++;
  Sequence& sequence = sequences_[id];
  sequence.id = id;
  sequence.layers.resize(layers_);
  return sequence;
}

void BlockMap::remove(Sequence& sequence) {
  for (LayerBlocks& layer : sequence.layers) {
    require(layer.blocks.empty(), "BlockMap::remove: the sequence still has blocks.");
    release_extent(layer);
  }
  sequences_.erase(sequence.id);
}

Sequence* BlockMap::find(std::uint64_t id) {
  const auto it = sequences_.find(id);
  return it == sequences_.end() ? nullptr : &it->second;
}

const Sequence* BlockMap::find(std::uint64_t id) const {
  const auto it = sequences_.find(id);
  return it == sequences_.end() ? nullptr : &it->second;
}

void BlockMap::set_state(Block& block, BlockState state) {
  if (block.state != BlockState::empty) --counts_[static_cast<std::size_t>(block.state)];
  if (state != BlockState::empty) ++counts_[static_cast<std::size_t>(state)];
  block.state = state;
}

void BlockMap::leave_device(Block& block) {
  if (block.device == no_frame) return;
  owners_[block.device] = {};
  device_.release(block.device);
  block.device = no_frame;
  if (block.ring) --ring_;
  block.ring = false;
}

void BlockMap::leave_pool(Block& block) {
  if (block.pool == no_frame) return;
  pool_.release(block.pool);
  block.pool = no_frame;
}

void BlockMap::place(const BlockKey& key, FrameIndex device) {
  Block& block = at(key);
  require(block.state == BlockState::empty, "BlockMap::place: the block has a frame already.");
  block.device = device;
  owners_[device] = key;
  set_state(block, BlockState::dirty);
}

void BlockMap::begin_write(const BlockKey& key, FrameIndex pool) {
  Block& block = at(key);
  require(block.state == BlockState::dirty, "BlockMap::begin_write: the block is not dirty.");
  block.pool = pool;
  set_state(block, BlockState::writing);
}

void BlockMap::commit_write(const BlockKey& key) {
  Block& block = at(key);
  require(block.state == BlockState::writing, "BlockMap::commit_write: no write is in flight.");
  set_state(block, BlockState::clean);
}

void BlockMap::fail_write(const BlockKey& key) {
  Block& block = at(key);
  require(block.state == BlockState::writing, "BlockMap::fail_write: no write is in flight.");
  leave_pool(block);
  set_state(block, BlockState::dirty);
}

void BlockMap::evict(const BlockKey& key) {
  Block& block = at(key);
  require(block.state == BlockState::clean, "BlockMap::evict: the block has no committed copy.");
  leave_device(block);
  set_state(block, BlockState::pooled);
}

void BlockMap::begin_load(const BlockKey& key, FrameIndex device, bool ring) {
  Block& block = at(key);
  require(block.state == BlockState::pooled, "BlockMap::begin_load: the block is not in the pool.");
  block.device = device;
  block.ring = ring;
  if (ring) ++ring_;
  owners_[device] = key;
  set_state(block, BlockState::loading);
}

void BlockMap::commit_load(const BlockKey& key) {
  Block& block = at(key);
  require(block.state == BlockState::loading, "BlockMap::commit_load: no load is in flight.");
  set_state(block, BlockState::clean);
}

void BlockMap::fail_load(const BlockKey& key) {
  Block& block = at(key);
  require(block.state == BlockState::loading, "BlockMap::fail_load: no load is in flight.");
  leave_device(block);
  set_state(block, BlockState::pooled);
}

void BlockMap::soil(const BlockKey& key) {
  Block& block = at(key);
  if (block.state == BlockState::dirty) return;
  require(block.state == BlockState::clean, "BlockMap::soil: the block is not on the device.");
  leave_pool(block);
  keep(key);
  set_state(block, BlockState::dirty);
}

void BlockMap::keep(const BlockKey& key) {
  Block& block = at(key);
  if (block.ring) --ring_;
  block.ring = false;
}

void BlockMap::relocate(const BlockKey& key, FrameIndex device) {
  Block& block = at(key);
  require(block.present() && !block.in_flight(), "BlockMap::relocate: the block cannot move now.");
  owners_[block.device] = {};
  device_.release(block.device);
  block.device = device;
  owners_[device] = key;
}

void BlockMap::drop(const BlockKey& key) {
  Block& block = at(key);
  require(!block.in_flight(), "BlockMap::drop: a transfer of the block is in flight.");
  leave_device(block);
  leave_pool(block);
  set_state(block, BlockState::empty);
}

FrameIndex BlockMap::take_pool_frame(LayerBlocks& layer, std::uint32_t needed,
                                     std::uint32_t extent_frames_max) {
  if (layer.extent.count == 0) {
    // Extents grow with the layer's length, so short sequences waste little and long ones lie in
    // few pieces.
    const std::uint32_t half = static_cast<std::uint32_t>(layer.blocks.size()) / 2;
    const std::uint32_t want = std::clamp(std::max(needed, half), 1U, extent_frames_max);
    layer.extent = pool_.acquire_run(want);
    if (layer.extent.count == 0) return no_frame;
    set_aside_ += layer.extent.count;
  }
  const FrameIndex frame = layer.extent.first++;
  --layer.extent.count;
  --set_aside_;
  return frame;
}

void BlockMap::release_extent(LayerBlocks& layer) {
  pool_.release(layer.extent);
  set_aside_ -= layer.extent.count;
  layer.extent = {};
}

std::uint32_t BlockMap::release_extents() {
  const std::uint32_t freed = set_aside_;
  for (auto& [id, sequence] : sequences_) {
    for (LayerBlocks& layer : sequence.layers) release_extent(layer);
  }
  return freed;
}

void BlockMap::check_block(const BlockKey& key, const Block& block,
                           std::vector<bool>& pool_seen) const {
  const bool on_device = block.present() || block.state == BlockState::loading;
  const bool in_pool = block.state != BlockState::dirty && block.state != BlockState::empty;
  require(block.state != BlockState::empty, "check: a block inside a sequence is empty.");
  require(on_device == (block.device != no_frame),
          "check: a block's device frame and state differ.");
  require(in_pool == (block.pool != no_frame), "check: a block's pool frame and state differ.");
  if (on_device) {
    const BlockKey owner = owners_[block.device];
    require(owner.sequence == key.sequence && owner.layer == key.layer && owner.block == key.block,
            "check: a device frame has two owners.");
    require(!device_.is_free(block.device), "check: a device frame in use is marked free.");
  }
  if (in_pool) {
    require(!pool_seen[block.pool], "check: a pool frame has two owners.");
    require(!pool_.is_free(block.pool), "check: a pool frame in use is marked free.");
    pool_seen[block.pool] = true;
  }
  require(!block.ring || block.state == BlockState::loading || block.state == BlockState::clean,
          "check: a ring frame holds a block that was not loaded.");
}

void BlockMap::check() const {
  device_.check();
  pool_.check();
  std::array<std::uint32_t, block_states> counts{};
  std::uint32_t ring = 0;
  std::uint32_t set_aside = 0;
  std::vector<bool> pool_seen(pool_.capacity());
  for (const auto& [id, sequence] : sequences_) {
    for (std::uint32_t layer = 0; layer < layers_; ++layer) {
      const LayerBlocks& blocks = sequence.layers[layer];
      set_aside += blocks.extent.count;
      for (std::uint32_t index = 0; index < blocks.blocks.size(); ++index) {
        const Block& block = blocks.blocks[index];
        check_block({const_cast<Sequence*>(&sequence), layer, index}, block, pool_seen);
        ++counts[static_cast<std::size_t>(block.state)];
        ring += block.ring ? 1 : 0;
      }
    }
  }
  require(counts == counts_, "check: the counts of blocks by state are wrong.");
  require(ring == ring_, "check: the count of ring frames is wrong.");
  require(set_aside == set_aside_, "check: the count of pool frames set aside is wrong.");
  const std::uint32_t on_device = count(BlockState::dirty) + count(BlockState::writing) +
                                  count(BlockState::clean) + count(BlockState::loading);
  require(on_device == device_.used(), "check: device frames in use and blocks there differ.");
  const std::uint32_t in_pool = count(BlockState::writing) + count(BlockState::clean) +
                                count(BlockState::pooled) + count(BlockState::loading);
  require(in_pool + set_aside == pool_.used(),
          "check: pool frames in use and blocks there differ.");
}

}  // namespace pie
