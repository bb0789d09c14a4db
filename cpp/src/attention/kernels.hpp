// What a compiled attention kernel offers, and the memory it works in.
//
// kernel.hpp is compiled once per instruction set; each translation unit publishes one table of
// functions. attention.cpp picks a table at run time, cuts the work into tasks and runs them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "pie/attention.hpp"

namespace pie::attention {

// The softmax restarts in every segment of this many tokens at absolute positions, and segments are
// merged in ascending order. That is what lets threads take segments of one sequence side by side
// and still give the bits of one thread going through them.
inline constexpr std::uint32_t segment_tokens = 512;

// Tokens that one pass of the kernel unpacks and works on.
inline constexpr std::uint32_t pass_tokens = 64;

// One softmax partial of a (row, head), in floats: accumulator [padded_dim], 16 lanes of the sum of
// weights (token modulo 16), then the running maximum in units of log2 and padding to 64 bytes.
[[nodiscard]] constexpr std::size_t padded_dim(std::uint32_t head_dim) {
  return (std::size_t{head_dim} + 15) / 16 * 16;
}
[[nodiscard]] constexpr std::size_t partial_floats(std::uint32_t head_dim) {
  return padded_dim(head_dim) + 32;
}

// The state of a (row, head) is two partials: the open segment's, then that of all before it.
[[nodiscard]] constexpr std::size_t head_state_floats(std::uint32_t head_dim) {
  return 2 * partial_floats(head_dim);
}

// A maximum below every finite score: a partial that has it has seen nothing. Scores are clamped to
// its opposite so that an overflow to infinity cannot become inf - inf.
inline constexpr float lowest_max = -3e38F;

// The first token that the row at `position` sees.
[[nodiscard]] constexpr std::uint32_t first_seen(const AttentionShape& shape,
                                                 std::uint32_t position) {
  return shape.window == 0 || position < shape.window ? 0 : position - shape.window + 1;
}

// Rows [row_begin, row_end) of one item and one KV head, over tokens [token_begin, token_end).
// "Lines" are the (row, query head) pairs that share the KV head, rows slowest.
struct FoldTask {
  const AttentionShape* shape = nullptr;
  const AttentionWork* work = nullptr;
  std::uint32_t kv_head = 0;
  std::uint32_t row_begin = 0;
  std::uint32_t row_end = 0;
  std::uint32_t token_begin = 0;
  std::uint32_t token_end = 0;
  // Where set, the tokens are one segment, and go to fresh partials here, one per line, instead of
  // into the state.
  float* partials = nullptr;
};

// Floats of scratch, aligned to 64 bytes, that a fold of `lines` lines needs.
[[nodiscard]] constexpr std::size_t scratch_floats(std::uint32_t head_dim, std::size_t lines) {
  const std::size_t unpacked = pass_tokens * (head_dim + padded_dim(head_dim));
  const std::size_t pointers = lines * sizeof(float*) / sizeof(float);
  return unpacked + lines * (padded_dim(head_dim) + pass_tokens) + pointers;
}

struct Kernels {
  const char* name = nullptr;
  void (*fold)(const FoldTask& task, float* scratch) = nullptr;
  // The segment after that of `state` (one head of one row) is the one in `partial`.
  void (*advance)(std::uint32_t head_dim, float* state, const float* partial) = nullptr;
  // Writes one head of one row; returns its log-sum-exp.
  float (*finish)(const AttentionShape& shape, std::uint32_t head, const float* state,
                  std::byte* out) = nullptr;
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

// The table of that name. Throws ConfigError where the name is unknown or this CPU lacks it; an
// empty name asks for the best this CPU has.
[[nodiscard]] const Kernels& find_kernels(std::string_view name);

// Replaces what the environment variable PIE_ISA chose. For tests; not while a step runs.
void use_kernels(const Kernels& kernels);

}  // namespace pie::attention
