// Rows given out and taken back; room for more of them, or for longer ones, is made by doubling.
#include "tables.hpp"

#include <algorithm>
#include <new>
#include <numeric>
#include <utility>

namespace pie {

namespace {

constexpr std::size_t edits_max = 1U << 16;  // beyond, copying all is no more work

// Whether entries are already those of adjacent frames from one on.
bool says(const std::int32_t* entries, std::uint32_t count, std::int32_t frame) {
  for (std::uint32_t i = 0; i < count; ++i) {
    if (entries[i] != frame + static_cast<std::int32_t>(i)) return false;
  }
  return true;
}

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
    if (noting_ && says(entries, count, frame)) return;
    std::iota(entries, entries + count, frame);
    if (noting_ && !noted_.all) note({layer, row, block, count, frame});
  }
}

// Added to the last edit where it goes on from that. Where there is no memory all is to be copied.
void BlockTables::note(const TableEdit& edit) {
  std::vector<TableEdit>& edits = noted_.edits;
  if (!edits.empty()) {
    TableEdit& last = edits.back();
    if (last.layer == edit.layer && last.row == edit.row && last.block + last.count == edit.block &&
        last.frame + static_cast<std::int32_t>(last.count) == edit.frame) {
      last.count += edit.count;
      return;
    }
  }
  try {
    noted_.all = edits.size() == edits_max;
    if (noted_.all) return;
    spoken_.resize(std::size_t{layers_} * rows_);
    std::uint32_t& spoken = spoken_[std::size_t{edit.layer} * rows_ + edit.row];
    if (spoken == batch_) separate(edit);
    spoken = batch_;
    edits.push_back(edit);
  } catch (const std::bad_alloc&) {
    noted_.all = true;
  }
}

// Begins another batch where this one speaks of the same entries.
void BlockTables::separate(const TableEdit& edit) {
  const std::uint32_t begin = noted_.batch_ends.empty() ? 0 : noted_.batch_ends.back();
  const auto overlaps = [&](const TableEdit& other) { return other.overlaps(edit); };
  if (std::none_of(noted_.edits.begin() + begin, noted_.edits.end(), overlaps)) return;
  noted_.batch_ends.push_back(static_cast<std::uint32_t>(noted_.edits.size()));
  ++batch_;
}

const TableEdits& BlockTables::take_edits() {
  noting_ = true;
  std::swap(taken_, noted_);
  noted_.all = false;
  noted_.edits.clear();
  noted_.batch_ends.clear();
  ++batch_;
  if (!taken_.edits.empty()) {
    taken_.batch_ends.push_back(static_cast<std::uint32_t>(taken_.edits.size()));
  }
  return taken_;
}

}  // namespace pie
