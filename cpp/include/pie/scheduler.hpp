// Moves KV so that each layer of a step finds its blocks on the device.
//
// Owns the block map, the transfers and the plan in force. One thread; reads no clock but the
// backend's, to count stalls. Within a step the layers run in order, and the copies for what comes
// next (later layers, and the first layers of the next step) are submitted ahead as far as the ring
// has room.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "pie/backend.hpp"
#include "pie/block_map.hpp"
#include "pie/policy.hpp"
#include "pie/transfers.hpp"

namespace pie {

// Query rows of one sequence that are served together in every layer of a step. Visits of one wave
// may be read by one call; a later wave of a layer starts when the wave before it is done.
struct Visit {
  Sequence* sequence = nullptr;
  std::uint32_t entry = 0;      // of the batch
  std::uint32_t first_row = 0;  // in the step's packed rows
  std::uint32_t rows = 0;
  std::uint32_t position = 0;  // of the first row, in tokens; row i appends token position + i
  std::uint32_t wave = 0;

  [[nodiscard]] std::uint32_t kv_end() const { return position + rows; }
};

// Blocks [first_block, end_block) of a visit's sequence, all readable on the device.
struct Piece {
  const Visit* visit = nullptr;
  std::uint32_t first_block = 0;
  std::uint32_t end_block = 0;
};

// What a layer's blocks are filled from and read by.
class LayerReader {
 public:
  LayerReader() = default;
  LayerReader(const LayerReader&) = delete;
  LayerReader& operator=(const LayerReader&) = delete;
  virtual ~LayerReader() = default;

  // Copies `rows` K and V rows, from packed row `row` on, into a block from its token `token` on.
  virtual void store(std::byte* frame, std::uint32_t token, std::uint32_t rows,
                     std::uint32_t row) = 0;

  // Reads pieces of different visits of one wave. A visit's pieces come in ascending, gapless order
  // over one or more calls.
  virtual void read(std::uint32_t layer, std::span<const Piece> pieces) = 0;
};

// One sequence of a step's batch.
struct Growth {
  Sequence* sequence = nullptr;
  std::uint32_t new_tokens = 0;
};

class Scheduler {
 public:
  Scheduler(Backend& backend, const Geometry& geometry, std::unique_ptr<Policy> policy);

  [[nodiscard]] BlockMap& map() { return map_; }
  [[nodiscard]] const BlockMap& map() const { return map_; }
  [[nodiscard]] const Transfers& transfers() const { return transfers_; }
  [[nodiscard]] const Policy& policy() const { return *policy_; }
  [[nodiscard]] const Plan& plan() const { return plan_; }
  [[nodiscard]] Nanos stall_ns() const { return stall_ns_; }

  // Plans the step and makes room for it, `staging_frames` at the top of the arena included;
  // `several_waves` says whether its visits will have more than one. Throws CapacityError, with
  // nothing lost, where it cannot fit.
  void begin(std::span<const Growth> batch, std::uint32_t staging_frames, bool several_waves);

  // What the readers' compute runs on.
  void set_stream(ComputeStream stream) { stream_ = stream; }

  // The rows of the step, in order; set before the first layer.
  void set_visits(std::vector<Visit> visits);

  // Appends the layer's tokens and has `reader` read every block. Throws IoError for a failed
  // transfer of a sequence of the batch; the step must then be aborted.
  void run_layer(std::uint32_t layer, LayerReader& reader);

  // Advances the lengths, writes behind what the plan wants, prefetches for a next step like this.
  void finish();

  // Takes the appends of the step back.
  void abort();

  // Cuts a sequence to `tokens`. A full block that becomes partial is loaded and leaves the pool.
  void truncate(Sequence& sequence, std::uint32_t tokens);
  void free(Sequence& sequence);

  // Waits until nothing is in flight.
  void drain();

  void check() const;

 private:
  // Position in the order in which blocks will be read; layers count on into the next step.
  struct Cursor {
    std::uint32_t layer = 0;
    std::size_t visit = 0;
    std::uint32_t block = 0;
  };

  [[nodiscard]] std::uint32_t blocks_of(std::uint32_t tokens) const;
  [[nodiscard]] Snapshot snapshot(std::span<const Growth> batch, std::uint32_t staging_frames,
                                  std::vector<SequenceView>& views) const;
  void admit(const Snapshot& snapshot, const Plan& plan, std::uint32_t staging_frames);
  void apply(const Plan& plan);
  [[nodiscard]] std::uint32_t held_block(const Sequence& sequence) const;
  void set_streamed(Sequence& sequence, std::uint32_t layer, std::uint32_t streamed);
  void reserve_staging(std::uint32_t frames);
  void clear_ring();
  [[nodiscard]] FrameIndex ring_begin() const;
  bool move_below(FrameIndex frame, FrameIndex limit);
  void vacate(FrameIndex frame, std::uint32_t limit);

  void append(const Visit& visit, LayerReader& reader);
  void write_begun(Sequence& sequence, std::uint32_t full);
  void fetch(std::size_t visit, std::uint32_t block, LayerReader& reader);
  void flush(LayerReader& reader);
  void release(const Piece& piece, Fence fence);

  [[nodiscard]] bool seek_pooled();
  void pump();
  [[nodiscard]] FrameRun take_run(std::uint32_t want, bool ring);
  [[nodiscard]] FrameIndex take_frame();
  void make_room();
  void write_or_wait();
  [[nodiscard]] bool evict_surplus(bool spare_layer);
  [[nodiscard]] bool evict_prefetched();
  [[nodiscard]] bool evict_any();
  [[nodiscard]] bool write_any();

  void write_full(Sequence& sequence, std::uint32_t layer, std::uint32_t limit,
                  bool rescue = false);
  [[nodiscard]] FrameIndex take_pool_frame(LayerBlocks& layer, std::uint32_t needed, bool reclaim);
  [[nodiscard]] bool grow_pool(std::uint32_t frames);
  [[nodiscard]] bool reclaim_pool();

  void land();
  void wait();
  void settle(const Sequence& sequence);
  void raise_errors();
  void open_block(Sequence& sequence, std::uint32_t tokens);
  void soil(Sequence& sequence, std::uint32_t index);
  void load_now(const BlockKey& key);
  void cut(Sequence& sequence, std::uint32_t tokens);

  Backend& backend_;
  Geometry geometry_;
  Capabilities capabilities_;
  ComputeStream stream_;
  std::unique_ptr<Policy> policy_;
  BlockMap map_;
  Transfers transfers_;

  Plan plan_;
  std::vector<Growth> batch_;
  std::vector<Visit> visits_;
  std::vector<Piece> pieces_;  // collected and not yet read
  Cursor cursor_;
  std::uint32_t layer_ = 0;        // that runs
  std::uint32_t wave_ = 0;         // that runs in it
  std::uint32_t copy_frames_ = 1;  // the most frames one ticket moves
  std::deque<BlockKey>
      surplus_;  // clean, not ring, streamed by the plan: oldest first; may be stale
  std::deque<BlockKey> loaded_;  // ring blocks in the order they were asked for; may be stale
  Nanos stall_ns_ = 0;
};

}  // namespace pie
