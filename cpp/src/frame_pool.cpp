// The bitmap behind FramePool, in two levels: word-wise searches, no allocation after construction.
#include "frame_pool.hpp"

#include <algorithm>
#include <bit>

#include "pie/error.hpp"

namespace pie {

namespace {

constexpr std::uint32_t word_bits = 64;

// A search for a long run settles for the longest of this many: in a pool cut into single frames a
// full search costs milliseconds and finds nothing.
constexpr std::uint32_t runs_max = 256;

std::uint32_t words_for(std::uint32_t bits) { return (bits + word_bits - 1) / word_bits; }
std::uint32_t word_of(std::uint32_t bit) { return bit / word_bits; }
std::uint64_t bit_of(std::uint32_t bit) { return std::uint64_t{1} << (bit % word_bits); }
std::uint32_t lowest_bit(std::uint64_t word) {
  return static_cast<std::uint32_t>(std::countr_zero(word));
}

}  // namespace

FramePool::FramePool(std::uint32_t capacity, std::uint32_t limit)
    : capacity_(capacity), bits_(words_for(capacity)), groups_(words_for(words_for(capacity))) {
  require(limit <= capacity, "FramePool: limit is above capacity.");
  set_limit(limit);
}

void FramePool::mark(FrameIndex frame, bool free) {
  const std::uint32_t word = word_of(frame);
  if (free) {
    bits_[word] |= bit_of(frame);
    groups_[word_of(word)] |= bit_of(word);
    lowest_group_ = std::min(lowest_group_, word_of(word));
    ++free_;
  } else {
    bits_[word] &= ~bit_of(frame);
    if (bits_[word] == 0) groups_[word_of(word)] &= ~bit_of(word);
    --free_;
  }
}

bool FramePool::is_free(FrameIndex frame) const {
  return frame < limit_ && (bits_[word_of(frame)] & bit_of(frame)) != 0;
}

FrameIndex FramePool::acquire() {
  if (free_ == 0) return no_frame;
  while (groups_[lowest_group_] == 0) ++lowest_group_;
  const std::uint32_t word = lowest_group_ * word_bits + lowest_bit(groups_[lowest_group_]);
  const FrameIndex frame = word * word_bits + lowest_bit(bits_[word]);
  mark(frame, false);
  return frame;
}

// The highest run of free frames that ends at or below `end`; count 0 where there is none.
FrameRun FramePool::next_run_below(FrameIndex end) const {
  const auto run_of_bits = [this](FrameIndex below, bool free) {
    // Highest frame under `below` whose bit equals `free`, plus one; 0 where there is none.
    while (below > 0) {
      const FrameIndex last = below - 1;
      const std::uint64_t word = free ? bits_[word_of(last)] : ~bits_[word_of(last)];
      const std::uint64_t under = word & (~std::uint64_t{0} >> (word_bits - 1 - last % word_bits));
      const FrameIndex base = word_of(last) * word_bits;
      if (under != 0) {
        return base + word_bits - static_cast<std::uint32_t>(std::countl_zero(under));
      }
      below = base;
    }
    return FrameIndex{0};
  };
  const FrameIndex top = run_of_bits(end, true);
  if (top == 0) return {};
  const FrameIndex bottom = run_of_bits(top, false);
  return {bottom, top - bottom};
}

// Next fit, downwards from where the last run was taken and once around: a ring that is released in
// the order it was taken stays in adjacent pieces.
FrameRun FramePool::find_run(std::uint32_t want, FrameIndex floor) const {
  FrameRun best;
  std::uint32_t looked_at = 0;
  for (const FrameIndex start : {std::min(run_end_, limit_), limit_}) {
    for (FrameIndex end = start; end > floor;) {
      FrameRun run = next_run_below(end);
      if (run.count == 0 || run.end() <= floor) break;
      end = run.first;
      run = {std::max(run.first, floor), run.end() - std::max(run.first, floor)};
      if (run.count > best.count) best = run;
      if (best.count >= want || ++looked_at == runs_max) return best;
    }
  }
  return best;
}

FrameRun FramePool::acquire_run(std::uint32_t want, FrameIndex floor) {
  if (free_ == 0 || want == 0) return {};
  FrameRun best = find_run(want, floor);
  if (best.count == 0) best = find_run(want, 0);
  const std::uint32_t count = std::min(best.count, want);
  const FrameRun taken{best.end() - count, count};
  for (FrameIndex frame = taken.first; frame < taken.end(); ++frame) mark(frame, false);
  run_end_ = taken.first == 0 ? limit_ : taken.first;
  return taken;
}

void FramePool::release(FrameIndex frame) {
  if (!retired_.empty() && retired_.erase(frame) > 0) return;
  require(frame < limit_ && !is_free(frame), "FramePool::release: the frame is not in use.");
  mark(frame, true);
}

void FramePool::release(FrameRun run) {
  for (FrameIndex frame = run.first; frame < run.end(); ++frame) release(frame);
}

void FramePool::set_limit(std::uint32_t limit) {
  require(limit <= capacity_, "FramePool::set_limit: the limit is above capacity.");
  for (FrameIndex frame = limit; frame < limit_; ++frame) {
    require(is_free(frame), "FramePool::set_limit: a frame to give up is in use.");
  }
  for (FrameIndex frame = limit; frame < limit_; ++frame) mark(frame, false);
  for (FrameIndex frame = limit_; frame < limit; ++frame) {
    if (retired_.erase(frame) == 0) mark(frame, true);
  }
  limit_ = limit;
  run_end_ = limit;
  lowest_group_ = 0;
}

void FramePool::retire(std::uint32_t limit) {
  try {
    for (FrameIndex frame = limit; frame < limit_; ++frame) {
      if (!is_free(frame)) retired_.insert(frame);
    }
  } catch (...) {
    std::erase_if(retired_, [&](FrameIndex frame) { return frame < limit_; });
    throw;
  }
  for (FrameIndex frame = limit; frame < limit_; ++frame) {
    if (is_free(frame)) mark(frame, false);
  }
  limit_ = std::min(limit_, limit);
  run_end_ = limit_;
  lowest_group_ = 0;
}

void FramePool::resize(std::uint32_t capacity, std::uint32_t limit) {
  bits_.reserve(words_for(capacity));
  groups_.reserve(words_for(words_for(capacity)));
  set_limit(std::min(limit, capacity_));
  require(limit_ <= capacity && retired_.empty(),
          "FramePool::resize: a frame to give up is in use.");
  capacity_ = capacity;
  bits_.resize(words_for(capacity));
  groups_.resize(words_for(words_for(capacity)));
  set_limit(limit);
}

void FramePool::check() const {
  std::uint32_t counted = 0;
  for (const std::uint64_t word : bits_) counted += static_cast<std::uint32_t>(std::popcount(word));
  require(counted == free_, "FramePool::check: the bitmap and the count of free frames differ.");
  for (std::uint32_t word = 0; word < bits_.size(); ++word) {
    const bool some = (groups_[word_of(word)] & bit_of(word)) != 0;
    require(some == (bits_[word] != 0), "FramePool::check: a group of the bitmap is wrong.");
  }
  require(free_ <= limit_, "FramePool::check: more frames are free than usable.");
  for (FrameIndex frame = limit_; frame < capacity_; ++frame) {
    require((bits_[word_of(frame)] & bit_of(frame)) == 0,
            "FramePool::check: a reserved frame is marked free.");
  }
}

}  // namespace pie
