// The scheduler's housekeeping: room in both tiers, the pool copy, sequences that part and end, and
// budgets that change. scheduler.cpp has the step.
#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "pie/error.hpp"
#include "pie/scheduler.hpp"

namespace pie {

namespace {

// Pool space is asked for from the system in pieces of this many bytes at least.
constexpr Bytes pool_growth_bytes = Bytes{64} << 20;

std::vector<std::uint64_t> ids_of(const std::vector<Branch*>& path) {
  std::vector<std::uint64_t> ids;
  for (const Branch* branch : path) ids.push_back(branch->id);
  return ids;
}

}  // namespace

// ---- room on the device -------------------------------------------------------------------------

FrameIndex Scheduler::take_frame() {
  FrameIndex frame = map_.device().acquire();
  while (frame == no_frame) {
    make_room();
    frame = map_.device().acquire();
  }
  return frame;
}

// Frees a frame or room in the ring, or brings that nearer. Not while blocks are collected that may
// go: those of the layer that runs stay where whole layers are asked for.
void Scheduler::make_room() {
  land();
  const bool none_free = map_.device().free() == 0;
  if (!none_free && map_.ring_frames() < std::max(1U, plan_.ring_frames)) return;
  if (none_free && evict_surplus(shape_.whole_layers)) return;
  if (evict_prefetched()) return;
  if (none_free && evict_any()) return;
  write_or_wait();
}

void Scheduler::write_or_wait() {
  if (transfers_.any()) {
    wait_for_room();
  } else if (!write_any()) {
    raise_errors();
    throw CapacityError("The device tier is full of blocks that cannot be moved to the pool (" +
                        sized(std::uint64_t{map_.device().used()} * capabilities_.frame_stride) +
                        " in use). Raise device_bytes, raise pool_bytes, or free a sequence.");
  }
}

bool Scheduler::is_read_now(std::uint32_t layer, const Branch& branch) const {
  return layer == layer_ && branch.active;
}

// Discards the oldest block that the plan does not keep; with `spare_layer`, none that is read in
// the layer that runs.
bool Scheduler::evict_surplus(bool spare_layer) {
  for (auto it = surplus_.begin(); it != surplus_.end();) {
    const BlockKey key = *it;
    const LayerBlocks& layer = key.branch->layers[key.layer];
    const bool valid = key.block < layer.blocks.size() && key.block < layer.streamed &&
                       BlockMap::at(key).state == BlockState::clean && !BlockMap::at(key).ring;
    if (valid && spare_layer && is_read_now(key.layer, *key.branch)) {
      ++it;
      continue;
    }
    it = surplus_.erase(it);
    if (!valid) continue;
    map_.evict(key);
    return true;
  }
  return false;
}

// Discards the prefetched block that is needed last. Where whole layers stay, those of the one that
// runs do not count.
bool Scheduler::evict_prefetched() {
  for (std::size_t i = loaded_.size(); i-- > 0;) {
    const BlockKey key = loaded_[i];
    const LayerBlocks& layer = key.branch->layers[key.layer];
    const bool listed = key.block < layer.blocks.size() && BlockMap::at(key).ring;
    if (listed && shape_.whole_layers && is_read_now(key.layer, *key.branch)) continue;
    if (listed && BlockMap::at(key).state == BlockState::loading) return false;
    loaded_.erase(loaded_.begin() + static_cast<std::ptrdiff_t>(i));
    if (!listed) continue;
    map_.evict(key);
    return true;
  }
  return false;
}

// Discards any clean block, of the layer whose turn is furthest away first.
bool Scheduler::evict_any() {
  const std::uint32_t layers = geometry_.layers;
  for (std::uint32_t back = 1; back <= layers; ++back) {
    const std::uint32_t layer = (layer_ + layers - back % layers) % layers;
    for (auto& [id, branch] : map_.branches()) {
      if (shape_.whole_layers && is_read_now(layer, branch)) continue;
      const std::vector<Block>& blocks = branch.layers[layer].blocks;
      for (std::uint32_t b = 0; b < blocks.size(); ++b) {
        if (blocks[b].state != BlockState::clean) continue;
        map_.evict({&branch, layer, b});
        return true;
      }
    }
  }
  return false;
}

// Starts writing committed full blocks of some layer, so that they can be discarded later.
bool Scheduler::write_any() {
  for (auto& [id, branch] : map_.branches()) {
    for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
      if (shape_.whole_layers && is_read_now(layer, branch)) continue;
      branch.layers[layer].written = branch.layers[layer].gone;
      write_full(branch, layer, branch.full, true);
      if (transfers_.any()) return true;
    }
  }
  return false;
}

