// Rows given out and taken back; room for more of them, or for longer ones, is made by doubling.
#include "tables.hpp"

#include <algorithm>
#include <new>
#include <numeric>
#include <utility>

namespace pie {

namespace {

constexpr std::size_t edits_max = 1U << 16;  // beyond, copying all is no more work

}  // namespace

void BlockTables::resize(std::uint32_t rows, std::uint32_t blocks) {
  BlockTables larger(layers_);
  larger.rows_ = rows;
  larger.blocks_ = blocks;
  larger.entries_.assign(std::size_t{layers_} * rows * blocks, no_table_frame);
  larger.used_ = used_;
  larger.used_.resize(rows);
  for (std::uint32_t layer = 0; layer < layers_; ++layer) {
    for (std::uint32_t i = 0; i < rows_; ++i) {
      std::copy_n(row(layer, i), blocks_, larger.entries_.data() + larger.offset(layer, i));
    }
  }
  larger.noting_ = noting_;
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

void BlockTables::set(std::uint32_t layer, std::uint32_t row, std::uint32_t block,
                      std::uint32_t count, std::int32_t frame) {
  std::int32_t* entries = entries_.data() + offset(layer, row) + block;
  if (frame == no_table_frame) {
    std::fill_n(entries, count, frame);
  } else {
    std::iota(entries, entries + count, frame);
    if (noting_ && !all_) note({layer, row, block, count, frame});
  }
}

// Added to the last edit where it goes on from that. Where there is no memory all is to be copied.
void BlockTables::note(const TableEdit& edit) {
  if (!edits_.empty()) {
    TableEdit& last = edits_.back();
    if (last.layer == edit.layer && last.row == edit.row && last.block + last.count == edit.block &&
        last.frame + static_cast<std::int32_t>(last.count) == edit.frame) {
      last.count += edit.count;
      return;
    }
  }
  try {
    all_ = edits_.size() == edits_max;
    if (!all_) edits_.push_back(edit);
  } catch (const std::bad_alloc&) {
    all_ = true;
  }
}

const std::vector<TableEdit>* BlockTables::take_edits() {
  noting_ = true;
  taken_.clear();
  taken_.swap(edits_);
  return std::exchange(all_, false) ? nullptr : &taken_;
}

}  // namespace pie
