// The step: plan, append, fetch, read, release, write behind.
#include "pie/scheduler.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "pie/error.hpp"

namespace pie {

namespace {

// Pool space is asked for from the system in pieces of this many bytes at least.
constexpr Bytes pool_growth_bytes = Bytes{64} << 20;

std::string sized(std::uint64_t bytes) {
  const unsigned shift = bytes < (10ULL << 20) ? 10 : 20;
  const std::uint64_t tenths = (bytes * 10 + (1ULL << shift) - 1) >> shift;
  return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) +
         (shift == 10 ? " KiB (" : " MiB (") + std::to_string(bytes) + " bytes)";
}

}  // namespace

Scheduler::Scheduler(Backend& backend, const Geometry& geometry, std::unique_ptr<Policy> policy)
    : backend_(backend),
      geometry_(geometry),
      capabilities_(backend.capabilities()),
      policy_(std::move(policy)),
      map_(geometry.layers, capabilities_.device_frames, capabilities_.pool_frames),
      transfers_(backend, map_) {
  const Bytes best = std::max(capabilities_.copy_bytes_best, capabilities_.frame_stride);
  copy_frames_ = static_cast<std::uint32_t>(
      std::max<Bytes>(1, best / std::max<Bytes>(1, capabilities_.frame_stride)));
}

std::uint32_t Scheduler::blocks_of(std::uint32_t tokens) const {
  return (tokens + geometry_.block_tokens - 1) / geometry_.block_tokens;
}

// ---- planning -----------------------------------------------------------------------------------

Snapshot Scheduler::snapshot(std::span<const Growth> batch, std::uint32_t staging_frames,
                             std::vector<SequenceView>& views) const {
  const std::uint32_t size = geometry_.block_tokens;
  views.clear();
  for (const auto& [id, sequence] : map_.sequences()) {
    std::uint32_t after = sequence.tokens;
    bool active = false;
    for (const Growth& growth : batch) {
      if (growth.sequence != &sequence) continue;
      after += growth.new_tokens;
      active = true;
    }
    // The block that is partial before the step stays until its end: an abort gives it back as it
    // was. If the step fills it, what follows may end in a partial block of its own.
    const bool tail_before = sequence.tokens % size != 0;
    const bool tail_after = after % size != 0;
    const bool fills_tail = tail_before && after / size > sequence.tokens / size;
    SequenceView view;
    view.active = active;
    view.full_blocks = after / size - (fills_tail ? 1 : 0);
    view.pinned_blocks = (fills_tail ? 1 : 0) + (tail_after ? 1 : 0);
    views.push_back(view);
  }
  Snapshot result;
  result.layers = geometry_.layers;
  result.device_frames =
      capabilities_.device_frames - std::min(capabilities_.device_frames, staging_frames);
  result.pool_frames = capabilities_.pool_frames;
  result.copy_frames_best = copy_frames_;
  result.sequences = views;
  return result;
}

// Refuses a plan that cannot be carried out, before anything is changed; the pool may grow.
void Scheduler::admit(const Snapshot& snapshot, const Plan& plan, std::uint32_t staging_frames) {
  const Bytes stride = capabilities_.frame_stride;
  const std::uint64_t needed = device_frames_needed(snapshot, plan);
  if (needed > snapshot.device_frames) {
    const bool streams = capabilities_.pool_frames > 0 && policy_->name() != "off";
    throw CapacityError(
        "The device tier cannot hold this step: it needs " +
        sized((needed + staging_frames) * stride) + " and device_bytes gives " +
        sized(std::uint64_t{capabilities_.device_frames} * stride) + ". " +
        (streams ? "What is left over are partial blocks, which stay on the device: raise "
                   "device_bytes to that, or run fewer sequences or fewer new tokens at once."
                 : "Nothing may be pooled under policy '" + policy_->name() + "' with a pool of " +
                       sized(std::uint64_t{capabilities_.pool_frames} * stride) +
                       ": give a pool (pool_bytes) with policy 'fit', or raise device_bytes."));
  }
  std::uint64_t streamed = 0;
  for (const std::uint32_t frames : plan.streamed_frames) streamed += frames;
  if (streamed <= map_.pool().limit()) return;
  if (streamed <= capabilities_.pool_frames && grow_pool(static_cast<std::uint32_t>(streamed))) {
    return;
  }
  const std::string refusal = backend_.pool_refusal();
  throw CapacityError("The pool tier cannot hold this step: it needs " + sized(streamed * stride) +
                      ", has " + sized(std::uint64_t{map_.pool().limit()} * stride) +
                      " and may take " + sized(std::uint64_t{capabilities_.pool_frames} * stride) +
                      (refusal.empty() ? "" : " (" + refusal + ")") +
                      ". Raise pool_bytes, free disk space, or free a sequence.");
}

