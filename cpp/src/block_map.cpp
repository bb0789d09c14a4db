// The transitions of BlockMap, each checked for its source state, and the conservation laws.
#include "block_map.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

#include "pie/error.hpp"

namespace pie {

// ---- the blocks of a layer ----------------------------------------------------------------------

namespace {

// Adds a run, to those that it follows or goes before.
void add_to(std::vector<PoolRun>& runs, const PoolRun& run) {
  const auto next = std::ranges::upper_bound(runs, run.first_block, {}, &PoolRun::first_block);
  const bool before = next != runs.end() && next->is_at(run.end(), run.pool + run.count);
  if (next != runs.begin() && (next - 1)->ends_at(run.first_block, run.pool)) {
    (next - 1)->count += run.count + (before ? next->count : 0);
    if (before) runs.erase(next);
  } else if (before) {
    *next = {run.first_block, run.pool, run.count + next->count};
  } else {
    runs.insert(next, run);
  }
}

std::vector<PoolRun> runs_of(const std::vector<Block>& blocks) {
  std::vector<PoolRun> runs;
  for (std::uint32_t b = 0; b < blocks.size(); ++b) {
    if (blocks[b].pool != no_frame) add_to(runs, {b, blocks[b].pool, 1});
  }
  return runs;
}

}  // namespace

std::uint32_t LayerBlocks::pooled_end(std::uint32_t block, std::uint32_t end) {
  front = std::max(front, gone);
  const bool known = block >= gone && block <= front;
  std::uint32_t at = known ? front : block;
  while (at < end && blocks[at].state == BlockState::pooled) ++at;
  if (known) front = std::max(front, at);
  return std::max(block, std::min(at, end));
}

const PoolRun& LayerBlocks::run_at(std::uint32_t block) const {
  return *(std::ranges::upper_bound(runs, block, {}, &PoolRun::first_block) - 1);
}

std::uint32_t LayerBlocks::present_end(std::uint32_t block, std::uint32_t end) const {
  if (is_in_front(block)) return block;
  if (away == 0 && block >= gone) return std::max(block, end);
  const std::uint32_t ahead = std::max(front, gone);
  if (block >= ahead && away == ahead - gone) return std::max(block, end);
  while (block < end && blocks[block].present()) ++block;
  return block;
}

BlockMap::BlockMap(Geometry geometry, std::uint32_t device_frames, std::uint32_t pool_frames)
    : geometry_(std::move(geometry)),
      device_(device_frames, device_frames),
      pool_(pool_frames, 0),
      tables_(geometry_.layers),
      owners_(device_frames) {}

void BlockMap::resize_device(std::uint32_t frames) {
  owners_.reserve(frames);
  device_.resize(frames, frames);
  owners_.resize(frames);
}

// ---- sequences and branches ---------------------------------------------------------------------

Sequence& BlockMap::add() {
  tables_.reserve_row();
  Sequence& sequence = sequences_[next_id_];
  sequence.id = next_id_++;
  sequence.row = tables_.add_row();
  return sequence;
}

Sequence& BlockMap::fork(const Sequence& sequence) {
  for (Branch* branch : sequence.path) branch->users.reserve(branch->users.size() + 1);
  Sequence& twin = add();
  try {
    twin.path.reserve(sequence.path.size());
  } catch (...) {
    remove(twin);
    throw;
  }
  twin.tokens = sequence.tokens;
  for (Branch* branch : sequence.path) join(twin, *branch);
  return twin;
}

void BlockMap::remove(Sequence& sequence) {
  require(sequence.path.empty(), "BlockMap::remove: the sequence still has branches.");
  tables_.remove_row(sequence.row);
  sequences_.erase(sequence.id);
}

Sequence* BlockMap::find(SequenceId id) {
  const auto it = sequences_.find(id);
  return it == sequences_.end() ? nullptr : &it->second;
}

const Sequence* BlockMap::find(SequenceId id) const {
  const auto it = sequences_.find(id);
  return it == sequences_.end() ? nullptr : &it->second;
}

Branch& BlockMap::grow(std::uint32_t first) {
  Branch branch;
  branch.id = next_branch_;
  branch.first = first;
  branch.layers.resize(geometry_.layers);
  return branches_.emplace(next_branch_++, std::move(branch)).first->second;
}

void BlockMap::remove(Branch& branch) {
  require(branch.users.empty(), "BlockMap::remove: a sequence uses the branch.");
  for (LayerBlocks& layer : branch.layers) {
    require(layer.blocks.empty(), "BlockMap::remove: the branch still has blocks.");
    release_extent(layer);
  }
  branches_.erase(branch.id);
}

void BlockMap::leave(Sequence& sequence) {
  Branch& branch = *sequence.path.back();
  for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
    tables_.set(layer, sequence.row, branch.first, branch.layers[layer].size(), no_table_frame);
  }
  std::erase(branch.users, &sequence);
  sequence.path.pop_back();
}

