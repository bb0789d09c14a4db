// Which frames of one tier are free: a bitmap that hands out single frames and adjacent runs.
//
// Singles come from the bottom and runs from the top, so that long-lived tails do not cut up the
// space that streaming wants in large adjacent pieces. Frames at or above `limit()` are reserved:
// they belong to whoever lowered the limit.
#pragma once

#include <cstdint>
#include <unordered_set>
#include <vector>

#include "pie/types.hpp"

namespace pie {

class FramePool {
 public:
  // Frames [0, limit) are free, [limit, capacity) reserved.
  FramePool(std::uint32_t capacity, std::uint32_t limit);

  // The lowest free frame, or no_frame.
  FrameIndex acquire();

  // A run of 1 to `want` adjacent frames at or above `floor`: the first from the top that holds
  // `want`, else the longest there is. Where nothing is free there, one below; `count` 0 where
  // nothing is free at all.
  FrameRun acquire_run(std::uint32_t want, FrameIndex floor = 0);

  // Throws LogicError for a frame that is not in use.
  void release(FrameIndex frame);
  void release(FrameRun run);

  // Moves the boundary between usable and reserved frames. Lowering it throws LogicError unless all
  // frames given up are free.
  void set_limit(std::uint32_t limit);

  // Lowers the limit where frames above it may be in use: none of them is handed out any more, and
  // they stay in use until they are released. `set_limit` takes that back.
  void retire(std::uint32_t limit);

  // Moves the capacity and, to it, the limit. Throws LogicError unless all frames given up are
  // free.
  void resize(std::uint32_t capacity, std::uint32_t limit);

  [[nodiscard]] bool is_free(FrameIndex frame) const;
  [[nodiscard]] std::uint32_t capacity() const { return capacity_; }
  [[nodiscard]] std::uint32_t limit() const { return limit_; }
  [[nodiscard]] std::uint32_t reserved() const { return capacity_ - limit_; }
  [[nodiscard]] std::uint32_t free() const { return free_; }
  [[nodiscard]] std::uint32_t used() const {
    return limit_ - free_ + static_cast<std::uint32_t>(retired_.size());
  }

  // free + used + reserved == capacity, counted in the bitmap. Throws LogicError.
  void check() const;

 private:
  void mark(FrameIndex frame, bool free);
  [[nodiscard]] FrameRun next_run_below(FrameIndex end) const;
  [[nodiscard]] FrameRun find_run(std::uint32_t want, FrameIndex floor) const;

  std::uint32_t capacity_;
  std::uint32_t limit_ = 0;
  std::uint32_t free_ = 0;
  std::uint32_t lowest_group_ = 0;          // no free frame lies in a group of words below this one
  FrameIndex run_end_ = 0;                  // where the search for the next run starts, downwards
  std::vector<std::uint64_t> bits_;         // 1: free
  std::vector<std::uint64_t> groups_;       // by word of `bits_`; 1: some frame in it is free
  std::unordered_set<FrameIndex> retired_;  // at or above the limit, and still in use
};

}  // namespace pie
