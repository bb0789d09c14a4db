// The policies "off", "fit" and "fixed:F".
#include "pie/policy.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "pie/error.hpp"

namespace pie {

namespace {

struct Totals {
  std::uint64_t full_active = 0;
  std::uint64_t full_idle = 0;
  std::uint64_t pinned = 0;

  [[nodiscard]] std::uint64_t full() const { return full_active + full_idle; }
};

Totals totals_of(const Snapshot& snapshot) {
  Totals totals;
  for (const BranchView& branch : snapshot.branches) {
    const std::uint64_t full = std::uint64_t{branch.full_blocks} * branch.layers;
    (branch.active ? totals.full_active : totals.full_idle) += full;
    totals.pinned += std::uint64_t{branch.pinned_blocks} * branch.layers;
  }
  return totals;
}

// Gives `frames` to the branches of one kind in proportion to their full frames, exactly.
void share_out(const Snapshot& snapshot, bool active, std::uint64_t total, std::uint64_t frames,
               std::vector<std::uint32_t>& streamed) {
  if (total == 0) return;
  std::uint64_t before = 0;
  for (std::size_t i = 0; i < snapshot.branches.size(); ++i) {
    const BranchView& branch = snapshot.branches[i];
    if (branch.active != active) continue;
    const std::uint64_t after = before + std::uint64_t{branch.full_blocks} * branch.layers;
    streamed[i] = static_cast<std::uint32_t>(after * frames / total - before * frames / total);
    before = after;
  }
}

// The ring that streams `frames` evenly over the layers: one layer in use while the next arrives,
// copies of the best size where that is more, and never above half of what is not pinned, but
// `least` in any case.
std::uint64_t ring_for(const Snapshot& snapshot, std::uint64_t frames, std::uint64_t free,
                       std::uint64_t least) {
  const std::uint64_t two_layers = 2 * ((frames + snapshot.layers - 1) / snapshot.layers);
  const std::uint64_t two_copies =
      std::min<std::uint64_t>(2ULL * snapshot.copy_frames_best, free / 8);
  return std::max(least, std::clamp<std::uint64_t>(std::max(two_layers, two_copies), 1,
                                                   std::max<std::uint64_t>(1, free / 2)));
}

// Streams at least `wanted` of the active frames, and more until the rest fits beside a ring of
// `ring_least` frames or more.
Plan plan_ring(const Snapshot& snapshot, const Totals& totals, std::uint64_t wanted,
               std::uint64_t ring_least) {
  Plan plan;
  plan.streamed_frames.assign(snapshot.branches.size(), 0);
  const std::uint64_t room =
      snapshot.device_frames > totals.pinned ? snapshot.device_frames - totals.pinned : 0;
  const std::uint64_t excess = totals.full() > room ? totals.full() - room : 0;
  if (excess == 0 && wanted == 0) return plan;

  // Idle branches are not read, so setting them aside costs neither ring nor link.
  const std::uint64_t idle = std::min(totals.full_idle, excess);
  const std::uint64_t excess_active = excess - idle;
  std::uint64_t active = std::max(excess_active, wanted);
  std::uint64_t ring = 0;
  if (active > 0) {
    // The ring takes room from residents, which adds to what is streamed: X = excess + ring(X).
    // Two rounds settle it: ring(X) is at most 2 X / layers and is capped at half of the room.
    ring = ring_for(snapshot, active, room, ring_least);
    for (int round = 0; round < 2; ++round) {
      active = std::min(totals.full_active, std::max(wanted, excess_active + ring));
      ring = ring_for(snapshot, active, room, ring_least);
    }
    const std::uint64_t kept = totals.full() - idle - active;
    if (kept + ring > room) {
      const std::uint64_t over = kept + ring - room;
      const std::uint64_t more = std::min(over, totals.full_active - active);
      active += more;
      ring = std::max(ring_least, ring - std::min(ring, over - more));
    }
  }
  plan.ring_frames = static_cast<std::uint32_t>(ring);
  share_out(snapshot, true, totals.full_active, active, plan.streamed_frames);
  share_out(snapshot, false, totals.full_idle, idle, plan.streamed_frames);
  return plan;
}

// The most frames that any one layer streams.
std::uint64_t widest_layer(const Snapshot& snapshot, const Plan& plan) {
  std::uint64_t frames = 0;
  for (std::size_t i = 0; i < snapshot.branches.size(); ++i) {
    const std::uint32_t layers = snapshot.branches[i].layers;
    if (snapshot.branches[i].active) frames += (plan.streamed_frames[i] + layers - 1) / layers;
  }
  return frames;
}

// Streams at least `wanted` of the active frames. Where whole layers are asked for, the ring grows
// until it holds one: each round leaves less over than the last, by the number of layers.
Plan plan_streaming(const Snapshot& snapshot, const Totals& totals, std::uint64_t wanted) {
  constexpr int rounds_max = 32;
  Plan plan = plan_ring(snapshot, totals, wanted, 1);
  for (int round = 0; snapshot.whole_layers && round < rounds_max; ++round) {
    const std::uint64_t widest = widest_layer(snapshot, plan);
    if (widest <= plan.ring_frames) break;
    plan = plan_ring(snapshot, totals, wanted, widest);
  }
  return plan;
}

class Off final : public Policy {
 public:
  [[nodiscard]] Plan plan(const Snapshot& snapshot) const override {
    Plan plan;
    plan.streamed_frames.assign(snapshot.branches.size(), 0);
    return plan;
  }
  [[nodiscard]] std::string name() const override { return "off"; }
};

class Fit final : public Policy {
 public:
  [[nodiscard]] Plan plan(const Snapshot& snapshot) const override {
    if (snapshot.pool_frames == 0) return Off().plan(snapshot);
    const Totals totals = totals_of(snapshot);
    Plan plan = plan_streaming(snapshot, totals, 0);
    // From half full on, eviction is in sight: what is written by then is a discard later.
    plan.write_behind = (totals.full() + totals.pinned) * 2 > snapshot.device_frames;
    return plan;
  }
  [[nodiscard]] std::string name() const override { return "fit"; }
};

class Fixed final : public Policy {
 public:
  Fixed(double share, std::string name) : share_(share), name_(std::move(name)) {}

