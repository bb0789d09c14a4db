// What a layer of a step is given and read by: rows to append, pieces of KV to attend to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "pie/attention.hpp"
#include "pie/types.hpp"

namespace pie {

// Inputs of one layer: rows of all sequences packed in batch order, `[sum of new_tokens, heads,
// d]`.
struct LayerInputs {
  Rows k;
  Rows v;
};

// Contiguous K and V of the batch, each `[batch, kv_heads, longest, head_dim]`; shorter sequences
// are padded with zeros on the right. Valid until the next `gather`, `begin` or `truncate`.
struct Gathered {
  void* k = nullptr;
  void* v = nullptr;
  std::uint32_t batch = 0;
  std::uint32_t longest = 0;  // tokens, the step's new ones included
};

// Packed rows of a layer and where their K and V go: row `first_row` + i to the slot slots[i],
// which is token `slot % block_tokens` of frame `slot / block_tokens`.
struct Append {
  std::uint32_t layer = 0;
  std::uint32_t first_row = 0;
  std::span<const std::int64_t> slots;
  std::uint32_t block_tokens = 0;
  std::byte* memory = nullptr;  // of frame 0
  Bytes stride = 0;             // of frames

  // Calls `run(frame, token, rows, row)` for each range of rows that are adjacent in one frame:
  // rows [row, row + rows) go to its tokens from `token` on.
  template <typename Run>
  void each_run(const Run& run) const {
    for (std::size_t i = 0; i < slots.size();) {
      const auto token = static_cast<std::uint32_t>(slots[i] % block_tokens);
      std::size_t end = i + 1;
      while (end < slots.size() && slots[end] == slots[end - 1] + 1 &&
             slots[end] % block_tokens != 0) {
        ++end;
      }
      run(memory + static_cast<Bytes>(slots[i] / block_tokens) * stride, token,
          static_cast<std::uint32_t>(end - i), first_row + static_cast<std::uint32_t>(i));
      i = end;
    }
  }
};

// Query rows of one sequence and a range of its KV that they are to read.
struct KvPiece {
  SequenceId sequence = 0;
  std::uint32_t entry = 0;      // of the step's batch
  std::uint32_t first_row = 0;  // in the step's packed rows
  std::uint32_t rows = 0;
  std::uint32_t position = 0;  // of the first row; the row at position p sees tokens t <= p
  std::uint32_t kv_begin = 0;  // a multiple of block_tokens
  std::uint32_t kv_end = 0;
  BlockFrames frames;  // frames[i] is that of block kv_begin / block_tokens + i
  bool first = false;  // of these rows in this layer
  bool last = false;
};

// Attention of the caller's: fills blocks and reads them. Both are called inside `run`, on its
// thread; an exception from either aborts the step and goes on to the caller of `run`. What they
// start on a compute stream must be on the one given to `set_stream`.
class LayerKernel {
 public:
  LayerKernel() = default;
  LayerKernel(const LayerKernel&) = delete;
  LayerKernel& operator=(const LayerKernel&) = delete;
  virtual ~LayerKernel() = default;

  // Copies K and V of packed rows into frames. One call a layer has them all, unless the device has
  // no room for so many: then they come in ascending order, and what was appended may be read
  // first.
  virtual void append(const Append& rows) = 0;

  // Reads pieces of different rows. The pieces of one row come in ascending, gapless order over one
  // or more calls; after a call its frames may be taken for other blocks.
  virtual void attend(std::uint32_t layer, std::span<const KvPiece> pieces) = 0;
};

}  // namespace pie