void BlockMap::join(Sequence& sequence, Branch& branch) {
  sequence.path.reserve(sequence.path.size() + 1);
  branch.users.push_back(&sequence);
  sequence.path.push_back(&branch);
  for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
    const std::vector<Block>& blocks = branch.layers[layer].blocks;
    for (std::uint32_t b = 0; b < blocks.size(); ++b) {
      const bool nowhere = blocks[b].device == no_frame;
      tables_.set(layer, sequence.row, branch.first + b, 1,
                  nowhere ? no_table_frame : static_cast<std::int32_t>(blocks[b].device));
    }
  }
}

void BlockMap::show(const BlockKey& key, FrameRun frames) {
  for (const Sequence* sequence : key.branch->users) {
    tables_.set(key.layer, sequence->row, key.branch->first + key.block, frames.count,
                static_cast<std::int32_t>(frames.first));
  }
}

// Where a block lies, in the tables of all its sequences.
void BlockMap::list(const BlockKey& key, std::int32_t device) {
  for (const Sequence* sequence : key.branch->users) {
    tables_.set(key.layer, sequence->row, key.branch->first + key.block, 1, device);
  }
}

namespace {

// The counts of a layer's leading blocks, which split and merge with them.
constexpr std::array leading_counts = {&LayerBlocks::gone, &LayerBlocks::streamed,
                                       &LayerBlocks::written};

// Blocks [0, at) are gone, and the others count from there.
void drop_front(std::vector<PoolRun>& runs, std::uint32_t at) {
  std::erase_if(runs, [&](const PoolRun& run) { return run.end() <= at; });
  for (PoolRun& run : runs) {
    const std::uint32_t cut = at - std::min(at, run.first_block);
    run = {run.first_block + cut - at, run.pool + cut, run.count - cut};
  }
}

}  // namespace

// The blocks of a branch have come to lie in it, or at other indices of it.
void BlockMap::rename(Branch& branch) {
  branch.boundaries.clear();
  branch.open = no_frame;
  branch.away = 0;
  for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
    LayerBlocks& blocks = branch.layers[layer];
    blocks.front = 0;
    blocks.away = 0;
    for (std::uint32_t b = 0; b < blocks.size(); ++b) {
      const Block& block = blocks.blocks[b];
      if (block.device != no_frame) owners_[block.device] = {&branch, layer, b};
      blocks.away += block.away() ? 1 : 0;
    }
    branch.away += blocks.away;
  }
}

Branch& BlockMap::split(Branch& branch, std::uint32_t at) {
  require(branch.in_flight == 0, "BlockMap::split: a transfer of the branch is in flight.");
  // What takes memory comes first; from then on nothing fails.
  for (Sequence* sequence : branch.users) sequence->path.reserve(sequence->path.size() + 1);
  Branch& front = grow(branch.first);
  try {
    front.users = branch.users;
    for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
      const std::vector<Block>& from = branch.layers[layer].blocks;
      front.layers[layer].blocks.assign(from.begin(), from.begin() + at);
      front.layers[layer].runs = runs_of(front.layers[layer].blocks);
    }
  } catch (...) {
    branches_.erase(front.id);
    throw;
  }
  for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
    LayerBlocks& from = branch.layers[layer];
    LayerBlocks& to = front.layers[layer];
    from.blocks.erase(from.blocks.begin(), from.blocks.begin() + at);
    drop_front(from.runs, at);
    for (std::uint32_t LayerBlocks::* count : leading_counts) {
      to.*count = std::min(from.*count, at);
      from.*count -= to.*count;
    }
  }
  rename(front);
  rename(branch);
  front.full = std::min(branch.full, at);
  front.active = branch.active;
  branch.full -= front.full;
  branch.first += at;
  for (Sequence* sequence : branch.users) {
    sequence->path.insert(std::ranges::find(sequence->path, &branch), &front);
  }
  return front;
}

