// Budgets that change between steps: both tiers grow and shrink, and what they hold moves.
#include <algorithm>
#include <new>
#include <string>
#include <utility>

#include "pie/error.hpp"
#include "scheduler.hpp"

namespace pie {

void Scheduler::resize(std::uint32_t device_frames, std::uint32_t pool_frames) {
  stop_prefetch();
  land();
  divide(0, 0);  // the last step's staging is over, and what the ring holds
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
  } catch (const std::bad_alloc&) {  // CapacityError is one
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
  transfers_.resize_device(frames);
  map_.resize_device(frames);
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
  if (capabilities_.streams) drain();  // memory goes after all that uses it
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
  try {
    pool.retire(std::min(frames, limit));
    empty_retired_pool(frames);
  } catch (...) {
    pool.set_limit(limit);
    pool_frames_ = before;
    throw;
  }
  if (capabilities_.streams) drain();
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
  static_cast<void>(reclaim_pool(map_.pool().capacity()));
  for_each_block([&](const BlockKey& key) {
    const FrameIndex frame = BlockMap::at(key).pool;
    if (frame != no_frame && frame >= frames) move_down(key);
  });
}

// Gives a block's pool copy another pool frame.
void Scheduler::move_down(const BlockKey& key) {
  load_now(key);
  soil(key);
  const FrameIndex frame = take_pool_frame(key.branch->layers[key.layer], 1, true);
  if (frame == no_frame) {
    throw CapacityError("resize: the pool cannot shrink so far while so much is held.");
  }
  pool_frames_taken_.assign(1, frame);
  transfers_.write(*key.branch, key.layer, key.block, pool_frames_taken_, false);
  settle(*key.branch);
  if (BlockMap::at(key).pool == no_frame) raise_error(*key.branch);
  if (BlockMap::at(key).state == BlockState::clean) map_.evict(key);
}

}  // namespace pie
