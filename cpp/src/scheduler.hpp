// Moves KV so that each layer of a step finds its blocks on the device.
//
// Owns the block map, the transfers, the ring and the plan in force. One thread; reads no clock but
// the backend's, to count stalls. A step is a walk: layer by layer, and in each branch by branch.
// What it will find only in the pool is asked for ahead of it, in the same order, as far as the
// ring has room: later layers, and the first layers of a next step like this one. What is found
// there though it was not asked for (it was evicted for want of room, or the batch changed) is
// fetched when the walk comes to it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "block_map.hpp"
#include "controller.hpp"
#include "pie/backend.hpp"
#include "pie/layer_kernel.hpp"
#include "pie/policy.hpp"
#include "reading.hpp"
#include "ring.hpp"
#include "transfers.hpp"

namespace pie {

// One sequence of a step's batch.
struct Growth {
  Sequence* sequence = nullptr;
  std::uint32_t new_tokens = 0;
  // Where the step's tokens go: the last branch of the sequence's path, or one that will take the
  // place of `shared`, which holds a partial block that others share.
  Branch* branch = nullptr;
  Branch* shared = nullptr;
};

// How a step's layers are read, as far as it matters to what lies where.
struct StepShape {
  std::uint32_t staging_frames = 0;  // to set aside at the top of the arena
  bool several_waves = false;        // visits will have more than one
  bool whole_layers = false;         // all blocks of a layer stay until the next layer begins
  bool in_place = false;             // who reads them can read some where they lie in the pool
};

class Scheduler {
 public:
  Scheduler(Backend& backend, const Geometry& geometry, std::unique_ptr<Policy> policy);

  [[nodiscard]] BlockMap& map() { return map_; }
  [[nodiscard]] const BlockMap& map() const { return map_; }
  [[nodiscard]] const Transfers& transfers() const { return transfers_; }
  [[nodiscard]] const Policy& policy() const { return *policy_; }
  [[nodiscard]] const Plan& plan() const { return plan_; }
  [[nodiscard]] Nanos stall_ns() const { return controller_.stall_ns(); }
  [[nodiscard]] const State& state() const { return controller_.state(); }
  void set_objective(const Objective& objective) { controller_.set_objective(objective); }

  // How many frames steps are wanted to stream from now on, though they may fit.
  void set_wanted(std::uint32_t frames) { wanted_frames_ = frames; }

  // Between steps.
  [[nodiscard]] Headroom headroom();

  // Between steps: see Cache.
  void start_trace(std::size_t events_most);
  [[nodiscard]] Trace take_trace();

  // Frames of the pool that were read where they lie, each as often as it was.
  [[nodiscard]] std::uint64_t in_place_frames() const { return in_place_frames_; }

  // `[layers, rows]`: which slot each row of the step goes to, of layers that have run.
  [[nodiscard]] std::span<const std::int64_t> slots() const { return slots_; }

  // Frames of the device that hold something: blocks, what passes through the ring, staging.
  [[nodiscard]] std::uint32_t frames_in_use() const {
    return map_.device().used() + ring_.frames_in_use() + staging_frames();
  }
  [[nodiscard]] std::uint32_t staging_frames() const {
    return map_.device().reserved() - ring_.frames().count;
  }

  // Plans the step and makes room for it. Throws CapacityError, with nothing lost, where it cannot
  // fit.
  void begin(std::span<const Growth> batch, const StepShape& shape);

  // What the readers' compute runs on.
  void set_stream(ComputeStream stream);

  // The rows of the step, in order; set before the first layer.
  void set_visits(std::vector<Visit> visits);

  // Has `kernel` append the layer's tokens and read every block. Throws IoError for a failed
  // transfer of a sequence of the batch; the step must then be aborted.
  void run_layer(std::uint32_t layer, LayerKernel& kernel);

  // Advances the lengths. What it throws has changed nothing, and the step must be aborted.
  void finish();

  // After `finish`: writes behind what the plan wants, prefetches for a next step like this.
  void look_ahead();

  // Takes the appends of the step back.
  void abort();

  // A sequence with the same tokens; what they share is held once.
  Sequence& fork(Sequence& sequence);

  // Cuts a sequence to `tokens`. Throws LogicError where a window has given back what the next
  // token would see.
  void truncate(Sequence& sequence, std::uint32_t tokens);
  void free(Sequence& sequence);

