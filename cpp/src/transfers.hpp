// Copies under way: which blocks each ticket moves, and what its end means for them.
//
// The only caller of Backend::submit and poll. Where the calling thread computes, blocks are in
// flight until their copy has ended; one that fails is tried again a bounded number of times, then
// its blocks go back to where they were and the first error is kept on their branch.
//
// Where compute is on a stream nobody waits: a block counts as moved when its copy is submitted,
// and frames of both tiers keep guards, the tickets that must pass before what comes next. What is
// copied waits for them by `after`, what is computed by `depend`. Readers need no guard: a copy
// into a frame waits for all that the stream was given before it. A copy that fails there means a
// lost device, since compute is enqueued behind it already.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "block_map.hpp"
#include "event_log.hpp"
#include "pie/backend.hpp"

namespace pie {

// Adjacent blocks of one layer of one branch that one ticket moves, and that have landed once their
// copy has ended well.
struct Landed {
  Lane lane = Lane::pool_to_device;
  Branch* branch = nullptr;
  std::uint32_t layer = 0;
  std::uint32_t first_block = 0;
  std::uint32_t count = 0;
};

// How often a copy is tried before it is given up.
inline constexpr std::uint32_t tries_max = 3;

// Adds a copy to a list, to the last copy there where it goes on from that in both tiers.
void add_copy(const Copy& copy, std::vector<Copy>& copies);

// What went one way, and how long at least one copy of it was under way. As far as both ends of
// that time are known, it is also counted as timed.
struct Traffic {
  std::uint64_t frames = 0;
  Nanos busy_ns = 0;
  std::uint64_t timed_frames = 0;
  Nanos timed_ns = 0;
  Nanos ended_ns = 0;  // the last that ended
  bool exact = true;   // and whether that is when it did
};

class Transfers {
 public:
  Transfers(Backend& backend, BlockMap& map);

  // Loads pooled blocks from `first_block` into `device`, one a frame, as one ticket.
  void load(Branch& branch, std::uint32_t layer, std::uint32_t first_block, FrameRun device);

  // Writes dirty blocks from `first_block` to `pool_frames`, one a frame, as one ticket. Where it
  // is `optional`, since the blocks stay on the device, a failure is counted and no error.
  void write(Branch& branch, std::uint32_t layer, std::uint32_t first_block,
             const std::vector<FrameIndex>& pool_frames, bool optional);

  // On a stream: what is written from here on is one ticket, or a few where it is much, which
  // `submit_writes` submits and `drop_writes` takes back. Between them those blocks are neither
  // clean nor dirty.
  void hold_writes() { holding_ = streams_; }
  void submit_writes();
  void drop_writes();

  // Copies from the pool into frames that no block owns, `after` what is told and the writes of
  // what is copied. Its end is told by `fetched`. `layer` is that of the first.
  [[nodiscard]] Ticket fetch(std::span<const Copy> copies, std::vector<Dep>& after,
                             std::uint32_t layer);
  [[nodiscard]] std::vector<Completion>& fetched() { return fetched_; }

  // What blocks are filled by: what is copied out of them waits for what that was given so far.
  void set_stream(ComputeStream stream) { stream_ = stream; }
  [[nodiscard]] Fence fence() { return backend_.record(stream_, Timing::unwanted); }

  // What the stream is about to do with a device frame: it is made to wait where it must.
  void before_read(FrameIndex device);
  void before_write(FrameIndex device);
  void before_read_pool(FrameRun pool);
  void depend(Ticket ticket);

  // How long streams have waited for copies, as far as it is known yet.
  [[nodiscard]] Nanos stall_ns() const { return stall_ns_; }

  // A place on the stream: when it passed, once that is known, and then no more.
  [[nodiscard]] Fence mark();
  [[nodiscard]] std::optional<Nanos> take_mark(Fence fence);
  void drop_mark(Fence fence);

  // Where copies and what streams wait are recorded, if anybody wants that.
  [[nodiscard]] EventLog& log() { return log_; }

  // To the device, and to the pool.
  [[nodiscard]] const Traffic& loads() const { return loads_; }
  [[nodiscard]] const Traffic& writes() const { return writes_; }

  // Whether what a stream's device frame holds is still being copied to the pool.
  [[nodiscard]] bool departs(FrameIndex device) const {
    return device != no_frame && under_way(guards_[device].departure);
  }

  // Adds what copies into a device frame must wait for.
  void add_guards(FrameIndex device, std::vector<Dep>& after) const;

  // `ticket` uses a frame that nobody owns any more.
  void guard_device(FrameIndex device, Ticket ticket) { guards_[device] = {ticket, {}}; }
  void guard_pool(FrameIndex pool, Ticket ticket);

  // Keeps the first failure of a branch, in words.
  void fail(Branch& branch, const Landed& copy, const Completion& completion);
  void count_retry() { ++retries_; }