// ---- the pool copy ------------------------------------------------------------------------------

// Writes the dirty ones of blocks [written, limit), adjacent blocks as one ticket. Stops where the
// pool is full: what is not written stays on the device. Blocks that the plan streams, and any in a
// `rescue`, may take the pool copies of blocks that it keeps.
void Scheduler::write_full(Branch& branch, std::uint32_t layer, std::uint32_t limit, bool rescue) {
  LayerBlocks& blocks = branch.layers[layer];
  std::vector<FrameIndex> frames;
  while (blocks.written < limit) {
    const std::uint32_t first = blocks.written;  // reclaiming pool frames may lower it
    frames.clear();
    std::uint32_t b = first;
    for (; b < limit && frames.size() < copy_frames_; ++b) {
      if (blocks.blocks[b].state != BlockState::dirty) break;
      const FrameIndex frame = take_pool_frame(blocks, std::max(limit, blocks.streamed) - b,
                                               rescue || b < blocks.streamed);
      if (frame == no_frame) break;
      frames.push_back(frame);
    }
    if (!frames.empty()) {
      transfers_.write(branch, layer, first, frames, !rescue && first >= blocks.streamed);
      if (blocks.written == first) blocks.written = b;
    } else if (blocks.blocks[b].state == BlockState::dirty) {
      return;
    } else {
      ++blocks.written;
    }
  }
}

FrameIndex Scheduler::take_pool_frame(LayerBlocks& layer, std::uint32_t needed, bool reclaim) {
  for (;;) {
    const FrameIndex frame = map_.take_pool_frame(layer, needed, copy_frames_);
    if (frame != no_frame) return frame;
    if (grow_pool(map_.pool().limit() + 1)) continue;
    if (map_.release_extents() == 0 && !(reclaim && reclaim_pool())) return no_frame;
  }
}

// Has at least `frames` usable frames in the pool, growing it in large pieces.
bool Scheduler::grow_pool(std::uint32_t frames) {
  FramePool& pool = map_.pool();
  if (frames > pool_frames_) return false;
  const std::uint64_t step = pool_growth_bytes / capabilities_.frame_stride;
  const std::uint64_t want = std::max<std::uint64_t>(frames, pool.limit() + step);
  const auto target = static_cast<std::uint32_t>(std::min<std::uint64_t>(want, pool_frames_));
  std::uint32_t usable = resize_pool(target, frames);
  if (usable < frames) usable = resize_pool(frames, frames);  // the last of the disk
  usable = std::min(usable, pool_frames_);
  if (usable > pool.limit()) pool.set_limit(usable);
  return pool.limit() >= frames;
}

// Asks for `target` usable frames of the pool, and waits until there are `needed` where it is slow.
std::uint32_t Scheduler::resize_pool(std::uint32_t target, std::uint32_t needed) {
  PoolSize size = backend_.resize_pool(target);
  while (size.pending && size.frames < needed) {
    wait();
    size = backend_.resize_pool(target);
  }
  return size.frames;
}

// Gives up the pool copies of blocks that the plan keeps on the device.
bool Scheduler::reclaim_pool() {
  bool any = false;
  for (auto& [id, branch] : map_.branches()) {
    for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
      LayerBlocks& blocks = branch.layers[layer];
      for (auto b = blocks.streamed; b < blocks.blocks.size(); ++b) {
        if (blocks.blocks[b].state != BlockState::clean) continue;
        map_.soil({&branch, layer, b});
        blocks.written = std::min(blocks.written, b);
        any = true;
      }
    }
  }
  return any;
}

// ---- sequences ----------------------------------------------------------------------------------

