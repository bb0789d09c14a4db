// The step: append, fetch, read, release, write behind.
#include "scheduler.hpp"

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <utility>

#include "pie/error.hpp"

namespace pie {

namespace {

constexpr auto in_pool = static_cast<FrameIndex>(in_pool_bit);

}  // namespace

Scheduler::Scheduler(Backend& backend, const Geometry& geometry, std::unique_ptr<Policy> policy)
    : backend_(backend),
      geometry_(geometry),
      capabilities_(backend.capabilities()),
      policy_(std::move(policy)),
      map_(geometry, capabilities_.device_frames, capabilities_.pool_frames),
      transfers_(backend, map_),
      ring_(transfers_, capabilities_.streams),
      reading_(geometry_, map_.tables()),
      controller_(backend, transfers_, geometry, policy_->name() != "off") {
  const Bytes best = std::max(capabilities_.copy_bytes_best, capabilities_.frame_stride);
  copy_frames_ = static_cast<std::uint32_t>(
      std::max<Bytes>(1, best / std::max<Bytes>(1, capabilities_.frame_stride)));
  pool_frames_taken_.reserve(copy_frames_);
  pool_frames_ = capabilities_.pool_frames;
  require(capabilities_.in_place_share == 0 || backend_.pool_address() != nullptr,
          "the backend's pool has no address, so nothing of it is read in place.");
  for (std::uint32_t layer = 0; layer < geometry.layers; ++layer) {
    const auto same = [&](const LayerClass& c) { return c.window == geometry.window(layer); };
    auto found = std::ranges::find_if(classes_, same);
    if (found == classes_.end()) found = classes_.insert(found, {geometry.window(layer), {}});
    found->layers.push_back(layer);
  }
}

// ---- the partial block --------------------------------------------------------------------------

// Has the block that the sequence's next token goes into on the device, without a pool copy and
// without other users.
void Scheduler::open_tail(Growth& growth) {
  if (growth.shared != nullptr) return copy_tail(growth);
  Branch& branch = *growth.branch;
  const std::uint32_t index = growth.sequence->tokens / geometry_.block_tokens - branch.first;
  if (index >= branch.blocks() || index == branch.open) return;
  for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
    const BlockKey key{&branch, layer, index};
    load_now(key);
    soil(key);
    transfers_.before_write(BlockMap::at(key).device);
  }
  branch.open = index;
}

// Copies the shared block to the sequence's own branch, which then takes its place.
void Scheduler::copy_tail(Growth& growth) {
  Branch& shared = *growth.shared;
  for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
    copy_block({&shared, layer, 0}, {growth.branch, layer, 0});
  }
  growth.branch->users.reserve(1);
  growth.shared = nullptr;
  map_.leave(*growth.sequence);
  map_.join(*growth.sequence, *growth.branch);
}

void Scheduler::copy_block(const BlockKey& from, const BlockKey& to) {
  BlockMap::lengthen(to.branch->layers[to.layer]);
  const FrameIndex frame = take_frame();
  try {
    load_now(from);
  } catch (...) {
    map_.device().release(frame);
    throw;
  }
  duplicate(BlockMap::at(from).device, frame);
  map_.place(to, frame);
}

void Scheduler::duplicate(FrameIndex from, FrameIndex to) {
  transfers_.before_read(from);
  transfers_.before_write(to);
  const Duplicate pair{from, to};
  backend_.duplicate(stream_, {&pair, 1});
}

// Has a block on the device and at rest. Where a load fails nothing is lost.
void Scheduler::load_now(const BlockKey& key) {
  const Block& block = BlockMap::at(key);
  if (block.in_flight()) settle(*key.branch);
  layer_ = key.layer;
  if (block.state != BlockState::pooled) return;
  land();  // what was written before goes now, and not when the block is there
  ring_.drop(key);
  const FrameIndex frame = take_frame();
  transfers_.load(*key.branch, key.layer, key.block, {frame, 1});
  settle(*key.branch);
  if (block.state == BlockState::pooled) raise_error(*key.branch);
}

// ---- a layer ------------------------------------------------------------------------------------

