// How much may be streamed: two pure functions over one value. `observe` learns from each step what
// steps cost, `decide` says how much of their KV may come over the link by an objective. Nothing is
// known in advance of the machine or the model; both are measured while they run.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "pie/types.hpp"

namespace pie {

// What bounds how much is admitted. What runs is never cut: its growth is granted while either tier
// has room.
enum class Aim : std::uint8_t {
  transparent,  // a step takes at most `slack` more than it would with all its KV on the device
  throughput    // most tokens a second
};

struct Objective {
  Aim aim = Aim::transparent;
  double slack = 0.05;
  Nanos step_ns_max = 0;  // a step takes no longer than this; 0: no bound
};

// Throws ConfigError for an objective other than "transparent" and "throughput", a slack that is
// not from 0 to 10, a bound that is negative or no number. Milliseconds; 0: no bound.
[[nodiscard]] Objective make_objective(std::string_view aim, double slack, double max_tpot_ms);

// What went over a link one way, and for how long it was at work, at most: where nobody saw when a
// copy ended, it counts until somebody did. Of that, what is timed exactly.
struct LinkUse {
  std::uint64_t frames = 0;
  Nanos busy_ns = 0;
  std::uint64_t timed_frames = 0;
  Nanos timed_ns = 0;
};

// A decode step that has ended, by fences and completions.
struct StepReport {
  std::uint64_t kv_frames = 0;      // worth of tokens it read, over all layers
  std::uint64_t loaded_frames = 0;  // of them came over the link
  Nanos step_ns = 0;                // from its begin to its finish, on the stream if there is one
  Nanos stall_ns = 0;               // of that, for copies
  LinkUse loads;                    // since the report before
  LinkUse writes;
};

// The time of a step without its stall, as base + kv * frames it reads + loaded * frames streamed +
// what it takes to stream at all (tables are edited, a stream waits for copies): a Kalman filter
// over base, kv, loaded - kv and that. What tells them apart is that the batch changes; where it
// does not, the base follows what changes slowly, and the others stay as they are known. Until one
// has been streamed, a frame streamed costs what a frame read does, since it is written to memory
// once, and nobody knows by how much more. A step that takes several times what was predicted (it
// compiled a kernel) is left out, and the first of all is the measure only until one takes half.
class StepModel {
 public:
  void observe(const StepReport& report);

  [[nodiscard]] bool is_known() const { return samples_ > 0; }
  // Of a step that reads so many frames and streams so many of them, without stall.
  [[nodiscard]] double predict_ns(double kv_frames, double loaded_frames) const;
  // How far off that may be for what is streamed: a standard deviation.
  [[nodiscard]] double doubt_ns(double kv_frames, double loaded_frames) const;
  // What streaming a frame adds to the computation beside it.
  [[nodiscard]] double interference_ns() const {
    return (value_[1] + value_[2]) * unit_ns_ / unit_frames_;
  }

 private:
  static constexpr std::size_t parts = 4;
  using Vector = std::array<double, parts>;

  [[nodiscard]] Vector inputs(double kv_frames, double loaded_frames) const {
    return {1, (kv_frames + loaded_frames) / unit_frames_, loaded_frames / unit_frames_,
            loaded_frames > 0 ? 1.0 : 0.0};
  }
  void restart(const StepReport& report);

  std::uint64_t samples_ = 0;
  bool streamed_ = false;     // in a step that was observed
  std::uint32_t strays_ = 0;  // steps in a row that were far from what was predicted
  double unit_ns_ = 1;        // the first step
  double unit_frames_ = 1;    // what it read
  Vector value_{};            // in these units
  std::array<Vector, parts> variance_{};
  double noise_ = 0;     // variance of a step, in units
  double last_off_ = 0;  // what the last step was beyond what was predicted
};

// What bounds a budget.
enum class Reason : std::uint8_t {
  starting,      // no step has been measured yet: nothing beyond the device
  exploring,     // nothing has been streamed yet: what does no harm if it costs much
  link,          // more would not arrive in time
  interference,  // more would slow the computation beside it
  latency,       // a step would take longer than its bound
  best,          // more would lower the throughput
  pool           // there is no room for more
};
[[nodiscard]] std::string_view name_of(Reason reason);

// How much a step may stream.
struct Budget {
  std::uint64_t frames = 0;
  std::uint64_t probe = 0;  // to stream of what would fit, so that it is known what more would cost
  Reason reason = Reason::starting;
};

// What there is, and what is held.
struct Demand {
  std::uint64_t device_frames = 0;
  std::uint64_t pool_frames = 0;    // that idle sequences leave
  std::uint64_t active_frames = 0;  // worth of tokens that a step reads, wherever they lie
  std::uint32_t layers = 1;
  std::uint32_t copy_frames = 1;    // of the best size
  std::uint32_t growth_frames = 0;  // that a step fills
  bool asked = false;               // somebody admits by the budget
  bool streams = false;             // compute runs on a stream
};

struct State {
  std::uint64_t steps = 0;  // observed
  StepModel decode;
  double load_ns = 0;       // a frame takes to the device; 0: nothing has been measured
  bool timed = false;       // or that is no more than a bound from above
  double write_ns = 0;      // and to the pool
  double usable = 0.9;      // share of the link's time that steps of late have had use of
  double margin = 0;        // share by which all but a few steps of late stay within the prediction
  Budget budget;            // in force
  std::uint64_t moves = 0;  // of the budget, so far
  std::uint32_t probes = 0;  // steps that streamed what would fit
  double slowdown = 0;       // of the last step, as a share
};

[[nodiscard]] State observe(const State& state, const StepReport& report);

// Moves at once to less, by an eighth of what it is and a little to more, and not for a few
// percent.
[[nodiscard]] Budget decide(const Demand& demand, const State& state, const Objective& objective);

// Frames that a step can read when it streams so many of them: the device is full, what is streamed
// passes through the ring, two and a half layers of it (on a stream three) or two copies, and as in
// a plan some make room for what fills.
[[nodiscard]] double room(const Demand& demand, std::uint64_t streamed_frames);

// Of a step that reads `kv_frames` and streams `loaded_frames` of them: nanoseconds, and how much
// longer that is than with all on the device, as a share. 0 where nothing is known.
[[nodiscard]] double step_ns(const State& state, double kv_frames, double loaded_frames);
[[nodiscard]] double slowdown(const State& state, double kv_frames, double loaded_frames);

// What can be admitted now, in tokens of sequences that will run beside those that do.
struct Headroom {
  std::uint64_t tokens = 0;       // within the objective
  std::uint64_t tokens_most = 0;  // that both tiers can hold; beyond `tokens` at a price:
  double slowdown_most = 0;       // of a step when all of it is held; 0 where nothing is known
};

}  // namespace pie