Sequence& Scheduler::fork(Sequence& sequence) {
  stop_prefetch();
  // An aborted step may have left a branch without blocks behind.
  if (!sequence.path.empty() && sequence.path.back()->blocks() == 0) leave(sequence);
  return map_.fork(sequence);
}

void Scheduler::free(Sequence& sequence) {
  stop_prefetch();
  const std::vector<std::uint64_t> path = ids_of(sequence.path);
  while (!sequence.path.empty()) leave(sequence);
  map_.remove(sequence);
  drop_unseen();
  for (const std::uint64_t branch : path) join_up(branch);
}

void Scheduler::truncate(Sequence& sequence, std::uint32_t tokens) {
  refuse_unseen(sequence, tokens);
  stop_prefetch();
  const std::vector<std::uint64_t> path = ids_of(sequence.path);
  const std::uint32_t keep = blocks_of(tokens);
  while (!sequence.path.empty() && sequence.path.back()->first >= keep) leave(sequence);
  if (!sequence.path.empty() && sequence.path.back()->end() > keep) {
    Branch& last = *sequence.path.back();
    if (last.users == 1) {
      cut(last, keep - last.first);
    } else {
      split(last, keep - last.first);
      leave(sequence);
    }
  }
  sequence.tokens = tokens;
  drop_unseen();
  for (const std::uint64_t branch : path) join_up(branch);
}

// A window gives frames back for good: the token that would come next must not look behind them.
void Scheduler::refuse_unseen(const Sequence& sequence, std::uint32_t tokens) const {
  if (tokens >= sequence.tokens) return;
  for (const LayerClass& layers : classes_) {
    const std::uint32_t needed = first_block(tokens, layers.window);
    for (const Branch* branch : sequence.path) {
      const std::uint32_t gone = branch->layers[layers.layers.front()].gone;
      if (gone == 0 || branch->first >= blocks_of(tokens) || branch->first + gone <= needed) {
        continue;
      }
      throw LogicError("truncate: sequence " + std::to_string(sequence.id) + " of " +
                       std::to_string(sequence.tokens) + " tokens cannot be cut to " +
                       std::to_string(tokens) + ": layers with a window of " +
                       std::to_string(layers.window) +
                       " tokens have given back what its next token would see. Cut fewer tokens, "
                       "or free the sequence and begin it again.");
    }
  }
}

// The last branch comes off the sequence's path, and goes where nobody else is on it.
void Scheduler::leave(Sequence& sequence) {
  Branch& branch = *sequence.path.back();
  BlockMap::leave(sequence);
  if (branch.users > 0) return;
  cut(branch, 0);
  static_cast<void>(transfers_.take_error(branch));
  map_.remove(branch);
}

// Drops a branch's blocks beyond the first `keep`.
void Scheduler::cut(Branch& branch, std::uint32_t keep) {
  settle(branch);
  for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
    LayerBlocks& blocks = branch.layers[layer];
    while (blocks.blocks.size() > keep) map_.shorten(branch, layer);
    blocks.gone = std::min(blocks.gone, keep);
    blocks.written = std::min(blocks.written, keep);
    if (keep == 0) map_.release_extent(blocks);
  }
  branch.full = std::min(branch.full, keep);
  const auto dropped = [&](const BlockKey& key) {
    return key.branch == &branch && key.block >= keep;
  };
  std::erase_if(surplus_, dropped);
  std::erase_if(loaded_, dropped);
}

// Blocks [0, at) of a branch become one of their own, which is returned.
Branch& Scheduler::split(Branch& branch, std::uint32_t at) {
  settle(branch);
  Branch& front = map_.split(branch, at);
  for (std::deque<BlockKey>* keys : {&surplus_, &loaded_}) {
    for (BlockKey& key : *keys) {
      if (key.branch != &branch) continue;
      if (key.block < at) {
        key.branch = &front;
      } else {
        key.block -= at;
      }
    }
  }
  return front;
}

