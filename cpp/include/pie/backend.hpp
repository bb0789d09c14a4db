// The seam: the one interface through which memory, movement, time and files enter.
//
// Everything above it is single-threaded, reads no clock, takes no lock, does no I/O. A backend
// owns both tiers of one device: an arena of device frames and a pool of frames behind it. All its
// calls are made by one thread at a time; only `wait` may block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "pie/types.hpp"

namespace pie {

// Direction of a copy. Tickets are numbered monotonically within their lane.
enum class Lane : std::uint8_t { pool_to_device, device_to_pool };

// Handle of a submitted batch of copies. Value 0 is "none".
struct Ticket {
  Lane lane = Lane::pool_to_device;
  std::uint64_t id = 0;
  friend bool operator==(const Ticket&, const Ticket&) = default;
};

// "Everything the compute stream has been given so far." Value 0 has always passed.
struct Fence {
  std::uint64_t id = 0;
};

// The caller's compute stream: an opaque number, a vendor's handle only inside a backend.
struct ComputeStream {
  std::uintptr_t handle = 0;
};

// Moves `count` adjacent frames from one tier to the other; the lane says which way.
struct Copy {
  FrameIndex device_first = no_frame;
  FrameIndex pool_first = no_frame;
  std::uint32_t count = 0;
};

// What a batch of copies must wait for.
struct Dep {
  Fence fence;
  Ticket ticket;
};

enum class Status : std::uint8_t { ok, failed, corrupt };

// A batch of copies has ended. `error` is an errno value where `status` is not ok.
struct Completion {
  Ticket ticket;
  Status status = Status::ok;
  int error = 0;
  Nanos began = 0;
  Nanos ended = 0;
};

// What a simulator needs to know of a piece of computation; ignored elsewhere.
struct Work {
  Nanos duration_ns = 0;
};

struct Capabilities {
  std::uint32_t device_frames = 0;      // usable when the backend was opened
  std::uint32_t device_frames_max = 0;  // the most that resize_device can ever give
  std::uint32_t pool_frames = 0;  // what the pool was opened for; 0: there is none, nor will be
  Bytes frame_stride = 0;         // distance of adjacent frames in either tier, >= payload
  Bytes copy_bytes_best = 0;      // copies of this size reach the link's rate
  bool streams = false;           // compute runs on a stream; false: on the calling thread
  std::string pool_io;            // how the pool is reached, for stats(): "direct-uring", ...
  std::string pool_io_reason;     // why not a faster way, and what to do; empty where there is none
};

// ok, or lost with the first error: then every sequence fails, pool copies stay valid.
struct Health {
  bool ok = true;
  std::string first_error;
};

class Backend {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend() = default;

  [[nodiscard]] virtual Capabilities capabilities() const = 0;
  [[nodiscard]] virtual Nanos now() const = 0;

  // Makes frames [0, frames) of a tier usable, and gives what lies behind the others back to the
  // system; no copy may touch those. Returns how many are usable now, which may be fewer: a growth
  // that cannot be had is refused, what runs goes on. `pool_refusal` says why the pool's was. All
  // device frames are usable from the start, no pool frame is.
  virtual std::uint32_t resize_device(std::uint32_t frames) = 0;
  virtual std::uint32_t resize_pool(std::uint32_t frames) = 0;
  [[nodiscard]] virtual std::string pool_refusal() const = 0;

  // Starts copies that are disjoint and unordered among themselves, once every `after` has passed.
  // Never blocks. Refuses (LogicError) frames out of range and a Dep that was never submitted.
  virtual Ticket submit(Lane lane, std::span<const Copy> copies, std::span<const Dep> after) = 0;

  // Writes ended tickets to `out`, each once, and returns how many. Never blocks.
  virtual std::size_t poll(std::span<Completion> out) = 0;

  // Returns when a completion is there to poll or `timeout_ns` has passed: the only call in which
  // time passes. Returns at once when nothing is in flight.
  virtual void wait(Nanos timeout_ns) = 0;

  virtual Fence record(ComputeStream stream) = 0;
  virtual void depend(ComputeStream stream, Ticket ticket) = 0;
  virtual void compute(ComputeStream stream, Work work) = 0;

  // Copies what a device frame holds to another, in the order of the stream.
  virtual void duplicate(ComputeStream stream, FrameIndex from, FrameIndex to) = 0;

  // Start of a device frame. Frames of a run are `frame_stride` apart.
  [[nodiscard]] virtual std::byte* address(FrameIndex device_frame) const = 0;

  // Whoever holds this keeps the memory under `address` mapped, beyond the backend's end. Null
  // where the memory is the caller's, or cannot be touched.
  [[nodiscard]] virtual std::shared_ptr<const void> memory() const { return nullptr; }

  [[nodiscard]] virtual Health health() const = 0;
};

}  // namespace pie
