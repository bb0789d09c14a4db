// Measures decode steps, learns from them, and says how much may be streamed.
#include "controller.hpp"

#include <algorithm>
#include <optional>
#include <utility>

namespace pie {

namespace {

constexpr std::size_t steps_kept = 64;  // whose end nobody has seen yet

// What went since, and no more the next time.
LinkUse since(Traffic& told, const Traffic& now) {
  const LinkUse use{now.frames - told.frames, now.busy_ns - told.busy_ns};
  told = now;
  return use;
}

Demand demand_of(const Snapshot& snapshot) {
  Demand demand;
  std::uint64_t idle = 0;
  for (const BranchView& view : snapshot.branches) {
    const std::uint64_t full = std::uint64_t{view.full_blocks} * view.layers;
    const std::uint64_t pinned = std::uint64_t{view.pinned_blocks} * view.layers;
    if (view.active) demand.active_frames += full + pinned;
    if (!view.active) idle += full;
  }
  demand.device_frames = snapshot.device_frames;
  demand.pool_frames = snapshot.pool_frames - std::min<std::uint64_t>(snapshot.pool_frames, idle);
  demand.layers = snapshot.layers;
  return demand;
}

}  // namespace

Controller::Controller(Backend& backend, Transfers& transfers, const Geometry& geometry,
                       bool measures)
    : backend_(backend),
      transfers_(transfers),
      streams_(backend.capabilities().streams),
      measures_(measures && backend.capabilities().pool_frames > 0),
      frames_per_token_(static_cast<double>(geometry.layers) / geometry.block_tokens) {
  ended_.reserve(steps_kept);
}

// ---- steps --------------------------------------------------------------------------------------

Controller::Moment Controller::moment() {
  if (!streams_) return {{}, true, backend_.now()};
  return {transfers_.mark(), false, 0};
}

bool Controller::has_come(Moment& moment) {
  if (moment.known) return true;
  const std::optional<Nanos> passed = transfers_.take_mark(moment.fence);
  moment.known = passed.has_value();
  moment.at_ns = passed.value_or(0);
  return moment.known;
}

void Controller::begin(bool decode, const Snapshot& snapshot) {
  abort();
  if (!measures_) return;
  learn();
  demand_ = demand_of(snapshot);
  if (ended_.size() >= steps_kept) return;
  open_ = {decode, moment(), {}, demand_.active_frames, 0};
  is_open_ = true;
}

void Controller::finish() {
  const std::uint64_t told = std::exchange(loaded_told_, transfers_.loaded_frames());
  if (!is_open_) return;
  open_.ended = moment();
  open_.loaded_frames = loaded_told_ - told;
  ended_.push_back(open_);
  is_open_ = false;
}

void Controller::abort() {
  if (is_open_) transfers_.drop_mark(open_.began.fence);
  is_open_ = false;
}

void Controller::learn() {
  while (!ended_.empty() && has_come(ended_.front().began) && has_come(ended_.front().ended)) {
    report(ended_.front());
    ended_.erase(ended_.begin());
  }
}

void Controller::report(const Step& step) {
  const Nanos stall = stall_ns();
  StepReport report;
  report.kv_frames = step.kv_frames;
  report.loaded_frames = step.loaded_frames;
  report.step_ns = step.ended.at_ns - step.began.at_ns;
  report.stall_ns = std::clamp<Nanos>(stall - stall_told_ns_, 0, report.step_ns);
  report.loads = since(loads_told_, transfers_.loads());
  report.writes = since(writes_told_, transfers_.writes());
  stall_told_ns_ = stall;
  if (!step.decode) return;
  state_ = observe(state_, report);
  const Budget budget = decide(demand_, state_, objective_);
  state_.moves += budget.frames != state_.budget.frames ? 1 : 0;
  state_.budget = budget;
}

// ---- room ---------------------------------------------------------------------------------------

Headroom Controller::headroom(const Snapshot& snapshot) const {
  Demand demand = demand_of(snapshot);
  demand.active_frames += snapshot.pool_frames - demand.pool_frames;
  demand.pool_frames = snapshot.pool_frames;
  if (!measures_) demand.pool_frames = 0;
  const auto tokens = [&](double frames) {
    const double more = frames - static_cast<double>(demand.active_frames);
    return static_cast<std::uint64_t>(std::max(0.0, more / frames_per_token_));
  };
  const auto streamed = std::min(state_.budget.frames, demand.pool_frames);
  const double most = room(demand, demand.pool_frames);
  Headroom found;
  found.tokens = tokens(room(demand, streamed));
  found.tokens_most = tokens(most);
  found.slowdown_most = slowdown(state_, most, static_cast<double>(demand.pool_frames));
  return found;
}

}  // namespace pie