void Scheduler::begin(std::span<const Growth> batch, std::uint32_t staging_frames,
                      bool several_waves) {
  land();
  // A wave may end inside a block that the step goes on to fill: then the layer that runs holds one
  // frame more than the end of the step tells.
  const bool cut =
      several_waves && std::ranges::any_of(batch, [&](const Growth& growth) {
        return growth.new_tokens > 1 &&
               (growth.sequence->tokens + growth.new_tokens) % geometry_.block_tokens == 0;
      });
  const std::uint32_t set_aside = staging_frames + (cut ? 1 : 0);
  std::vector<SequenceView> views;
  const Snapshot now = snapshot(batch, set_aside, views);
  Plan plan = policy_->plan(now);
  admit(now, plan, set_aside);

  plan_ = std::move(plan);
  batch_.assign(batch.begin(), batch.end());
  visits_.clear();
  cursor_ = {};
  layer_ = 0;
  apply(plan_);
  reserve_staging(staging_frames);
  clear_ring();
}

void Scheduler::apply(const Plan& plan) {
  for (auto& [id, sequence] : map_.sequences()) sequence.active = false;
  for (const Growth& growth : batch_) growth.sequence->active = true;
  std::size_t index = 0;
  for (auto& [id, sequence] : map_.sequences()) {
    const std::uint32_t frames = plan.streamed_frames[index++];
    const std::uint32_t held = held_block(sequence);
    for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
      const std::uint32_t streamed = streamed_blocks(frames, layer, geometry_.layers);
      set_streamed(sequence, layer, streamed + (streamed > held ? 1 : 0));
    }
  }
  // What was prefetched for sequences that are not in this step only takes up the ring.
  std::deque<BlockKey> wanted;
  for (const BlockKey& key : loaded_) {
    const Block& block = BlockMap::at(key);
    if (!block.ring) continue;
    if (!key.sequence->active && block.state == BlockState::clean) {
      map_.evict(key);
    } else {
      wanted.push_back(key);
    }
  }
  loaded_.swap(wanted);
}

// The block that is partial before the step and full after it stays until the step has ended, so
// the plan does not count it: streaming a prefix that reaches beyond it takes one block more.
std::uint32_t Scheduler::held_block(const Sequence& sequence) const {
  const std::uint32_t size = geometry_.block_tokens;
  for (const Growth& growth : batch_) {
    if (growth.sequence != &sequence || sequence.tokens % size == 0) continue;
    const std::uint32_t after = sequence.tokens + growth.new_tokens;
    if (after / size > sequence.tokens / size) return sequence.tokens / size;
  }
  return no_frame;
}

void Scheduler::set_streamed(Sequence& sequence, std::uint32_t layer, std::uint32_t streamed) {
  LayerBlocks& blocks = sequence.layers[layer];
  const auto size = static_cast<std::uint32_t>(blocks.blocks.size());
  if (streamed > blocks.streamed) {
    write_full(sequence, layer, std::min(streamed, sequence.tokens / geometry_.block_tokens));
  }
  for (std::uint32_t b = blocks.streamed; b < std::min(streamed, size); ++b) {
    const Block& block = blocks.blocks[b];
    if (block.state == BlockState::clean && !block.ring) map_.evict({&sequence, layer, b});
  }
  for (std::uint32_t b = streamed; b < std::min(blocks.streamed, size); ++b) {
    map_.keep({&sequence, layer, b});
  }
  blocks.streamed = streamed;
}