void BlockMap::merge(Branch& front, Branch& back) {
  require(front.in_flight == 0 && back.in_flight == 0 && front.users.size() == back.users.size() &&
              front.full == front.blocks() && front.end() == back.first,
          "BlockMap::merge: the branches are not one.");
  const std::uint32_t at = front.blocks();
  for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {  // what takes memory
    LayerBlocks& to = front.layers[layer];
    to.blocks.reserve(at + back.layers[layer].size());
    to.runs.reserve(to.runs.size() + back.layers[layer].runs.size());
  }
  for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
    LayerBlocks& from = back.layers[layer];
    LayerBlocks& to = front.layers[layer];
    for (const PoolRun& run : from.runs)
      add_to(to.runs, {at + run.first_block, run.pool, run.count});
    to.blocks.insert(to.blocks.end(), from.blocks.begin(), from.blocks.end());
    // A count goes on in the second part only where it reached the end of the first.
    for (std::uint32_t LayerBlocks::* count : leading_counts) {
      if (to.*count == at) to.*count += from.*count;
    }
    release_extent(to);
    to.extent = std::exchange(from.extent, {});
    from = {};
  }
  rename(front);
  front.full += back.full;
  front.active = front.active || back.active;
  for (Sequence* sequence : back.users) std::erase(sequence->path, &back);
  back.users.clear();
  remove(back);
}

// ---- transitions --------------------------------------------------------------------------------

void BlockMap::set_state(const BlockKey& key, BlockState state) {
  LayerBlocks& layer = key.branch->layers[key.layer];
  Block& block = at(key);
  const auto count = [&](std::uint32_t by) {
    if (block.state != BlockState::empty) counts_[static_cast<std::size_t>(block.state)] += by;
    if (!block.away()) return;
    layer.away += by;
    key.branch->away += by;
  };
  count(std::uint32_t{0} - 1);
  block.state = state;
  count(1);
  if (state != BlockState::pooled) layer.front = std::min(layer.front, key.block);
}

void BlockMap::enter_device(const BlockKey& key, FrameIndex device) {
  at(key).device = device;
  owners_[device] = key;
  list(key, static_cast<std::int32_t>(device));
}

void BlockMap::leave_device(const BlockKey& key) {
  Block& block = at(key);
  if (block.device == no_frame) return;
  owners_[block.device] = {};
  list(key, no_table_frame);
  device_.release(block.device);
  block.device = no_frame;
}

void BlockMap::enter_pool(const BlockKey& key, FrameIndex pool) {
  add_to(key.branch->layers[key.layer].runs, {key.block, pool, 1});
  at(key).pool = pool;
}

void BlockMap::leave_pool(const BlockKey& key) {
  Block& block = at(key);
  if (block.pool == no_frame) return;
  std::vector<PoolRun>& runs = key.branch->layers[key.layer].runs;
  const auto run = std::ranges::upper_bound(runs, key.block, {}, &PoolRun::first_block) - 1;
  const std::uint32_t before = key.block - run->first_block;
  const PoolRun after{key.block + 1, run->pool + before + 1, run->count - before - 1};
  if (after.count > 0 && before > 0) {
    (runs.insert(run + 1, after) - 1)->count = before;
  } else if (after.count > 0) {
    *run = after;
  } else if (before > 0) {
    run->count = before;
  } else {
    runs.erase(run);
  }
  pool_.release(std::exchange(block.pool, no_frame));
}

void BlockMap::lengthen(LayerBlocks& layer) { layer.blocks.emplace_back(); }