// What the earlier stream was given comes before what this one will be: so a fence of this one
// stands for both.
void Scheduler::set_stream(ComputeStream stream) {
  if (stream == stream_) return;
  backend_.require_usable(stream);
  backend_.depend(stream, {backend_.record(stream_, Timing::unwanted), {}});
  stream_ = stream;
  transfers_.set_stream(stream);
}

void Scheduler::set_visits(std::vector<Visit> visits) {
  reading_.set(std::move(visits));
  layer_ = 0;
  wave_ = 0;
  appended_ = false;
  slots_.resize(std::size_t{geometry_.layers} * reading_.rows());
  reconcile();
  pump();
}

void Scheduler::run_layer(std::uint32_t layer, LayerKernel& kernel) {
  end_layer();
  layer_ = layer;
  wave_ = 0;
  stored_ = 0;
  slotted_ = 0;
  appended_ = false;
  running_ = true;
  land();
  raise_errors();
  if (transfers_.log().on()) trace_layer();
  cursor_ = std::max(cursor_, {layer_, 0, 0});
  pump();
  if (reading_.legs().back().wave == 0) append_wave(kernel);
  if (is_present()) {
    attend_present(kernel);
  } else {
    read_layer(kernel);
  }
  if (transfers_.log().on()) controller_.end_attention();
  if (!shape_.whole_layers) end_layer();
}

void Scheduler::trace_layer() {
  std::uint64_t frames = 0;
  std::uint64_t streamed = 0;
  for (const Leg& leg : reading_.legs()) {
    const LayerBlocks& layer = leg.branch->layers[layer_];
    frames += layer.size() - layer.gone;
    streamed += layer.away;
  }
  controller_.begin_layer(layer_, frames, streamed);
}

void Scheduler::start_trace(std::size_t events_most) {
  land();
  controller_.start_trace(events_most);
}

Trace Scheduler::take_trace() {
  land();
  return controller_.take_trace();
}

// Whether all that the layer reads lies on the device, so that one call can read it.
bool Scheduler::is_present() const {
  const bool loading = capabilities_.streams && transfers_.loading();
  return appended_ && !loading &&
         std::ranges::all_of(reading_.legs(), [](const Leg& leg) { return leg.branch->away == 0; });
}

void Scheduler::attend_present(LayerKernel& kernel) {
  kernel.attend(layer_, reading_.whole(layer_, layer_frames()));
  land();
}

void Scheduler::read_layer(LayerKernel& kernel) {
  reading_.start(layer_);
  for (std::size_t i = 0; i < reading_.legs().size(); ++i) {
    const std::uint32_t wave = reading_.legs()[i].wave;
    if (wave != wave_) {
      flush(kernel);
      appended_ = false;
    }
    wave_ = wave;
    if (!appended_) append_wave(kernel);
    read_branch(i, kernel);
  }
  flush(kernel);
}

// What the layer has read may leave. What comes next into the ring waits for the readers.
void Scheduler::end_layer() {
  ring_.release();
  running_ = false;
  evict_written(false);
}

void Scheduler::read_branch(std::size_t index, LayerKernel& kernel) {
  const Leg& leg = reading_.legs()[index];
  cursor_ = std::max(cursor_, {layer_, index, 0});
  const LayerBlocks& layer = leg.branch->layers[layer_];
  const std::uint32_t end = layer.size();
  for (std::uint32_t block = reading_.first_block(leg, layer_); block < end;) {
    std::uint32_t ready = layer.present_end(block, end);
    if (ready == block) ready = show_in_place({leg.branch, layer_, block});
    if (ready == block) ready = std::min(end, fetch(index, block, kernel));
    if (ready == block) continue;
    collect(leg, block, ready);
    block = ready;
  }
}

// Finds slots for the new tokens of a wave, and has the kernel fill them: in one call, unless the
// device has no room for so many.
void Scheduler::append_wave(LayerKernel& kernel) {
  bool several = false;
  for (const Visit& visit : reading_.visits()) {
    if (visit.wave != wave_) continue;
    append(visit, kernel);
    several = several || visit.sequence->gain > 1;
  }
  store(kernel);
  appended_ = true;
  if (several) pump();
}

