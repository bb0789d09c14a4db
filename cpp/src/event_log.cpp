// The record behind a trace.
#include "event_log.hpp"

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

namespace pie {

std::string_view name_of(EventKind kind) {
  constexpr std::array<std::string_view, 5> names = {"layer", "attention", "stall", "load",
                                                     "write"};
  return names[static_cast<std::size_t>(kind)];
}

void EventLog::start(std::size_t events_most) {
  *this = {};
  trace_.events.reserve(events_most);
  trace_.steps.reserve(events_most);
  most_ = events_most;
}

Trace EventLog::stop() {
  std::ranges::rotate(trace_.events,
                      trace_.events.begin() + static_cast<std::ptrdiff_t>(next_event_));
  std::ranges::rotate(trace_.steps, trace_.steps.begin() + static_cast<std::ptrdiff_t>(next_step_));
  Trace kept = std::move(trace_);
  *this = {};
  return kept;
}

}  // namespace pie
