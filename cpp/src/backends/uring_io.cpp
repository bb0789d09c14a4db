// Segments through io_uring, submitted and reaped inside the calls of the computing thread: there
// is no other thread, so nothing competes with the computation for its cores.
//
// The arena is not registered with the ring. Registration would save half of the 6 ms of CPU time
// that reading 1 GiB takes (0.7 % of one core at 2.4 GB/s; the rate is the same), but it touches
// and pins every page of the budget, used or not: 2 to 3 s and 1 GiB of memory per GiB on the
// machine where this was measured, and more than most users' locked-memory limit.
#include "segment_io.hpp"

#if defined(PIE_HAVE_LIBURING)

#include <liburing.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <system_error>

namespace pie {
namespace {

constexpr unsigned slot_count = reads_in_flight_max + writes_in_flight_max;

// How often a segment may be turned away (no memory for now, the submitting thread ended) before
// that counts as its error.
constexpr unsigned attempts_max = 64;

bool is_transient(int error) {
  return error == EAGAIN || error == EINTR || error == EBUSY || error == ECANCELED;
}

class UringIo final : public SegmentIo {
 public:
  explicit UringIo(int file, Bytes alignment) : file_(file), alignment_(alignment) {
    for (unsigned i = 0; i < slot_count; ++i) free_.push_back(i);
  }

