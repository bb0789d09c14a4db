// Measures decode steps, learns from them, and says how much may be streamed.
//
// It also records them, and their layers, where a trace is kept.
//
// A step begins and ends where the compute is: by fences on a stream, whose times come to be known
// a while later, else by the clock. A decode step ends where the next one begins, since what comes
// after its last attention is part of what a token takes; else where its last layer does. So it is
// reported once the next one has begun.
#pragma once

#include <cstdint>
#include <vector>

#include "pie/adapting.hpp"
#include "pie/backend.hpp"
#include "pie/policy.hpp"
#include "transfers.hpp"

namespace pie {

class Controller {
 public:
  // Measures nothing where nothing may be streamed.
  Controller(Backend& backend, Transfers& transfers, const Geometry& geometry, bool measures);

  void set_objective(const Objective& objective) { objective_ = objective; }

  // That the calling thread has waited since then; what streams wait is known to the transfers.
  void add_stall(Nanos began_ns);
  [[nodiscard]] Nanos stall_ns() const { return waited_ns_ + transfers_.stall_ns(); }

  // Around each step that is not aborted, in which every sequence gains one token or not.
  void begin(bool decode, std::uint32_t rows, const Snapshot& snapshot);
  void finish(std::uint64_t resident_frames, std::uint64_t ring_frames);
  void abort();

  // Around a layer's attention, while a trace is kept: what it reads, and of that in the pool.
  void begin_layer(std::uint32_t layer, std::uint64_t frames, std::uint64_t streamed);
  void end_attention();

  // Between steps. Steps whose end is not known yet, since nobody has waited for the stream, are
  // left out.
  void start_trace(std::size_t events_most);
  [[nodiscard]] Trace take_trace();

  [[nodiscard]] const State& state() const { return state_; }

  // Between steps. Counts all that is held as read by the steps to come, and what the next one
  // begins as held.
  [[nodiscard]] Headroom headroom(const Snapshot& snapshot, std::uint64_t begun_frames);

 private:
  // When something happened, by a fence if need be.
  struct Moment {
    Fence fence;
    bool known = false;
    Nanos at_ns = 0;
  };
  struct Layer {
    std::uint32_t layer = 0;
    std::uint64_t frames = 0;
    std::uint64_t streamed = 0;
    Moment began;
    Moment attended = {};
  };
  struct Step {
    bool decode = false;
    bool follows = false;  // the one before it, directly
    std::uint32_t rows = 0;
    Moment began;
    Moment ended;
    StepReport report;
    bool measured = false;     // but for its time
    std::uint64_t number = 0;  // as traced; 0: it is not
    std::uint64_t resident_frames = 0;
    std::uint64_t ring_frames = 0;
    std::vector<Layer> layers = {};  // while a trace is kept
  };

  [[nodiscard]] Moment moment();
  [[nodiscard]] bool has_come(Moment& moment);
  [[nodiscard]] bool has_come(Step& step);
  void learn(bool all);
  void measure(Step& step);
  void report(const Step& step);
  void record(const Step& step);

  Backend& backend_;
  Transfers& transfers_;
  const bool streams_;
  const bool measures_;
  const std::uint32_t block_tokens_;
  const double frames_per_token_;
  Objective objective_;
  State state_;
  Demand demand_;       // of the last step; what fills, of the last that decoded
  bool asked_ = false;  // for the headroom, ever
  bool is_open_ = false;
  Step open_;
  std::vector<Step> ended_;  // whose time is not known yet
  bool interrupted_ = true;  // by a step that was aborted, since the last that ended
  Nanos waited_ns_ = 0;
  Nanos stall_told_ns_ = 0;  // as next, of what is reported
  std::uint64_t loaded_told_ = 0;
  Traffic loads_told_;
  Traffic writes_told_;
};

}  // namespace pie
