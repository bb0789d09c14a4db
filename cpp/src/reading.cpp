// Visits and the legs they make, collected into pieces.
#include "reading.hpp"

#include <algorithm>
#include <utility>

namespace pie {

// Each wave reads its visits' paths. A branch that several pass through is read once, by all of
// them; since paths part and never meet again, every visit still gets its blocks in order.
void Reading::set(std::vector<Visit> visits) {
  clear();
  visits_ = std::move(visits);
  progress_.resize(visits_.size());
  for (std::uint32_t i = 0; i < visits_.size(); ++i) {
    const Visit& visit = visits_[i];
    for (Branch* branch : visit.sequence->path) {
      const bool listed = branch->leg < legs_.size() && legs_[branch->leg].branch == branch &&
                          legs_[branch->leg].wave == visit.wave;
      if (!listed) {
        branch->leg = legs_.size();
        legs_.push_back({branch, visit.wave, visit.position, {}});
      }
      Leg& leg = legs_[branch->leg];
      leg.position = std::min(leg.position, visit.position);
      leg.visits.push_back(i);
    }
  }
}

void Reading::clear() {
  visits_.clear();
  legs_.clear();
  whole_layer_ = no_layer;
  ready_ = false;
}

std::uint32_t Reading::first_block(const Leg& leg, std::uint32_t layer) const {
  const std::uint32_t seen = geometry_.first_block(leg.position, geometry_.window(layer));
  return seen - std::min(seen, leg.branch->first);
}

void Reading::start(std::uint32_t layer) {
  layer_ = layer;
  whole_layer_ = no_layer;
  ready_ = false;
  for (std::size_t i = 0; i < visits_.size(); ++i) {
    const std::uint32_t begin = geometry_.first_block(visits_[i].position, geometry_.window(layer));
    progress_[i] = {begin, begin, begin};
  }
}

void Reading::collect(const Leg& leg, std::uint32_t end) {
  for (const std::uint32_t visit : leg.visits) {
    progress_[visit].ready = std::max(progress_[visit].ready, leg.branch->first + end);
  }
  ready_ = true;
}

std::span<const KvPiece> Reading::take(const BlockFrames& frames) {
  ready_ = false;
  pieces_.clear();
  for (std::size_t i = 0; i < visits_.size(); ++i) {
    Progress& progress = progress_[i];
    if (progress.ready == progress.read) continue;
    add_piece(i, frames);
    progress.read = progress.ready;
  }
  return pieces_;
}

// The pieces differ from those of the layer before by their tables, where the window is the same:
// with nothing streamed a layer costs no more than that.
std::span<const KvPiece> Reading::whole(std::uint32_t layer, const BlockFrames& frames) {
  const std::uint32_t before = whole_layer_;
  if (before != no_layer && geometry_.window(before) == geometry_.window(layer)) {
    const std::ptrdiff_t ahead = tables_.row(layer, 0) - tables_.row(before, 0);
    for (KvPiece& piece : pieces_) piece.frames.table += ahead;
  } else {
    start(layer);
    pieces_.clear();
    for (std::size_t i = 0; i < visits_.size(); ++i) {
      progress_[i].ready = geometry_.blocks_of(visits_[i].kv_end());
      add_piece(i, frames);
    }
  }
  whole_layer_ = layer;
  return pieces_;
}

// What is ready of a visit and not yet read.
void Reading::add_piece(std::size_t visit, const BlockFrames& frames) {
  const Visit& of = visits_[visit];
  const Progress& progress = progress_[visit];
  KvPiece& piece = pieces_.emplace_back();
  piece.sequence = of.sequence->id;
  piece.entry = of.entry;
  piece.first_row = of.first_row;
  piece.rows = of.rows;
  piece.position = of.position;
  piece.kv_begin = progress.read * geometry_.block_tokens;
  piece.kv_end = std::min(progress.ready * geometry_.block_tokens, of.kv_end());
  piece.first = progress.read == progress.begin;
  piece.last = piece.kv_end == of.kv_end();
  piece.frames = frames;
  piece.frames.table = tables_.row(layer_, of.sequence->row) + progress.read;
}

}  // namespace pie