// A block that is there already is open: what its first token needs was seen to.
void Scheduler::append(const Visit& visit, LayerKernel& kernel) {
  const std::uint32_t size = geometry_.block_tokens;
  const std::int32_t* table = map_.tables().row(layer_, visit.sequence->row);
  std::int64_t* slots = slots_.data() + std::size_t{layer_} * reading_.rows() + visit.first_row;
  std::uint32_t block = visit.position / size;
  std::uint32_t offset = visit.position % size;
  for (std::uint32_t done = 0; done < visit.rows; ++block, offset = 0) {
    if (offset == 0) add_block(*visit.sequence->path.back(), kernel);
    const std::uint32_t rows = std::min(size - offset, visit.rows - done);
    std::iota(slots, slots + rows, std::int64_t{table[block]} * size + offset);
    slots += rows;
    done += rows;
    slotted_ = visit.first_row + done;
  }
}

// One more block at the end of the layer that runs.
void Scheduler::add_block(Branch& branch, LayerKernel& kernel) {
  if (map_.device().free() == 0) store(kernel);
  LayerBlocks& layer = branch.layers[layer_];
  BlockMap::lengthen(layer);  // first: there may be no memory for it
  const FrameIndex frame = take_frame();
  map_.place({&branch, layer_, layer.size() - 1}, frame);
  transfers_.before_write(frame);
}

// Has the kernel fill the slots that were found since the last call, and writes what is full and
// streamed.
void Scheduler::store(LayerKernel& kernel) {
  if (stored_ == slotted_) return;
  const std::int64_t* slots = slots_.data() + std::size_t{layer_} * reading_.rows() + stored_;
  kernel.append({layer_,
                 stored_,
                 {slots, slotted_ - stored_},
                 geometry_.block_tokens,
                 backend_.address(0),
                 capabilities_.frame_stride});
  stored_ = slotted_;
  for (const Visit& visit : reading_.visits()) {
    if (visit.wave != wave_ || visit.sequence->gain == 1 || visit.first_row >= stored_) continue;
    const std::uint32_t rows = std::min(visit.rows, stored_ - visit.first_row);
    write_begun(visit, (visit.position + rows) / geometry_.block_tokens);
  }
}

// Of the blocks that a long step itself has begun and filled, what is to be written is written at
// once: it may append more than the device holds, and the step after it is not to wait for all
// that. They do not count until finish, so an abort just drops them. The block that was partial
// before the step stays as it is, and so does what was not written before.
void Scheduler::write_begun(const Visit& visit, std::uint32_t full) {
  Branch& branch = *visit.sequence->path.back();
  LayerBlocks& blocks = branch.layers[layer_];
  const std::uint32_t begun = geometry_.blocks_of(visit.sequence->tokens) - branch.first;
  const std::uint32_t filled = full - branch.first;
  const std::uint32_t limit = plan_.write_behind ? filled : std::min(filled, blocks.streamed);
  if (limit <= begun) return;
  const std::uint32_t before = std::exchange(blocks.written, std::max(blocks.written, begun));
  write_full(branch, layer_, limit);
  if (before < begun) blocks.written = std::min(before, blocks.written);
}

// Blocks [0, end) of a layer, those that the plan streams, are read where they lie in the pool.
// Said by what stays as it is from the start of a step to its end.
std::uint32_t Scheduler::in_place_end(const Branch& branch, std::uint32_t layer) const {
  if (!shape_.in_place) return 0;
  const LayerBlocks& blocks = branch.layers[layer];
  const std::uint32_t seen = branch.full - std::min(branch.full, blocks.gone);
  const auto most = static_cast<std::uint32_t>(seen * capabilities_.in_place_share);
  return std::min(blocks.streamed, blocks.gone + most);
}