// Makes the top `frames` frames of the arena free of blocks and sets them aside.
void Scheduler::reserve_staging(std::uint32_t frames) {
  FramePool& device = map_.device();
  const std::uint32_t limit = device.capacity() - frames;
  if (limit == device.limit()) return;
  for (FrameIndex frame = limit; frame < device.limit(); ++frame) vacate(frame, limit);
  device.set_limit(limit);
}

// Streamed runs are as long as the free space is in one piece: what lies where the ring belongs, at
// the top of what is usable, moves down into the holes that evictions left.
void Scheduler::clear_ring() {
  const FrameIndex begin = ring_begin();
  for (FrameIndex frame = begin; frame < map_.device().limit(); ++frame) {
    if (!map_.device().is_free(frame)) move_below(frame, begin);
  }
}

FrameIndex Scheduler::ring_begin() const {
  const FrameIndex end = map_.device().limit();
  return end - std::min(end, plan_.ring_frames);
}

// Copies a resident block at rest into a free frame below `limit`; false where it cannot.
bool Scheduler::move_below(FrameIndex frame, FrameIndex limit) {
  const BlockKey key = map_.owner(frame);
  const Block& block = BlockMap::at(key);
  if (block.in_flight() || block.ring) return false;
  const FrameIndex to = map_.device().acquire();
  if (to == no_frame) return false;
  if (to >= limit) {
    map_.device().release(to);
    return false;
  }
  std::memcpy(backend_.address(to), backend_.address(frame), geometry_.frame_bytes());
  map_.relocate(key, to);
  return true;
}

// Moves the block in `frame` below `limit`, or discards it where it has a copy.
void Scheduler::vacate(FrameIndex frame, std::uint32_t limit) {
  while (!map_.device().is_free(frame)) {
    const BlockKey key = map_.owner(frame);
    const Block& block = BlockMap::at(key);
    if (move_below(frame, limit)) continue;
    if (block.in_flight()) {
      wait();
    } else if (block.state == BlockState::clean) {
      map_.evict(key);
    } else if (!evict_surplus(false) && !evict_prefetched() && !evict_any()) {
      write_or_wait();
    }
  }
}

// ---- a layer ------------------------------------------------------------------------------------

void Scheduler::set_visits(std::vector<Visit> visits) {
  visits_ = std::move(visits);
  cursor_ = {};
  pump();
}

void Scheduler::run_layer(std::uint32_t layer, LayerReader& reader) {
  layer_ = layer;
  wave_ = 0;
  pieces_.clear();
  land();
  raise_errors();
  pump();
  for (std::size_t i = 0; i < visits_.size(); ++i) {
    const Visit& visit = visits_[i];
    wave_ = visit.wave;
    if (!pieces_.empty() && pieces_.back().visit->wave != visit.wave) flush(reader);
    append(visit, reader);
    const std::vector<Block>& blocks = visit.sequence->layers[layer].blocks;
    const std::uint32_t end = blocks_of(visit.kv_end());
    for (std::uint32_t block = 0; block < end;) {
      std::uint32_t ready = block;
      while (ready < end && blocks[ready].present()) ++ready;
      if (ready == block) {
        fetch(i, block, reader);
        continue;
      }
      pieces_.push_back({&visit, block, ready});
      block = ready;
    }
  }
  flush(reader);
}

void Scheduler::append(const Visit& visit, LayerReader& reader) {
  Sequence& sequence = *visit.sequence;
  std::vector<Block>& blocks = sequence.layers[layer_].blocks;
  const std::uint32_t size = geometry_.block_tokens;
  const auto old_blocks = static_cast<std::uint32_t>(blocks.size());
  const std::uint32_t new_blocks = blocks_of(visit.kv_end()) - old_blocks;
  // Making room may discard blocks that are collected but not yet read: read them first.
  if (new_blocks > map_.device().free()) flush(reader);
  for (std::uint32_t token = visit.position; token < visit.kv_end();) {
    const std::uint32_t index = token / size;
    const std::uint32_t rows = std::min(size - token % size, visit.kv_end() - token);
    if (index == blocks.size()) {
      const FrameIndex frame = take_frame();
      blocks.emplace_back();
      map_.place({&sequence, layer_, index}, frame);
    }
    reader.store(backend_.address(blocks[index].device), token % size, rows,
                 visit.first_row + token - visit.position);
    token += rows;
    const bool pause = (index + 1) % copy_frames_ == 0 || map_.device().free() == 0;
    if (pause || token == visit.kv_end()) write_begun(sequence, token / size);
  }
}