  [[nodiscard]] Plan plan(const Snapshot& snapshot) const override {
    if (snapshot.pool_frames == 0) return Off().plan(snapshot);
    const Totals totals = totals_of(snapshot);
    const auto wanted =
        static_cast<std::uint64_t>(std::ceil(share_ * static_cast<double>(totals.full_active)));
    Plan plan = plan_streaming(snapshot, totals, wanted);
    plan.write_behind = share_ > 0 || (totals.full() + totals.pinned) * 2 > snapshot.device_frames;
    return plan;
  }
  [[nodiscard]] std::string name() const override { return name_; }

 private:
  double share_;
  std::string name_;
};

}  // namespace

std::uint32_t streamed_blocks(std::uint32_t streamed_frames, std::uint32_t layer,
                              std::uint32_t layers) {
  const std::uint64_t remainder = streamed_frames % layers;
  const auto extra = (layer + 1) * remainder / layers - layer * remainder / layers;
  return streamed_frames / layers + static_cast<std::uint32_t>(extra);
}

std::uint64_t device_frames_needed(const Snapshot& snapshot, const Plan& plan) {
  const Totals totals = totals_of(snapshot);
  return totals.full() - plan.streamed() + totals.pinned + plan.ring_frames;
}

std::unique_ptr<Policy> make_policy(const std::string& name) {
  if (name == "off") return std::make_unique<Off>();
  if (name == "fit") return std::make_unique<Fit>();
  if (name.starts_with("fixed:")) {
    double share = -1;
    const char* first = name.data() + 6;
    const char* last = name.data() + name.size();
    const auto [end, code] = std::from_chars(first, last, share);
    if (code == std::errc() && end == last && first != last && share >= 0 && share <= 1) {
      return std::make_unique<Fixed>(share, name);
    }
  }
  throw ConfigError("policy '" + name +
                    "' is unknown: use 'fit', 'off', or 'fixed:F' with F between 0 and 1.");
}

}  // namespace pie
