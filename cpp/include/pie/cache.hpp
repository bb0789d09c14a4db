// The facade that bindings and embedders use: sequences, steps, attention over two tiers of memory.
//
// One thread at a time. A step is a transaction: begin, then every layer once and in order through
// `attend` or `gather`, then `finish`; `abort` (or an exception from a layer) takes back its
// appends. Sequences' lengths advance in `finish` only.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "pie/adapting.hpp"
#include "pie/attention.hpp"
#include "pie/backend.hpp"
#include "pie/layer_kernel.hpp"
#include "pie/options.hpp"
#include "pie/policy.hpp"
#include "pie/trace.hpp"
#include "pie/types.hpp"

namespace pie {

// One sequence of a step's batch and how many tokens it gains in it.
struct StepEntry {
  SequenceId sequence = 0;
  std::uint32_t new_tokens = 0;
};

// What the layers of a step are read by: the library's attention in place, a contiguous copy of K
// and V, a kernel of the caller's, one that also reads frames of the pool where they lie (see
// `in_pool_bit`), or the caller himself by a table of frames.
enum class Reader : std::uint8_t { attend, gather, kernel, pool_kernel, pages };

// What a model asks of its attention.
struct AttendOptions {
  float scale = 1;               // multiplies q.k
  float soft_cap = 0;            // see AttentionShape
  const float* sinks = nullptr;  // see AttentionShape
};

// The memory of the device tier: frame i starts at `start` + i * `stride_bytes`. The start stays
// where it is for as long as the cache lives, and the memory mapped for as long as `owner` is held
// too (null: it is the caller's).
struct Arena {
  std::byte* start = nullptr;
  // Where frame i of the pool starts, likewise, if steps read some of those in place; else null.
  const std::byte* pool = nullptr;
  Bytes stride_bytes = 0;
  std::uint32_t frames = 0;
  std::shared_ptr<const void> owner;
};

// `[batch, most blocks]`: the device frame of each block of each sequence, -1 where there is none
// (past the end, or before the window). Good until the cache's next call.
struct FrameTable {
  std::uint32_t batch = 0;
  std::span<const std::int32_t> frames;
};

// What the step that is open reads and fills, in the field's terms, for kernels of the caller's.
// Good until a call that changes the cache; a layer's part of `block_tables` and `slot_mapping`
// once the layer runs. Nothing of it is rebuilt from step to step: a sequence keeps its row, and an
// entry is written to where a block comes, moves or goes.
struct StepTables {
  // `[layers, sequences, blocks]`: the device frame of each block, -1 where there is none. Of a
  // block that is streamed, where it lies while it is read, with `in_pool_bit` where that is in the
  // pool, and nothing to rely on before and after.
  const std::int32_t* block_tables = nullptr;
  std::uint32_t layers = 0;
  std::uint32_t sequences = 0;  // rows there are, of which the batch has some
  std::uint32_t blocks = 0;
  std::span<const std::int32_t> rows;  // `[batch]`: which of them
  std::span<const std::int64_t>
      slot_mapping;                        // `[layers, packed rows]`: frame * block_tokens + token
  std::span<const std::int32_t> seq_lens;  // `[batch]`: tokens, the step's new ones included
  std::span<const std::int32_t> cu_seqlens;  // `[batch + 1]`: where each one's packed rows begin
};

// The step that is open: how many rows it has and which layer comes next. No rows: none is.
struct OpenStep {
  std::uint32_t rows = 0;
  std::uint32_t next_layer = 0;
};

// Counters since construction, and gauges. "decode" counts steps in which every sequence gained one
// token; their time runs from one begin to the next where two follow each other, else to finish.
struct Stats {
  Bytes device_bytes = 0;       // the budget
  Bytes device_bytes_used = 0;  // frames in use and staging, now
  Bytes device_bytes_peak = 0;
  Bytes pool_bytes = 0;  // the most the pool may take
  Bytes pool_bytes_used = 0;
  Bytes pool_bytes_peak = 0;
  Bytes kv_bytes = 0;        // KV of all sequences, wherever it lies
  Bytes streamed_bytes = 0;  // pool to device
  Bytes written_bytes = 0;   // device to pool
  Bytes in_place_bytes = 0;  // read where they lie in the pool
  std::uint64_t steps = 0;
  std::uint64_t decode_steps = 0;
  std::uint64_t decode_tokens = 0;
  Nanos decode_ns = 0;
  Nanos decode_stall_ns = 0;
  Nanos stall_ns = 0;         // compute waited for copies; on a stream as far as it is known yet
  double stall_fraction = 0;  // decode_stall_ns / decode_ns
  double decode_tokens_per_s = 0;   // decode_tokens / decode_ns
  std::uint64_t retries = 0;        // transfers that failed and were tried again
  std::uint64_t failed_writes = 0;  // of what is on the device too: tried again in a later step
  std::uint32_t sequences = 0;
  std::uint32_t block_tokens = 0;
  std::uint32_t resident_frames = 0;
  std::uint32_t ring_frames = 0;  // the ring's size in the plan in force
  Bytes budget_bytes = 0;         // that a step may stream by the objective
  std::string budget_reason;      // what bounds that: see Reason
  std::uint64_t budget_moves = 0;
  double link_bytes_per_s = 0;          // pool to device, while it is at work; 0: not measured yet
  double interference_ns_per_byte = 0;  // that streaming adds to what is computed beside it
  double slowdown = 0;  // of the last decode step but a few, against all on the device; estimated
  std::string policy;
  std::string pool_io;
  std::string pool_io_reason;  // why not a faster way; empty where there is none
  std::string attention_isa;
};

// It belongs to the process that made it: in a forked child every call throws LogicError, and the
// destructor does nothing.
class Cache {
 public:
  // Opens the host backend. Throws ConfigError for options that cannot work, the least device_bytes
  // that would among them.
  explicit Cache(const CacheOptions& options);