// A long step may append more than the device holds: of the blocks that the step itself has begun
// and filled, those that the plan streams are written at once. They do not count until finish, so
// an abort just drops them. The block that was partial before the step stays as it is.
void Scheduler::write_begun(Sequence& sequence, std::uint32_t full) {
  LayerBlocks& blocks = sequence.layers[layer_];
  const std::uint32_t limit = std::min(full, blocks.streamed);
  const std::uint32_t begun = blocks_of(sequence.tokens);
  if (limit <= begun) return;
  blocks.written = std::max(blocks.written, begun);
  write_full(sequence, layer_, limit);
}

// Brings a block that is not on the device nearer to being there.
void Scheduler::fetch(std::size_t visit, std::uint32_t index, LayerReader& reader) {
  const Sequence& sequence = *visits_[visit].sequence;
  const Block& block = sequence.layers[layer_].blocks[index];
  if (block.state == BlockState::pooled) {
    cursor_ = {layer_, visit, index};
    pump();
  }
  if (!pieces_.empty()) {
    flush(reader);  // compute what is there while the rest arrives
  } else if (block.state == BlockState::pooled && !transfers_.any()) {
    make_room();
  } else {
    wait();
  }
  raise_errors();
}

void Scheduler::flush(LayerReader& reader) {
  if (pieces_.empty()) return;
  reader.read(layer_, pieces_);
  const Fence fence = backend_.record(stream_);
  for (const Piece& piece : pieces_) release(piece, fence);
  pieces_.clear();
  land();
  pump();
}

// Ring blocks that were read leave, or stay where they are if the plan has come to keep them.
void Scheduler::release(const Piece& piece, Fence fence) {
  LayerBlocks& layer = piece.visit->sequence->layers[layer_];
  for (std::uint32_t b = piece.first_block; b < piece.end_block; ++b) {
    const Block& block = layer.blocks[b];
    transfers_.read_until(block.device, fence);
    if (block.ring) map_.evict({piece.visit->sequence, layer_, b});
  }
}

// ---- ahead of the layers ------------------------------------------------------------------------

// Advances the cursor to the next block that is only in the pool; false at the end of what may be
// prefetched, which is one round of layers ahead of the one that runs.
bool Scheduler::seek_pooled() {
  while (!visits_.empty() && cursor_.layer < layer_ + geometry_.layers) {
    const std::uint32_t layer = cursor_.layer % geometry_.layers;
    const std::uint32_t wave = cursor_.layer == layer_ ? wave_ : 0;
    for (; cursor_.visit < visits_.size(); ++cursor_.visit, cursor_.block = 0) {
      // A later wave reads the same sequence again: what it needs comes back when it starts.
      if (visits_[cursor_.visit].wave > wave) return false;
      const std::vector<Block>& blocks = visits_[cursor_.visit].sequence->layers[layer].blocks;
      for (; cursor_.block < blocks.size(); ++cursor_.block) {
        if (blocks[cursor_.block].state == BlockState::pooled) return true;
      }
    }
    cursor_.visit = 0;
    ++cursor_.layer;
  }
  return false;
}

// Submits loads in the order in which they will be needed, as far as the ring has room.
void Scheduler::pump() {
  while (seek_pooled()) {
    Sequence& sequence = *visits_[cursor_.visit].sequence;
    const std::uint32_t layer = cursor_.layer % geometry_.layers;
    const LayerBlocks& blocks = sequence.layers[layer];
    const bool ring = cursor_.block < blocks.streamed;
    const auto size = static_cast<std::uint32_t>(blocks.blocks.size());
    const std::uint32_t end = ring ? std::min(blocks.streamed, size) : size;
    std::uint32_t want = 1;
    while (want < copy_frames_ && cursor_.block + want < end &&
           blocks.blocks[cursor_.block + want].state == BlockState::pooled) {
      ++want;
    }
    const FrameRun frames = take_run(want, ring);
    if (frames.count == 0) return;
    transfers_.load(sequence, layer, cursor_.block, frames, ring);
    for (std::uint32_t i = 0; ring && i < frames.count; ++i) {
      loaded_.push_back({&sequence, layer, cursor_.block + i});
    }
    cursor_.block += frames.count;
  }
}

