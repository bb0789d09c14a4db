// How segments of a copy travel between the arena and the pool file: the one interface between the
// host backend, which queues and orders, and the two ways of doing the I/O below it.
//
// All calls come from one thread at a time and none but `wait` blocks. An I/O error is a value in a
// SegmentEnd; retrying is left to whoever submitted the copy. What is done here, because no caller
// could: interrupted calls are repeated and short transfers continued.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "pie/backend.hpp"
#include "pie/types.hpp"

namespace pie {

// Copies are cut into segments of this size, a multiple of every alignment direct I/O asks for.
// Measured on a virtual disk of 2.4 GB/s: 128 KiB read 10 % less at five times the CPU time; 512
// KiB to 2 MiB read the same within 4 %, 512 KiB at a quarter more CPU time; 4 MiB read less.
inline constexpr Bytes segment_bytes = Bytes{1} << 20;

// Segments in flight at most. Reads: the file must stay busy for as long as the computing thread
// stays away between two polls; 32 MiB last 13 ms at 2.4 GB/s, 16 MiB only half of that. Writes:
// two come near the disk's rate and took nothing measurable from reads, four took 7 %.
inline constexpr std::uint32_t reads_in_flight_max = 32;
inline constexpr std::uint32_t writes_in_flight_max = 2;

// `bytes` adjacent bytes at `memory` and at `offset` of the file; the lane says which way they go.
struct Segment {
  Lane lane = Lane::pool_to_device;
  std::byte* memory = nullptr;
  Bytes offset = 0;
  Bytes bytes = 0;
  std::uint64_t ticket_id = 0;
};

// `error` is 0 or an errno value. `ended` is `exact` with threads, and with io_uring where the
// caller was waiting; else it is the time of the call that saw the end, since nobody else is there
// to look at a clock.
struct SegmentEnd {
  Lane lane = Lane::pool_to_device;
  std::uint64_t ticket_id = 0;
  int error = 0;
  Nanos ended = 0;
  bool exact = true;
};

class SegmentIo {
 public:
  SegmentIo() = default;
  SegmentIo(const SegmentIo&) = delete;
  SegmentIo& operator=(const SegmentIo&) = delete;
  // Waits for what is in flight, so that memory may be unmapped afterwards.
  virtual ~SegmentIo() = default;

  // Sends a segment on its way, at the next `hand_on` at the latest; the caller keeps to the limits
  // above.
  virtual void start(const Segment& segment) = 0;
  virtual void hand_on() {}

  // Appends the segments that ended since the last call.
  virtual void reap(std::vector<SegmentEnd>& out) = 0;

  // Returns when there may be something to reap, or `timeout_ns` has passed.
  virtual void wait(Nanos timeout_ns) = 0;

  // The error after which nothing works any more and every segment fails; 0 while all is well.
  [[nodiscard]] virtual int lost() const = 0;
};

// Monotonic, in nanoseconds. The only clock of the host backend.
[[nodiscard]] Nanos clock_ns();

// Through io_uring, submitted and reaped by the calling thread. Returns nullptr, and why, where the
// kernel, its policy or this build lacks it. `alignment` is what transfers may be cut at.
[[nodiscard]] std::unique_ptr<SegmentIo> open_uring_io(int file, Bytes alignment, std::string& why);

// Through pread and pwrite on four threads, which start with the first segment. With `drop_cache`
// what was read does not stay in the page cache, where it would take the memory a second time.
[[nodiscard]] std::unique_ptr<SegmentIo> open_thread_io(int file, Bytes alignment, bool drop_cache);

}  // namespace pie
