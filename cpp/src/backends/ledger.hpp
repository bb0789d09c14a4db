// What every backend keeps of its tickets and fences: their numbers, what each waits for, failures
// that are passed on, and completions not yet polled. How copies move is the backend's own; what it
// notes of a ticket meanwhile is `Work`.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "pie/backend.hpp"
#include "pie/error.hpp"

namespace pie {

// The lane of copies from one tier to another.
[[nodiscard]] inline Lane lane_between(Tier from, Tier to) {
  if (from == Tier::pool && to == Tier::device) return Lane::pool_to_device;
  if (from == Tier::device && to == Tier::pool) return Lane::device_to_pool;
  if (from == Tier::disk && to == Tier::pool) return Lane::disk_to_pool;
  if (from == Tier::pool && to == Tier::disk) return Lane::pool_to_disk;
  throw LogicError("submit: copies go between neighbouring tiers, and from one to another.");
}

// The first frame of a copy's end in this tier.
[[nodiscard]] inline FrameIndex first_in(Tier tier, const Copy& copy) {
  return copy.from.tier == tier ? copy.from.first : copy.to.first;
}

// Throws LogicError for copies beyond these frames of a device and a pool, or to and from a disk.
inline void require_in_range(std::span<const Copy> copies, std::uint32_t device_frames,
                             std::uint32_t pool_frames) {
  for (const Copy& copy : copies) {
    if (copy.count == 0) continue;
    require(copy.from.tier != Tier::disk && copy.to.tier != Tier::disk,
            "submit: this backend has no disk tier behind its pool");
    const FrameIndex device = first_in(Tier::device, copy);
    require(device < device_frames && copy.count <= device_frames - device,
            "submit: a copy reaches beyond the device frames there are");
    const FrameIndex pool = first_in(Tier::pool, copy);
    require(pool < pool_frames && copy.count <= pool_frames - pool,
            "submit: a copy reaches beyond the pool frames that resize_pool has made usable");
  }
}

template <class Work>
class Ledger {
 public:
  // One submitted batch of copies, from `open` until `end`.
  struct Entry {
    std::vector<Copy> copies;  // none of them empty
    std::vector<Dep> after;    // what had not passed when last looked at
    Completion completion;     // as far as it is known
    Work work;
  };
  using Entries = std::map<std::uint64_t, Entry>;  // by ticket id, so in order of submission

  // Numbers a batch. Throws LogicError where the seam says so.
  Ticket open(std::span<const Copy> copies, std::span<const Dep> after) {
    require(!copies.empty(), "submit: a ticket has at least one copy, of no frames if need be");
    const Lane lane = lane_between(copies.front().from.tier, copies.front().to.tier);
    Entry entry;
    for (const Copy& copy : copies) {
      require(lane_between(copy.from.tier, copy.to.tier) == lane,
              "submit: the copies of one ticket go the same way");
      if (copy.count > 0) entry.copies.push_back(copy);
    }
    for (const Dep& dep : after) {
      require_issued(dep, "submit: waits for a fence or ticket that was never submitted");
      if (dep.fence.id != 0 || dep.ticket.id != 0) entry.after.push_back(dep);
    }
    LaneState& to = state(lane);
    const Ticket ticket{lane, ++to.issued};
    entry.completion.ticket = ticket;
    to.live.emplace(ticket.id, std::move(entry));
    return ticket;
  }

  void require_issued(const Dep& dep, const char* message) const {
    require(dep.fence.id <= fences_issued_ && dep.ticket.id <= state(dep.ticket.lane).issued,
            message);
  }

  [[nodiscard]] Entries& live(Lane lane) { return state(lane).live; }
  [[nodiscard]] const Entries& live(Lane lane) const { return state(lane).live; }
  [[nodiscard]] Entry& at(Ticket ticket) { return state(ticket.lane).live.at(ticket.id); }

