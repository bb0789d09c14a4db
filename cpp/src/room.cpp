// The scheduler's room: frames of the device for what comes, and pool copies for what goes.
#include <algorithm>
#include <string>
#include <utility>

#include "pie/error.hpp"
#include "scheduler.hpp"

namespace pie {

namespace {

// Pool space is asked for from the system in pieces of this many bytes at least.
constexpr Bytes pool_growth_bytes = Bytes{64} << 20;

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

// Frees a frame, or brings that nearer. Not while blocks of the layer that runs are ready and not
// read, unless whole layers are asked for.
void Scheduler::make_room() {
  land();
  if (map_.device().free() > 0) return;
  if (!shape_.whole_layers) evict_written(false, true);
  if (map_.device().free() > 0) return;
  if (map_.count(BlockState::writing) > 0 || !evict_any()) write_or_wait();
}

void Scheduler::write_or_wait() {
  if (map_.count(BlockState::writing) > 0) return wait_for_room();
  if (write_any()) return;
  if (transfers_.any() && !capabilities_.streams) return wait_for_room();
  raise_errors();
  throw CapacityError("The device tier is full of blocks that cannot be moved to the pool (" +
                      sized(std::uint64_t{map_.device().used()} * capabilities_.frame_stride) +
                      " in use). Raise device_bytes, raise pool_bytes, or free a sequence.");
}

bool Scheduler::is_read_now(std::uint32_t layer, const Branch& branch) const {
  return layer == layer_ && branch.active;
}

// Discards what has come to be in the pool and is not to stay; may spare the layer that runs. On a
// stream what is still being copied there stays until room is `needed`, since whoever got its frame
// would wait for the copy.
void Scheduler::evict_written(bool spare_layer, bool needed) {
  std::erase_if(written_, [&](const Stretch& stretch) {
    if (spare_layer && stretch.layer == layer_) return false;
    const auto found = map_.branches().find(stretch.branch);
    if (found == map_.branches().end()) return true;
    Branch& branch = found->second;
    const LayerBlocks& layer = branch.layers[stretch.layer];
    const std::uint32_t end = std::min({stretch.end, layer.streamed, layer.size()});
    if (stretch.begin >= end) return true;
    if (!needed && transfers_.departs(layer.blocks[stretch.begin].device)) return false;
    for (std::uint32_t b = stretch.begin; b < end; ++b) {
      if (layer.blocks[b].state == BlockState::clean) map_.evict({&branch, stretch.layer, b});
    }
    return true;
  });
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
      const std::uint64_t before = transfers_.started_writes();
      branch.layers[layer].written = branch.layers[layer].gone;
      write_full(branch, layer, branch.full, true);
      if (transfers_.started_writes() > before) return true;
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
  const std::uint64_t before = transfers_.started_writes();
  std::vector<FrameIndex>& frames = pool_frames_taken_;
  while (blocks.written < limit) {
    // On a stream what was written counts as such at once: a rescue must not take it back.
    const bool saved = capabilities_.streams && transfers_.started_writes() > before;
    const std::uint32_t first = blocks.written;  // reclaiming pool frames may lower it
    frames.clear();
    std::uint32_t b = first;
    for (; b < limit && frames.size() < copy_frames_; ++b) {
      if (blocks.blocks[b].state != BlockState::dirty) break;
      const FrameIndex frame = take_pool_frame(blocks, std::max(limit, blocks.streamed) - b,
                                               (rescue && !saved) || b < blocks.streamed);
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
    if (map_.release_extents() == 0 && !(reclaim && reclaim_pool(needed))) return no_frame;
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

// Where nobody is to wait the pool is asked to grow before it is needed, and looked at again later.
void Scheduler::grow_ahead() {
  FramePool& pool = map_.pool();
  const std::uint64_t step = pool_growth_bytes / capabilities_.frame_stride;
  const bool writes = plan_.write_behind || plan_.streamed() > 0;
  if (!capabilities_.streams || !writes || pool.limit() >= pool_frames_) return;
  if (pool.free() > step / 2) return;
  static_cast<void>(reach_pool(static_cast<std::uint32_t>(pool.limit() + step)));
}

// Whether the pool has so many frames. Else it is asked to grow, and nobody waits.
bool Scheduler::reach_pool(std::uint32_t frames) {
  FramePool& pool = map_.pool();
  if (frames <= pool.limit()) return true;
  const PoolSize size = backend_.resize_pool(std::min(frames, pool_frames_));
  if (size.frames > pool.limit()) pool.set_limit(std::min(size.frames, pool_frames_));
  return frames <= pool.limit();
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

// Where nothing is held any more the pool keeps as much as it came to hold since the last time, and
// a piece to grow into, for loads that repeat; the rest goes back to the system.
void Scheduler::give_back_pool() {
  if (!map_.sequences().empty()) return;
  FramePool& pool = map_.pool();
  const Bytes step = pool_growth_bytes / capabilities_.frame_stride;
  const std::uint64_t kept = std::exchange(pool_frames_most_, 0) + step;
  if (kept >= pool.limit()) return;
  drain();
  if (pool.used() > 0) return;
  pool.set_limit(static_cast<std::uint32_t>(kept));
  static_cast<void>(backend_.resize_pool(pool.limit()));
}

// Gives up pool copies of blocks that the plan keeps on the device, `needed` of them if there are
// as many.
bool Scheduler::reclaim_pool(std::uint32_t needed) {
  std::uint32_t freed = 0;
  for (auto& [id, branch] : map_.branches()) {
    for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
      const LayerBlocks& blocks = branch.layers[layer];
      for (auto b = blocks.streamed; b < blocks.blocks.size() && freed < needed; ++b) {
        if (blocks.blocks[b].state != BlockState::clean) continue;
        soil({&branch, layer, b});
        ++freed;
      }
    }
  }
  return freed > 0;
}

// Gives up the pool copy of a block on the device.
void Scheduler::soil(const BlockKey& key) {
  LayerBlocks& layer = key.branch->layers[key.layer];
  ring_.guard_pool(*key.branch, key.layer, key.block, key.block + 1);
  map_.soil(key);
  layer.written = std::min(layer.written, key.block);
}

}  // namespace pie