  // Runs over a backend of the embedder's; its frames must hold `geometry.frame_bytes()`.
  Cache(const Geometry& geometry, const std::string& policy, std::unique_ptr<Backend> backend);

  // The same by a policy of the embedder's. A step whose plan is not one for its snapshot throws
  // LogicError, and what the policy throws goes on to the caller of `begin`; neither changes
  // anything.
  Cache(const Geometry& geometry, std::unique_ptr<Policy> policy, std::unique_ptr<Backend> backend);

  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;
  ~Cache();

  [[nodiscard]] const Geometry& geometry() const;

  [[nodiscard]] SequenceId add();
  // A sequence with the same tokens. What two have in common is held once, and copied, a block at
  // most, when one of them writes to it.
  [[nodiscard]] SequenceId fork(SequenceId sequence);
  // Throws LogicError where layers with a window have given back what is needed to go on.
  void truncate(SequenceId sequence, std::uint32_t tokens);
  void free(SequenceId sequence);
  [[nodiscard]] std::uint32_t length(SequenceId sequence) const;

  // Throws CapacityError, with nothing changed, where the tiers cannot hold the step.
  void begin(std::span<const StepEntry> batch, Reader reader);

  // Appends the layer's K and V and attends to all of each sequence, causally. `q` and `out` are
  // packed like the inputs, with `query_heads` heads. `lse`, if given: `[rows, query_heads]`.
  void attend(std::uint32_t layer, const LayerInputs& inputs, const Rows& q, const MutableRows& out,
              std::uint32_t query_heads, const AttendOptions& options, float* lse);

  // Appends the layer's K and V and returns all of them contiguously.
  Gathered gather(std::uint32_t layer, const LayerInputs& inputs);

  // Appends the layer's K and V and has all blocks of the layer on the device at once, until the
  // next layer or the end of the step.
  FrameTable pages(std::uint32_t layer, const LayerInputs& inputs);
  [[nodiscard]] Arena arena() const;

  // Throws LogicError where no step is open.
  [[nodiscard]] StepTables tables() const;

  // What changed in `block_tables` since this was asked last, for who keeps a copy of them: apply
  // it before what reads the copy, inside the kernel's calls. Good until it is asked again.
  [[nodiscard]] const TableEdits& take_table_edits();

  // Has `kernel` append the layer's K and V and read all of each sequence.
  void run(std::uint32_t layer, LayerKernel& kernel);

  // The stream that the caller's compute runs on, where the backend has any: transfers wait for
  // what was given to it. Between steps.
  void set_stream(ComputeStream stream);

  void finish();
  void abort() noexcept;
  [[nodiscard]] OpenStep open_step() const;

  // Budgets from now on, between steps, up or down; what is given up goes back to the system.
  // Throws CapacityError, with nothing changed, where what is held does not fit, and IoError, with
  // nothing lost, where a transfer fails on the way.
  void resize(Bytes device_bytes, Bytes pool_bytes);

  // What `headroom` goes by from now on; what runs is not touched.
  void set_objective(const Objective& objective);

  // How much steps are to stream from now on, though it may fit on the device: by policy "adaptive"
  // or "fit" at least this much of what they read. They stream what does not fit in any case.
  void set_streamed(Bytes bytes);

  // What can be admitted now without more slowdown than the objective allows, by what decode steps
  // have cost so far. A sequence takes whole blocks, with its next token; those that are held are
  // counted like that. Between steps. From the first call on, decode steps by policy "adaptive" may
  // stream a little of what would fit, until it is known what that costs: 128 of them at most and
  // then one in 256, within half of the slack.
  [[nodiscard]] Headroom headroom() const;

  [[nodiscard]] Stats stats() const;

  // Records steps, layers, stalls and copies from now on, the last `events_most` of them, in memory
  // that is set aside at once; on a stream two more timed fences a layer. Throws ConfigError for 0
  // or more than 10,000,000. Between steps, as is the end of it.
  void start_trace(std::size_t events_most);
  // What was recorded, and no more is. On a stream what it has not come to yet is left out.
  [[nodiscard]] Trace take_trace();

  // Throws LogicError naming the first invariant that does not hold.
  void check() const;

  // Waits for transfers and gives all memory back. Every later call but close() throws LogicError.
  void close();

 private:
  struct Door;
  class Impl;
  class Turn;
  template <typename Change>
  auto change(const Change& what);

  std::unique_ptr<Door> door_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace pie
