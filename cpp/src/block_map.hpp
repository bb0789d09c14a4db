// Where every block of every sequence lies, and the legal ways for that to change.
//
// Sequences that were forked share what they have in common. A branch is a stretch of consecutive
// blocks, in every layer, that all sequences through it share; a sequence is a path of branches.
// Blocks are written to only by the sequence that has the last branch of its path for itself.
//
// A block is keyed by (branch, layer, block index). Its states, and the one function that makes
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
//   pooled   only in the pool; what is read of it is fetched into the ring, which the map knows not
//   loading  its device frame is being filled
//
// `drop` takes a block that is not in flight back to empty. The map owns the bookkeeping of both
// tiers' frames; it moves no bytes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "frame_pool.hpp"
#include "pie/types.hpp"
#include "tables.hpp"

namespace pie {

enum class BlockState : std::uint8_t { empty, dirty, writing, clean, pooled, loading };
inline constexpr std::size_t block_states = 6;

struct Block {
  FrameIndex device = no_frame;
  FrameIndex pool = no_frame;
  BlockState state = BlockState::empty;

  // Readable where it lies on the device.
  [[nodiscard]] bool present() const {
    return state == BlockState::dirty || state == BlockState::writing || state == BlockState::clean;
  }
  [[nodiscard]] bool away() const {
    return state == BlockState::pooled || state == BlockState::loading;
  }
  [[nodiscard]] bool in_flight() const {
    return state == BlockState::writing || state == BlockState::loading;
  }
};

// Adjacent blocks of one layer in adjacent pool frames.
struct PoolRun {
  std::uint32_t first_block = 0;
  FrameIndex pool = no_frame;
  std::uint32_t count = 0;

  [[nodiscard]] std::uint32_t end() const { return first_block + count; }
  [[nodiscard]] bool is_at(std::uint32_t block, FrameIndex frame) const {
    return first_block == block && pool == frame;
  }
  [[nodiscard]] bool ends_at(std::uint32_t block, FrameIndex frame) const {
    return end() == block && pool + count == frame;
  }
  friend bool operator==(const PoolRun&, const PoolRun&) = default;
};

// The blocks of one layer of one branch; indices count from the branch's first block. What is asked
// of many blocks in every step is known without a look at each.
struct LayerBlocks {
  std::vector<Block> blocks;
  std::vector<PoolRun> runs;   // all that have a pool frame, in order
  std::uint32_t away = 0;      // blocks that cannot be read on the device: pooled, or being loaded
  std::uint32_t front = 0;     // blocks [gone, front) are pooled, perhaps more after them
  std::uint32_t gone = 0;      // blocks [0, gone) are empty: no row sees them any more
  std::uint32_t streamed = 0;  // blocks [0, streamed) are not kept on the device: the plan in force
  std::uint32_t written = 0;   // where the search for full blocks without a pool copy starts
  FrameRun extent;             // pool frames set aside for this layer's next blocks

  [[nodiscard]] std::uint32_t size() const { return static_cast<std::uint32_t>(blocks.size()); }

  [[nodiscard]] bool is_in_front(std::uint32_t block) const {
    return block >= gone && block < front;
  }
  [[nodiscard]] bool is_pooled(std::uint32_t block) const {
    return is_in_front(block) || blocks[block].state == BlockState::pooled;
  }

  // The end of the adjacent blocks from one on, before `end`, that are only in the pool, or that
  // can be read where they lie on the device: the block itself where it is none.
  [[nodiscard]] std::uint32_t pooled_end(std::uint32_t block, std::uint32_t end);
  [[nodiscard]] std::uint32_t present_end(std::uint32_t block, std::uint32_t end) const;
  [[nodiscard]] const PoolRun& run_at(std::uint32_t block) const;  // which has a pool frame
};

// How far the plan in force streams a branch in the layers of one window, and what it was told by.
struct Boundary {
  std::uint32_t streamed_frames = no_frame;  // of all those layers together; until then not known
  std::uint32_t gone = 0;
  std::uint32_t held = no_frame;
  friend bool operator==(const Boundary&, const Boundary&) = default;
};

struct Sequence;

struct Branch {
  std::uint64_t id = 0;
  std::uint32_t first = 0;  // its first block, counted from the start of its sequences
  std::uint32_t full = 0;   // how many of its blocks, from the first on, are full and committed
  std::vector<Sequence*> users;  // whose path it is on
  std::vector<LayerBlocks> layers;
  std::vector<Boundary> boundaries;  // by window
  std::uint32_t away = 0;            // blocks that cannot be read on the device, of all layers
  std::uint32_t open = no_frame;     // the partial block, once it is on the device alone
  std::uint32_t in_flight = 0;       // transfers under way
  std::string error;                 // first failure not yet told to the caller

  // Of the step that runs, or ran last.
  bool active = false;            // read in it
  std::uint32_t grows_to = 0;     // tokens after it of the sequence that appends here; 0: none does
  std::uint32_t held = no_frame;  // the block that is partial before the step and full after it
  std::size_t leg = 0;            // its place in the order of reading