// Frames for a load of `want` blocks. While other loads run it is all or nothing: what is read
// and released in the meantime adds up to large copies again, where taking each crumb at once would
// keep the ring in crumbs for ever. With nothing under way, any run will do.
FrameRun Scheduler::take_run(std::uint32_t want, bool ring) {
  const std::uint32_t used = map_.ring_frames();
  const std::uint32_t room = plan_.ring_frames - std::min(plan_.ring_frames, used);
  const std::uint32_t fits = ring ? std::min(want, room) : want;
  if (fits < want && transfers_.loading() && want <= plan_.ring_frames / 2) return {};
  FrameRun frames = map_.device().acquire_run(fits, ring ? ring_begin() : 0);
  while (frames.count == 0 && fits > 0 && evict_surplus(true)) {
    frames = map_.device().acquire_run(fits, ring ? ring_begin() : 0);
  }
  if (frames.count == fits || !transfers_.loading() || fits > plan_.ring_frames / 2) return frames;
  map_.device().release(frames);
  return {};
}

// ---- room on the device -------------------------------------------------------------------------

FrameIndex Scheduler::take_frame() {
  FrameIndex frame = map_.device().acquire();
  while (frame == no_frame) {
    make_room();
    frame = map_.device().acquire();
  }
  return frame;
}

// Frees a frame or room in the ring, or brings that nearer. Not while pieces are collected.
void Scheduler::make_room() {
  land();
  const bool none_free = map_.device().free() == 0;
  if (!none_free && map_.ring_frames() < std::max(1U, plan_.ring_frames)) return;
  if (none_free && evict_surplus(false)) return;
  if (evict_prefetched()) return;
  if (none_free && evict_any()) return;
  write_or_wait();
}

void Scheduler::write_or_wait() {
  if (transfers_.any()) {
    wait();
    raise_errors();
  } else if (!write_any()) {
    raise_errors();
    throw CapacityError("The device tier is full of blocks that cannot be moved to the pool (" +
                        sized(std::uint64_t{map_.device().used()} * capabilities_.frame_stride) +
                        " in use). Raise device_bytes, raise pool_bytes, or free a sequence.");
  }
}