  [[nodiscard]] bool has_passed(const Dep& dep) const {
    return !ahead_.contains(dep.fence.id) && !state(dep.ticket.lane).live.contains(dep.ticket.id);
  }

  // Whether the entry must still wait. Once something it waits for has failed it has failed too.
  [[nodiscard]] bool is_held(Entry& entry) const {
    std::erase_if(entry.after, [&](const Dep& dep) {
      if (!has_passed(dep)) return false;
      const auto& failed = state(dep.ticket.lane).failed;
      const auto found = failed.find(dep.ticket.id);
      if (found != failed.end() && entry.completion.status == Status::ok) {
        entry.completion.status = Status::failed;
        entry.completion.error = found->second;
      }
      return true;
    });
    return !entry.after.empty();
  }

  // The batch has ended, as its completion says.
  void end(Ticket ticket) {
    LaneState& lane = state(ticket.lane);
    const auto found = lane.live.find(ticket.id);
    const Completion& completion = found->second.completion;
    if (completion.status != Status::ok) lane.failed.emplace(ticket.id, completion.error);
    if (lane.failed.size() > failures_kept) lane.failed.erase(lane.failed.begin());
    completions_.push_back(completion);
    lane.live.erase(found);
    ++passed_;
  }

  // A fence that has not passed, and its passing at a time that comes out of `poll` if wanted.
  [[nodiscard]] Fence record(Timing timing) {
    const Fence fence{++fences_issued_};
    ahead_.emplace(fence.id, timing);
    return fence;
  }
  void pass(Fence fence, Nanos now) {
    const auto found = ahead_.find(fence.id);
    if (found->second == Timing::wanted) {
      Completion completion;
      completion.fence = fence;
      completion.began = completion.ended = now;
      completions_.push_back(completion);
    }
    ahead_.erase(found);
    ++passed_;
  }

  // How many fences have passed and batches ended: as long as it is the same, what waits waits.
  [[nodiscard]] std::uint64_t passed() const { return passed_; }

  std::size_t poll(std::span<Completion> out) {
    const std::size_t count = std::min(out.size(), completions_.size());
    const auto end = completions_.begin() + static_cast<std::ptrdiff_t>(count);
    std::copy(completions_.begin(), end, out.begin());
    completions_.erase(completions_.begin(), end);
    return count;
  }

  [[nodiscard]] bool is_idle() const {
    return std::ranges::all_of(lanes_, [](const LaneState& lane) { return lane.live.empty(); });
  }
  [[nodiscard]] bool has_completions() const { return !completions_.empty(); }

  // Whether a copy that has not ended uses a frame of the tier from this one on.
  [[nodiscard]] bool reaches(Tier tier, FrameIndex from) const {
    const auto uses = [&](const Copy& copy) {
      return (copy.from.tier == tier && copy.from.first + copy.count > from) ||
             (copy.to.tier == tier && copy.to.first + copy.count > from);
    };
    return std::ranges::any_of(lanes_, [&](const LaneState& lane) {
      return std::ranges::any_of(lane.live, [&](const auto& live) {
        return std::ranges::any_of(live.second.copies, uses);
      });
    });
  }

 private:
  static constexpr std::size_t failures_kept = 1024;

  struct LaneState {
    std::uint64_t issued = 0;  // id of the newest ticket
    Entries live;
    std::map<std::uint64_t, int> failed;  // error of the newest that failed
  };

  LaneState& state(Lane lane) { return lanes_[static_cast<std::size_t>(lane)]; }
  [[nodiscard]] const LaneState& state(Lane lane) const {
    return lanes_[static_cast<std::size_t>(lane)];
  }

  std::array<LaneState, lane_count> lanes_;
  std::map<std::uint64_t, Timing> ahead_;  // fences that have not passed
  std::uint64_t fences_issued_ = 0;
  std::uint64_t passed_ = 0;
  std::deque<Completion> completions_;  // not yet polled
};

}  // namespace pie