// Shows blocks from one on where they lie in the pool, once they have come there. Returns the end
// of those that are read so: the block itself where it is not.
std::uint32_t Scheduler::show_in_place(const BlockKey& key) {
  const std::uint32_t end = in_place_end(*key.branch, key.layer);
  LayerBlocks& layer = key.branch->layers[key.layer];
  const std::uint32_t until = key.block < end ? layer.pooled_end(key.block, end) : key.block;
  for (std::uint32_t block = key.block; block < until;) {
    const PoolRun run = layer.run_at(block);
    const std::uint32_t count = std::min(until, run.end()) - block;
    const FrameRun frames{run.pool + (block - run.first_block), count};
    transfers_.before_read_pool(frames);
    map_.show({key.branch, key.layer, block}, {frames.first | in_pool, count});
    in_place_frames_ += count;
    block += count;
  }
  return until;
}

// Brings a block that is not on the device nearer to being there. Returns the end of the blocks
// from it on that now are: `index` itself where it is not there yet.
std::uint32_t Scheduler::fetch(std::size_t leg, std::uint32_t index, LayerKernel& kernel) {
  const BlockKey key{reading_.legs()[leg].branch, layer_, index};
  const Load* load = ring_.find(key);
  if (load != nullptr && (capabilities_.streams || ring_.arrived(*load))) return take(load, key);
  if (load == nullptr && BlockMap::at(key).state == BlockState::pooled) {
    ask_now(leg, key, kernel);
  } else {
    wait_for(kernel);
  }
  return index;
}

// For what is under way: computes what is there while the rest arrives.
void Scheduler::wait_for(LayerKernel& kernel) {
  if (reading_.ready() && !shape_.whole_layers) {
    flush(kernel);
  } else {
    wait_for_room();
  }
  raise_errors();
}

// Takes a load that is there, or that the stream is made to wait for, and shows where it lies.
std::uint32_t Scheduler::take(const Load* found, const BlockKey& key) {
  const Load load = ring_.take(found, capabilities_.streams);
  map_.show(key, {load.device + key.block - load.first_block, load.end() - key.block});
  return load.end();
}

// Asks for a block that was not asked for: the ring had no room for it yet, or it came to be only
// in the pool since.
void Scheduler::ask_now(std::size_t leg, const BlockKey& key, LayerKernel& kernel) {
  const Cursor here{layer_, leg, key.block};
  const std::uint32_t asked = ask(key, ahead_ || here < cursor_);
  if (cursor_ <= here) {
    cursor_ = {layer_, leg, key.block + asked};
    pump();
  } else {
    ahead_ = true;
    ring_.close();
  }
  if (BlockMap::at(key).state != BlockState::pooled || ring_.find(key) != nullptr) return;
  if (reading_.ready() && !shape_.whole_layers) return flush(kernel);
  if (ring_.drop_last()) {
    cursor_ = here;
    ahead_ = true;
    return;
  }
  transfers_.load(*key.branch, key.layer, key.block, {take_frame(), 1});
}

void Scheduler::collect(const Leg& leg, std::uint32_t begin, std::uint32_t end) {
  const std::vector<Block>& blocks = leg.branch->layers[layer_].blocks;
  for (std::uint32_t b = begin; capabilities_.streams && transfers_.loading() && b < end; ++b) {
    if (blocks[b].present()) transfers_.before_read(blocks[b].device);
  }
  reading_.collect(leg, end);
}

void Scheduler::flush(LayerKernel& kernel) {
  if (!reading_.ready()) return;
  kernel.attend(layer_, reading_.take(layer_frames()));
  if (!shape_.whole_layers) ring_.release();
  land();
  pump();
}

// With the table of the layer's first row.
BlockFrames Scheduler::layer_frames() const {
  return {backend_.address(0), capabilities_.frame_stride, map_.tables().row(layer_, 0),
          shape_.in_place ? backend_.pool_address() : nullptr};
}

// ---- ahead of the layers ------------------------------------------------------------------------

// Whether the leg at the cursor has yet to append blocks that the plan streams: where the layer
// does not fit, they will be in the pool when it reads them.
bool Scheduler::is_to_grow() const {
  const bool done = cursor_.layer < layer_ || (cursor_.layer == layer_ && appended_);
  if (shape_.whole_layers || cursor_.layer >= geometry_.layers || done) return false;
  const Branch& branch = *reading_.legs()[cursor_.leg].branch;
  const LayerBlocks& layer = branch.layers[cursor_.layer];
  return branch.grows_to > 0 && layer.streamed > layer.blocks.size();
}