// Where a branch and a neighbour of it have come to have the same sequences they become one, so
// that what was forked and freed does not stay in pieces.
void Scheduler::join_up(std::uint64_t id) {
  const auto found = map_.branches().find(id);
  if (found == map_.branches().end()) return;
  for (auto& [sequence_id, sequence] : map_.sequences()) {
    const auto place = std::ranges::find(sequence.path, &found->second);
    if (place == sequence.path.end()) continue;
    if (place + 1 != sequence.path.end()) merge(**place, **(place + 1));
    return;
  }
}

void Scheduler::merge(Branch& front, Branch& back) {
  if (front.users != back.users || front.full < front.blocks()) return;
  if (front.in_flight > 0 || back.in_flight > 0 || !back.error.empty()) return;
  const std::uint32_t at = front.blocks();
  for (std::deque<BlockKey>* keys : {&surplus_, &loaded_}) {
    for (BlockKey& key : *keys) {
      if (key.branch == &back) key = {&front, key.layer, key.block + at};
    }
  }
  map_.merge(front, back);
}

// Gives back the frames that no row of any sequence will see again.
void Scheduler::drop_unseen() {
  for (const LayerClass& layers : classes_) {
    if (layers.window == 0) continue;
    std::map<std::uint64_t, std::uint32_t> seen;  // by branch, the first block that is still seen
    for (const auto& [id, sequence] : map_.sequences()) {
      const std::uint32_t first = first_block(sequence.tokens, layers.window);
      for (Branch* branch : sequence.path) {
        const auto [place, fresh] = seen.emplace(branch->id, first);
        place->second = std::min(place->second, first);
      }
    }
    for (const auto& [id, first] : seen) {
      Branch& branch = map_.branches().at(id);
      if (first > branch.first) drop_front(branch, layers, first - branch.first);
    }
  }
}

void Scheduler::drop_front(Branch& branch, const LayerClass& layers, std::uint32_t end) {
  const std::uint32_t target = std::min(end, branch.full);
  for (const std::uint32_t layer : layers.layers) {
    LayerBlocks& blocks = branch.layers[layer];
    for (; blocks.gone < target; ++blocks.gone) {
      while (blocks.blocks[blocks.gone].in_flight()) wait();
      map_.drop({&branch, layer, blocks.gone});
    }
    blocks.streamed = std::max(blocks.streamed, target);
    blocks.written = std::max(blocks.written, target);
  }
}

// ---- other sizes --------------------------------------------------------------------------------

void Scheduler::resize(std::uint32_t device_frames, std::uint32_t pool_frames) {
  stop_prefetch();
  land();
  map_.device().set_limit(map_.device().capacity());  // the last step's staging is over
  shape_ = {};
  std::vector<BranchView> views;
  Snapshot now = snapshot(device_frames, pool_frames, views);
  Plan plan = policy_->plan(now);
  // What moves within the pool passes through a frame of the device, of the ring if there is one.
  const bool passes = pool_frames < pool_frames_ && plan.streamed() > 0 && plan.ring_frames == 0;
  if (passes) {
    --now.device_frames;
    plan = policy_->plan(now);
  }
  admit_on_device(now, plan, passes ? 1 : 0, "what the sequences hold");
  if (plan.streamed() > pool_frames) {
    throw CapacityError("resize: a pool of " + sized(pool_frames * capabilities_.frame_stride) +
                        " cannot hold the " + sized(plan.streamed() * capabilities_.frame_stride) +
                        " that the device cannot. Give more of either, or free a sequence.");
  }
  const std::uint32_t device_before = map_.device().capacity();
  const std::uint32_t pool_before = pool_frames_;
  grow_device(device_frames);
  if (pool_frames > pool_frames_) {
    map_.pool().resize(pool_frames, map_.pool().limit());
    pool_frames_ = pool_frames;
  }
  plan_ = std::move(plan);
  try {
    apply(plan_);
    // The device goes last: what moves within the pool passes through it, and nothing of it must be
    // asked for again where the pool cannot shrink.
    if (pool_frames < pool_frames_) shrink_pool(pool_frames);
    if (device_frames < map_.device().capacity()) shrink_device(device_frames);
  } catch (const CapacityError&) {
    restore(device_before, pool_before);
    throw;
  }
}