  // Applies what has ended, or was submitted to a stream, and returns it; good until the next call.
  const std::vector<Landed>& land();

  // Lets what was submitted begin, where the calling thread has to do that.
  void go_on() {
    if (!streams_ && any()) backend_.poll({});
  }

  // Waits until something has ended, or a while.
  void wait();

  [[nodiscard]] bool any() const { return !in_flight_.empty() || !fetching_.empty(); }
  [[nodiscard]] std::uint64_t loaded_frames() const { return loaded_frames_; }
  [[nodiscard]] std::uint64_t written_frames() const { return written_frames_; }
  [[nodiscard]] std::uint64_t started_writes() const { return started_writes_; }
  [[nodiscard]] std::uint64_t retries() const { return retries_; }
  [[nodiscard]] std::uint64_t given_up() const { return given_up_; }
  [[nodiscard]] std::uint64_t failed_writes() const { return failed_writes_; }

  // Loads into frames of blocks that a stream may have to wait for.
  [[nodiscard]] bool loading() const { return loads_in_flight_ > 0; }

  // Why the device is lost, by a copy that failed behind a stream; empty while it is not.
  [[nodiscard]] const std::string& lost() const { return lost_; }

  // Whether some branch has an error that was not taken yet.
  [[nodiscard]] bool troubled() const { return troubled_ > 0; }
  [[nodiscard]] std::string take_error(Branch& branch);

  void resize_device(std::uint32_t frames) { guards_.resize(frames); }

  // Every block in flight is claimed by exactly one ticket and no frame by two. Throws LogicError.
  void check() const;

 private:
  struct Transfer : Landed {
    bool optional = false;
    std::uint32_t tries = 1;
    bool ordered = false;      // the stream waits for it
    std::uint32_t frames = 0;  // of its ticket
  };

  // Of a device frame. Value 0 is "none".
  struct Guard {
    Ticket arrival;    // fills it
    Ticket departure;  // copies it to the pool
  };

  // A stream's wait for a copy: the fence before it, and when that passed and the copy ended, as
  // far as it is known.
  struct Halt {
    Fence before;
    Ticket ticket;
    std::optional<Nanos> began_ns = {};
    std::optional<Nanos> ended_ns = {};
  };

  struct Mark {
    Fence fence;
    std::optional<Nanos> passed_ns;
  };

  // A ticket of `fetch` under way.
  struct Fetch {
    Ticket ticket;
    std::uint32_t frames = 0;
    std::uint32_t layer = 0;
  };

  [[nodiscard]] bool under_way(Ticket ticket) const;
  void add(Ticket ticket, std::vector<Dep>& deps) const;
  void add_deps(const Transfer& transfer, std::vector<Dep>& deps) const;
  void note_guards(const Transfer& transfer, Ticket ticket);
  void add_pool_guards(FrameIndex pool, std::vector<Dep>& after) const;
  void prune_guards();
  void order(Ticket& ticket);
  void start(const Transfer& transfer);
  void submit(std::span<const Transfer> group);
  void submit_held();
  void end(const Completion& completion);
  void record(const Completion& completion, std::uint32_t frames, std::uint32_t layer);
  void pass(const Completion& completion);
  void commit(const Transfer& transfer);
  void put_back(const Transfer& transfer);
  void give_up(const Transfer& transfer, const Completion& completion);

  Backend& backend_;
  ComputeStream stream_;
  BlockMap& map_;
  std::unordered_map<std::uint64_t, Transfer> in_flight_;  // by ticket: its id and its lane
  const bool streams_;
  std::vector<Transfer> held_;  // writes of the next ticket
  bool holding_ = false;
  std::uint64_t held_frames_ = 0;
  const std::uint64_t held_frames_most_;
  std::vector<Fetch> fetching_;       // a handful
  std::array<Completion, 64> ended_;  // as many as are asked for at once
  std::vector<Completion> fetched_;   // those that have ended, until they are taken
  std::vector<Guard> guards_;         // by device frame; for streams
  std::unordered_multimap<FrameIndex, Ticket> pool_guards_;  // copies that use pool frames
  std::vector<Landed> landing_;                              // since `land` was called
  std::vector<Landed> landed_;                               // what it returned
  std::vector<Halt> halts_;                                  // a handful, oldest first
  std::vector<Mark> marks_;
  Traffic loads_;
  Traffic writes_;
  Nanos stall_ns_ = 0;
  EventLog log_;
  std::string lost_;
  std::uint32_t loads_in_flight_ = 0;  // tickets
  std::uint64_t loaded_frames_ = 0;
  std::uint64_t written_frames_ = 0;
  std::uint64_t started_writes_ = 0;
  std::uint64_t retries_ = 0;
  std::uint64_t given_up_ = 0;       // transfers that failed each time they were tried,
  std::uint64_t failed_writes_ = 0;  // and those of them that were optional
  std::uint32_t troubled_ = 0;       // branches with an error
};

}  // namespace pie