// Advances the cursor to the next block that is only in the pool; false at the end of what may be
// asked for, which is one round of layers ahead of the one that runs.
bool Scheduler::seek_pooled() {
  const std::vector<Leg>& legs = reading_.legs();
  if (legs.empty() || map_.count(BlockState::pooled) == 0) return false;
  while (cursor_.layer < layer_ + geometry_.layers) {
    const std::uint32_t wave = cursor_.layer == layer_ ? wave_ : 0;
    for (; cursor_.leg < legs.size(); ++cursor_.leg, cursor_.block = 0) {
      const Leg& leg = legs[cursor_.leg];
      // A later wave reads the same branches again: what it needs comes back when it starts.
      if (leg.wave > wave) return false;
      if (seek_in(leg, cursor_.layer % geometry_.layers)) return true;
      if (is_to_grow()) return false;
    }
    cursor_.leg = 0;
    cursor_.block = 0;
    ++cursor_.layer;
  }
  return false;
}

// Nothing but the streamed blocks at the front is looked through where all in the pool may be
// there.
bool Scheduler::seek_in(const Leg& leg, std::uint32_t layer) {
  LayerBlocks& blocks = leg.branch->layers[layer];
  if (blocks.away == 0) return false;
  const std::uint32_t size = blocks.size();
  const bool all = blocks.away > blocks.streamed - std::min(blocks.streamed, blocks.gone);
  const std::uint32_t end = all ? size : std::min(size, blocks.streamed);
  if (cursor_.block >= end) return false;
  cursor_.block =
      std::max({cursor_.block, reading_.first_block(leg, layer), in_place_end(*leg.branch, layer)});
  for (; cursor_.block < end; ++cursor_.block) {
    cursor_.block = blocks.present_end(cursor_.block, end);
    if (cursor_.block < end && blocks.is_pooled(cursor_.block)) return true;
  }
  return false;
}

BlockKey Scheduler::key_at_cursor() const {
  return {reading_.legs()[cursor_.leg].branch, cursor_.layer % geometry_.layers, cursor_.block};
}

// Adjacent blocks in the pool from one on, all of them streamed by the plan or none.
std::uint32_t Scheduler::run_from(const BlockKey& key) {
  LayerBlocks& layer = key.branch->layers[key.layer];
  const std::uint32_t size = layer.size();
  const std::uint32_t end = key.block < layer.streamed ? std::min(layer.streamed, size) : size;
  return layer.pooled_end(key.block, end) - key.block;
}

// What is in the ring from before is kept where the step reads it too. Where a whole layer is read
// at once it must fit without a gap, so then it is all or nothing.
void Scheduler::reconcile() {
  cursor_ = {};
  ahead_ = !ring_.empty();
  if (!seek_pooled()) return;  // what is there waits for a step that reads it
  cursor_ = {};
  ahead_ = false;
  std::vector<Load> before = ring_.take_list();
  std::optional<Cursor> missing;
  std::size_t hint = 0;
  std::size_t kept = 0;
  const std::size_t count = before.size();
  while (kept < count && seek_pooled()) {
    const BlockKey key = key_at_cursor();
    std::size_t tried = 0;
    while (tried < count && !before[(hint + tried) % count].holds(key)) ++tried;
    if (tried == count) {
      if (!missing) missing = cursor_;
      cursor_.block += run_from(key);
      continue;
    }
    Load& load = before[(hint + tried) % count];
    hint = (hint + tried + 1) % count;
    cursor_.block = load.end();
    ring_.put_back(load);
    load.branch = nullptr;
    ++kept;
  }
  for (const Load& load : before) {
    if (load.branch != nullptr) ring_.drop(load);
  }
  if (missing) cursor_ = *missing;
  ahead_ = missing.has_value();
  if (shape_.whole_layers && (missing || kept < count)) {
    ring_.drop_all();
    cursor_ = {};
  }
}

