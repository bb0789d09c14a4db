// The ring: device frames through which streamed blocks pass, and the list of what is fetched.
//
// A streamed block stays in the pool. Each time it is to be read, a load copies it, with blocks
// next to it, into adjacent frames of the ring. Loads are asked for in the order of reading and
// fill one segment of the ring after another. Where the caller computes, a ticket of many copies
// fills a segment; on a stream, where each costs the caller calls, all that a layer left when it
// was read. A segment is filled anew once all its loads were read, or dropped, after the fence
// behind its readers and after the copies into it that are still under way: so nobody waits before
// the segment is read.
//
// The ring lies at the end of the arena and its segments are counted from there, so that it grows
// and shrinks, by segments, without moving what is in it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "block_map.hpp"
#include "pie/backend.hpp"
#include "transfers.hpp"

namespace pie {

// Adjacent pooled blocks of one layer of one branch, copied to adjacent frames to be read once.
struct Load {
  Branch* branch = nullptr;
  std::uint32_t layer = 0;
  std::uint32_t first_block = 0;
  std::uint32_t count = 0;
  FrameIndex device = no_frame;
  std::uint32_t segment = 0;
  Ticket ticket = {};
  std::uint32_t tries = 1;

  [[nodiscard]] std::uint32_t end() const { return first_block + count; }
  [[nodiscard]] bool is_of(const Branch& other, std::uint32_t other_layer) const {
    return branch == &other && layer == other_layer;
  }
  [[nodiscard]] bool holds(const BlockKey& key) const {
    return is_of(*key.branch, key.layer) && key.block >= first_block && key.block < end();
  }
};

class Ring {
 public:
  Ring(Transfers& transfers, bool streams) : transfers_(transfers), streams_(streams) {}

  // Lies in `frames`, which end where the arena does, in segments of `segment_frames`. What is in
  // segments that stay, stays. Frames that it gives up may still be copied into: see `strays`.
  void reshape(FrameRun frames, std::uint32_t segment_frames);

  [[nodiscard]] FrameRun frames() const { return frames_; }
  [[nodiscard]] std::uint32_t segment_frames() const { return segment_frames_; }
  [[nodiscard]] std::uint32_t frames_in_use() const;

  // Whether copies into frames that it gave up are under way.
  [[nodiscard]] bool strays() const;

  // Has blocks fetched, as many of them as the segment that is being filled still holds, or else
  // the next free one; returns how many, 0 where no segment is free. Copies start with `submit`, or
  // with `close`, which gives up the rest of the segment, or where the caller computes when the
  // segment is full.
  std::uint32_t ask(Branch& branch, std::uint32_t layer, std::uint32_t first_block,
                    std::uint32_t count);
  void submit();
  void close();

  // The load that holds a block and was not taken; null: there is none.
  [[nodiscard]] const Load* find(const BlockKey& key) const;
  // The first that was not taken; null: none.
  [[nodiscard]] const Load* first() const { return empty() ? nullptr : &queue_[next_load_]; }
  [[nodiscard]] bool empty() const { return next_load_ == queue_.size(); }

  // Of `count` blocks from one on, how many come before the first that a load holds.
  [[nodiscard]] std::uint32_t gap(const BlockKey& from, std::uint32_t count) const;

  // Whether the copy of a load has ended.
  [[nodiscard]] bool arrived(const Load& load) const;

  // Takes a load off the list, for the caller to read. With `order`, has the stream wait for it.
  Load take(const Load* load, bool order);

  // All that was taken is read by what the stream was given so far.
  void release();

  // Drops loads that nobody took.
  void drop_all();
  void drop_asked();  // those that were asked for and not started
  void drop(const Branch& branch);
  void drop(const BlockKey& key);
  void cut(const Branch& branch, std::uint32_t keep);  // blocks beyond the first `keep`
  // Blocks [0, end) of a layer are read no more.
  void trim(const Branch& branch, std::uint32_t layer, std::uint32_t end);
  // All of the segment whose turn comes last; false where there are none.
  [[nodiscard]] bool drop_last();

  // The list anew: what is put back of what was asked for, in the order of reading.
  [[nodiscard]] std::vector<Load> take_list();
  void put_back(const Load& load) { queue_.push_back(load); }
  void drop(const Load& load) { --segments_[load.segment].unread; }

  // Pool frames of blocks [begin, end) may come to be nobody's or another branch's: copies out of
  // them go on.
  void guard_pool(const Branch& branch, std::uint32_t layer, std::uint32_t begin,
                  std::uint32_t end);
  void guard_pool(const Branch& branch);

  // Applies the ends of copies. A load that fails is tried again by itself, then dropped, and its
  // branch keeps the error.
  void land();

  // Throws LogicError where loads, segments and the block map do not agree.
  void check() const;

 private:
  struct Segment {
    FrameRun frames;
    std::uint32_t filled = 0;  // frames
    std::uint32_t unread = 0;  // loads not taken
    std::uint32_t taken = 0;   // loads taken and not released
    bool fresh = true;         // its frames were others' before
    Fence readers = {};
  };

  // A ticket under way: its loads as they were asked for.
  struct Flight {
    Ticket ticket;
    std::uint32_t segments = 0;  // that it fills, a bit each
    bool strays = false;         // some of what it fills was given up
    std::vector<Load> loads;
  };

  // Drops what `drops` says of, which may change what it is shown.
  template <typename Change>
  void change(const Change& drops);
  [[nodiscard]] bool open();
  [[nodiscard]] std::span<const Load> waiting() const {
    return std::span(queue_).subspan(next_load_);
  }
  void forget_taken();
  Ticket start(std::uint32_t into, std::vector<Load> loads);
  void list_deps(std::uint32_t into);
  void retry(const Completion& completion);
  void leave(std::uint32_t first_segment);

  static constexpr std::uint32_t no_segment = 0xffffffff;
  static constexpr std::uint32_t segments_max = 31;

  Transfers& transfers_;
  const bool streams_;
  FrameRun frames_;
  std::uint32_t segment_frames_ = 0;
  std::vector<Segment> segments_;
  std::vector<Load> queue_;    // in the order of reading
  std::size_t next_load_ = 0;  // in the queue; those before it were taken
  std::vector<Flight> flights_;
  std::vector<Load> asked_;  // not submitted
  std::vector<Load> spare_;  // empty; kept for its memory, as are the next two between calls
  std::vector<Copy> copies_;
  std::vector<Dep> deps_;
  std::uint32_t open_ = no_segment;
  std::uint32_t next_ = 0;   // where the search for a free segment starts
  std::uint32_t taken_ = 0;  // loads, in all segments
  Ticket ordered_;           // the last that the stream was made to wait for
};

}  // namespace pie