  ~UringIo() override {
    if (!open_) return;
    std::vector<SegmentEnd> ended;
    while (free_.size() < slot_count) {
      wait(Nanos{1'000'000'000});
      reap(ended);
    }
    io_uring_queue_exit(&ring_);
  }

  // 0 or an errno value. Completions wait for the caller's next call instead of interrupting its
  // computation (Linux 5.19); waiting with a timeout needs 5.11.
  int open() {
    int error = io_uring_queue_init(slot_count, &ring_,
                                    IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG);
    if (error == -EINVAL) error = io_uring_queue_init(slot_count, &ring_, 0);
    open_ = error == 0;
    if (open_ && (ring_.features & IORING_FEAT_EXT_ARG) == 0) return ENOSYS;
    return -error;
  }

  // Small segments go to the kernel together: on a virtual disk each call is an exit to the machine
  // below, 20 us where this was measured. Large ones go by themselves, so that the disk begins with
  // the first while the next is prepared: handing on 32 of them at once lost 12 % of the rate to a
  // disk that had come to rest meanwhile.
  void start(const Segment& segment) override {
    const unsigned index = free_.back();
    free_.pop_back();
    slots_[index] = {segment, 0};
    prepare(index);
    prepared_ += segment.bytes;
    if (prepared_ >= segment_bytes) hand_on();
  }

  void hand_on() override {
    prepared_ = 0;
    if (lost_ != 0 || io_uring_sq_ready(&ring_) == 0) return;
    note(io_uring_submit(&ring_));
  }

  void reap(std::vector<SegmentEnd>& out) override {
    io_uring_cqe* entry = nullptr;
    while (lost_ == 0 && io_uring_peek_cqe(&ring_, &entry) == 0) {
      const auto index = static_cast<unsigned>(io_uring_cqe_get_data64(entry));
      const int result = entry->res;
      io_uring_cqe_seen(&ring_, entry);
      advance(index, result);
    }
    hand_on();
    waited_ = false;
    if (lost_ != 0) fail_all();
    out.insert(out.end(), ended_.begin(), ended_.end());
    ended_.clear();
  }

  void wait(Nanos timeout_ns) override {
    if (lost_ != 0 || !ended_.empty() || free_.size() == slot_count) return;
    __kernel_timespec timeout{.tv_sec = timeout_ns / 1'000'000'000,
                              .tv_nsec = timeout_ns % 1'000'000'000};
    io_uring_cqe* entry = nullptr;
    note(io_uring_submit_and_wait_timeout(&ring_, &entry, 1, &timeout, nullptr));
    waited_ = true;
  }

  [[nodiscard]] int lost() const override { return lost_; }

 private:
  struct Slot {
    Segment rest;  // what has not been moved yet
    unsigned attempts = 0;
  };

  // Never fails: each slot has at most one entry in the queue, and the queue has one for each slot.
  void prepare(unsigned index) {
    if (lost_ != 0) return;
    const Segment& rest = slots_[index].rest;
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);
    const auto bytes = static_cast<unsigned>(rest.bytes);
    if (rest.lane == Lane::pool_to_device) {
      io_uring_prep_read(entry, file_, rest.memory, bytes, rest.offset);
    } else {
      io_uring_prep_write(entry, file_, rest.memory, bytes, rest.offset);
    }
    io_uring_sqe_set_data64(entry, index);
  }

  // `result` bytes of the slot's rest have been moved, or -errno. A transfer that stops short is
  // taken up again at the last aligned offset, and is an error where it has moved less than that.
  void advance(unsigned index, int result) {
    Slot& slot = slots_[index];
    if (result < 0 && is_transient(-result) && ++slot.attempts < attempts_max) {
      prepare(index);
      return;
    }
    if (result < 0) {
      end(index, -result);
      return;
    }
    const Bytes moved = static_cast<Bytes>(result);
    const Bytes kept = moved == slot.rest.bytes ? moved : moved / alignment_ * alignment_;
    slot.rest.memory += kept;
    slot.rest.offset += kept;
    slot.rest.bytes -= kept;
    if (slot.rest.bytes == 0) {
      end(index, 0);
    } else if (kept == 0) {
      end(index, EIO);
    } else {
      prepare(index);
    }
  }

  void end(unsigned index, int error) {
    const Segment& segment = slots_[index].rest;
    ended_.push_back({segment.lane, segment.ticket_id, error, clock_ns(), waited_});
    free_.push_back(index);
  }

  // After an error that is not a matter of time the ring is not touched again. The kernel keeps the
  // pages of transfers in flight until they end, so the arena may go before them.
  void note(int result) {
    if (result < 0 && result != -ETIME && !is_transient(-result)) lost_ = -result;
  }

  void fail_all() {
    std::array<bool, slot_count> unused{};
    for (const unsigned index : free_) unused[index] = true;
    for (unsigned index = 0; index < slot_count; ++index) {
      if (!unused[index]) end(index, lost_);
    }
  }

  const int file_;
  const Bytes alignment_;
  io_uring ring_{};
  bool open_ = false;
  int lost_ = 0;
  bool waited_ = false;  // just now, for what is reaped next
  Bytes prepared_ = 0;   // since segments were handed on
  std::array<Slot, slot_count> slots_{};
  std::vector<unsigned> free_;  // indices of unused slots
  std::vector<SegmentEnd> ended_;
};

// What to do about an error from setting the ring up.
const char* remedy_of(int error) {
  switch (error) {
    case EPERM:
    case EACCES:
      return "A container's seccomp profile or kernel.io_uring_disabled forbids it: allow "
             "io_uring_setup and io_uring_enter";
    case ENOSYS:
      return "This kernel is too old for it: use Linux 5.11 or newer";
    case ENOMEM:
      return "Raise the limit on locked memory (ulimit -l)";
    default:
      return "Close other rings or files of this process";
  }
}

}  // namespace

std::unique_ptr<SegmentIo> open_uring_io(int file, Bytes alignment, std::string& why) {
  auto io = std::make_unique<UringIo>(file, alignment);
  const int error = io->open();
  if (error == 0) return io;
  why = "io_uring cannot be set up: " + std::generic_category().message(error) + ". " +
        remedy_of(error);
  return nullptr;
}

}  // namespace pie

#else

namespace pie {

std::unique_ptr<SegmentIo> open_uring_io(int /*file*/, Bytes /*alignment*/, std::string& why) {
  why = "this build has no io_uring: install liburing's headers and build again";
  return nullptr;
}

}  // namespace pie

#endif
