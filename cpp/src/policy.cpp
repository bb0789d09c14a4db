// The policies "off", "adaptive", "fit" and "fixed:F".
#include "pie/policy.hpp"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <utility>

#include "pie/error.hpp"

namespace pie {

namespace {

// The active blocks of the layers of one window.
struct ClassTotal {
  std::uint64_t full = 0;  // frames
  std::uint32_t layers = 0;
};

struct Totals {
  std::uint64_t full_active = 0;
  std::uint64_t full_idle = 0;
  std::uint64_t pinned = 0;
  std::vector<ClassTotal> classes;  // by layer_class

  [[nodiscard]] std::uint64_t full() const { return full_active + full_idle; }
};

std::uint64_t full_frames(const BranchView& view) {
  return std::uint64_t{view.full_blocks} * view.layers;
}

std::uint64_t ceil_of(std::uint64_t a, std::uint64_t b) { return (a + b - 1) / b; }

Totals totals_of(const Snapshot& snapshot) {
  Totals totals;
  for (const BranchView& view : snapshot.branches) {
    (view.active ? totals.full_active : totals.full_idle) += full_frames(view);
    totals.pinned += std::uint64_t{view.pinned_blocks} * view.layers;
    if (!view.active) continue;
    if (view.layer_class >= totals.classes.size()) totals.classes.resize(view.layer_class + 1);
    totals.classes[view.layer_class].full += full_frames(view);
    totals.classes[view.layer_class].layers = view.layers;
  }
  return totals;
}

// Gives `frames` to the branches of one kind in proportion to their full frames, exactly.
void share_out(const Snapshot& snapshot, bool active, std::uint64_t frames,
               std::vector<std::uint32_t>& streamed) {
  std::uint64_t total = 0;
  for (const BranchView& view : snapshot.branches) {
    total += view.active == active ? full_frames(view) : 0;
  }
  std::uint64_t before = 0;
  for (std::size_t i = 0; total > 0 && i < snapshot.branches.size(); ++i) {
    const BranchView& view = snapshot.branches[i];
    if (view.active != active) continue;
    const std::uint64_t after = before + full_frames(view);
    streamed[i] = static_cast<std::uint32_t>(after * frames / total - before * frames / total);
    before = after;
  }
}

// How many frames are to be streamed: between `least` and `most` all is well, else `aim`.
struct Range {
  std::uint64_t least = 0;
  std::uint64_t aim = 0;
  std::uint64_t most = 0;
};

// Leaves the boundaries of the branches of one kind where they are, or moves some of them, a block
// in each layer at a time: further in where most is resident, back where most is streamed. Where
// there are none yet, the least is shared out.
void move_boundaries(const Snapshot& snapshot, bool active, const Range& range,
                     std::vector<std::uint32_t>& streamed) {
  using Candidate = std::pair<std::uint64_t, std::size_t>;  // frames that could move, and whose
  std::uint64_t sum = 0;
  std::vector<std::size_t> views;
  for (std::size_t i = 0; i < snapshot.branches.size(); ++i) {
    const BranchView& view = snapshot.branches[i];
    if (view.active != active) continue;
    streamed[i] = static_cast<std::uint32_t>(
        std::min<std::uint64_t>(view.streamed_frames, full_frames(view)));
    sum += streamed[i];
    views.push_back(i);
  }
  if (sum == 0) return share_out(snapshot, active, range.least, streamed);
  if (sum >= range.least && sum <= range.most) return;
  const bool out = sum < range.least;
  std::vector<Candidate> heap;
  for (const std::size_t i : views) {
    heap.emplace_back(out ? full_frames(snapshot.branches[i]) - streamed[i] : streamed[i], i);
  }
  std::ranges::make_heap(heap);
  while (sum != range.aim && heap.front().first > 0 && (sum < range.aim) == out) {
    std::ranges::pop_heap(heap);
    auto& [left, i] = heap.back();
    const std::uint64_t room = out ? range.most - sum : sum - range.least;
    const auto step = static_cast<std::uint32_t>(
        std::min({left, room, std::uint64_t{snapshot.branches[i].layers}}));
    streamed[i] = out ? streamed[i] + step : streamed[i] - step;
    sum = out ? sum + step : sum - step;
    left -= step;
    std::ranges::push_heap(heap);
  }
}

// The most frames that one layer streams of `frames`, shared out evenly.
std::uint64_t widest_share(const Totals& totals, std::uint64_t frames) {
  std::uint64_t widest = 0;
  for (const ClassTotal& c : totals.classes) {
    if (c.full == 0) continue;
    widest = std::max(widest, ceil_of(ceil_of(c.full * frames, totals.full_active), c.layers));
  }
  return widest;
}

// The ring that streams `frames` evenly over the layers: one layer in use while the next arrives,
// copies of the best size where that is more, and never above half of what is not pinned nor what
// the pool has left, but `least` in any case. On a stream a layer more: what a layer leaves is
// fetched by one ticket, which may hold the end of a layer with the start of the next, and without
// it that end would come late. It moves in steps of an eighth or less, and one in force that serves
// stays, up to four times what is wanted, since what has been asked for ahead is lost when it
// moves.
std::uint64_t ring_for(const Snapshot& snapshot, const Totals& totals, std::uint64_t frames,
                       std::uint64_t free, std::uint64_t left, std::uint64_t least) {
  const std::uint64_t share = widest_share(totals, frames);
  const std::uint64_t layers = (snapshot.streams ? 3 : 2) * share;
  const std::uint64_t two_copies =
      std::min<std::uint64_t>(2ULL * snapshot.copy_frames_best, free / 8);
  const std::uint64_t most = std::max<std::uint64_t>(1, std::min(free / 2, left));
  const std::uint64_t ring = std::clamp<std::uint64_t>(std::max(layers, two_copies), 1, most);
  const std::uint64_t wanted =
      std::max(least, ring - ring % std::max<std::uint64_t>(1, std::bit_floor(ring) / 8));
  const std::uint64_t now = snapshot.ring_frames;
  const std::uint64_t next = now < wanted ? wanted + wanted / 4 : now;  // where it is to move, far
  return now == 0 || next > 4 * wanted || next >= most ? wanted : next;
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
  if (excess == 0 && wanted == 0) {
    // What is set aside of idle branches costs nothing until a step reads them, whose plan then
    // finds the boundaries where it left them: from anew they would lie elsewhere, and what is in
    // the pool by the old ones would be read beside what leaves by the new.
    const std::uint64_t most = snapshot.pool_frames;
    move_boundaries(snapshot, false, {0, most, most}, plan.streamed_frames);
    // Where nothing else needs its room the ring stays for steps that stream again: to come back it
    // would have to wait for copies out of the frames that it takes.
    plan.ring_frames = static_cast<std::uint32_t>(
        std::min<std::uint64_t>(snapshot.ring_frames, room - (totals.full() - plan.streamed())));
    return plan;
  }

  // Idle branches are not read, so setting them aside costs neither ring nor link.
  std::uint64_t idle = std::min(totals.full_idle, excess);
  const std::uint64_t excess_active = excess - idle;
  std::uint64_t active = std::max(excess_active, wanted);
  std::uint64_t ring = 0;
  const std::uint64_t idle_most = std::min<std::uint64_t>(totals.full_idle, snapshot.pool_frames);
  if (active == 0 && excess + snapshot.ring_frames < idle_most) {
    // Nobody streams in this step: what was asked for ahead stays for those who will.
    ring = snapshot.ring_frames;
    idle = excess + ring;
  } else if (active > 0) {
    // Where nothing is spare the ring takes room from residents, which adds to what is streamed:
    // X = excess + ring(X). Three rounds settle it: ring(X) grows far slower than X and is capped
    // at half of the room.
    const std::uint64_t spare = room - std::min(room, totals.full());
    const std::uint64_t left =
        snapshot.pool_frames - std::min<std::uint64_t>(snapshot.pool_frames, excess);
    for (int round = 0; round < 3; ++round) {
      ring = ring_for(snapshot, totals, active, room, left, ring_least);
      const std::uint64_t taken = ring - std::min(ring, spare);
      active = std::min(totals.full_active, std::max(wanted, excess_active + taken));
    }
    const std::uint64_t kept = totals.full() - idle - active;
    if (kept + ring > room) ring = std::max(ring_least, ring - std::min(ring, kept + ring - room));
  }
  plan.ring_frames = static_cast<std::uint32_t>(ring);
  // Blocks fill in every step: several steps' are made room for at once.
  const std::uint64_t ahead = std::min<std::uint64_t>(4ULL * snapshot.growth_frames, active / 16);
  const std::uint64_t pool = std::max<std::uint64_t>(snapshot.pool_frames, active + idle);
  const std::uint64_t most = std::min({totals.full_active, active + 2 * ahead, pool - idle});
  move_boundaries(snapshot, true, {active, std::min(active + ahead, most), most},
                  plan.streamed_frames);
  const std::uint64_t left_to_idle = std::max(idle, pool - std::min(pool, plan.streamed()));
  move_boundaries(snapshot, false, {idle, idle, std::min(totals.full_idle, left_to_idle)},
                  plan.streamed_frames);
  return plan;
}

// The most frames that any one layer streams.
std::uint64_t widest_layer(const Snapshot& snapshot, const Plan& plan) {
  std::vector<std::uint64_t> frames;  // by class
  for (std::size_t i = 0; i < snapshot.branches.size(); ++i) {
    const BranchView& view = snapshot.branches[i];
    if (!view.active) continue;
    if (view.layer_class >= frames.size()) frames.resize(view.layer_class + 1);
    frames[view.layer_class] += ceil_of(plan.streamed_frames[i], view.layers);
  }
  return frames.empty() ? 0 : *std::ranges::max_element(frames);
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
  explicit Fit(std::string name) : name_(std::move(name)) {}

  [[nodiscard]] Plan plan(const Snapshot& snapshot) const override {
    if (snapshot.pool_frames == 0) return Off().plan(snapshot);
    const Totals totals = totals_of(snapshot);
    const std::uint32_t wanted = std::min(snapshot.wanted_frames, snapshot.pool_frames);
    Plan plan = plan_streaming(snapshot, totals, wanted);
    // From half full on, eviction is in sight: what is written by then is a discard later.
    plan.write_behind = wanted > 0 || (totals.full() + totals.pinned) * 2 > snapshot.device_frames;
    return plan;
  }
  [[nodiscard]] std::string name() const override { return name_; }

 private:
  std::string name_;
};

class Fixed final : public Policy {
 public:
  Fixed(double share, std::string name) : share_(share), name_(std::move(name)) {}

