// Copies under way: which blocks each ticket moves, and what its end means for them.
//
// The only caller of Backend::submit and poll. Where the calling thread computes, blocks are in
// flight until their copy has ended; one that fails is tried again a bounded number of times, then
// its blocks go back to where they were and the first error is kept on their branch.
//
// Where compute is on a stream nobody waits: a block counts as moved when its copy is submitted,
// and frames of both tiers keep guards, the tickets and fences that must pass before what comes
// next. What is copied waits for them by `after`, what is computed by `depend`. A copy that fails
// there means a lost device, since compute is enqueued behind it already.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "block_map.hpp"
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

class Transfers {
 public:
  Transfers(Backend& backend, BlockMap& map);

  // Loads pooled blocks from `first_block` into `device`, one a frame, as one ticket.
  void load(Branch& branch, std::uint32_t layer, std::uint32_t first_block, FrameRun device,
            bool ring);

  // Writes dirty blocks from `first_block` to `pool_frames`, one a frame, as one ticket. Where it
  // is `optional`, since the blocks stay on the device, a failure is counted and no error.
  void write(Branch& branch, std::uint32_t layer, std::uint32_t first_block,
             const std::vector<FrameIndex>& pool_frames, bool optional);

  // A device frame was read by everything given to the compute stream so far: what is next copied
  // into it waits for that.
  void read_until(FrameIndex device, Fence fence) { guards_[device].readers = fence; }
  void read_until(Fence fence) {
    for (Guard& guard : guards_) guard.readers = fence;
  }

  // What blocks are filled by: what is copied out of them waits for what that was given so far.
  void set_stream(ComputeStream stream) { stream_ = stream; }

  // What the stream is about to do with a device frame: it is made to wait where it must.
  void before_read(FrameIndex device);
  void before_write(FrameIndex device);

  // Applies what has ended, or was submitted to a stream, and returns it; good until the next call.
  const std::vector<Landed>& land();

  // Waits until something has ended, or a while.
  void wait();

  [[nodiscard]] bool any() const { return !in_flight_.empty(); }
  [[nodiscard]] bool loading() const { return map_.count(BlockState::loading) > 0; }
  [[nodiscard]] std::uint64_t loaded_frames() const { return loaded_frames_; }
  [[nodiscard]] std::uint64_t written_frames() const { return written_frames_; }
  [[nodiscard]] std::uint64_t started_writes() const { return started_writes_; }
  [[nodiscard]] std::uint64_t retries() const { return retries_; }
  [[nodiscard]] std::uint64_t given_up() const { return given_up_; }
  [[nodiscard]] std::uint64_t failed_writes() const { return failed_writes_; }

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
    bool ordered = false;  // the stream waits for it
  };

  // Of a device frame. Value 0 is "none".
  struct Guard {
    Fence readers;     // of what was read on the stream
    Ticket arrival;    // fills it
    Ticket departure;  // copies it to the pool
  };

  [[nodiscard]] std::vector<Dep> deps_of(const Transfer& transfer);
  void note_guards(const Transfer& transfer, Ticket ticket);
  [[nodiscard]] Ticket& pool_guard(FrameIndex pool);
  void order(Ticket& ticket);
  void start(const Transfer& transfer);
  void submit(const Transfer& transfer);
  void end(const Completion& completion);
  void commit(const Transfer& transfer);
  void put_back(const Transfer& transfer);
  void give_up(const Transfer& transfer, const Completion& completion);

  Backend& backend_;
  ComputeStream stream_;
  BlockMap& map_;
  std::unordered_map<std::uint64_t, Transfer> in_flight_;  // by ticket: its id and its lane
  const bool streams_;
  std::vector<Guard> guards_;        // by device frame
  std::vector<Ticket> pool_guards_;  // by pool frame, of the last copy that used it; for streams
  std::vector<Landed> landing_;      // since `land` was called
  std::vector<Landed> landed_;       // what it returned
  std::string lost_;
  std::uint64_t loaded_frames_ = 0;
  std::uint64_t written_frames_ = 0;
  std::uint64_t started_writes_ = 0;  // tickets
  std::uint64_t retries_ = 0;
  std::uint64_t given_up_ = 0;       // transfers that failed each time they were tried,
  std::uint64_t failed_writes_ = 0;  // and those of them that were optional
  std::uint32_t troubled_ = 0;       // branches with an error
};

}  // namespace pie
