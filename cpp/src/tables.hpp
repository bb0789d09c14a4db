// The tables that kernels read: in which device frame each block of each sequence lies.
//
// A sequence has a row of its own from its first day to its last, so that one that goes shifts no
// other; a row is written to where a block comes, moves or goes, and never rebuilt.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pie/types.hpp"

namespace pie {

class BlockTables {
 public:
  explicit BlockTables(std::uint32_t layers) : layers_(layers) {}

  // A row without blocks, and the end of one. After `reserve_row` the next one takes no memory.
  void reserve_row();
  [[nodiscard]] std::uint32_t add_row();
  void remove_row(std::uint32_t row);

  // Blocks [0, blocks) can be told of.
  void reserve_blocks(std::uint32_t blocks);

  // Blocks [block, block + count) of a row lie in the frames from `frame` on, or in none.
  void set(std::uint32_t layer, std::uint32_t row, std::uint32_t block, std::uint32_t count,
           std::int32_t frame);

  // What was set since this was called last, for who keeps a copy; not what lies nowhere any more.
  // Good until it is called again.
  [[nodiscard]] const TableEdits& take_edits();

  // `[blocks]`, by block of the sequence: a frame of the device, or `no_table_frame`.
  [[nodiscard]] const std::int32_t* row(std::uint32_t layer, std::uint32_t row) const {
    return entries_.data() + offset(layer, row);
  }

  // All of them, `[layers, rows, blocks]`.
  [[nodiscard]] const std::int32_t* data() const { return entries_.data(); }
  [[nodiscard]] std::uint32_t rows() const { return rows_; }
  [[nodiscard]] std::uint32_t blocks() const { return blocks_; }

 private:
  [[nodiscard]] std::size_t offset(std::uint32_t layer, std::uint32_t row) const {
    return (std::size_t{layer} * rows_ + row) * blocks_;
  }
  void resize(std::uint32_t rows, std::uint32_t blocks);
  void note(const TableEdit& edit);
  void separate(const TableEdit& edit);

  std::uint32_t layers_;
  std::uint32_t rows_ = 0;
  std::uint32_t blocks_ = 0;
  std::vector<std::int32_t> entries_;
  std::vector<bool> used_;             // by row
  bool noting_ = false;                // somebody keeps a copy
  TableEdits noted_ = {true, {}, {}};  // since `take_edits`; of its batches the last has no end
  TableEdits taken_;                   // what it returned
  std::vector<std::uint32_t> spoken_;  // by layer and row: the batch that last spoke of it
  std::uint32_t batch_ = 1;
};

}  // namespace pie
