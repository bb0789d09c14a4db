// The readers that come with the cache: attention in place, a contiguous copy of K and V, and a
// table of frames.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "pie/attention.hpp"
#include "pie/layer_kernel.hpp"

namespace pie {

// Folds attention over the pieces into the state of each row, and writes the rows that are done.
class AttendKernel final : public LayerKernel {
 public:
  // `state` holds the rows of one wave, `rows_per_wave` of them.
  AttendKernel(const AttentionShape& shape, const LayerInputs& inputs, const Rows& q,
               const MutableRows& out, float* lse, float* state, std::uint32_t rows_per_wave);

  void append(const Append& rows) override;
  void attend(std::uint32_t layer, std::span<const KvPiece> pieces) override;

 private:
  [[nodiscard]] float* state_of(const KvPiece& piece) const;

  AttentionShape shape_;
  LayerInputs inputs_;
  Rows q_;
  MutableRows out_;
  float* lse_;
  float* state_;
  std::uint32_t rows_per_wave_;
  std::vector<AttentionWork> work_;
};

// Copies the pieces to their places in contiguous K and V, and zeros what lies past their ends.
class GatherKernel final : public LayerKernel {
 public:
  GatherKernel(const AttentionShape& shape, const LayerInputs& inputs, const Gathered& gathered);

  void append(const Append& rows) override;
  void attend(std::uint32_t layer, std::span<const KvPiece> pieces) override;

 private:
  [[nodiscard]] std::byte* place(void* base, const KvPiece& piece, std::uint32_t head,
                                 std::uint32_t token) const;
  void copy_block(const KvPiece& piece, std::uint32_t token, const std::byte* frame) const;
  void zero(const KvPiece& piece, std::uint32_t begin, std::uint32_t end) const;

  AttentionShape shape_;
  LayerInputs inputs_;
  Gathered gathered_;
  Bytes row_bytes_;
};

// Appends, and leaves the reading to the caller, who has the tables.
class PagesKernel final : public LayerKernel {
 public:
  PagesKernel(const AttentionShape& shape, const LayerInputs& inputs)
      : shape_(shape), inputs_(inputs) {}

  void append(const Append& rows) override;
  void attend(std::uint32_t /*layer*/, std::span<const KvPiece> /*pieces*/) override {}

 private:
  AttentionShape shape_;
  LayerInputs inputs_;
};

}  // namespace pie