void BlockMap::shorten(Branch& branch, std::uint32_t layer) {
  LayerBlocks& blocks = branch.layers[layer];
  drop({&branch, layer, static_cast<std::uint32_t>(blocks.blocks.size()) - 1});
  blocks.blocks.pop_back();
}

void BlockMap::place(const BlockKey& key, FrameIndex device) {
  require(at(key).state == BlockState::empty, "BlockMap::place: the block has a frame already.");
  enter_device(key, device);
  set_state(key, BlockState::dirty);
}

void BlockMap::begin_write(const BlockKey& key, FrameIndex pool) {
  require(at(key).state == BlockState::dirty, "BlockMap::begin_write: the block is not dirty.");
  enter_pool(key, pool);
  set_state(key, BlockState::writing);
}

void BlockMap::commit_write(const BlockKey& key) {
  require(at(key).state == BlockState::writing, "BlockMap::commit_write: no write is in flight.");
  set_state(key, BlockState::clean);
}

void BlockMap::fail_write(const BlockKey& key) {
  require(at(key).state == BlockState::writing, "BlockMap::fail_write: no write is in flight.");
  leave_pool(key);
  set_state(key, BlockState::dirty);
}

void BlockMap::evict(const BlockKey& key) {
  require(at(key).state == BlockState::clean, "BlockMap::evict: the block has no committed copy.");
  leave_device(key);
  set_state(key, BlockState::pooled);
}

void BlockMap::begin_load(const BlockKey& key, FrameIndex device) {
  require(at(key).state == BlockState::pooled,
          "BlockMap::begin_load: the block is not in the pool.");
  enter_device(key, device);
  set_state(key, BlockState::loading);
}

void BlockMap::commit_load(const BlockKey& key) {
  require(at(key).state == BlockState::loading, "BlockMap::commit_load: no load is in flight.");
  set_state(key, BlockState::clean);
}

void BlockMap::fail_load(const BlockKey& key) {
  require(at(key).state == BlockState::loading, "BlockMap::fail_load: no load is in flight.");
  leave_device(key);
  set_state(key, BlockState::pooled);
}

void BlockMap::soil(const BlockKey& key) {
  const Block& block = at(key);
  if (block.state == BlockState::dirty) return;
  require(block.state == BlockState::clean, "BlockMap::soil: the block is not on the device.");
  leave_pool(key);
  set_state(key, BlockState::dirty);
}

void BlockMap::relocate(const BlockKey& key, FrameIndex device) {
  const Block& block = at(key);
  require(block.present() && !block.in_flight(), "BlockMap::relocate: the block cannot move now.");
  owners_[block.device] = {};
  device_.release(block.device);
  enter_device(key, device);
}

void BlockMap::drop(const BlockKey& key) {
  require(!at(key).in_flight(), "BlockMap::drop: a transfer of the block is in flight.");
  leave_device(key);
  leave_pool(key);
  list(key, no_table_frame);
  set_state(key, BlockState::empty);
}

// ---- pool frames --------------------------------------------------------------------------------

