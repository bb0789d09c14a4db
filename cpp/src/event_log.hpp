// The record behind a trace: the last events, in memory that is set aside when it is started.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pie/trace.hpp"

namespace pie {

class EventLog {
 public:
  // Keeps the last `events_most` of each kind of record from now on; what was kept is forgotten.
  void start(std::size_t events_most);
  // What was kept, in the order it became known; nothing is recorded any more.
  [[nodiscard]] Trace stop();

  [[nodiscard]] bool on() const { return most_ > 0; }

  // Counts the steps: what is recorded from here on is of the next one.
  void next_step() { ++step_; }
  [[nodiscard]] std::uint64_t step() const { return step_; }

  void add(const Event& event) { keep(event, trace_.events, next_event_); }
  void add(const StepEvent& event) { keep(event, trace_.steps, next_step_); }

 private:
  // Over the oldest where there is no room.
  template <typename T>
  void keep(const T& one, std::vector<T>& kept, std::size_t& next) {
    if (kept.size() < most_) {
      kept.push_back(one);
    } else {
      kept[next] = one;
      next = (next + 1) % most_;
      ++trace_.dropped;
    }
  }

  std::size_t most_ = 0;  // 0: nothing is recorded
  std::uint64_t step_ = 0;
  std::size_t next_event_ = 0;  // the oldest, once there is no room
  std::size_t next_step_ = 0;
  Trace trace_;
};

}  // namespace pie