// Asks for blocks in the order in which they will be read, as far as the ring has room. On a stream
// the rest of a layer goes with what there is room for of the next, since each ticket costs the
// caller calls; but not where that layer is the next to be read.
void Scheduler::pump() {
  if (ring_.empty()) ahead_ = false;
  const Load* first = ring_.first();
  bool rest = first != nullptr && first->layer != cursor_.layer % geometry_.layers &&
              (cursor_.leg > 0 || cursor_.block > 0);
  std::uint32_t layer = cursor_.layer;
  while (seek_pooled()) {
    const bool next = cursor_.layer != layer;
    if (next && capabilities_.streams && !std::exchange(rest, false)) ring_.submit();
    if (next && shape_.whole_layers) ring_.close();
    layer = cursor_.layer;
    const Load* load = ahead_ ? ring_.find(key_at_cursor()) : nullptr;
    const std::uint32_t count =
        load != nullptr ? load->end() - cursor_.block : ask(key_at_cursor(), ahead_);
    if (count == 0) break;
    cursor_.block += count;
  }
  ring_.close();
  transfers_.go_on();
}

// Into ordinary frames where the plan wants the blocks to stay and some are free, else into the
// ring. Returns how many blocks were asked for: none that a load holds, if there may be some
// beyond.
std::uint32_t Scheduler::ask(const BlockKey& key, bool beyond) {
  const std::uint32_t run = run_from(key);
  const std::uint32_t count = beyond ? ring_.gap(key, run) : run;
  if (key.block >= key.branch->layers[key.layer].streamed) {
    const FrameRun frames = map_.device().acquire_run(std::min(count, copy_frames_));
    if (frames.count > 0) {
      transfers_.load(*key.branch, key.layer, key.block, frames);
      return frames.count;
    }
  }
  return ring_.ask(*key.branch, key.layer, key.block, count);
}

// ---- the end of a step --------------------------------------------------------------------------

void Scheduler::finish() {
  end_layer();
  land();
  raise_errors();
  controller_.finish(map_.device().used(), plan_.ring_frames);
  const std::uint32_t size = geometry_.block_tokens;
  for (const Growth& growth : batch_) {
    Branch& branch = *growth.branch;
    growth.sequence->tokens += growth.new_tokens;
    branch.full = growth.sequence->tokens / size - branch.first;
    if (branch.full > branch.open) branch.open = no_frame;
  }
}

// The pool is what the system gives: what it refused it may give by now, and on a stream it is
// asked again where nobody waits.
Headroom Scheduler::headroom() {
  const std::uint32_t there = map_.pool().limit();
  const bool refused = there < pool_frames_ && !backend_.pool_refusal().empty();
  const bool given = refused && !capabilities_.streams && grow_pool(there + 1);
  std::uint64_t begun = 0;  // blocks that the next token of each sequence begins
  for (const auto& [id, sequence] : map_.sequences()) {
    begun += sequence.tokens > 0 && sequence.tokens % geometry_.block_tokens == 0 ? 1 : 0;
  }
  std::vector<BranchView> views;
  return controller_.headroom(
      snapshot(map_.device().capacity(), refused && !given ? there : pool_frames_, views),
      begun * geometry_.layers);
}

void Scheduler::look_ahead() {
  std::vector<Growth> grown = close_batch();  // what is thrown from here on finds no step
  std::erase_if(grown,
                [&](const Growth& growth) { return full_before(growth) == growth.branch->full; });
  write_together([&] {
    for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
      for (const Growth& growth : grown) write_grown(growth, layer);
    }
  });
  grow_ahead();
  pool_frames_most_ = std::max(pool_frames_most_, map_.pool().used());
  drop_unseen();
  land();
  const bool wrapped = cursor_.layer >= geometry_.layers;
  cursor_.layer -= geometry_.layers;
  if (!wrapped) cursor_ = {};
  layer_ = 0;
  wave_ = 0;
  try {
    pump();
  } catch (...) {
    ring_.drop_asked();
    throw;
  }
}

// The branch's full blocks before the step that is done.
std::uint32_t Scheduler::full_before(const Growth& growth) const {
  const std::uint32_t tokens = growth.sequence->tokens - growth.new_tokens;
  return tokens / geometry_.block_tokens - growth.branch->first;
}

