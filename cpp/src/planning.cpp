// What a step will need, before its first layer: the batch opened, a plan asked for and carried
// out, the arena divided anew.
#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "pie/error.hpp"
#include "scheduler.hpp"

namespace pie {

void Scheduler::begin(std::span<const Growth> batch, const StepShape& shape) {
  backend_.require_usable(stream_);
  land();
  shape_ = shape;
  open_batch(batch);
  const std::uint32_t set_aside = shape.staging_frames + (ends_with_full_blocks() ? 1 : 0);
  const std::uint32_t capacity = map_.device().capacity();
  std::vector<BranchView> views;
  Snapshot now = snapshot(capacity - std::min(capacity, set_aside), pool_frames_, views);
  now.wanted_frames = std::max(wanted_frames_, probe_frames());
  std::uint32_t rows = 0;
  for (const Growth& growth : batch_) rows += growth.new_tokens;
  controller_.begin(is_decode(), rows, now);
  Plan plan = policy_->plan(now);
  require(is_plan_for(now, plan), "step: the policy's plan is not one for the step's snapshot.");
  admit(now, plan, set_aside);

  plan_ = std::move(plan);
  write_together([&] { apply(plan_); });
  if (capabilities_.streams) land();  // what was written goes
  divide(shape.staging_frames, plan_.ring_frames - lent_frames());
  for (Growth& growth : batch_) open_tail(growth);
  if (shape.whole_layers) settle_plan();
}

// Finds or makes the branch that takes each sequence's tokens. What others share is not touched:
// a partial block among it is copied when there is room for the copy.
void Scheduler::open_batch(std::span<const Growth> batch) {
  close_batch();
  stop_prefetch();
  for (auto& [id, branch] : map_.branches()) branch.active = false;
  batch_.assign(batch.begin(), batch.end());
  std::map<Branch*, std::uint32_t> leaving;  // sequences that get a copy of the shared block
  for (Growth& growth : batch_) {
    Sequence& sequence = *growth.sequence;
    const std::uint32_t size = geometry_.block_tokens;
    const bool partial = sequence.tokens % size != 0;
    Branch* last = sequence.path.empty() ? nullptr : sequence.path.back();
    auto users = last == nullptr ? 0 : static_cast<std::uint32_t>(last->users.size());
    if (users > 1) users -= leaving[last];
    if (users == 1) {
      growth.branch = last;
      last->full = sequence.tokens / size - last->first;
    } else if (!partial) {
      growth.branch = &map_.grow(sequence.tokens / size);
      map_.join(sequence, *growth.branch);
    } else {
      if (last->blocks() > 1) split(*last, last->blocks() - 1);
      ++leaving[last];
      growth.shared = last;
      growth.branch = &map_.grow(last->first);
    }
    sequence.gain = growth.new_tokens;
    const std::uint32_t after = sequence.tokens + growth.new_tokens;
    map_.reserve_blocks(geometry_.blocks_of(after));
    growth.branch->grows_to = after;
    const bool fills = partial && after / size > sequence.tokens / size;
    growth.branch->held = fills ? sequence.tokens / size - growth.branch->first : no_frame;
    growth.branch->active = true;
    for (Branch* branch : sequence.path) branch->active = true;
  }
}

// Forgets the batch, and says what it was. What was to take the place of a shared block, and has
// not, goes.
std::vector<Growth> Scheduler::close_batch() {
  std::vector<Growth> closed = std::exchange(batch_, {});
  for (const Growth& growth : closed) {
    growth.sequence->gain = 0;
    if (growth.branch == nullptr) continue;  // opening the batch went no further
    growth.branch->grows_to = 0;
    growth.branch->held = no_frame;
    if (!growth.branch->users.empty()) continue;
    cut(*growth.branch, 0);
    map_.remove(*growth.branch);
  }
  return closed;
}

// While several tokens are appended, the block that takes them lies in an ordinary frame. Where the
// step ends with a full block, which may be streamed, the end of the step does not tell of that
// one.
bool Scheduler::ends_with_full_blocks() const {
  return std::ranges::any_of(batch_, [&](const Growth& growth) {
    return growth.new_tokens > 1 && growth.branch->grows_to % geometry_.block_tokens == 0;
  });
}

// What the plan in force streams, as far as that is still said by what it was told.
std::uint32_t Scheduler::streamed_frames(const Branch& branch, std::uint32_t window) const {
  if (window < branch.boundaries.size()) {
    const Boundary& last = branch.boundaries[window];
    const std::uint32_t gone = branch.layers[classes_[window].layers.front()].gone;
    const bool known = last.streamed_frames != no_frame;
    if (known && last.gone == gone && last.held == branch.held) return last.streamed_frames;
  }
  return count_streamed(branch, window);
}

// The plan counts streamed blocks from the first that is still seen, without the held one.
std::uint32_t Scheduler::count_streamed(const Branch& branch, std::uint32_t window) const {
  const LayerClass& layers = classes_[window];
  const std::uint32_t gone = branch.layers[layers.layers.front()].gone;
  std::uint32_t frames = 0;
  for (const std::uint32_t layer : layers.layers) {
    const std::uint32_t streamed = branch.layers[layer].streamed;
    frames += streamed - gone - (streamed > branch.held ? 1 : 0);
  }
  return frames;
}

BranchView Scheduler::view_of(const Branch& branch, std::uint32_t window) const {
  const LayerClass& layers = classes_[window];
  const std::uint32_t size = geometry_.block_tokens;
  const std::uint32_t gone = branch.layers[layers.layers.front()].gone;
  BranchView view;
  view.layers = static_cast<std::uint32_t>(layers.layers.size());
  view.active = branch.active;
  view.layer_class = window;
  view.streamed_frames = streamed_frames(branch, window);
  if (branch.grows_to == 0) {
    view.full_blocks = branch.full - gone;
    view.pinned_blocks = branch.blocks() - branch.full;
    view.tokens = (branch.blocks() - gone) * size;
    return view;
  }
  // The block that is partial before the step stays until its end: an abort gives it back as it
  // was. If the step fills it, what follows may end in a partial block of its own.
  const std::uint32_t held = branch.held != no_frame ? 1 : 0;
  view.full_blocks = branch.grows_to / size - branch.first - held - gone;
  view.pinned_blocks = held + (branch.grows_to % size != 0 ? 1 : 0);
  view.tokens = branch.grows_to - (branch.first + gone) * size;
  return view;
}

Snapshot Scheduler::snapshot(std::uint32_t device_frames, std::uint32_t pool_frames,
                             std::vector<BranchView>& views) const {
  views.clear();
  for (const auto& [id, branch] : map_.branches()) {
    for (std::uint32_t i = 0; i < classes_.size(); ++i) views.push_back(view_of(branch, i));
  }
  Snapshot result;
  result.layers = geometry_.layers;
  result.device_frames = device_frames;
  result.pool_frames = pool_frames;
  result.copy_frames_best = copy_frames_;
  result.growth_frames =
      static_cast<std::uint32_t>(batch_.size() * geometry_.layers / geometry_.block_tokens);
  result.ring_frames = plan_.ring_frames;
  result.wanted_frames = wanted_frames_;
  result.whole_layers = shape_.whole_layers;
  result.streams = capabilities_.streams;
  result.branches = views;
  return result;
}

// What the step is to stream though it may fit, to learn from it: no step fails of that, so it asks
// no more of the pool than what is there, with room to spare, and nothing of one that has failed.
std::uint32_t Scheduler::probe_frames() {
  const auto frames = static_cast<std::uint32_t>(controller_.state().budget.probe);
  if (frames == 0 || policy_->name() != "adaptive" || !is_decode()) return 0;
  return transfers_.failed_writes() == 0 && reach_pool(2 * frames) ? frames : 0;
}

bool Scheduler::is_decode() const {
  const auto gains_one = [](const Growth& growth) { return growth.new_tokens == 1; };
  return std::ranges::all_of(batch_, gains_one);
}

// Refuses a plan that cannot be carried out, before anything is changed; the pool may grow, and
// what the system does not give it, it has not.
void Scheduler::admit(const Snapshot& snapshot, const Plan& plan, std::uint32_t staging_frames) {
  Snapshot usable = snapshot;
  const std::uint64_t spare = plan.streamed() + 1;
  if (plan.streamed() > 0 && spare <= snapshot.pool_frames && spare > map_.pool().limit() &&
      !grow_pool(static_cast<std::uint32_t>(spare))) {
    usable.pool_frames = map_.pool().limit();
  }
  admit_on_device(usable, plan, staging_frames, "this step");
  const Bytes stride = capabilities_.frame_stride;
  const std::uint64_t streamed = plan.streamed();
  if (streamed <= map_.pool().limit()) return;
  if (streamed <= snapshot.pool_frames && grow_pool(static_cast<std::uint32_t>(streamed))) return;
  const std::string refusal = backend_.pool_refusal();
  throw CapacityError("The pool tier cannot hold this step: it needs " + sized(streamed * stride) +
                      ", has " + sized(std::uint64_t{map_.pool().limit()} * stride) +
                      " and may take " + sized(std::uint64_t{snapshot.pool_frames} * stride) +
                      (refusal.empty() ? "" : " (" + refusal + ")") +
                      ". Raise pool_bytes, free disk space, or free a sequence.");
}

void Scheduler::admit_on_device(const Snapshot& snapshot, const Plan& plan,
                                std::uint32_t staging_frames, const std::string& what) const {
  const Bytes stride = capabilities_.frame_stride;
  // Where the pool is to be full to its last frame, blocks could not change places with a device
  // that is full as well: one frame of it stays free.
  const bool stuck = plan.streamed() > 0 && plan.streamed() >= snapshot.pool_frames;
  const std::uint64_t needed = device_frames_needed(snapshot, plan) + (stuck ? 1 : 0);
  if (needed <= snapshot.device_frames) return;
  const bool streams = snapshot.pool_frames > 0 && policy_->name() != "off";
  const std::uint64_t there = std::uint64_t{snapshot.device_frames} + staging_frames;
  throw CapacityError(
      "The device tier cannot hold " + what + ": it needs " +
      sized((needed + staging_frames) * stride) + " and device_bytes gives " +
      sized(there * stride) + ". " +
      (streams ? "What is left over are partial blocks, which stay on the device: raise "
                 "device_bytes to that, or run fewer sequences or fewer new tokens at once."
               : "Nothing may be pooled under policy '" + policy_->name() + "' with a pool of " +
                     sized(std::uint64_t{snapshot.pool_frames} * stride) +
                     ": give a pool (pool_bytes) with policy 'fit', or raise device_bytes."));
}

// On a stream what `write` writes goes in few tickets, or where it throws not at all.
void Scheduler::write_together(const std::function<void()>& write) {
  transfers_.hold_writes();
  try {
    write();
  } catch (...) {
    transfers_.drop_writes();
    throw;
  }
  transfers_.submit_writes();
}

void Scheduler::apply(const Plan& plan) {
  std::size_t index = 0;
  for (auto& [id, branch] : map_.branches()) {
    branch.boundaries.resize(classes_.size());
    for (std::uint32_t window = 0; window < classes_.size(); ++window) {
      const std::uint32_t gone = branch.layers[classes_[window].layers.front()].gone;
      const Boundary boundary{plan.streamed_frames[index++], gone, branch.held};
      Boundary& last = branch.boundaries[window];
      if (boundary == last) continue;
      last = {};  // not known while it moves, which may be interrupted
      set_streamed(branch, classes_[window].layers, boundary.streamed_frames);
      last = boundary;
    }
  }
}

// A prefix that reaches beyond the held block takes one block more than the plan counts. What is
// not the same in every layer begins with another layer in each branch, so that no layer gets more
// of them all.
void Scheduler::set_streamed(Branch& branch, std::span<const std::uint32_t> layers,
                             std::uint32_t frames) {
  const auto count = static_cast<std::uint32_t>(layers.size());
  for (std::uint32_t i = 0; i < count; ++i) {
    const auto turn = static_cast<std::uint32_t>((i + branch.id) % count);
    const std::uint32_t streamed =
        branch.layers[layers[i]].gone + streamed_blocks(frames, turn, count);
    set_streamed(branch, layers[i], streamed + (streamed > branch.held ? 1 : 0));
  }
}

void Scheduler::set_streamed(Branch& branch, std::uint32_t layer, std::uint32_t streamed) {
  LayerBlocks& blocks = branch.layers[layer];
  const std::uint32_t before = std::exchange(blocks.streamed, streamed);
  if (streamed <= before) return;
  write_full(branch, layer, std::min(streamed, branch.full));
  const auto size = static_cast<std::uint32_t>(blocks.blocks.size());
  for (std::uint32_t b = before; b < std::min(streamed, size); ++b) {
    if (blocks.blocks[b].state != BlockState::clean || b == branch.held) continue;
    map_.evict({&branch, layer, b});
  }
}

// Frames of the ring that the step needs for what it appends, of blocks that the plan streams: they
// lie in ordinary frames until they are written. Where a layer does not fit, half of the ring.
std::uint32_t Scheduler::lent_frames() const {
  std::uint32_t most = 0;
  for (std::uint32_t layer = 0; plan_.ring_frames > 0 && layer < geometry_.layers; ++layer) {
    std::uint32_t frames = 0;
    for (const Growth& growth : batch_) {
      if (growth.new_tokens == 1) continue;
      const Branch& branch = *growth.branch;
      const std::uint32_t begun = geometry_.blocks_of(growth.sequence->tokens) - branch.first;
      const std::uint32_t full = branch.grows_to / geometry_.block_tokens - branch.first;
      const std::uint32_t streamed = std::min(full, branch.layers[layer].streamed);
      frames += streamed - std::min(streamed, begun);
    }
    most = std::max(most, frames);
  }
  return std::min(most, shape_.whole_layers ? plan_.ring_frames : plan_.ring_frames / 2);
}

// The arena from now on: ordinary frames, staging, the ring.
void Scheduler::divide(std::uint32_t staging_frames, std::uint32_t ring_frames) {
  FramePool& device = map_.device();
  const std::uint32_t begin = device.capacity() - ring_frames;
  const std::uint32_t limit = begin - staging_frames;
  // Several segments, so that some are filled while one is read, and copies of the best size. Those
  // in use stay as large as they are while that serves, since what is in them is lost otherwise. On
  // a stream three fill the ring: one of a frame or two more would cost as much as any.
  const std::uint32_t third = (ring_frames + (capabilities_.streams ? 2 : 0)) / 3;
  const std::uint32_t best = std::clamp(copy_frames_, (ring_frames + 7) / 8, std::max(1U, third));
  const std::uint32_t now = ring_.segment_frames();
  const bool serves = now <= ring_frames / 5 && now >= (ring_frames + 23) / 24 &&
                      now >= std::min(copy_frames_, best);
  const std::uint32_t segment = serves ? now : best;
  const FrameRun ring{begin, ring_frames};
  if (limit < device.limit()) {
    for (FrameIndex frame = limit; frame < device.limit(); ++frame) vacate(frame, limit);
    device.set_limit(limit);
    ring_.reshape(ring, segment);
  } else {
    ring_.reshape(ring, segment);
    device.set_limit(limit);
  }
  // On a stream whatever comes into those frames waits for what still goes there.
  while (!capabilities_.streams && ring_.strays()) wait();
}

// Where a whole layer is read at once, what the plan streams of it may be in no other place than
// the ring: what is still to be written goes first.
void Scheduler::settle_plan() {
  std::uint32_t needed = 0;
  for (const Growth& growth : batch_) {
    needed += geometry_.blocks_of(growth.branch->grows_to) - growth.branch->end();
  }
  if (map_.device().free() < needed * geometry_.layers) drain();
}

// Copies a resident block at rest into a free frame below `limit`; false where it cannot.
bool Scheduler::move_below(FrameIndex frame, FrameIndex limit) {
  const BlockKey key = map_.owner(frame);
  if (BlockMap::at(key).in_flight()) return false;
  const FrameIndex to = map_.device().acquire();
  if (to == no_frame) return false;
  if (to >= limit) {
    map_.device().release(to);
    return false;
  }
  duplicate(frame, to);
  map_.relocate(key, to);
  return true;
}

// Moves the block in `frame` below `limit`, or discards it where it has a copy.
void Scheduler::vacate(FrameIndex frame, std::uint32_t limit) {
  for (BlockKey key = map_.owner(frame); key.branch != nullptr; key = map_.owner(frame)) {
    const Block& block = BlockMap::at(key);
    if (move_below(frame, limit)) continue;
    if (block.in_flight()) {
      wait_for_room();
    } else if (block.state == BlockState::clean) {
      map_.evict(key);
    } else if (!evict_any()) {
      write_or_wait();
    }
  }
}

}  // namespace pie
