// What happened when, for people to look at: a record of the last steps, of bounded length.
//
// Times are the backend's: where compute runs on a stream they are when the stream came to a place,
// else when the calling thread did.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "pie/adapting.hpp"
#include "pie/types.hpp"

namespace pie {

enum class EventKind : std::uint8_t {
  layer,  // from where its attention begins to where that of the next one does, or the step ends
  attention,  // of that, its KV appended and read
  stall,      // the computation waits for copies
  load,       // a copy to the device
  write       // a copy to the pool
};
[[nodiscard]] std::string_view name_of(EventKind kind);

struct Event {
  EventKind kind = EventKind::layer;
  std::uint64_t step = 0;   // counted from 1, where the trace began; of a copy, when that ended
  std::uint32_t layer = 0;  // of a copy, its first block's; of a stall, none
  Nanos began_ns = 0;
  Nanos ended_ns = 0;
  std::uint64_t frames = 0;    // that a layer reads, or a copy moves
  std::uint64_t streamed = 0;  // of those that a layer reads, in the pool as it begins
};

// A step that was finished.
struct StepEvent {
  std::uint64_t step = 0;
  bool decode = false;     // every sequence gained one token
  std::uint32_t rows = 0;  // new tokens
  Nanos began_ns = 0;
  Nanos ended_ns = 0;  // of a decode step that another follows, where that begins
  Nanos stall_ns = 0;  // since the one before, as far as it is known yet
  LinkUse loads;       // likewise
  LinkUse writes;
  std::uint64_t kv_frames = 0;        // that it read
  std::uint64_t resident_frames = 0;  // on the device as it ended
  std::uint64_t ring_frames = 0;      // the ring's size
  Budget budget;                      // in force
  double load_ns = 0;                 // as in State, as is the next
  double slowdown = 0;
};

struct Trace {
  Bytes frame_bytes = 0;  // of a frame, in either tier
  std::vector<StepEvent> steps;
  std::vector<Event> events;  // as they became known
  std::uint64_t dropped = 0;  // of both: the oldest go when there are more than were asked for
};

}  // namespace pie