  // Frames of both tiers from now on. Throws CapacityError, with nothing changed, where what is
  // held does not fit, and IoError, with nothing lost, where a transfer fails on the way.
  void resize(std::uint32_t device_frames, std::uint32_t pool_frames);

  // Waits until nothing is in flight.
  void drain();

  void check() const;

 private:
  // The layers that share a window.
  struct LayerClass {
    std::uint32_t window = 0;
    std::vector<std::uint32_t> layers;
  };

  // Adjacent blocks of one layer of one branch.
  struct Stretch {
    std::uint64_t branch = 0;  // its id: the branch may be gone by now
    std::uint32_t layer = 0;
    std::uint32_t begin = 0;
    std::uint32_t end = 0;
  };

  // Position in the order in which blocks will be read; layers count on into the next step.
  struct Cursor {
    std::uint32_t layer = 0;
    std::size_t leg = 0;
    std::uint32_t block = 0;

    friend auto operator<=>(const Cursor&, const Cursor&) = default;
  };

  // What a step will need: planning.cpp.
  void open_batch(std::span<const Growth> batch);
  std::vector<Growth> close_batch();
  [[nodiscard]] bool ends_with_full_blocks() const;
  [[nodiscard]] std::uint32_t streamed_frames(const Branch& branch, std::uint32_t window) const;
  [[nodiscard]] std::uint32_t count_streamed(const Branch& branch, std::uint32_t window) const;
  [[nodiscard]] BranchView view_of(const Branch& branch, std::uint32_t window) const;
  [[nodiscard]] std::uint32_t probe_frames();
  // Whether each sequence of the step gains one token.
  [[nodiscard]] bool is_decode() const;
  [[nodiscard]] Snapshot snapshot(std::uint32_t device_frames, std::uint32_t pool_frames,
                                  std::vector<BranchView>& views) const;
  void admit(const Snapshot& snapshot, const Plan& plan, std::uint32_t staging_frames);
  void admit_on_device(const Snapshot& snapshot, const Plan& plan, std::uint32_t staging_frames,
                       const std::string& what) const;
  void write_together(const std::function<void()>& write);
  void apply(const Plan& plan);
  void set_streamed(Branch& branch, std::span<const std::uint32_t> layers, std::uint32_t frames);
  void set_streamed(Branch& branch, std::uint32_t layer, std::uint32_t streamed);
  [[nodiscard]] std::uint32_t lent_frames() const;
  void divide(std::uint32_t staging_frames, std::uint32_t ring_frames);
  void settle_plan();
  [[nodiscard]] bool move_below(FrameIndex frame, FrameIndex limit);
  void vacate(FrameIndex frame, std::uint32_t limit);

  // The partial block, a layer, what is asked for ahead of it, the end of a step: scheduler.cpp.
  void open_tail(Growth& growth);
  void copy_tail(Growth& growth);
  void copy_block(const BlockKey& from, const BlockKey& to);
  void duplicate(FrameIndex from, FrameIndex to);
  void load_now(const BlockKey& key);

  void trace_layer();
  [[nodiscard]] bool is_present() const;
  void attend_present(LayerKernel& kernel);
  void read_layer(LayerKernel& kernel);
  void read_branch(std::size_t index, LayerKernel& kernel);
  void append_wave(LayerKernel& kernel);
  void append(const Visit& visit, LayerKernel& kernel);
  void add_block(Branch& branch, LayerKernel& kernel);
  void store(LayerKernel& kernel);
  void write_begun(const Visit& visit, std::uint32_t full);
  [[nodiscard]] std::uint32_t in_place_end(const Branch& branch, std::uint32_t layer) const;
  [[nodiscard]] std::uint32_t show_in_place(const BlockKey& key);
  [[nodiscard]] std::uint32_t fetch(std::size_t leg, std::uint32_t block, LayerKernel& kernel);
  [[nodiscard]] std::uint32_t take(const Load* load, const BlockKey& key);
  void ask_now(std::size_t leg, const BlockKey& key, LayerKernel& kernel);
  void wait_for(LayerKernel& kernel);
  void collect(const Leg& leg, std::uint32_t begin, std::uint32_t end);
  void flush(LayerKernel& kernel);
  [[nodiscard]] BlockFrames layer_frames() const;
  void end_layer();

