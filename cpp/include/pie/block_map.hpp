// Where every block of every sequence lies, and the legal ways for that to change.
//
// A block is keyed by (sequence, layer, block index). Its states, and the one function that makes
// each transition:
//
//             place               begin_write            commit_write
//     empty ---------> dirty <-----------------> writing ------------> clean
//                        ^        fail_write                          |  ^
//                        | soil (drops the pool copy)                 |  | commit_load
//                        +--------------------------------------------+  |
//                                                     evict |         loading
//                                                           v   begin_load | fail_load
//                                                         pooled <---------+
//
//   dirty    only on the device: partial, or full and not yet written
//   writing  full, on the device, its pool copy in flight; counts as being on the device
//   clean    on the device with a committed pool copy: evicting it is a discard
//   pooled   only in the pool
//   loading  its device frame is being filled
//
// `drop` takes a block that is not in flight back to empty. The map owns the bookkeeping of both
// tiers' frames; it moves no bytes.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "pie/frame_pool.hpp"
#include "pie/types.hpp"

namespace pie {

enum class BlockState : std::uint8_t { empty, dirty, writing, clean, pooled, loading };
inline constexpr std::size_t block_states = 6;

struct Block {
  FrameIndex device = no_frame;
  FrameIndex pool = no_frame;
  BlockState state = BlockState::empty;
  bool ring = false;  // its device frame belongs to the ring: loaded to be used once

  // Readable where it lies on the device.
  [[nodiscard]] bool present() const {
    return state == BlockState::dirty || state == BlockState::writing || state == BlockState::clean;
  }
  [[nodiscard]] bool in_flight() const {
    return state == BlockState::writing || state == BlockState::loading;
  }
};

// The blocks of one layer of one sequence.
struct LayerBlocks {
  std::vector<Block> blocks;
  std::uint32_t streamed = 0;  // blocks [0, streamed) are not kept on the device: the plan in force
  std::uint32_t written = 0;   // where the search for full blocks without a pool copy starts
  FrameRun extent;             // pool frames set aside for this layer's next blocks
};

struct Sequence {
  std::uint64_t id = 0;
  std::uint32_t tokens = 0;  // committed length
  std::vector<LayerBlocks> layers;
  std::uint32_t in_flight = 0;  // transfers under way
  bool active = false;          // in the batch of the step that runs, or of the last one
  std::string error;            // first failure not yet told to the caller
};

// One block, by name.
struct BlockKey {
  Sequence* sequence = nullptr;
  std::uint32_t layer = 0;
  std::uint32_t block = 0;
};

class BlockMap {
 public:
  BlockMap(std::uint32_t layers, std::uint32_t device_frames, std::uint32_t pool_frames);

  Sequence& add();
  void remove(Sequence& sequence);  // all its blocks are empty
  [[nodiscard]] Sequence* find(std::uint64_t id);
  [[nodiscard]] const Sequence* find(std::uint64_t id) const;
  [[nodiscard]] std::map<std::uint64_t, Sequence>& sequences() { return sequences_; }
  [[nodiscard]] const std::map<std::uint64_t, Sequence>& sequences() const { return sequences_; }

  [[nodiscard]] FramePool& device() { return device_; }
  [[nodiscard]] const FramePool& device() const { return device_; }
  [[nodiscard]] FramePool& pool() { return pool_; }
  [[nodiscard]] const FramePool& pool() const { return pool_; }

  [[nodiscard]] static Block& at(const BlockKey& key) {
    return key.sequence->layers[key.layer].blocks[key.block];
  }

  // The transitions. Frames given to them are acquired already; frames they free are released.
  void place(const BlockKey& key, FrameIndex device);
  void begin_write(const BlockKey& key, FrameIndex pool);
  void commit_write(const BlockKey& key);
  void fail_write(const BlockKey& key);
  void evict(const BlockKey& key);
  void begin_load(const BlockKey& key, FrameIndex device, bool ring);
  void commit_load(const BlockKey& key);
  void fail_load(const BlockKey& key);
  void soil(const BlockKey& key);
  void keep(const BlockKey& key);  // a ring block becomes resident where it is
  void relocate(const BlockKey& key, FrameIndex device);
  void drop(const BlockKey& key);

  // A pool frame for the layer's next block, from its extent; no_frame where the pool is full.
  // `needed` says how many more blocks are about to ask.
  FrameIndex take_pool_frame(LayerBlocks& layer, std::uint32_t needed,
                             std::uint32_t extent_frames_max);
  // Takes back what is set aside and unused; returns the frames freed.
  std::uint32_t release_extents();
  void release_extent(LayerBlocks& layer);

  // Who uses a device frame; `sequence` is null where nobody does.
  [[nodiscard]] BlockKey owner(FrameIndex device) const { return owners_[device]; }

  [[nodiscard]] std::uint32_t count(BlockState state) const {
    return counts_[static_cast<std::size_t>(state)];
  }
  [[nodiscard]] std::uint32_t ring_frames() const { return ring_; }

  // Every frame has at most one owner, each tier's frames add up, states and counts agree.
  void check() const;

 private:
  void set_state(Block& block, BlockState state);
  void leave_device(Block& block);
  void leave_pool(Block& block);
  void check_block(const BlockKey& key, const Block& block, std::vector<bool>& pool_seen) const;

  std::uint32_t layers_;
  FramePool device_;
  FramePool pool_;
  std::map<std::uint64_t, Sequence> sequences_;
  std::uint64_t next_id_ = 1;
  std::vector<BlockKey> owners_;  // by device frame
  std::array<std::uint32_t, block_states> counts_{};
  std::uint32_t ring_ = 0;
  std::uint32_t set_aside_ = 0;  // pool frames in extents, not yet used
};

}  // namespace pie
