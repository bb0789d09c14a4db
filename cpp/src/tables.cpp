// Rows given out and taken back; room for more of them, or for longer ones, is made by doubling.
#include "tables.hpp"

#include <algorithm>
#include <utility>

namespace pie {

void BlockTables::resize(std::uint32_t rows, std::uint32_t blocks) {
  BlockTables larger(layers_);
  larger.rows_ = rows;
  larger.blocks_ = blocks;
  larger.entries_.assign(std::size_t{layers_} * rows * blocks, no_table_frame);
  larger.used_ = used_;
  larger.used_.resize(rows);
  for (std::uint32_t layer = 0; layer < layers_; ++layer) {
    for (std::uint32_t i = 0; i < rows_; ++i) {
      std::copy_n(row(layer, i), blocks_, larger.row(layer, i));
    }
  }
  *this = std::move(larger);
}

void BlockTables::reserve_row() {
  if (std::ranges::find(used_, false) == used_.end()) resize(std::max(8U, 2 * rows_), blocks_);
}

std::uint32_t BlockTables::add_row() {
  reserve_row();
  const auto index = static_cast<std::uint32_t>(std::ranges::find(used_, false) - used_.begin());
  used_[index] = true;
  return index;
}

void BlockTables::remove_row(std::uint32_t index) { used_[index] = false; }

void BlockTables::reserve_blocks(std::uint32_t blocks) {
  if (blocks > blocks_) resize(rows_, std::max(blocks, 2 * blocks_));
}

}  // namespace pie
