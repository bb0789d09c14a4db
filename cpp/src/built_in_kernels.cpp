// Attention in place, gathering and tables of frames, as kernels over pieces of KV.
#include "built_in_kernels.hpp"

#include <algorithm>
#include <cstring>

namespace pie {

namespace {

Rows rows_from(const Rows& rows, std::uint32_t row, DType dtype) {
  const auto bytes = static_cast<std::int64_t>(dtype_bytes(dtype)) * rows.row_stride * row;
  return {static_cast<const std::byte*>(rows.data) + bytes, rows.row_stride, rows.head_stride};
}

MutableRows rows_from(const MutableRows& rows, std::uint32_t row, DType dtype) {
  const auto bytes = static_cast<std::int64_t>(dtype_bytes(dtype)) * rows.row_stride * row;
  return {static_cast<std::byte*>(rows.data) + bytes, rows.row_stride, rows.head_stride};
}

void append_to(const AttentionShape& shape, const LayerInputs& inputs, const Append& rows) {
  rows.each_run([&](std::byte* frame, std::uint32_t token, std::uint32_t count, std::uint32_t row) {
    frame_append(shape, frame, token, count, rows_from(inputs.k, row, shape.dtype),
                 rows_from(inputs.v, row, shape.dtype));
  });
}

}  // namespace

// ---- attention ----------------------------------------------------------------------------------

AttendKernel::AttendKernel(const AttentionShape& shape, const LayerInputs& inputs, const Rows& q,
                           const MutableRows& out, float* lse, float* state,
                           std::uint32_t rows_per_wave)
    : shape_(shape),
      inputs_(inputs),
      q_(q),
      out_(out),
      lse_(lse),
      state_(state),
      rows_per_wave_(rows_per_wave) {}

void AttendKernel::append(const Append& rows) { append_to(shape_, inputs_, rows); }

float* AttendKernel::state_of(const KvPiece& piece) const {
  return state_ + piece.first_row % rows_per_wave_ * attention_state_floats(shape_);
}

void AttendKernel::attend(std::uint32_t /*layer*/, std::span<const KvPiece> pieces) {
  work_.clear();
  for (const KvPiece& piece : pieces) {
    if (piece.first) attention_reset(shape_, state_of(piece), piece.rows);
    work_.push_back({rows_from(q_, piece.first_row, shape_.dtype), piece.rows, piece.position,
                     piece.kv_begin, piece.kv_end, piece.frames, state_of(piece)});
  }
  attention_fold(shape_, work_);
  for (const KvPiece& piece : pieces) {
    if (!piece.last) continue;
    const std::size_t lse_at = std::size_t{piece.first_row} * shape_.query_heads;
    attention_finish(shape_, state_of(piece), piece.rows,
                     rows_from(out_, piece.first_row, shape_.dtype),
                     lse_ == nullptr ? nullptr : lse_ + lse_at);
  }
}

// ---- contiguous K and V -------------------------------------------------------------------------

GatherKernel::GatherKernel(const AttentionShape& shape, const LayerInputs& inputs,
                           const Gathered& gathered)
    : shape_(shape),
      inputs_(inputs),
      gathered_(gathered),
      row_bytes_(shape.head_dim * dtype_bytes(shape.dtype)) {}

void GatherKernel::append(const Append& rows) { append_to(shape_, inputs_, rows); }

void GatherKernel::attend(std::uint32_t /*layer*/, std::span<const KvPiece> pieces) {
  for (const KvPiece& piece : pieces) {
    for (std::uint32_t t = piece.kv_begin; t < piece.kv_end; t += shape_.block_tokens) {
      copy_block(piece, t, piece.frames[(t - piece.kv_begin) / shape_.block_tokens]);
    }
    if (piece.first) zero(piece, 0, piece.kv_begin);
    if (piece.last) zero(piece, piece.kv_end, gathered_.longest);
  }
}

// Start of the row of `token` of one head of the piece's sequence.
std::byte* GatherKernel::place(void* base, const KvPiece& piece, std::uint32_t head,
                               std::uint32_t token) const {
  const std::size_t lines = std::size_t{piece.entry} * shape_.kv_heads + head;
  return static_cast<std::byte*>(base) + (lines * gathered_.longest + token) * row_bytes_;
}

void GatherKernel::copy_block(const KvPiece& piece, std::uint32_t token,
                              const std::byte* frame) const {
  const Bytes bytes = std::min(shape_.block_tokens, piece.kv_end - token) * row_bytes_;
  const Bytes head_bytes = shape_.block_tokens * row_bytes_;
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    const std::byte* k = frame + head * head_bytes;
    const std::byte* v = k + shape_.kv_heads * head_bytes;
    std::memcpy(place(gathered_.k, piece, head, token), k, bytes);
    std::memcpy(place(gathered_.v, piece, head, token), v, bytes);
  }
}

void GatherKernel::zero(const KvPiece& piece, std::uint32_t begin, std::uint32_t end) const {
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    std::memset(place(gathered_.k, piece, head, begin), 0, (end - begin) * row_bytes_);
    std::memset(place(gathered_.v, piece, head, begin), 0, (end - begin) * row_bytes_);
  }
}

// ---- a table of frames --------------------------------------------------------------------------

void PagesKernel::append(const Append& rows) { append_to(shape_, inputs_, rows); }

}  // namespace pie