// Discards the oldest block that the plan does not keep; with `spare_layer`, none of the layer that
// runs.
bool Scheduler::evict_surplus(bool spare_layer) {
  for (auto it = surplus_.begin(); it != surplus_.end();) {
    const BlockKey key = *it;
    const LayerBlocks& layer = key.sequence->layers[key.layer];
    const bool valid = key.block < layer.blocks.size() && key.block < layer.streamed &&
                       BlockMap::at(key).state == BlockState::clean && !BlockMap::at(key).ring;
    if (valid && spare_layer && key.layer == layer_) {
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

// Discards the prefetched block that is needed last.
bool Scheduler::evict_prefetched() {
  while (!loaded_.empty()) {
    const BlockKey key = loaded_.back();
    const LayerBlocks& layer = key.sequence->layers[key.layer];
    const bool listed = key.block < layer.blocks.size() && BlockMap::at(key).ring;
    if (listed && BlockMap::at(key).state == BlockState::loading) return false;
    loaded_.pop_back();
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
    for (auto& [id, sequence] : map_.sequences()) {
      const std::vector<Block>& blocks = sequence.layers[layer].blocks;
      for (std::uint32_t b = 0; b < blocks.size(); ++b) {
        if (blocks[b].state != BlockState::clean) continue;
        map_.evict({&sequence, layer, b});
        return true;
      }
    }
  }
  return false;
}

// Starts writing committed full blocks of some layer, so that they can be discarded later.
bool Scheduler::write_any() {
  for (auto& [id, sequence] : map_.sequences()) {
    for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
      sequence.layers[layer].written = 0;
      write_full(sequence, layer, sequence.tokens / geometry_.block_tokens, true);
      if (transfers_.any()) return true;
    }
  }
  return false;
}

// ---- the pool copy ------------------------------------------------------------------------------

// Writes the dirty ones of blocks [written, limit), adjacent blocks as one ticket. Stops where the
// pool is full: what is not written stays on the device. Blocks that the plan streams, and any in a
// `rescue`, may take the pool copies of blocks that it keeps.
void Scheduler::write_full(Sequence& sequence, std::uint32_t layer, std::uint32_t limit,
                           bool rescue) {
  LayerBlocks& blocks = sequence.layers[layer];
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
      transfers_.write(sequence, layer, first, frames);
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
  if (frames > capabilities_.pool_frames) return false;
  const std::uint64_t step = pool_growth_bytes / capabilities_.frame_stride;
  const std::uint64_t want = std::max<std::uint64_t>(frames, pool.limit() + step);
  const auto target =
      static_cast<std::uint32_t>(std::min<std::uint64_t>(want, capabilities_.pool_frames));
  std::uint32_t usable = backend_.resize_pool(target);
  if (usable < frames) usable = backend_.resize_pool(frames);  // the last of the disk
  if (usable > pool.limit()) pool.set_limit(usable);
  return pool.limit() >= frames;
}

// Gives up the pool copies of blocks that the plan keeps on the device.
bool Scheduler::reclaim_pool() {
  bool any = false;
  for (auto& [id, sequence] : map_.sequences()) {
    for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
      LayerBlocks& blocks = sequence.layers[layer];
      for (auto b = blocks.streamed; b < blocks.blocks.size(); ++b) {
        if (blocks.blocks[b].state != BlockState::clean) continue;
        map_.soil({&sequence, layer, b});
        blocks.written = std::min(blocks.written, b);
        any = true;
      }
    }
  }
  return any;
}

// ---- the end of a step --------------------------------------------------------------------------

void Scheduler::finish() {
  land();
  raise_errors();
  for (const Growth& growth : batch_) growth.sequence->tokens += growth.new_tokens;
  for (const Growth& growth : batch_) {
    Sequence& sequence = *growth.sequence;
    const std::uint32_t before = (sequence.tokens - growth.new_tokens) / geometry_.block_tokens;
    const std::uint32_t full = sequence.tokens / geometry_.block_tokens;
    if (full == before) continue;
    for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
      LayerBlocks& blocks = sequence.layers[layer];
      blocks.written = std::min(blocks.written, before);
      const std::uint32_t wanted = plan_.write_behind ? full : std::min(full, blocks.streamed);
      write_full(sequence, layer, wanted);
    }
  }
  while (evict_surplus(false)) {
  }
  clear_ring();
  cursor_.layer -= std::min(cursor_.layer, geometry_.layers);
  layer_ = 0;
  wave_ = 0;
  batch_.clear();
  pump();
}

void Scheduler::abort() {
  pieces_.clear();
  visits_.clear();
  for (const Growth& growth : batch_) cut(*growth.sequence, growth.sequence->tokens);
  batch_.clear();
}

// Drops what lies beyond `tokens`; a block it cuts through is on the device and dirty already.
void Scheduler::cut(Sequence& sequence, std::uint32_t tokens) {
  settle(sequence);
  const std::uint32_t keep = blocks_of(tokens);
  for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
    LayerBlocks& blocks = sequence.layers[layer];
    while (blocks.blocks.size() > keep) {
      map_.drop({&sequence, layer, static_cast<std::uint32_t>(blocks.blocks.size()) - 1});
      blocks.blocks.pop_back();
    }
    blocks.written = std::min(blocks.written, tokens / geometry_.block_tokens);
    if (keep == 0) map_.release_extent(blocks);
  }
  const auto gone = [&](const BlockKey& key) {
    return key.sequence == &sequence && key.block >= keep;
  };
  std::erase_if(surplus_, gone);
  std::erase_if(loaded_, gone);
}

