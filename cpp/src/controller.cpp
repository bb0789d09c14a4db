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
  const LinkUse use{now.frames - told.frames, now.busy_ns - told.busy_ns,
                    now.timed_frames - told.timed_frames, now.timed_ns - told.timed_ns};
  told = now;
  return use;
}

Demand demand_of(const Snapshot& snapshot, std::uint32_t block_tokens) {
  Demand demand;
  std::uint64_t idle = 0;
  std::uint64_t read = 0;  // tokens, over all layers
  for (const BranchView& view : snapshot.branches) {
    if (view.active) read += std::uint64_t{view.tokens} * view.layers;
    if (!view.active) idle += std::uint64_t{view.full_blocks} * view.layers;
  }
  demand.active_frames = read / block_tokens;
  demand.device_frames = snapshot.device_frames;
  demand.pool_frames = snapshot.pool_frames - std::min<std::uint64_t>(snapshot.pool_frames, idle);
  demand.layers = snapshot.layers;
  demand.copy_frames = snapshot.copy_frames_best;
  demand.streams = snapshot.streams;
  return demand;
}

}  // namespace

Controller::Controller(Backend& backend, Transfers& transfers, const Geometry& geometry,
                       bool measures)
    : backend_(backend),
      transfers_(transfers),
      streams_(backend.capabilities().streams),
      measures_(measures && backend.capabilities().pool_frames > 0),
      block_tokens_(geometry.block_tokens),
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

bool Controller::has_come(Step& step) {
  bool all = has_come(step.began) && has_come(step.ended);
  for (Layer& layer : step.layers) all = all && has_come(layer.began) && has_come(layer.attended);
  return all;
}

void Controller::begin(bool decode, std::uint32_t rows, const Snapshot& snapshot) {
  abort();
  EventLog& log = transfers_.log();
  if (!measures_ && !log.on()) return;
  const std::uint32_t growth = decode ? snapshot.growth_frames : demand_.growth_frames;
  demand_ = demand_of(snapshot, block_tokens_);
  demand_.growth_frames = growth;
  demand_.asked = asked_;
  if (ended_.size() >= steps_kept) {
    interrupted_ = true;
    return;
  }
  open_ = {};
  open_.decode = decode;
  open_.follows = !interrupted_ && decode;
  open_.rows = rows;
  open_.began = moment();
  open_.report.kv_frames = demand_.active_frames;
  if (log.on()) log.next_step();
  open_.number = log.step();
  is_open_ = true;
  learn(false);
}

void Controller::begin_layer(std::uint32_t layer, std::uint64_t frames, std::uint64_t streamed) {
  if (is_open_) open_.layers.push_back({layer, frames, streamed, moment()});
}

void Controller::end_attention() {
  if (is_open_) open_.layers.back().attended = moment();
}

void Controller::finish(std::uint64_t resident_frames, std::uint64_t ring_frames) {
  const std::uint64_t told = std::exchange(loaded_told_, transfers_.loaded_frames());
  if (!is_open_) return;
  open_.ended = moment();
  open_.report.loaded_frames = loaded_told_ - told;
  open_.resident_frames = resident_frames;
  open_.ring_frames = ring_frames;
  ended_.push_back(std::move(open_));
  is_open_ = false;
  interrupted_ = false;
}

void Controller::abort() {
  if (is_open_) {
    interrupted_ = true;
    transfers_.drop_mark(open_.began.fence);
    for (const Layer& layer : open_.layers) {
      transfers_.drop_mark(layer.began.fence);
      transfers_.drop_mark(layer.attended.fence);
    }
  }
  is_open_ = false;
}