  [[nodiscard]] bool seek_pooled();
  [[nodiscard]] bool seek_in(const Leg& leg, std::uint32_t layer);
  [[nodiscard]] BlockKey key_at_cursor() const;
  [[nodiscard]] static std::uint32_t run_from(const BlockKey& key);
  [[nodiscard]] bool is_to_grow() const;
  void reconcile();
  void pump();
  [[nodiscard]] std::uint32_t ask(const BlockKey& key, bool beyond);

  [[nodiscard]] std::uint32_t full_before(const Growth& growth) const;
  void write_grown(const Growth& growth, std::uint32_t layer);
  void stop_prefetch();

  void land();
  void wait();
  void wait_for_room();
  void settle(const Branch& branch);
  void raise_errors();
  [[noreturn]] void raise_error(Branch& branch);

  // Frames of the device for what comes, and of the pool for what goes: room.cpp.
  [[nodiscard]] FrameIndex take_frame();
  void make_room();
  void write_or_wait();
  [[nodiscard]] bool is_read_now(std::uint32_t layer, const Branch& branch) const;
  void evict_written(bool spare_layer, bool needed = false);
  [[nodiscard]] bool evict_any();
  [[nodiscard]] bool write_any();
  void write_full(Branch& branch, std::uint32_t layer, std::uint32_t limit, bool rescue = false);
  [[nodiscard]] FrameIndex take_pool_frame(LayerBlocks& layer, std::uint32_t needed, bool reclaim);
  [[nodiscard]] bool grow_pool(std::uint32_t frames);
  void grow_ahead();
  [[nodiscard]] bool reach_pool(std::uint32_t frames);
  void give_back_pool();
  std::uint32_t resize_pool(std::uint32_t target, std::uint32_t needed);
  [[nodiscard]] bool reclaim_pool(std::uint32_t needed);
  void soil(const BlockKey& key);

  // Tiers that grow and shrink: budgets.cpp.
  void restore(std::uint32_t device_frames, std::uint32_t pool_frames);
  void grow_device(std::uint32_t frames);
  void shrink_device(std::uint32_t frames);
  void shrink_pool(std::uint32_t frames);
  void empty_retired_pool(std::uint32_t frames);
  template <typename Visitor>
  void for_each_block(const Visitor& visitor);
  void move_down(const BlockKey& key);

  // Forks, cuts and ends of sequences: sequences.cpp.
  void drop_unseen();
  void drop_front(Branch& branch, const LayerClass& layers, std::uint32_t end);
  void refuse_unseen(const Sequence& sequence, std::uint32_t tokens) const;
  void cut(Branch& branch, std::uint32_t blocks);
  void prepare_to_leave(const Sequence& sequence, std::uint32_t keep);
  void tidy_up(const std::vector<std::uint64_t>& path);
  void leave(Sequence& sequence);
  Branch& split(Branch& branch, std::uint32_t at);
  void join_up(std::uint64_t branch);
  void merge(Branch& front, Branch& back);

  Backend& backend_;
  Geometry geometry_;
  Capabilities capabilities_;
  ComputeStream stream_;
  std::unique_ptr<Policy> policy_;
  BlockMap map_;
  Transfers transfers_;
  Ring ring_;
  Reading reading_;
  Controller controller_;
  std::vector<LayerClass> classes_;

  Plan plan_;
  StepShape shape_;
  std::vector<Growth> batch_;
  std::vector<Stretch> written_;     // of the layer that runs: streamed, clean, and still there
  Cursor cursor_;                    // of what is to be asked for next
  bool ahead_ = false;               // loads beyond the cursor may be in the ring
  bool running_ = false;             // blocks of `layer_` are in use
  std::uint32_t layer_ = 0;          // that runs
  std::uint32_t wave_ = 0;           // that runs in it
  bool appended_ = false;            // whether the wave that runs has its new tokens
  std::uint32_t stored_ = 0;         // rows of the layer that the kernel has stored
  std::uint32_t slotted_ = 0;        // rows of it that have slots
  std::vector<std::int64_t> slots_;  // `[layers, rows]`
  std::vector<FrameIndex> pool_frames_taken_;  // for what is about to be written
  std::uint32_t copy_frames_ = 1;              // the most frames one ticket moves
  std::uint32_t pool_frames_ = 0;              // the most that the pool may come to hold
  std::uint32_t pool_frames_most_ = 0;         // in use after a step, since nothing was held
  std::uint32_t wanted_frames_ = 0;            // as set_wanted says
  std::uint64_t in_place_frames_ = 0;
};

}  // namespace pie