// Takes back what a resize that cannot be carried through has moved by then.
void Scheduler::restore(std::uint32_t device_frames, std::uint32_t pool_frames) {
  std::vector<BranchView> views;
  plan_ = policy_->plan(snapshot(device_frames, pool_frames, views));
  apply(plan_);
  const std::uint32_t limit = map_.pool().limit();
  if (limit > pool_frames) {
    shrink_pool(pool_frames);
  } else {
    map_.pool().resize(pool_frames, limit);
    pool_frames_ = pool_frames;
  }
  if (device_frames < map_.device().capacity()) shrink_device(device_frames);
}

void Scheduler::grow_device(std::uint32_t frames) {
  if (frames <= map_.device().capacity()) return;
  const std::uint32_t usable = backend_.resize_device(frames);
  if (usable < frames) {
    static_cast<void>(backend_.resize_device(map_.device().capacity()));
    const bool reserved = usable >= capabilities_.device_frames_max;
    throw CapacityError(
        "resize: the device tier can have " + sized(usable * capabilities_.frame_stride) +
        ", not " + sized(frames * capabilities_.frame_stride) + ": " +
        (reserved ? "it grows within the memory it was made over, or else the addresses reserved "
                    "then: as many as the machine has memory, or just what was asked for where a "
                    "limit (ulimit -v) allows no more. Make a new cache with more."
                  : "the system gives no more memory. Ask for no more."));
  }
  map_.resize_device(frames);
  transfers_.resize_device(frames);
}

void Scheduler::shrink_device(std::uint32_t frames) {
  FramePool& device = map_.device();
  device.retire(frames);
  try {
    for (FrameIndex frame = frames; frame < device.capacity(); ++frame) vacate(frame, frames);
  } catch (...) {
    device.set_limit(device.capacity());
    throw;
  }
  map_.resize_device(frames);
  transfers_.resize_device(frames);
  static_cast<void>(backend_.resize_device(frames));
}

template <typename Visitor>
void Scheduler::for_each_block(const Visitor& visitor) {
  for (auto& [id, branch] : map_.branches()) {
    for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
      for (std::uint32_t b = 0; b < branch.blocks(); ++b) visitor(BlockKey{&branch, layer, b});
    }
  }
}

void Scheduler::shrink_pool(std::uint32_t frames) {
  drain();
  map_.release_extents();
  FramePool& pool = map_.pool();
  const std::uint32_t limit = pool.limit();
  const std::uint32_t before = std::exchange(pool_frames_, frames);
  pool.retire(std::min(frames, limit));
  try {
    empty_retired_pool(frames);
  } catch (...) {
    pool.set_limit(limit);
    pool_frames_ = before;
    throw;
  }
  pool.resize(frames, std::min(frames, limit));
  static_cast<void>(backend_.resize_pool(pool.limit()));
}

// What the plan keeps on the device gives up its pool frames first; what it streams then moves from
// frames at or above `frames` into those that stay.
void Scheduler::empty_retired_pool(std::uint32_t frames) {
  for_each_block([&](const BlockKey& key) {
    const bool streamed = key.block < key.branch->layers[key.layer].streamed;
    if (!streamed && BlockMap::at(key).state == BlockState::pooled) load_now(key);
  });
  drain();
  static_cast<void>(reclaim_pool());
  for_each_block([&](const BlockKey& key) {
    const FrameIndex frame = BlockMap::at(key).pool;
    if (frame != no_frame && frame >= frames) move_down(key);
  });
}

// Gives a block's pool copy another pool frame.
void Scheduler::move_down(const BlockKey& key) {
  load_now(key);
  map_.soil(key);
  key.branch->layers[key.layer].written =
      std::min(key.branch->layers[key.layer].written, key.block);
  const FrameIndex frame = take_pool_frame(key.branch->layers[key.layer], 1, true);
  if (frame == no_frame) {
    throw CapacityError("resize: the pool cannot shrink so far while so much is held.");
  }
  transfers_.write(*key.branch, key.layer, key.block, {frame}, false);
  settle(*key.branch);
  if (BlockMap::at(key).state != BlockState::clean) raise_error(*key.branch);
  map_.evict(key);
}

}  // namespace pie
