// The words every other file is written in: tiers, frames, runs of frames, bytes and nanoseconds.
//
// All are small values without vendor types. Units: bytes are Bytes, times are Nanos; a count of
// frames or tokens is a plain std::uint32_t whose name says what it counts.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pie {

using Bytes = std::uint64_t;
using Nanos = std::int64_t;

// Where a frame lies. `device` is what attention reads at full speed, `pool` the capacity behind
// it, `disk` what may lie behind a pool in memory.
enum class Tier : std::uint8_t { device, pool, disk };

using SequenceId = std::uint64_t;

// Index of a frame inside its tier, counted from 0; `no_frame` where there is none.
using FrameIndex = std::uint32_t;
inline constexpr FrameIndex no_frame = 0xffffffff;

// What a table of frames says where there is none.
inline constexpr std::int32_t no_table_frame = -1;

// Set in what a table says of a block that is read where it lies in the pool: the other bits say
// which frame of that.
inline constexpr std::int32_t in_pool_bit = 1 << 30;

// A change of tables `[layers, rows, blocks]`: blocks [block, block + count) of a row came to lie
// in the frames from `frame` on.
struct TableEdit {
  std::uint32_t layer = 0;
  std::uint32_t row = 0;
  std::uint32_t block = 0;
  std::uint32_t count = 0;
  std::int32_t frame = no_table_frame;

  [[nodiscard]] bool overlaps(const TableEdit& other) const {
    return layer == other.layer && row == other.row && block < other.block + other.count &&
           other.block < block + count;
  }
};

// Changes, oldest first. No two of a batch speak of one entry, so those may be made at once.
struct TableEdits {
  bool all = false;  // more has changed than is told: copy the tables
  std::vector<TableEdit> edits;
  std::vector<std::uint32_t> batch_ends;  // into `edits`
};

// The frames of adjacent blocks, by a table: number i of them starts at `memory` + `table[i]` *
// `stride` bytes, or where `in_pool_bit` is set, so many bytes behind `pool`.
struct BlockFrames {
  const std::byte* memory = nullptr;
  Bytes stride = 0;
  const std::int32_t* table = nullptr;
  const std::byte* pool = nullptr;  // null where none of them lies there

  [[nodiscard]] const std::byte* operator[](std::size_t i) const {
    const bool in_pool = (table[i] & in_pool_bit) != 0;
    return (in_pool ? pool : memory) + static_cast<Bytes>(table[i] & ~in_pool_bit) * stride;
  }
};

// `count` adjacent frames of one tier, starting at `first`.
struct FrameRun {
  FrameIndex first = no_frame;
  std::uint32_t count = 0;

  [[nodiscard]] FrameIndex end() const { return first + count; }
  friend bool operator==(const FrameRun&, const FrameRun&) = default;
};

// Element type of K and V.
enum class DType : std::uint8_t { f32, bf16, f16 };

[[nodiscard]] constexpr Bytes dtype_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Geometry of one layer's KV. All layers of a cache share it.
struct Geometry {
  std::uint32_t layers = 0;
  std::uint32_t kv_heads = 0;
  std::uint32_t head_dim = 0;      // elements
  std::uint32_t block_tokens = 0;  // tokens in one frame, a multiple of `granule_tokens`
  DType dtype = DType::f32;

  // By layer, 0: all; empty: all, in every layer. With a window of w tokens the row at position p
  // sees tokens t with p - w < t <= p, and frames that no row can see any more are given back.
  std::vector<std::uint32_t> windows = {};

  [[nodiscard]] std::uint32_t window(std::uint32_t layer) const {
    return windows.empty() ? 0 : windows[layer];
  }

  // The first token that the row at `position` sees in a layer with this window.
  [[nodiscard]] static std::uint32_t first_seen(std::uint32_t position, std::uint32_t window) {
    return window == 0 || position < window ? 0 : position - window + 1;
  }
  // Its block, and how many blocks hold these tokens.
  [[nodiscard]] std::uint32_t first_block(std::uint32_t position, std::uint32_t window) const {
    return first_seen(position, window) / block_tokens;
  }
  [[nodiscard]] std::uint32_t blocks_of(std::uint32_t tokens) const {
    return (tokens + block_tokens - 1) / block_tokens;
  }

  // Payload of one frame, `[2, kv_heads, block_tokens, head_dim]` elements: all K, then all V.
  [[nodiscard]] Bytes frame_bytes() const {
    return Bytes{2} * kv_heads * block_tokens * head_dim * dtype_bytes(dtype);
  }
};

// Attention consumes KV in steps of this many tokens, counted from the absolute position 0, so its
// bits do not depend on how blocks were cut into pieces. Every block holds a multiple of it.
inline constexpr std::uint32_t granule_tokens = 16;

}  // namespace pie
