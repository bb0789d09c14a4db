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

// A frame of a tier, and as many after it as somebody says.
struct Place {
  Tier tier = Tier::device;
  FrameIndex first = no_frame;
};

// Moves `count` adjacent frames from one tier to another.
struct Copy {
  Place from;
  Place to;
  std::uint32_t count = 0;
};

// The ways between tiers. All copies of a ticket go the same way, which is the ticket's lane.
enum class Lane : std::uint8_t { pool_to_device, device_to_pool, disk_to_pool, pool_to_disk };
inline constexpr std::size_t lane_count = 4;

// Handle of a submitted batch of copies, numbered monotonically within its lane. Value 0 is "none".
struct Ticket {
  Lane lane = Lane::pool_to_device;
  std::uint64_t id = 0;
  friend bool operator==(const Ticket&, const Ticket&) = default;
};

// "Everything a compute stream has been given so far." Value 0 has always passed.
struct Fence {
  std::uint64_t id = 0;
  friend bool operator==(const Fence&, const Fence&) = default;
};

// Whether the time at which a fence passes is wanted: then it comes as a completion.
enum class Timing : std::uint8_t { unwanted, wanted };

// The caller's compute stream: an opaque number, a vendor's handle only inside a backend.
struct ComputeStream {
  std::uintptr_t handle = 0;
  friend bool operator==(const ComputeStream&, const ComputeStream&) = default;
};

// What a batch of copies, or a stream, must wait for.
struct Dep {
  Fence fence;
  Ticket ticket;
};

// The contents of one device frame to another.
struct Duplicate {
  FrameIndex from = no_frame;
  FrameIndex to = no_frame;
};

enum class Status : std::uint8_t { ok, failed, corrupt };

// A batch of copies has ended, or a fence whose time was wanted has passed (then `ticket` is none).
// `error` is an errno value where `status` is not ok. Where a backend does not time when a batch of
// device_to_pool began, `began` is since when it could; where it does not time when one ended,
// `ended` is when that was seen, and not `exact`.
struct Completion {
  Ticket ticket;
  Fence fence;
  Status status = Status::ok;
  int error = 0;
  Nanos began = 0;
  Nanos ended = 0;
  bool exact = true;
};

// How many frames of the pool are usable, and whether more are on their way.
struct PoolSize {
  std::uint32_t frames = 0;
  bool pending = false;
};

struct Capabilities {
  std::uint32_t device_frames = 0;      // usable when the backend was opened
  std::uint32_t device_frames_max = 0;  // the most that resize_device can ever give
  std::uint32_t pool_frames = 0;  // what the pool was opened for; 0: there is none, nor will be
  Bytes frame_stride = 0;         // distance of adjacent frames in either tier, >= payload
  Bytes copy_bytes_best = 0;      // copies of this size reach the link's rate
  bool streams = false;           // compute runs on a stream; false: on the calling thread
  // Of the KV that a step reads, how much is best read where it lies in the pool, by kernels that
  // can: from 0, none, to 1. More than 0 only where `pool_address` is not null.
  double in_place_share = 0;
  std::string pool_io;         // how the pool is reached, for stats(): "direct-uring", ...
  std::string pool_io_reason;  // why not a faster way, and what to do; empty where there is none
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
  // system; no copy may touch those. Says how many are usable now, which may be fewer: a growth
  // that cannot be had is refused, what runs goes on. `pool_refusal` says why the pool's was. A
  // pool may also be slow to grow: then more frames come to be usable later, `wait` returns when
  // they do, and the same call again says how many. All device frames are usable from the start, no
  // pool frame is.
  virtual std::uint32_t resize_device(std::uint32_t frames) = 0;
  virtual PoolSize resize_pool(std::uint32_t frames) = 0;
  [[nodiscard]] virtual std::string pool_refusal() const = 0;

  // Starts copies that are disjoint and unordered among themselves, once every `after` has passed;
  // where the calling thread does it, by the next `poll` or `wait`. Never blocks. Refuses
  // (LogicError) no copy at all, copies of several lanes, frames out of range and a Dep that was
  // never submitted. A ticket that waits for one that fails, fails with it; so does one that is
  // submitted long after that, up to a thousand failures of the lane later.
  //
  // A lane may serve its tickets in turn. That cannot stop for ever: what a ticket or a stream
  // waits for was submitted or recorded before it, so the oldest of all waits for nothing.
  virtual Ticket submit(std::span<const Copy> copies, std::span<const Dep> after) = 0;

  // Writes ended tickets and passed fences to `out`, each once, and returns how many. Never blocks.
  virtual std::size_t poll(std::span<Completion> out) = 0;

  // Returns when a completion is there to poll, the pool has grown, or `timeout_ns` has passed: the
  // only call in which time passes. Returns at once when nothing is under way.
  virtual void wait(Nanos timeout_ns) = 0;

  // Throws LogicError where copies cannot be ordered with what is given to `stream`: it is another
  // device's, or is being captured. Asked before a step is given to it.
  virtual void require_usable(ComputeStream /*stream*/) const {}

  // A fence behind everything that `stream` has been given so far.
  virtual Fence record(ComputeStream stream, Timing timing) = 0;

  // What `stream` is given from now on happens after `dep`: a ticket, or a fence of any stream.
  // Refuses one that was never submitted; where the calling thread computes, also one that has not
  // passed, since it is the caller who must wait.
  virtual void depend(ComputeStream stream, const Dep& dep) = 0;

  // Copies what device frames hold to others, in the order of the stream. The targets are in no
  // other of these pairs.
  virtual void duplicate(ComputeStream stream, std::span<const Duplicate> frames) = 0;

  // Start of a device frame. Frames of a run are `frame_stride` apart.
  [[nodiscard]] virtual std::byte* address(FrameIndex device_frame) const = 0;

  // Start of the pool's frame 0, where what runs on a compute stream may read it: as long as no
  // frame that it reads is given up, and after the ticket that filled it. Null: nothing may.
  [[nodiscard]] virtual const std::byte* pool_address() const { return nullptr; }

  // Whoever holds this keeps the memory under `address` mapped, beyond the backend's end. Null
  // where the memory is the caller's, or cannot be touched.
  [[nodiscard]] virtual std::shared_ptr<const void> memory() const { return nullptr; }

  [[nodiscard]] virtual Health health() const = 0;
};

}  // namespace pie
