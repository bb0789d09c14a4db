// Attention over frames on the CPU: exact softmax attention that continues over pieces of KV.
//
// Method: online softmax (Milakov and Gimelshein, arXiv 1805.02867) as FlashAttention uses it, with
// running maximum, sum and accumulator kept per (query row, head) between pieces. KV is consumed in
// granules of `granule_tokens` at absolute positions and each granule with the same order of
// operations, so the result of a row is bit-identical whatever the pieces, the chunk it came in,
// the rows beside it and the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "pie/types.hpp"

namespace pie {

// Rows of a matrix held by the caller: element (row, head, d) lies at
// data + (row * row_stride + head * head_stride + d) * dtype_bytes. Strides are in elements.
struct Rows {
  const void* data = nullptr;
  std::int64_t row_stride = 0;
  std::int64_t head_stride = 0;
};

struct MutableRows {
  void* data = nullptr;
  std::int64_t row_stride = 0;
  std::int64_t head_stride = 0;
};

struct AttentionShape {
  std::uint32_t query_heads = 0;  // a multiple of kv_heads
  std::uint32_t kv_heads = 0;
  std::uint32_t head_dim = 0;
  std::uint32_t block_tokens = 0;
  DType dtype = DType::f32;  // of q, K, V and out
  float scale = 0;           // multiplies q.k
  std::uint32_t window = 0;  // a row at position p sees tokens t > p - window; 0: all
  float soft_cap = 0;        // scaled scores s become soft_cap * tanh(s / soft_cap); 0: they do not
  // `[query_heads]`: scores of one token more for each head that has no value; null: none. They are
  // part of the log-sum-exp.
  const float* sinks = nullptr;
};

// One piece of one sequence: query rows at absolute positions [position, position + rows), and the
// KV of tokens [kv_begin, kv_end), kv_begin a multiple of granule_tokens. A row at position p sees
// tokens t <= p, and within the window if there is one. `frames[i]` is the start of the frame of
// block kv_begin / block_tokens + i. Pieces of one row must be given in ascending, gapless order
// from token 0, or from any granule at or before the first token that it sees.
struct AttentionWork {
  Rows q;
  std::uint32_t rows = 0;
  std::uint32_t position = 0;
  std::uint32_t kv_begin = 0;
  std::uint32_t kv_end = 0;
  BlockFrames frames;
  float* state = nullptr;  // rows * attention_state_floats(shape), set by attention_reset first
};

// Floats of running state that one query row needs, all its heads together.
[[nodiscard]] std::size_t attention_state_floats(const AttentionShape& shape);

void attention_reset(const AttentionShape& shape, float* state, std::uint32_t rows);

// Folds the pieces into their states. Items are independent: different rows, or different
// sequences.
void attention_fold(const AttentionShape& shape, std::span<const AttentionWork> work);

// Writes the normalised rows; a row that saw no token becomes zeros. `lse`, if given, receives the
// natural log-sum-exp of the scaled scores, `[rows, query_heads]`, -inf for such a row.
void attention_finish(const AttentionShape& shape, const float* state, std::uint32_t rows,
                      const MutableRows& out, float* lse);

// Writes K and V rows of tokens [token, token + rows) of one block into its frame; `token` counts
// from the block's start.
void frame_append(const AttentionShape& shape, std::byte* frame, std::uint32_t token,
                  std::uint32_t rows, const Rows& k, const Rows& v);

// Name of the instruction set chosen at run time: "avx512", "avx2", "portable".
[[nodiscard]] const char* attention_isa();

}  // namespace pie