void Scheduler::truncate(Sequence& sequence, std::uint32_t tokens) {
  visits_.clear();
  settle(sequence);
  map_.device().set_limit(map_.device().capacity());  // the last step's staging is over
  if (tokens % geometry_.block_tokens != 0) open_block(sequence, tokens);
  sequence.tokens = tokens;
  cut(sequence, tokens);
}

// Makes the block that `tokens` cuts through partial. While the sequence is taken to end there, it
// is not written again. Where the device has no room, what lies behind the block goes first.
void Scheduler::open_block(Sequence& sequence, std::uint32_t tokens) {
  const std::uint32_t index = tokens / geometry_.block_tokens;
  std::uint32_t kept = std::exchange(sequence.tokens, tokens);
  try {
    try {
      soil(sequence, index);
    } catch (const CapacityError&) {
      kept = std::min(kept, (index + 1) * geometry_.block_tokens);
      cut(sequence, kept);
      soil(sequence, index);
    }
  } catch (...) {
    sequence.tokens = kept;
    throw;
  }
}

// Has a block of every layer on the device without a pool copy, ready to be written again. Where a
// load fails nothing is lost: a full block may well be dirty.
void Scheduler::soil(Sequence& sequence, std::uint32_t index) {
  for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
    load_now({&sequence, layer, index});
    map_.soil({&sequence, layer, index});
    LayerBlocks& blocks = sequence.layers[layer];
    blocks.written = std::min(blocks.written, index);
  }
}

// Has a block on the device and at rest, not in the ring.
void Scheduler::load_now(const BlockKey& key) {
  layer_ = key.layer;
  if (BlockMap::at(key).state == BlockState::pooled) {
    const FrameIndex frame = take_frame();
    transfers_.load(*key.sequence, key.layer, key.block, {frame, 1}, false);
    settle(*key.sequence);
    if (!key.sequence->error.empty()) {
      throw IoError(std::exchange(key.sequence->error, std::string()));
    }
  }
  map_.keep(key);
}

void Scheduler::free(Sequence& sequence) {
  visits_.clear();
  std::erase_if(batch_, [&](const Growth& growth) { return growth.sequence == &sequence; });
  cut(sequence, 0);
  map_.remove(sequence);
}

// ---- completions --------------------------------------------------------------------------------

void Scheduler::land() {
  for (const Landed& landed : transfers_.land()) {
    const LayerBlocks& layer = landed.sequence->layers[landed.layer];
    for (std::uint32_t i = 0; i < landed.count; ++i) {
      const BlockKey key{landed.sequence, landed.layer, landed.first_block + i};
      const bool ring = BlockMap::at(key).ring;
      // Written, or loaded under an earlier plan: the plan in force does not keep it.
      if (!ring && key.block < layer.streamed) surplus_.push_back(key);
      if (ring && !landed.sequence->active) map_.evict(key);
    }
  }
  while (!loaded_.empty() && !BlockMap::at(loaded_.front()).ring) loaded_.pop_front();
}

void Scheduler::wait() {
  const Nanos began = backend_.now();
  transfers_.wait();
  stall_ns_ += backend_.now() - began;
  land();
}

void Scheduler::settle(const Sequence& sequence) {
  while (sequence.in_flight > 0) wait();
}

void Scheduler::drain() {
  while (transfers_.any()) wait();
}

// Tells the first failure of a sequence of the batch, once.
void Scheduler::raise_errors() {
  for (const Growth& growth : batch_) {
    if (!growth.sequence->error.empty()) {
      throw IoError(std::exchange(growth.sequence->error, std::string()));
    }
  }
  const Health health = backend_.health();
  if (!health.ok) throw IoError("The device is lost: " + health.first_error);
}

void Scheduler::check() const {
  map_.check();
  transfers_.check();
  for (const auto& [id, sequence] : map_.sequences()) {
    for (const LayerBlocks& layer : sequence.layers) {
      const std::uint32_t full = sequence.tokens / geometry_.block_tokens;
      for (std::uint32_t b = full; b < layer.blocks.size(); ++b) {
        require(!batch_.empty() || layer.blocks[b].state == BlockState::dirty,
                "check: a partial block is not dirty on the device.");
      }
    }
  }
}

}  // namespace pie