FrameIndex BlockMap::take_pool_frame(LayerBlocks& layer, std::uint32_t needed,
                                     std::uint32_t extent_frames_max) {
  if (layer.extent.count == 0) {
    // Extents double with the layer, so short sequences waste little and long ones lie in
    // few pieces.
    const std::uint32_t size = layer.size();
    const std::uint32_t want = std::clamp(std::max(needed, size), 1U, extent_frames_max);
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
  if (freed == 0) return 0;
  for (auto& [id, branch] : branches_) {
    for (LayerBlocks& layer : branch.layers) release_extent(layer);
  }
  return freed;
}

// ---- invariants ---------------------------------------------------------------------------------

void BlockMap::check_block(const BlockKey& key, std::vector<bool>& pool_seen) const {
  const Block& block = at(key);
  const LayerBlocks& layer = key.branch->layers[key.layer];
  const bool on_device = block.present() || block.state == BlockState::loading;
  const bool in_pool = block.state != BlockState::dirty && block.state != BlockState::empty;
  require((key.block < layer.gone) == (block.state == BlockState::empty),
          "check: a block that is seen is empty, or one that is not holds something.");
  require(on_device == (block.device != no_frame),
          "check: a block's device frame and state differ.");
  require(in_pool == (block.pool != no_frame), "check: a block's pool frame and state differ.");
  const auto listed = on_device ? static_cast<std::int32_t>(block.device) : no_table_frame;
  for (const Sequence* sequence : key.branch->users) {
    const std::int32_t entry = tables_.row(key.layer, sequence->row)[key.branch->first + key.block];
    require(block.state == BlockState::pooled || entry == listed,
            "check: a block's frame in a table is another.");
  }
  if (on_device) {
    const BlockKey owner = owners_[block.device];
    require(owner.branch == key.branch && owner.layer == key.layer && owner.block == key.block,
            "check: a device frame has two owners.");
    require(!device_.is_free(block.device), "check: a device frame in use is marked free.");
  }
  if (in_pool) {
    require(!pool_seen[block.pool], "check: a pool frame has two owners.");
    require(!pool_.is_free(block.pool), "check: a pool frame in use is marked free.");
    pool_seen[block.pool] = true;
  }
}

void BlockMap::check_paths() const {
  std::map<const Branch*, std::size_t> users;
  for (const auto& [id, sequence] : sequences_) {
    std::uint32_t end = 0;
    for (const Branch* branch : sequence.path) {
      require(branch->first == end, "check: a path has a gap.");
      end = branch->end();
      ++users[branch];
      const bool tail = branch == sequence.path.back();
      require(tail || branch->full == branch->blocks(), "check: a block inside a path is partial.");
    }
    require(sequence.gain > 0 || end == geometry_.blocks_of(sequence.tokens),
            "check: a path and its sequence's length differ.");
  }
  for (const auto& [id, branch] : branches_) {
    const auto found = users.find(&branch);
    require(branch.users.size() == (found == users.end() ? 0 : found->second),
            "check: the count of a branch's users is wrong.");
  }
}

void BlockMap::check_layer(Branch& branch, std::uint32_t layer,
                           std::vector<bool>& pool_seen) const {
  const LayerBlocks& blocks = branch.layers[layer];
  std::uint32_t away = 0;
  for (std::uint32_t index = 0; index < blocks.size(); ++index) {
    const Block& block = blocks.blocks[index];
    check_block({&branch, layer, index}, pool_seen);
    away += block.away() ? 1 : 0;
    require(index < blocks.gone || index >= blocks.front || block.state == BlockState::pooled,
            "check: a block at the front of a layer is not only in the pool.");
  }
  require(away == blocks.away, "check: a layer's count of blocks away is wrong.");
  require(runs_of(blocks.blocks) == blocks.runs, "check: a layer's runs in the pool are wrong.");
}

void BlockMap::check_frames() const {
  std::array<std::uint32_t, block_states> counts{};
  std::uint32_t set_aside = 0;
  std::vector<bool> pool_seen(pool_.capacity());
  for (const auto& [id, branch] : branches_) {
    std::uint32_t away = 0;
    for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
      check_layer(const_cast<Branch&>(branch), layer, pool_seen);
      away += branch.layers[layer].away;
      set_aside += branch.layers[layer].extent.count;
      for (const Block& block : branch.layers[layer].blocks) {
        if (block.state != BlockState::empty) ++counts[static_cast<std::size_t>(block.state)];
      }
    }
    require(away == branch.away, "check: a branch's count of blocks away is wrong.");
  }
  require(counts == counts_, "check: the counts of blocks by state are wrong.");
  require(set_aside == set_aside_, "check: the count of pool frames set aside is wrong.");
}

void BlockMap::check() const {
  device_.check();
  pool_.check();
  check_paths();
  check_frames();
  const std::uint32_t on_device = count(BlockState::dirty) + count(BlockState::writing) +
                                  count(BlockState::clean) + count(BlockState::loading);
  require(on_device == device_.used(), "check: device frames in use and blocks there differ.");
  const std::uint32_t in_pool = count(BlockState::writing) + count(BlockState::clean) +
                                count(BlockState::pooled) + count(BlockState::loading);
  require(in_pool + set_aside_ == pool_.used(),
          "check: pool frames in use and blocks there differ.");
}

}  // namespace pie
