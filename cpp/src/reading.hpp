// What the rows of a step read: in which order, and how far each has come in the layer that runs.
//
// A visit is rows of one sequence, a leg a branch that visits pass through, read in one go. A leg's
// blocks are collected as they come to be readable; what is collected of the visits makes the
// pieces that a kernel is given.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "block_map.hpp"
#include "pie/layer_kernel.hpp"
#include "pie/types.hpp"
#include "tables.hpp"

namespace pie {

// Query rows of one sequence that are served together in every layer of a step. Visits of one wave
// may be read by one call; a later wave of a layer starts when the wave before it is done.
struct Visit {
  Sequence* sequence = nullptr;
  std::uint32_t entry = 0;      // of the batch
  std::uint32_t first_row = 0;  // in the step's packed rows
  std::uint32_t rows = 0;
  std::uint32_t position = 0;  // of the first row, in tokens; row i appends token position + i
  std::uint32_t wave = 0;

  [[nodiscard]] std::uint32_t kv_end() const { return position + rows; }
};

// A branch, by all visits of one wave that pass through it.
struct Leg {
  Branch* branch = nullptr;
  std::uint32_t wave = 0;
  std::uint32_t position = 0;  // the least of its visits'
  std::vector<std::uint32_t> visits;
};

class Reading {
 public:
  // Both outlive it.
  Reading(const Geometry& geometry, const BlockTables& tables)
      : geometry_(geometry), tables_(tables) {}

  // The rows of a step, in order; none are left of one before.
  void set(std::vector<Visit> visits);
  void clear();

  [[nodiscard]] std::span<const Visit> visits() const { return visits_; }
  [[nodiscard]] const std::vector<Leg>& legs() const { return legs_; }  // in the order of reading
  [[nodiscard]] std::uint32_t rows() const {
    return visits_.back().first_row + visits_.back().rows;
  }

  // The block, counted from the branch's first, that a leg's rows see first in a layer.
  [[nodiscard]] std::uint32_t first_block(const Leg& leg, std::uint32_t layer) const;

  // A layer that is read by and by begins.
  void start(std::uint32_t layer);

  // Blocks of the leg's branch before `end` can be read.
  void collect(const Leg& leg, std::uint32_t end);

  // Whether something was collected and not taken, and pieces of that: good until the next call.
  // `frames` has the table of the layer's first row.
  [[nodiscard]] bool ready() const { return ready_; }
  [[nodiscard]] std::span<const KvPiece> take(const BlockFrames& frames);

  // Pieces of all that a layer reads, where all of it can be read.
  [[nodiscard]] std::span<const KvPiece> whole(std::uint32_t layer, const BlockFrames& frames);

 private:
  // How far a visit is through the layer that runs, in blocks of its sequence.
  struct Progress {
    std::uint32_t begin = 0;
    std::uint32_t read = 0;
    std::uint32_t ready = 0;
  };

  static constexpr std::uint32_t no_layer = 0xffffffff;

  void add_piece(std::size_t visit, const BlockFrames& frames);

  const Geometry& geometry_;
  const BlockTables& tables_;
  std::vector<Visit> visits_;
  std::vector<Leg> legs_;                 // wave by wave
  std::vector<Progress> progress_;        // of the visits
  std::vector<KvPiece> pieces_;           // that were given last
  std::uint32_t layer_ = 0;               // that runs
  std::uint32_t whole_layer_ = no_layer;  // of which the pieces are, where they are of all of it
  bool ready_ = false;
};

}  // namespace pie
