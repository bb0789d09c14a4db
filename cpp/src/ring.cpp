// Segments filled, read and filled anew.
#include "ring.hpp"

#include <algorithm>
#include <ranges>
#include <utility>

#include "pie/error.hpp"

namespace pie {

// ---- where it lies ------------------------------------------------------------------------------

void Ring::reshape(FrameRun frames, std::uint32_t segment_frames) {
  if (frames == frames_ && segment_frames == segment_frames_) return;
  const std::uint32_t count = (frames.count + segment_frames - 1) / segment_frames;
  require(count <= segments_max, "Ring::reshape: more segments than a flight can name.");
  segments_.reserve(count);  // there may be no memory for it
  const bool same = frames.end() == frames_.end() && segment_frames == segment_frames_;
  frames_ = frames;
  std::uint32_t stays = 0;
  const auto run_of = [&](std::uint32_t index) {
    const std::uint32_t above = index * segment_frames;
    const std::uint32_t size = std::min(segment_frames, frames.count - above);
    return FrameRun{frames.end() - above - size, size};
  };
  while (same && stays < std::min<std::size_t>(count, segments_.size()) &&
         segments_[stays].frames == run_of(stays)) {
    ++stays;
  }
  leave(stays);
  segment_frames_ = segment_frames;
  for (std::uint32_t i = stays; i < count; ++i) segments_.push_back({run_of(i)});
  next_ = 0;
}

// Gives up the segments from `first` on, with what is in them.
void Ring::leave(std::uint32_t first) {
  forget_taken();
  std::erase_if(queue_, [&](const Load& load) { return load.segment >= first; });
  for (Flight& flight : flights_) {
    const std::uint32_t left = flight.segments >> first << first;
    flight.segments &= ~left;
    flight.strays = flight.strays || left != 0;
    for (const Load& load : flight.loads) {
      if ((left >> load.segment & 1U) == 0) continue;
      for (std::uint32_t i = 0; i < load.count; ++i) {
        transfers_.guard_device(load.device + i, flight.ticket);
      }
    }
  }
  segments_.resize(std::min<std::size_t>(first, segments_.size()));
}

std::uint32_t Ring::frames_in_use() const {
  std::uint32_t frames = 0;
  for (const Segment& segment : segments_) {
    if (segment.unread + segment.taken > 0) frames += segment.filled;
  }
  return frames;
}

bool Ring::strays() const { return std::ranges::any_of(flights_, &Flight::strays); }

// ---- asking -------------------------------------------------------------------------------------

bool Ring::open() {
  const auto count = static_cast<std::uint32_t>(segments_.size());
  for (std::uint32_t i = 0; i < count; ++i) {
    const std::uint32_t index = (next_ + i) % count;
    Segment& segment = segments_[index];
    if (segment.unread + segment.taken > 0) continue;
    segment.filled = 0;
    open_ = index;
    next_ = (index + 1) % count;
    return true;
  }
  return false;
}

std::uint32_t Ring::ask(Branch& branch, std::uint32_t layer, std::uint32_t first_block,
                        std::uint32_t count) {
  if (open_ == no_segment && !open()) return 0;
  Segment& segment = segments_[open_];
  const std::uint32_t fits = std::min(count, segment.frames.count - segment.filled);
  asked_.push_back(
      {&branch, layer, first_block, fits, segment.frames.first + segment.filled, open_, {}});
  segment.filled += fits;
  ++segment.unread;
  if (segment.filled < segment.frames.count) return fits;
  open_ = no_segment;
  if (!streams_) submit();
  return fits;
}

void Ring::close() {
  open_ = no_segment;
  submit();
}

void Ring::submit() {
  if (asked_.empty()) return;
  std::vector<Load> loads = std::exchange(asked_, std::exchange(spare_, {}));
  if (2 * next_load_ > queue_.size()) forget_taken();
  const std::size_t before = queue_.size();
  try {
    std::uint32_t into = 0;
    for (const Load& load : loads) into |= 1U << load.segment;
    list_deps(into);
    queue_.insert(queue_.end(), loads.begin(), loads.end());
    const Ticket ticket = start(into, std::move(loads));
    for (std::size_t i = before; i < queue_.size(); ++i) queue_[i].ticket = ticket;
  } catch (...) {
    for (const Load& load : loads) drop(load);  // those that were not handed on
    for (std::size_t i = before; i < queue_.size(); ++i) drop(queue_[i]);
    queue_.resize(before);
    throw;
  }
}

// What copies into segments, a bit each, wait for.
void Ring::list_deps(std::uint32_t into) {
  deps_.clear();
  bool fresh = false;
  for (std::uint32_t i = 0; i < segments_.size(); ++i) {
    if ((into >> i & 1U) == 0) continue;
    const Segment& segment = segments_[i];
    fresh = fresh || segment.fresh;
    const auto same = [&](const Dep& dep) { return dep.fence == segment.readers; };
    if (!segment.fresh && std::ranges::none_of(deps_, same)) deps_.push_back({segment.readers, {}});
    for (std::uint32_t f = 0; segment.fresh && streams_ && f < segment.frames.count; ++f) {
      transfers_.add_guards(segment.frames.first + f, deps_);
    }
  }
  if (fresh && streams_) deps_.push_back({transfers_.fence(), {}});
  // From the last on: on a stream the last copies into a segment wait for those before them, and
  // the host runs far ahead of all.
  for (const Flight& flight : flights_ | std::views::reverse) {
    const bool stray = fresh && flight.strays;
    if (!stray && (flight.segments & into) == 0) continue;
    deps_.push_back({{}, flight.ticket});
    if (streams_) into &= ~flight.segments;
  }
}

// One ticket for loads into these segments, after what is listed.
Ticket Ring::start(std::uint32_t into, std::vector<Load> loads) {
  copies_.clear();
  for (const Load& load : loads) {
    const PoolRun* run = &load.branch->layers[load.layer].run_at(load.first_block);
    for (std::uint32_t block = load.first_block; block < load.end(); block = run++->end()) {
      const std::uint32_t count = std::min(run->end(), load.end()) - block;
      add_copy({{Tier::pool, run->pool + block - run->first_block},
                {Tier::device, load.device + block - load.first_block},
                count},
               copies_);
    }
  }
  flights_.reserve(flights_.size() + 1);  // from here on nothing is forgotten
  const Ticket ticket = transfers_.fetch(copies_, deps_, loads.front().layer);
  for (const Load& load : loads) segments_[load.segment].fresh = false;
  flights_.push_back({ticket, into, false, std::move(loads)});
  return ticket;
}

// ---- reading ------------------------------------------------------------------------------------

void Ring::forget_taken() {
  queue_.erase(queue_.begin(), queue_.begin() + static_cast<std::ptrdiff_t>(next_load_));
  next_load_ = 0;
}

const Load* Ring::find(const BlockKey& key) const {
  for (const Load& load : waiting()) {
    if (load.holds(key)) return &load;
  }
  return nullptr;
}

bool Ring::arrived(const Load& load) const {
  return std::ranges::find(flights_, load.ticket, &Flight::ticket) == flights_.end();
}

Load Ring::take(const Load* load, bool order) {
  const Load taken = *load;
  if (order && taken.ticket != ordered_) {
    if (!arrived(taken)) transfers_.depend(taken.ticket);
    ordered_ = taken.ticket;
  }
  Segment& segment = segments_[taken.segment];
  --segment.unread;
  ++segment.taken;
  ++taken_;
  if (load == &queue_[next_load_]) {
    ++next_load_;
  } else {
    queue_.erase(queue_.begin() + (load - queue_.data()));
  }
  return taken;
}

void Ring::release() {
  if (taken_ == 0) return;
  const Fence readers = transfers_.fence();
  for (Segment& segment : segments_) {
    if (segment.taken == 0) continue;
    segment.readers = readers;
    segment.taken = 0;
  }
  taken_ = 0;
}

// ---- dropping -----------------------------------------------------------------------------------

void Ring::drop_all() {
  drop_asked();
  queue_.clear();
  next_load_ = 0;
  for (Segment& segment : segments_) segment.unread = 0;
}

void Ring::drop_asked() {
  for (const Load& load : asked_) drop(load);
  asked_.clear();
  open_ = no_segment;
}

template <typename Change>
void Ring::change(const Change& drops) {
  forget_taken();
  std::erase_if(queue_, [&](Load& load) {
    if (!drops(load)) return false;
    drop(load);
    return true;
  });
}

void Ring::drop(const Branch& branch) {
  change([&](const Load& load) { return load.branch == &branch; });
}

std::uint32_t Ring::gap(const BlockKey& from, std::uint32_t count) const {
  for (const Load& load : waiting()) {
    if (load.branch != from.branch || load.layer != from.layer || load.end() <= from.block)
      continue;
    count = std::min(count, load.first_block - std::min(load.first_block, from.block));
  }
  return count;
}

void Ring::drop(const BlockKey& key) {
  change([&](const Load& load) { return load.holds(key); });
}

void Ring::cut(const Branch& branch, std::uint32_t keep) {
  change([&](Load& load) {
    if (load.branch != &branch || load.end() <= keep) return false;
    load.count = keep - std::min(keep, load.first_block);
    return load.count == 0;
  });
}

void Ring::trim(const Branch& branch, std::uint32_t layer, std::uint32_t end) {
  change([&](Load& load) {
    if (!load.is_of(branch, layer) || load.first_block >= end) return false;
    const std::uint32_t gone = std::min(end - load.first_block, load.count);
    load.first_block += gone;
    load.device += gone;
    load.count -= gone;
    return load.count == 0;
  });
}

bool Ring::drop_last() {
  if (empty()) return false;
  const std::uint32_t segment = queue_.back().segment;
  change([&](const Load& load) { return load.segment == segment; });
  return true;
}

std::vector<Load> Ring::take_list() {
  forget_taken();
  return std::exchange(queue_, {});
}

void Ring::guard_pool(const Branch& branch, std::uint32_t layer, std::uint32_t begin,
                      std::uint32_t end) {
  for (const Flight& flight : flights_) {
    for (const Load& load : flight.loads) {
      if (!load.is_of(branch, layer)) continue;
      const std::vector<Block>& blocks = branch.layers[layer].blocks;
      for (auto b = std::max(begin, load.first_block); b < std::min(end, load.end()); ++b) {
        if (blocks[b].pool != no_frame) transfers_.guard_pool(blocks[b].pool, flight.ticket);
      }
    }
  }
}

void Ring::guard_pool(const Branch& branch) {
  for (std::uint32_t layer = 0; !flights_.empty() && layer < branch.layers.size(); ++layer) {
    guard_pool(branch, layer, 0, static_cast<std::uint32_t>(branch.layers[layer].blocks.size()));
  }
}

// ---- completions --------------------------------------------------------------------------------

void Ring::land() {
  while (!transfers_.fetched().empty()) {
    const Completion completion = transfers_.fetched().back();
    transfers_.fetched().pop_back();
    const auto flight = std::ranges::find(flights_, completion.ticket, &Flight::ticket);
    if (flight->loads.capacity() > spare_.capacity()) spare_ = std::move(flight->loads);
    spare_.clear();
    flights_.erase(flight);
    if (completion.status != Status::ok && !streams_) retry(completion);
  }
}

// Each load by itself, waiting for no other, so that one that cannot be read is nobody else's
// trouble.
void Ring::retry(const Completion& completion) {
  std::vector<Load> failed;
  change([&](const Load& load) {
    if (load.ticket != completion.ticket) return false;
    failed.push_back(load);
    return true;
  });
  for (Load& load : failed | std::views::reverse) {
    if (load.tries == tries_max) {
      transfers_.fail(*load.branch,
                      {Lane::pool_to_device, load.branch, load.layer, load.first_block, load.count},
                      completion);
      continue;
    }
    ++load.tries;
    transfers_.count_retry();
    deps_.clear();
    queue_.insert(queue_.begin(), load);
    ++segments_[load.segment].unread;
    try {
      queue_.front().ticket = start(1U << load.segment, {load});
    } catch (...) {
      drop(load);
      queue_.erase(queue_.begin());
      throw;
    }
  }
}

void Ring::check() const {
  std::vector<std::uint32_t> unread(segments_.size());
  for (const Load& load : waiting()) {
    ++unread.at(load.segment);
    const FrameRun frames = segments_[load.segment].frames;
    require(load.device >= frames.first && load.device + load.count <= frames.end(),
            "check: a load lies outside its segment.");
    for (std::uint32_t b = load.first_block; b < load.end(); ++b) {
      require(BlockMap::at({load.branch, load.layer, b}).state == BlockState::pooled,
              "check: a load holds a block that is not in the pool alone.");
    }
  }
  std::uint32_t frames = 0;
  for (std::size_t i = 0; i < segments_.size(); ++i) {
    require(unread[i] == segments_[i].unread, "check: a segment's count of loads is wrong.");
    frames += segments_[i].frames.count;
  }
  require(frames == frames_.count && asked_.empty(), "check: the segments are not the ring.");
}

}  // namespace pie