  [[nodiscard]] std::uint32_t blocks() const {
    return static_cast<std::uint32_t>(layers.front().blocks.size());
  }
  [[nodiscard]] std::uint32_t end() const { return first + blocks(); }
};

struct Sequence {
  SequenceId id = 0;
  std::uint32_t row = 0;      // of the tables
  std::uint32_t tokens = 0;   // committed length
  std::vector<Branch*> path;  // its blocks, in order and without a gap
  std::uint32_t gain = 0;     // tokens that the step that runs adds
};

// One block, by name.
struct BlockKey {
  Branch* branch = nullptr;
  std::uint32_t layer = 0;
  std::uint32_t block = 0;  // counted from the branch's first
};

class BlockMap {
 public:
  using Sequences = std::map<SequenceId, Sequence>;
  using Branches = std::map<std::uint64_t, Branch>;

  BlockMap(Geometry geometry, std::uint32_t device_frames, std::uint32_t pool_frames);

  Sequence& add();
  Sequence& fork(const Sequence& sequence);
  void remove(Sequence& sequence);  // its path is empty
  [[nodiscard]] Sequence* find(SequenceId id);
  [[nodiscard]] const Sequence* find(SequenceId id) const;
  [[nodiscard]] const Sequences& sequences() const { return sequences_; }
  [[nodiscard]] Sequences& sequences() { return sequences_; }
  [[nodiscard]] const Branches& branches() const { return branches_; }
  [[nodiscard]] Branches& branches() { return branches_; }

  // A branch without blocks and without users.
  Branch& grow(std::uint32_t first);
  void remove(Branch& branch);  // has neither

  // The last branch of the path comes off it, or a branch comes on.
  void leave(Sequence& sequence);
  void join(Sequence& sequence, Branch& branch);

  // Blocks [0, at) of a branch at rest become one of their own, which its sequences pass first.
  Branch& split(Branch& branch, std::uint32_t at);
  // The reverse, for branches at rest, all full, that follow each other in all their paths.
  void merge(Branch& front, Branch& back);

  [[nodiscard]] FramePool& device() { return device_; }
  [[nodiscard]] const FramePool& device() const { return device_; }
  [[nodiscard]] FramePool& pool() { return pool_; }
  [[nodiscard]] const FramePool& pool() const { return pool_; }
  void resize_device(std::uint32_t frames);

  [[nodiscard]] static Block& at(const BlockKey& key) {
    return key.branch->layers[key.layer].blocks[key.block];
  }

  // Where pooled blocks from one on are while they are read: in adjacent frames of the device, or
  // with `in_pool_bit` of the pool.
  void show(const BlockKey& key, FrameRun frames);

  // Where each block of each sequence lies; of a pooled one, where it was shown last.
  [[nodiscard]] const BlockTables& tables() const { return tables_; }
  [[nodiscard]] BlockTables& tables() { return tables_; }
  void reserve_blocks(std::uint32_t blocks) { tables_.reserve_blocks(blocks); }

  // One empty block more at the end of a layer, or the last block, at rest, dropped and gone.
  static void lengthen(LayerBlocks& layer);
  void shorten(Branch& branch, std::uint32_t layer);

  // The transitions. Frames given to them are acquired already; frames they free are released.
  void place(const BlockKey& key, FrameIndex device);
  void begin_write(const BlockKey& key, FrameIndex pool);
  void commit_write(const BlockKey& key);
  void fail_write(const BlockKey& key);
  void evict(const BlockKey& key);
  void begin_load(const BlockKey& key, FrameIndex device);
  void commit_load(const BlockKey& key);
  void fail_load(const BlockKey& key);
  void soil(const BlockKey& key);
  void relocate(const BlockKey& key, FrameIndex device);
  void drop(const BlockKey& key);

  // A pool frame for the layer's next block, from its extent; no_frame where the pool is full.
  // `needed` says how many more blocks are about to ask.
  FrameIndex take_pool_frame(LayerBlocks& layer, std::uint32_t needed,
                             std::uint32_t extent_frames_max);
  // Takes back what is set aside and unused; returns the frames freed.
  std::uint32_t release_extents();
  void release_extent(LayerBlocks& layer);

  // Who uses a device frame; `branch` is null where nobody does.
  [[nodiscard]] BlockKey owner(FrameIndex device) const { return owners_[device]; }

  [[nodiscard]] std::uint32_t count(BlockState state) const {
    return counts_[static_cast<std::size_t>(state)];
  }

  // Every frame has at most one owner, each tier's frames add up, states and counts agree, every
  // path covers its sequence. Throws LogicError.
  void check() const;

 private:
  void set_state(const BlockKey& key, BlockState state);
  void enter_device(const BlockKey& key, FrameIndex device);
  void leave_device(const BlockKey& key);
  void enter_pool(const BlockKey& key, FrameIndex pool);
  void leave_pool(const BlockKey& key);
  void rename(Branch& branch);
  void list(const BlockKey& key, std::int32_t device);
  void check_layer(Branch& branch, std::uint32_t layer, std::vector<bool>& pool_seen) const;
  void check_block(const BlockKey& key, std::vector<bool>& pool_seen) const;
  void check_paths() const;
  void check_frames() const;

  Geometry geometry_;
  FramePool device_;
  FramePool pool_;
  Sequences sequences_;
  Branches branches_;
  BlockTables tables_;
  std::uint64_t next_id_ = 1;
  std::uint64_t next_branch_ = 1;
  std::vector<BlockKey> owners_;  // by device frame
  std::array<std::uint32_t, block_states> counts_{};
  std::uint32_t set_aside_ = 0;  // pool frames in extents, not yet used
};

}  // namespace pie
