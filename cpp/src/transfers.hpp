// Copies under way: which blocks each ticket moves, and what its end means for them.
//
// The only caller of Backend::submit and poll. A copy that fails is tried again a bounded number of
// times; then its blocks go back to where they were and the first error is kept on their branch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "block_map.hpp"
#include "pie/backend.hpp"

namespace pie {

// Adjacent blocks of one layer of one branch whose copy has ended well.
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
  void read_until(FrameIndex device, Fence fence) { readers_[device] = fence; }
  void read_until(Fence fence) { std::ranges::fill(readers_, fence); }

  // What blocks are filled by: what is copied out of them waits for what that was given so far.
  void set_stream(ComputeStream stream) { stream_ = stream; }

  // Applies what has ended and returns it; the reference is good until the next call.
  const std::vector<Landed>& land();

  // Waits until something has ended, or a while.
  void wait();

  [[nodiscard]] bool any() const { return !in_flight_.empty(); }
  [[nodiscard]] bool loading() const { return map_.count(BlockState::loading) > 0; }
  [[nodiscard]] std::uint64_t loaded_frames() const { return loaded_frames_; }
  [[nodiscard]] std::uint64_t written_frames() const { return written_frames_; }
  [[nodiscard]] std::uint64_t retries() const { return retries_; }
  [[nodiscard]] std::uint64_t given_up() const { return given_up_; }
  [[nodiscard]] std::uint64_t failed_writes() const { return failed_writes_; }

  // Whether some branch has an error that was not taken yet.
  [[nodiscard]] bool troubled() const { return troubled_ > 0; }
  [[nodiscard]] std::string take_error(Branch& branch);

  void resize_device(std::uint32_t frames) { readers_.resize(frames); }

  // Every block in flight is claimed by exactly one ticket and no frame by two. Throws LogicError.
  void check() const;

 private:
  struct Transfer {
    Lane lane = Lane::pool_to_device;
    Branch* branch = nullptr;
    std::uint32_t layer = 0;
    std::uint32_t first_block = 0;
    std::uint32_t count = 0;
    bool optional = false;
    std::uint32_t tries = 1;
  };

  void start(const Transfer& transfer);
  void submit(const Transfer& transfer);
  void end(const Completion& completion);
  void commit(const Transfer& transfer);
  void put_back(const Transfer& transfer);
  void give_up(const Transfer& transfer, const Completion& completion);

  Backend& backend_;
  ComputeStream stream_;
  BlockMap& map_;
  std::unordered_map<std::uint64_t, Transfer> in_flight_;  // by ticket, lane in the lowest bit
  std::vector<Fence> readers_;                             // by device frame
  std::vector<Landed> landed_;
  std::uint64_t loaded_frames_ = 0;
  std::uint64_t written_frames_ = 0;
  std::uint64_t retries_ = 0;
  std::uint64_t given_up_ = 0;       // transfers that failed each time they were tried,
  std::uint64_t failed_writes_ = 0;  // and those of them that were optional
  std::uint32_t troubled_ = 0;       // branches with an error
};

}  // namespace pie