// Of the last step only with `all`, where no other has begun.
void Controller::learn(bool all) {
  for (Step& step : ended_) {
    if (!step.measured && !has_come(step)) break;
    if (!step.measured) measure(step);
  }
  while (!ended_.empty() && ended_.front().measured) {
    Step& step = ended_.front();
    Step* next = ended_.size() > 1 ? &ended_[1] : is_open_ ? &open_ : nullptr;
    if (next == nullptr ? !all : !has_come(next->began)) return;
    const bool followed = next != nullptr && next->follows && step.decode;
    step.report.step_ns = (followed ? next->began : step.ended).at_ns - step.began.at_ns;
    report(step);
    ended_.erase(ended_.begin());
  }
}

// What has become known until its last layer had ended is this step's.
void Controller::measure(Step& step) {
  const Nanos stall = stall_ns();
  const Nanos most = step.ended.at_ns - step.began.at_ns;
  step.report.stall_ns = std::clamp<Nanos>(stall - stall_told_ns_, 0, most);
  step.report.loads = since(loads_told_, transfers_.loads());
  step.report.writes = since(writes_told_, transfers_.writes());
  step.measured = true;
  stall_told_ns_ = stall;
}

void Controller::report(const Step& step) {
  if (step.decode && measures_) {
    state_ = observe(state_, step.report);
    const Budget budget = decide(demand_, state_, objective_);
    state_.moves += budget.frames != state_.budget.frames ? 1 : 0;
    state_.budget = budget;
  }
  if (step.number > 0 && transfers_.log().on()) record(step);
}

void Controller::add_stall(Nanos began_ns) {
  const Nanos now = backend_.now();
  waited_ns_ += now - began_ns;
  EventLog& log = transfers_.log();
  if (log.on() && now > began_ns) log.add({EventKind::stall, log.step(), 0, began_ns, now});
}

// ---- trace --------------------------------------------------------------------------------------

void Controller::record(const Step& step) {
  EventLog& log = transfers_.log();
  const Nanos ended_ns = step.began.at_ns + step.report.step_ns;
  for (std::size_t i = 0; i < step.layers.size(); ++i) {
    const Layer& layer = step.layers[i];
    const bool last = i + 1 == step.layers.size();
    const Nanos ended = last ? ended_ns : step.layers[i + 1].began.at_ns;
    const Nanos began = layer.began.at_ns;
    log.add(Event{EventKind::layer, step.number, layer.layer, began, ended, layer.frames,
                  layer.streamed});
    log.add(Event{EventKind::attention, step.number, layer.layer, began, layer.attended.at_ns,
                  layer.frames, layer.streamed});
  }
  StepEvent event;
  event.step = step.number;
  event.decode = step.decode;
  event.rows = step.rows;
  event.began_ns = step.began.at_ns;
  event.ended_ns = ended_ns;
  event.stall_ns = step.report.stall_ns;
  event.loads = step.report.loads;
  event.writes = step.report.writes;
  event.kv_frames = step.report.kv_frames;
  event.resident_frames = step.resident_frames;
  event.ring_frames = step.ring_frames;
  event.budget = state_.budget;
  event.load_ns = state_.load_ns;
  event.slowdown = state_.slowdown;
  log.add(event);
}

void Controller::start_trace(std::size_t events_most) {
  learn(true);
  transfers_.log().start(events_most);
  for (Step& step : ended_) step.number = 0;
}

Trace Controller::take_trace() {
  learn(true);
  return transfers_.log().stop();
}

// ---- room ---------------------------------------------------------------------------------------

Headroom Controller::headroom(const Snapshot& snapshot, std::uint64_t begun_frames) {
  asked_ = true;
  Demand demand = demand_of(snapshot, block_tokens_);
  demand.pool_frames = measures_ ? snapshot.pool_frames : 0;
  demand.growth_frames = demand_.growth_frames;
  std::uint64_t held = begun_frames;  // and whole blocks
  for (const BranchView& view : snapshot.branches) {
    held += std::uint64_t{view.full_blocks + view.pinned_blocks} * view.layers;
  }
  const auto tokens = [&](double frames) {
    const double more = frames - static_cast<double>(held);
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
