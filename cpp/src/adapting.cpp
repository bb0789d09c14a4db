// Learning what steps cost, and how much of their KV they may stream.
#include "pie/adapting.hpp"

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <utility>

#include "pie/error.hpp"

namespace pie {

namespace {

// In units of the first step and of what it read. A step's base follows the model and the machine;
// what a frame costs moves little once it is known.
constexpr double base_drift = 4e-7;  // variances, a step
constexpr double slope_drift = 1e-10;
constexpr double slope_unknown = 0.1;
constexpr double doubt_unknown = 4;    // of a step, if all that it reads were streamed
constexpr double any_unknown = 0.002;  // of a step, where anything is streamed
constexpr double noise_least = 2.5e-5;
constexpr double stray_share = 0.1;  // this far from what was predicted, and
constexpr double stray_sigmas = 4;   // this many deviations, is another phase
constexpr std::uint32_t strays_most = 3;
constexpr std::uint64_t samples_few = 8;  // with fewer only what takes twice as long is far off

constexpr double link_memory = 0.8;     // of what was measured before, a step
constexpr double stall_counts = 0.01;   // share of a step from which on a stall says something
constexpr double work_counts = 0.7;     // and share that the link must have been at work
constexpr double link_trust = 0.98;     // a step, where nothing says that it is slower,
constexpr double link_unproven = 0.45;  // until a budget is about twice what is streamed
constexpr double usable_pace = 0.25;
constexpr double margin_pace = 0.5;     // of what a step is beyond the margin
constexpr double margin_kept = 0.99;    // a step
constexpr double worth_raising = 0.06;  // of the budget, so that it rests where nothing changes
constexpr double worth_lowering = 0.04;
constexpr double doubt_counts = 0.5;        // of a deviation, as cost
constexpr int steps_of_search = 64;         // of a search, of two
constexpr std::uint64_t probes_most = 128;  // steps, and then
constexpr std::uint64_t steps_a_probe = 256;
constexpr std::uint64_t probes_at_once = 8;
constexpr std::uint64_t probe_turns = 8;  // half of them without, one with a part
constexpr std::uint64_t probe_parts = 4;
constexpr double doubt_kept = 0.005;      // of a step: less is not worth a probe
constexpr double harmless_slack = 0.025;  // of a step, where throughput is wanted

double as_double(std::uint64_t value) { return static_cast<double>(value); }

}  // namespace

Objective make_objective(std::string_view aim, double slack, double max_tpot_ms) {
  Objective objective;
  if (aim == "throughput") {
    objective.aim = Aim::throughput;
  } else if (aim != "transparent") {
    throw ConfigError("objective '" + std::string(aim) +
                      "' is unknown: use 'transparent' or 'throughput'.");
  }
  if (!(slack >= 0 && slack <= 10)) {
    throw ConfigError("slack is " + std::to_string(slack) +
                      ": give the share that a step may take longer, from 0 to 10.");
  }
  if (!(max_tpot_ms >= 0 && max_tpot_ms <= 1e9)) {
    throw ConfigError("max_tpot_ms is " + std::to_string(max_tpot_ms) +
                      ": give the milliseconds that a token may take, or 0 for no bound.");
  }
  objective.slack = slack;
  objective.step_ns_max = static_cast<Nanos>(max_tpot_ms * 1e6);
  return objective;
}

std::string_view name_of(Reason reason) {
  constexpr std::array<std::string_view, 7> names = {
      "starting", "exploring", "link", "interference", "latency", "best", "pool"};
  return names[static_cast<std::size_t>(reason)];
}

// ---- what a step takes --------------------------------------------------------------------------

void StepModel::restart(const StepReport& report) {
  unit_ns_ = static_cast<double>(report.step_ns - report.stall_ns);
  unit_frames_ = std::max(1.0, as_double(report.kv_frames));
  samples_ = 0;
  value_ = {1};
  variance_ = {};
  variance_[0][0] = variance_[1][1] = variance_[2][2] = slope_unknown;
  noise_ = noise_least;
  last_off_ = 0;
  strays_ = 0;
  streamed_ = false;
}

double StepModel::predict_ns(double kv_frames, double loaded_frames) const {
  const Vector x = inputs(kv_frames, loaded_frames);
  double predicted = 0;
  for (std::size_t i = 0; i < parts; ++i) predicted += value_[i] * x[i];
  return std::max(1.0, unit_ns_ * predicted);
}

double StepModel::doubt_ns(double kv_frames, double loaded_frames) const {
  if (!streamed_) {
    const double share = loaded_frames / std::max(1.0, kv_frames);
    return doubt_unknown * share * predict_ns(kv_frames, 0);
  }
  Vector adds = inputs(kv_frames, loaded_frames);  // to a step that streams nothing
  adds[0] = 0;
  adds[1] = adds[2];
  double variance = 0;
  for (std::size_t i = 0; i < parts; ++i) {
    for (std::size_t j = 0; j < parts; ++j) variance += adds[i] * variance_[i][j] * adds[j];
  }
  return unit_ns_ * std::sqrt(std::max(0.0, variance));
}

void StepModel::observe(const StepReport& report) {
  if (report.step_ns <= report.stall_ns) return;
  const auto took = static_cast<double>(report.step_ns - report.stall_ns);
  if (samples_ == 0 || (samples_ <= samples_few && took < unit_ns_ / 2)) restart(report);
  if (!streamed_ && report.loaded_frames > 0) {
    const double doubt = doubt_ns(as_double(report.kv_frames), unit_frames_) / unit_ns_;
    for (std::size_t i = 0; i < parts; ++i) variance_[i][2] = variance_[2][i] = 0;
    variance_[2][2] = doubt * doubt;
    variance_[3][3] = any_unknown * any_unknown;
    streamed_ = true;
  }
  const double measured = took / unit_ns_;
  const Vector x = inputs(as_double(report.kv_frames), as_double(report.loaded_frames));
  Vector gain{};  // variance * x, later over its deviation
  double expected = noise_;
  double predicted = 0;
  for (std::size_t i = 0; i < parts; ++i) {
    variance_[i][i] += i == 0 ? base_drift : slope_drift / std::max(1.0, x[1] * x[1]);
    for (std::size_t j = 0; j < parts; ++j) gain[i] += variance_[i][j] * x[j];
    predicted += value_[i] * x[i];
  }
  for (std::size_t i = 0; i < parts; ++i) expected += x[i] * gain[i];
  const double off = measured - predicted;
  // One that is far off is left out; several are another phase, and its base is not known.
  const double least = samples_ > samples_few ? stray_share : 1;
  const bool stray =
      std::abs(off) > least * predicted && off * off > stray_sigmas * stray_sigmas * expected;
  strays_ = stray ? strays_ + 1 : 0;
  if (stray && strays_ < strays_most) return;
  if (stray) {
    variance_[0][0] += off * off;
    gain[0] += off * off;
    expected += off * off;
    strays_ = 0;
  } else {
    // By what differs from step to step: what stays off is to be learned, and no noise.
    const double jump = off - std::exchange(last_off_, off);
    noise_ = std::max(noise_least, noise_ + 0.05 * (jump * jump / 2 - noise_));
  }
  ++samples_;
  for (std::size_t i = 0; i < parts; ++i) {
    value_[i] += gain[i] / expected * off;
    for (std::size_t j = 0; j < parts; ++j) variance_[i][j] -= gain[i] * gain[j] / expected;
  }
  // Reading or streaming more never takes less: what the slopes would owe is the base's.
  value_[0] += std::min(0.0, value_[1]) * x[1];
  value_[1] = std::max(0.0, value_[1]);
  value_[0] += std::min(0.0, value_[1] + value_[2]) * x[2];
  value_[2] = std::max(-value_[1], value_[2]);
  value_[0] += std::min(0.0, value_[3]) * x[3];
  value_[3] = std::max(0.0, value_[3]);
}

// ---- what the link brings -----------------------------------------------------------------------

double step_ns(const State& state, double kv_frames, double loaded_frames) {
  const double computed = state.decode.predict_ns(kv_frames, loaded_frames);
  return std::max(computed, loaded_frames * state.load_ns / state.usable);
}

double slowdown(const State& state, double kv_frames, double loaded_frames) {
  if (!state.decode.is_known()) return 0;
  return step_ns(state, kv_frames, loaded_frames) / state.decode.predict_ns(kv_frames, 0) - 1;
}

namespace {

// Whether what is timed stands for all: where copies are timed as they are waited for, the few that
// are waited for are the slow ones.
bool is_timed(const LinkUse& use) { return use.timed_ns > 0 && 2 * use.timed_frames > use.frames; }

// What is timed is followed; what is not takes no longer than it seems to.
void follow(const LinkUse& use, double& frame_ns) {
  const bool timed = is_timed(use);
  if (!timed && (use.frames == 0 || use.busy_ns <= 0)) return;
  const double measured = timed ? static_cast<double>(use.timed_ns) / as_double(use.timed_frames)
                                : static_cast<double>(use.busy_ns) / as_double(use.frames);
  if (frame_ns == 0) {
    frame_ns = measured;
  } else if (timed) {
    frame_ns = link_memory * frame_ns + (1 - link_memory) * measured;
  } else {
    frame_ns = std::min(frame_ns, measured);
  }
}

}  // namespace

State observe(const State& state, const StepReport& report) {
  State next = state;
  next.decode.observe(report);
  ++next.steps;
  if (state.budget.probe > 0 && report.loaded_frames > 0) ++next.probes;
  follow(report.loads, next.load_ns);
  const bool timed = is_timed(report.loads);
  next.timed = state.timed || timed;
  const bool first = state.load_ns == 0 && !timed;
  if (first && next.load_ns > 0 && state.budget.frames > 0) {  // as fast as exploring took it for
    const double most = static_cast<double>(report.step_ns) / as_double(state.budget.frames);
    next.load_ns = std::min(next.load_ns, most);
  }
  follow(report.writes, next.write_ns);
  if (next.decode.is_known() && report.step_ns > 0) {
    const double alone = next.decode.predict_ns(as_double(report.kv_frames), 0);
    next.slowdown = std::max(0.0, static_cast<double>(report.step_ns) / alone - 1);
  }
  if (report.loaded_frames == 0) next.margin *= margin_kept;  // nothing is learned of it
  if (report.loaded_frames == 0 || report.step_ns == 0 || next.load_ns == 0) return next;
  const auto step = static_cast<double>(report.step_ns);
  const double expected =
      step_ns(next, as_double(report.kv_frames), as_double(report.loaded_frames));
  // Raised by what is beyond it, and otherwise let down slowly: few steps are beyond.
  const double excess = step / expected - 1 - state.margin;
  next.margin = state.margin * margin_kept + margin_pace * std::max(0.0, excess);
  const double used = std::min(1.0, as_double(report.loaded_frames) * next.load_ns / step);
  // A stall beside a link that rests comes of what has just changed, and says nothing of its rate.
  const bool stalled = static_cast<double>(report.stall_ns) > stall_counts * step;
  const bool at_work = static_cast<double>(report.loads.busy_ns) > work_counts * step;
  // Nobody waited for a copy, so nobody knows how much faster it was than it seems: a little more
  // is asked of the link, until somebody waits.
  if (!timed && !stalled && used > link_unproven) next.load_ns *= link_trust;
  if ((stalled && at_work) || (timed && used > state.usable)) {
    next.usable = std::clamp(state.usable + usable_pace * (used - state.usable), 0.05, 1.0);
  }
  return next;
}

// ---- how much -----------------------------------------------------------------------------------

double room(const Demand& demand, std::uint64_t streamed_frames) {
  const auto device = as_double(demand.device_frames);
  const auto streamed = as_double(streamed_frames);
  const double two_copies = std::min(2.0 * demand.copy_frames, device / 8);
  const double ring = std::max((demand.streams ? 3 : 2.5) * streamed / demand.layers, two_copies);
  const double ahead = 2 * std::min(4.0 * demand.growth_frames, streamed / 16);
  return device + std::max(0.0, streamed - ahead - ring);
}

namespace {

// What a step takes, and what is not known of that counts.
double cautious_ns(const State& state, double kv, double streamed) {
  return step_ns(state, kv, streamed) + doubt_counts * state.decode.doubt_ns(kv, streamed);
}

std::uint64_t a_little_of(const Demand& demand) { return demand.device_frames / 16; }

// What makes a step beyond the objective; nothing where it is within.
std::optional<Reason> beyond(const State& state, const Objective& objective, double kv,
                             double streamed) {
  const double takes = cautious_ns(state, kv, streamed);
  if (objective.step_ns_max > 0 && takes > static_cast<double>(objective.step_ns_max)) {
    return Reason::latency;
  }
  const double margin = std::min(state.margin, objective.slack / 2);
  const double most = (1 + objective.slack) * state.decode.predict_ns(kv, 0);
  if (objective.aim == Aim::throughput || takes * (1 + margin) <= most) return {};
  const bool waits = step_ns(state, kv, streamed) > state.decode.predict_ns(kv, streamed);
  return waits ? Reason::link : Reason::interference;
}

// The most between two budgets that the objective allows, or where throughput is wanted the best.
Budget search(const Demand& demand, const State& state, const Objective& objective, double least,
              double most) {
  Budget found{static_cast<std::uint64_t>(least), 0, Reason::pool};
  double best = 0;
  for (int i = 0; i <= steps_of_search; ++i) {
    const double streamed = std::floor(least + (most - least) * i / steps_of_search);
    const auto frames = static_cast<std::uint64_t>(streamed);
    const double kv = room(demand, frames);
    if (const auto reason = beyond(state, objective, kv, streamed)) {
      found.reason = *reason;
      break;
    }
    const double takes = cautious_ns(state, kv, streamed);
    if (objective.aim == Aim::throughput && kv / takes < best) {
      found.reason = Reason::best;
      continue;
    }
    best = kv / takes;
    found = {frames, 0, Reason::pool};
  }
  return found;
}

// Among all budgets, and then around what was found.
Budget aimed_at(const Demand& demand, const State& state, const Objective& objective) {
  // What takes the link four steps is beyond every objective.
  const double alone = state.decode.predict_ns(as_double(demand.device_frames), 0);
  double most = as_double(demand.pool_frames);
  if (state.load_ns > 0) most = std::min(most, 4 * alone / state.load_ns);
  const double found = as_double(search(demand, state, objective, 0, most).frames);
  const double around = most / steps_of_search;
  return search(demand, state, objective, std::max(0.0, found - around),
                std::min(most, found + around));
}

// What does little harm where the device is full, whatever it costs. While nobody has timed what
// came back from the pool, the link is taken for half as fast as the way there.
std::uint64_t harmless(const Demand& demand, const State& state, Objective objective) {
  State guess = state;
  if (!state.timed) guess.load_ns = 2 * guess.write_ns;
  objective.slack = objective.aim == Aim::throughput ? harmless_slack : objective.slack / 2;
  objective.aim = Aim::transparent;
  return std::min(aimed_at(demand, guess, objective).frames, a_little_of(demand));
}

Budget next_of(const Demand& demand, const State& state, const Objective& objective) {
  const Budget& now = state.budget;
  if (!state.decode.is_known()) return {0, 0, Reason::starting};
  if (state.load_ns == 0) return {harmless(demand, state, objective), 0, Reason::exploring};
  Budget next = aimed_at(demand, state, objective);
  const double change = as_double(next.frames) - as_double(now.frames);
  const double worth = change > 0 ? worth_raising : worth_lowering;
  if (std::abs(change) < worth * as_double(now.frames)) return {now.frames, 0, next.reason};
  const std::uint64_t most = now.frames + now.frames / 8 + a_little_of(demand) / 4;
  next.frames = std::min(next.frames, most);
  return next;
}

// Before there is need of it: where more is held than a quarter of what the device can, and while
// doubt takes a good part of what the objective allows. For a few steps, and then for as many not,
// since it is by the difference that it shows; one time in four a part of that, which tells what
// more takes from what anything does.
std::uint64_t probe(const Demand& demand, const State& state, const Objective& objective,
                    std::uint64_t budget) {
  if (!demand.asked || 4 * demand.active_frames < demand.device_frames) return 0;
  const std::uint64_t allowed = probes_most + state.steps / steps_a_probe;
  if (!state.decode.is_known() || state.probes >= allowed) return 0;
  const std::uint64_t turn = state.steps / probes_at_once;
  if (turn % 2 == 1) return 0;
  Demand held = demand;
  held.device_frames = std::min(demand.device_frames, demand.active_frames);
  const std::uint64_t little = harmless(held, state, objective);
  const auto kv = as_double(demand.active_frames);
  const double doubt = state.decode.doubt_ns(kv, as_double(std::max(budget, little)));
  const double alone = state.decode.predict_ns(kv, 0);
  const double used = as_double(little) * state.load_ns / alone;
  const bool proven = state.load_ns > 0 && (state.timed || used < link_unproven);
  if (proven && doubt < doubt_kept * alone) return 0;
  return turn % probe_turns == probe_turns - 2 ? little / probe_parts : little;
}

}  // namespace

Budget decide(const Demand& demand, const State& state, const Objective& objective) {
  Budget next = next_of(demand, state, objective);
  next.probe = probe(demand, state, objective, next.frames);
  return next;
}

}  // namespace pie