  [[nodiscard]] Plan plan(const Snapshot& snapshot) const override {
    if (snapshot.pool_frames == 0) return Off().plan(snapshot);
    const Totals totals = totals_of(snapshot);
    const auto share =
        static_cast<std::uint64_t>(std::ceil(share_ * static_cast<double>(totals.full_active)));
    Plan plan =
        plan_streaming(snapshot, totals, std::min<std::uint64_t>(share, snapshot.pool_frames));
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

bool is_plan_for(const Snapshot& snapshot, const Plan& plan) {
  if (plan.streamed_frames.size() != snapshot.branches.size()) return false;
  for (std::size_t i = 0; i < plan.streamed_frames.size(); ++i) {
    if (plan.streamed_frames[i] > full_frames(snapshot.branches[i])) return false;
  }
  return plan.ring_frames > 0 || std::ranges::none_of(snapshot.branches, [&](const auto& view) {
           return view.active && plan.streamed_frames[&view - snapshot.branches.data()] > 0;
         });
}

std::uint64_t device_frames_needed(const Snapshot& snapshot, const Plan& plan) {
  const Totals totals = totals_of(snapshot);
  return totals.full() - plan.streamed() + totals.pinned + plan.ring_frames;
}

std::unique_ptr<Policy> make_policy(const std::string& name) {
  if (name == "off") return std::make_unique<Off>();
  if (name == "adaptive" || name == "fit") return std::make_unique<Fit>(name);
  if (name.starts_with("fixed:")) {
    double share = -1;
    const char* first = name.data() + 6;
    const char* last = name.data() + name.size();
    const auto [end, code] = std::from_chars(first, last, share);
    if (code == std::errc() && end == last && first != last && share >= 0 && share <= 1) {
      return std::make_unique<Fixed>(share, name);
    }
  }
  throw ConfigError(
      "policy '" + name +
      "' is unknown: use 'adaptive', 'fit', 'off', or 'fixed:F' with F between 0 and 1.");
}

}  // namespace pie