// Writes the blocks of a layer that the step has filled, as far as the plan wants: from the first
// that is not written on, and of old ones no more than there are new ones, so that a step that
// comes to write behind pays for no earlier one.
void Scheduler::write_grown(const Growth& growth, std::uint32_t layer) {
  Branch& branch = *growth.branch;
  const std::uint32_t before = full_before(growth);
  LayerBlocks& blocks = branch.layers[layer];
  blocks.written = std::min(blocks.written, before);
  const std::uint32_t behind = blocks.written + 2 * (branch.full - before);
  const std::uint32_t wanted = plan_.write_behind ? behind : 0;
  write_full(branch, layer, std::min(branch.full, std::max(wanted, blocks.streamed)));
}

void Scheduler::abort() {
  controller_.abort();
  end_layer();  // whatever it has come to
  ring_.drop_all();
  stop_prefetch();
  for (const Growth& growth : batch_) {
    const std::uint32_t blocks = geometry_.blocks_of(growth.sequence->tokens);
    if (growth.branch != nullptr && !growth.branch->users.empty())
      cut(*growth.branch, blocks - growth.branch->first);
  }
  close_batch();
}

// What is prefetched stays where it is; no more is asked for.
void Scheduler::stop_prefetch() {
  ring_.drop_asked();  // where asking was interrupted
  reading_.clear();
  cursor_ = {};
  layer_ = 0;
  wave_ = 0;
}

// ---- completions --------------------------------------------------------------------------------

// What the plan streams leaves the device once it is in the pool; of the layer that runs, when that
// has read it.
void Scheduler::land() {
  for (const Landed& landed : transfers_.land()) {
    const std::uint32_t end = landed.first_block + landed.count;
    if (landed.lane == Lane::pool_to_device) continue;
    written_.push_back({landed.branch->id, landed.layer, landed.first_block, end});
  }
  ring_.land();
  evict_written(running_);
}

void Scheduler::wait() {
  const Nanos began = backend_.now();
  transfers_.wait();
  controller_.add_stall(began);
  land();
}

void Scheduler::settle(const Branch& branch) {
  if (capabilities_.streams) land();  // what was submitted is not to name the branch any more
  while (branch.in_flight > 0) wait();
}

void Scheduler::drain() {
  while (transfers_.any()) wait();
}

// Tells the first failure of a sequence of the batch, once.
void Scheduler::raise_errors() {
  for (const Growth& growth : batch_) {
    if (!transfers_.troubled()) break;
    for (Branch* branch : growth.sequence->path) {
      if (!branch->error.empty()) raise_error(*branch);
    }
  }
  const Health health = backend_.health();
  if (!health.ok) throw IoError("The device is lost: " + health.first_error);
  if (!transfers_.lost().empty()) throw IoError("The device is lost: " + transfers_.lost());
}

// Where the last transfer under way has failed for good, what would make room cannot be written:
// though it is of no sequence of the batch, trying it again and again would never end.
void Scheduler::wait_for_room() {
  const std::uint64_t before = transfers_.given_up();
  wait();
  raise_errors();
  if (transfers_.given_up() == before || transfers_.any()) return;
  for (auto& [id, branch] : map_.branches()) {
    if (!branch.error.empty()) raise_error(branch);
  }
}

// In the name of a sequence that the branch belongs to, of the batch if one is there.
void Scheduler::raise_error(Branch& branch) {
  SequenceId named = 0;
  for (const auto& [id, sequence] : map_.sequences()) {
    if (std::ranges::find(sequence.path, &branch) == sequence.path.end()) continue;
    if (named == 0 || sequence.gain > 0) named = id;
  }
  throw IoError("Sequence " + std::to_string(named) + ": " + transfers_.take_error(branch), named);
}

void Scheduler::check() const {
  map_.check();
  transfers_.check();
  ring_.check();
  for (const auto& [id, branch] : map_.branches()) {
    for (std::uint32_t window = 0; window < classes_.size(); ++window) {
      require(streamed_frames(branch, window) == count_streamed(branch, window),
              "check: a branch's boundary is not where its layers have it.");
    }
  }
}

}  // namespace pie
