// What the scheduler does to whole sequences: they fork, are cut, end, and lose what no window
// sees.
#include <algorithm>
#include <map>
#include <new>
#include <string>
#include <utility>

#include "pie/error.hpp"
#include "scheduler.hpp"

namespace pie {

namespace {

std::vector<std::uint64_t> ids_of(const std::vector<Branch*>& path) {
  std::vector<std::uint64_t> ids;
  for (const Branch* branch : path) ids.push_back(branch->id);
  return ids;
}

}  // namespace

Sequence& Scheduler::fork(Sequence& sequence) {
  stop_prefetch();
  // An aborted step may have left a branch without blocks behind.
  if (!sequence.path.empty() && sequence.path.back()->blocks() == 0) leave(sequence);
  return map_.fork(sequence);
}

void Scheduler::free(Sequence& sequence) {
  stop_prefetch();
  const std::vector<std::uint64_t> path = ids_of(sequence.path);
  prepare_to_leave(sequence, 0);
  while (!sequence.path.empty()) leave(sequence);
  map_.remove(sequence);
  tidy_up(path);
}

void Scheduler::truncate(Sequence& sequence, std::uint32_t tokens) {
  refuse_unseen(sequence, tokens);
  stop_prefetch();
  const std::vector<std::uint64_t> path = ids_of(sequence.path);
  const std::uint32_t keep = geometry_.blocks_of(tokens);
  prepare_to_leave(sequence, keep);
  const auto last = std::ranges::find_if(
      sequence.path, [&](const Branch* b) { return b->first < keep && b->end() > keep; });
  if (last != sequence.path.end() && (*last)->users.size() > 1)
    split(**last, keep - (*last)->first);
  while (!sequence.path.empty() && sequence.path.back()->first >= keep) leave(sequence);
  if (!sequence.path.empty() && sequence.path.back()->end() > keep) {
    cut(*sequence.path.back(), keep - sequence.path.back()->first);
  }
  sequence.tokens = tokens;
  tidy_up(path);
}

// What takes memory before a sequence loses its blocks from `keep` on: from then on nothing fails.
void Scheduler::prepare_to_leave(const Sequence& sequence, std::uint32_t keep) {
  for (Branch* branch : sequence.path) {
    const bool stays = branch->first >= keep && branch->users.size() > 1;  // for others
    if (branch->end() <= keep || stays) continue;
    settle(*branch);
    const std::uint32_t begin = std::max(keep, branch->first) - branch->first;
    for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
      ring_.guard_pool(*branch, layer, begin, branch->layers[layer].size());
    }
  }
}

// What a sequence that lost blocks leaves to be done. Where there is no memory for it, more room is
// taken than need be, until the next time.
void Scheduler::tidy_up(const std::vector<std::uint64_t>& path) {
  try {
    drop_unseen();
    for (const std::uint64_t branch : path) join_up(branch);
    give_back_pool();
  } catch (const std::bad_alloc&) {
    return;
  }
}

// A window gives frames back for good: the token that would come next must not look behind them.
void Scheduler::refuse_unseen(const Sequence& sequence, std::uint32_t tokens) const {
  if (tokens >= sequence.tokens) return;
  for (const LayerClass& layers : classes_) {
    const std::uint32_t needed = geometry_.first_block(tokens, layers.window);
    for (const Branch* branch : sequence.path) {
      const std::uint32_t gone = branch->layers[layers.layers.front()].gone;
      if (gone == 0 || branch->first >= geometry_.blocks_of(tokens) ||
          branch->first + gone <= needed) {
        continue;
      }
      throw LogicError("truncate: sequence " + std::to_string(sequence.id) + " of " +
                       std::to_string(sequence.tokens) + " tokens cannot be cut to " +
                       std::to_string(tokens) + ": layers with a window of " +
                       std::to_string(layers.window) +
                       " tokens have given back what its next token would see. Cut fewer tokens, "
                       "or free the sequence and begin it again.");
    }
  }
}

// The last branch comes off the sequence's path, and goes where nobody else is on it.
void Scheduler::leave(Sequence& sequence) {
  Branch& branch = *sequence.path.back();
  map_.leave(sequence);
  if (!branch.users.empty()) return;
  cut(branch, 0);
  static_cast<void>(transfers_.take_error(branch));
  map_.remove(branch);
}

// Drops a branch's blocks beyond the first `keep`.
void Scheduler::cut(Branch& branch, std::uint32_t keep) {
  settle(branch);
  ring_.cut(branch, keep);
  for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
    LayerBlocks& blocks = branch.layers[layer];
    ring_.guard_pool(branch, layer, keep, static_cast<std::uint32_t>(blocks.blocks.size()));
    while (blocks.blocks.size() > keep) map_.shorten(branch, layer);
    blocks.gone = std::min(blocks.gone, keep);
    blocks.written = std::min(blocks.written, keep);
    if (keep == 0) map_.release_extent(blocks);
  }
  branch.full = std::min(branch.full, keep);
  branch.open = no_frame;
}

// Blocks [0, at) of a branch become one of their own, which is returned.
Branch& Scheduler::split(Branch& branch, std::uint32_t at) {
  settle(branch);
  ring_.guard_pool(branch);
  ring_.drop(branch);
  return map_.split(branch, at);
}

// Where a branch and a neighbour of it have come to have the same sequences they become one, so
// that what was forked and freed does not stay in pieces.
void Scheduler::join_up(std::uint64_t id) {
  const auto found = map_.branches().find(id);
  if (found == map_.branches().end()) return;
  for (auto& [sequence_id, sequence] : map_.sequences()) {
    const auto place = std::ranges::find(sequence.path, &found->second);
    if (place == sequence.path.end()) continue;
    if (place + 1 != sequence.path.end()) merge(**place, **(place + 1));
    return;
  }
}

void Scheduler::merge(Branch& front, Branch& back) {
  if (front.users.size() != back.users.size() || front.full < front.blocks()) return;
  if (capabilities_.streams) land();
  if (front.in_flight > 0 || back.in_flight > 0 || !back.error.empty()) return;
  ring_.guard_pool(back);
  ring_.drop(back);
  map_.merge(front, back);
}

// Gives back the frames that no row of any sequence will see again.
void Scheduler::drop_unseen() {
  for (const LayerClass& layers : classes_) {
    if (layers.window == 0) continue;
    std::map<std::uint64_t, std::uint32_t> seen;  // by branch, the first block that is still seen
    for (const auto& [id, sequence] : map_.sequences()) {
      const std::uint32_t first = geometry_.first_block(sequence.tokens, layers.window);
      for (Branch* branch : sequence.path) {
        const auto [place, fresh] = seen.emplace(branch->id, first);
        place->second = std::min(place->second, first);
      }
    }
    for (const auto& [id, first] : seen) {
      Branch& branch = map_.branches().at(id);
      if (first > branch.first) drop_front(branch, layers, first - branch.first);
    }
  }
}

void Scheduler::drop_front(Branch& branch, const LayerClass& layers, std::uint32_t end) {
  const std::uint32_t target = std::min(end, branch.full);
  for (const std::uint32_t layer : layers.layers) {
    LayerBlocks& blocks = branch.layers[layer];
    ring_.trim(branch, layer, target);
    ring_.guard_pool(branch, layer, blocks.gone, std::max(blocks.gone, target));
    for (; blocks.gone < target; ++blocks.gone) {
      while (blocks.blocks[blocks.gone].in_flight()) wait();
      map_.drop({&branch, layer, blocks.gone});
    }
    blocks.streamed = std::max(blocks.streamed, target);
    blocks.written = std::max(blocks.written, target);
  }
}

}  // namespace pie
