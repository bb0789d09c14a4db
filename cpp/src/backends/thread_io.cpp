// Segments through pread and pwrite on a few threads: for machines without io_uring, and for files
// without direct I/O. The threads take segments in the order in which they were started.
#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

#include "segment_io.hpp"

namespace pie {
namespace {

constexpr std::size_t thread_count = 4;

// Keeps the signals of this process, an interpreter's Ctrl-C say, away from threads made meanwhile.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_{};
};

class ThreadIo final : public SegmentIo {
 public:
  ThreadIo(int file, Bytes alignment, bool drop_cache)
      : file_(file), alignment_(alignment), drop_cache_(drop_cache) {}

  ~ThreadIo() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    work_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  void start(const Segment& segment) override {
    if (workers_.empty()) start_workers();
    {
      const std::lock_guard lock(mutex_);
      if (workers_.empty()) {
        ended_.push_back({segment.lane, segment.ticket_id, lost_, clock_ns()});
        return;
      }
      queue_.push_back(segment);
      ++in_flight_;
    }
    work_.notify_one();
  }

  void reap(std::vector<SegmentEnd>& out) override {
    const std::lock_guard lock(mutex_);
    out.insert(out.end(), ended_.begin(), ended_.end());
    ended_.clear();
  }

  void wait(Nanos timeout_ns) override {
    std::unique_lock lock(mutex_);
    done_.wait_for(lock, std::chrono::nanoseconds(timeout_ns),
                   [this] { return !ended_.empty() || in_flight_ == 0; });
  }

  [[nodiscard]] int lost() const override { return lost_; }

 private:
  // Fewer threads than wished for are slower, none at all is the end.
  void start_workers() {
    const SignalsBlocked blocked;
    try {
      while (workers_.size() < thread_count) workers_.emplace_back([this] { work(); });
    } catch (const std::system_error& error) {
      if (workers_.empty()) lost_ = error.code().value();
    }
  }

  // Body of a thread: until stopping, and then until the queue is empty.
  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      work_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const Segment segment = queue_.front();
      queue_.pop_front();
      lock.unlock();
      const int error = transfer(segment);
      const Nanos ended = clock_ns();
      lock.lock();
      ended_.push_back({segment.lane, segment.ticket_id, error, ended});
      --in_flight_;
      done_.notify_all();
    }
  }

  // Moves the whole segment; 0 or an errno value. A transfer that stops short is taken up again at
  // the last aligned offset, and is an error where it has moved less than that.
  [[nodiscard]] int transfer(const Segment& segment) const {
    Bytes moved = 0;
    while (moved < segment.bytes) {
      const ssize_t result = move(segment, moved);
      if (result < 0 && errno == EINTR) continue;
      if (result < 0) return errno;
      const Bytes now = static_cast<Bytes>(result);
      const Bytes kept = moved + now == segment.bytes ? now : now / alignment_ * alignment_;
      if (kept == 0) return EIO;
      moved += kept;
    }
    if (drop_cache_ && segment.lane == Lane::pool_to_device) {
      ::posix_fadvise(file_, static_cast<off_t>(segment.offset), static_cast<off_t>(segment.bytes),
                      POSIX_FADV_DONTNEED);
    }
    return 0;
  }

  [[nodiscard]] ssize_t move(const Segment& segment, Bytes moved) const {
    std::byte* memory = segment.memory + moved;
    const Bytes bytes = segment.bytes - moved;
    const auto offset = static_cast<off_t>(segment.offset + moved);
    if (segment.lane == Lane::pool_to_device) return ::pread(file_, memory, bytes, offset);
    return ::pwrite(file_, memory, bytes, offset);
  }

  const int file_;
  const Bytes alignment_;
  const bool drop_cache_;
  int lost_ = 0;
  std::vector<std::thread> workers_;

  std::mutex mutex_;  // guards what follows
  std::condition_variable work_;
  std::condition_variable done_;
  std::deque<Segment> queue_;
  std::vector<SegmentEnd> ended_;
  std::size_t in_flight_ = 0;
  bool stopping_ = false;
};

}  // namespace

std::unique_ptr<SegmentIo> open_thread_io(int file, Bytes alignment, bool drop_cache) {
  return std::make_unique<ThreadIo>(file, alignment, drop_cache);
}

}  // namespace pie
