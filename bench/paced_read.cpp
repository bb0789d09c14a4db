// Plain direct reads at a rate that is told: what a disk costs a computation that shares its
// machine, with none of Pie in it.
//
//   paced_read DIR BYTES
//
// Makes an unlinked file of so many bytes in DIR and says "ready". Then each line of its input is a
// rate in bytes a second: it reads the file round and round in pieces of the size and depth that
// the host backend uses, through io_uring, into huge pages, evenly spread in time; 0 is silence.
// Each line is answered by the bytes read since the one before. It ends with its input.
#include <cstdio>

#if defined(PIE_HAVE_LIBURING)

#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "backends/segment_io.hpp"

namespace {

using pie::Bytes;

constexpr unsigned depth = pie::reads_in_flight_max;

double seconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

std::byte* huge_pages(Bytes bytes) {
  auto* memory = static_cast<std::byte*>(std::aligned_alloc(Bytes{2} << 20, bytes));
  if (memory == nullptr) throw std::bad_alloc();
  ::madvise(memory, bytes, MADV_HUGEPAGE);
  std::memset(memory, 1, bytes);
  return memory;
}

class Reader {
 public:
  Reader(const char* dir, Bytes bytes)
      : bytes_(bytes / pie::segment_bytes * pie::segment_bytes),
        memory_(huge_pages(depth * pie::segment_bytes)) {
    file_ = ::open(dir, O_TMPFILE | O_RDWR | O_DIRECT | O_CLOEXEC, 0600);
    if (file_ < 0 || bytes_ == 0) throw std::runtime_error("no file can be made there");
    for (Bytes at = 0; at < bytes_; at += pie::segment_bytes) {
      const auto written = ::pwrite(file_, memory_, pie::segment_bytes, static_cast<off_t>(at));
      if (written != static_cast<ssize_t>(pie::segment_bytes)) {
        throw std::runtime_error("the file cannot be written");
      }
    }
    if (io_uring_queue_init(depth, &ring_, 0) != 0)
      throw std::runtime_error("there is no io_uring");
  }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  ~Reader() {
    io_uring_queue_exit(&ring_);
    ::close(file_);
    std::free(memory_);
  }

  // Reads at `rate` until there is input. Returns the bytes that came.
  Bytes read_until_told(double rate) {
    const double began = seconds();
    Bytes started = 0;
    Bytes ended = 0;
    while (!is_told(rate == 0)) {
      const double due = rate * (seconds() - began);
      while (in_flight_ < depth && static_cast<double>(started) < due) {
        start();
        started += pie::segment_bytes;
      }
      ended += reap(0.001);
    }
    while (in_flight_ > 0) ended += reap(1);
    return ended;
  }

 private:
  static bool is_told(bool wait) {
    pollfd input{STDIN_FILENO, POLLIN, 0};
    return ::poll(&input, 1, wait ? -1 : 0) > 0;
  }

  void start() {
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);
    io_uring_prep_read(entry, file_, memory_ + next_ % depth * pie::segment_bytes,
                       pie::segment_bytes, next_ * pie::segment_bytes % bytes_);
    io_uring_submit(&ring_);
    ++next_;
    ++in_flight_;
  }

  // Takes what has ended, or waits so long for something to end.
  Bytes reap(double seconds_most) {
    Bytes bytes = 0;
    __kernel_timespec timeout{
        .tv_sec = static_cast<long long>(seconds_most),
        .tv_nsec = static_cast<long long>(seconds_most * 1e9) % 1'000'000'000};
    io_uring_cqe* entry = nullptr;
    if (io_uring_wait_cqe_timeout(&ring_, &entry, &timeout) != 0) return 0;
    do {
      if (entry->res < 0) throw std::runtime_error("a read failed");
      bytes += static_cast<Bytes>(entry->res);
      io_uring_cqe_seen(&ring_, entry);
      --in_flight_;
    } while (io_uring_peek_cqe(&ring_, &entry) == 0);
    return bytes;
  }

  Bytes bytes_;
  std::byte* memory_;
  int file_ = -1;
  io_uring ring_{};
  Bytes next_ = 0;  // piece
  unsigned in_flight_ = 0;
};

int serve(const char* dir, Bytes bytes) {
  Reader reader(dir, bytes);
  std::puts("ready");
  std::fflush(stdout);
  char line[64];
  double rate = 0;
  for (;;) {
    const Bytes came = reader.read_until_told(rate);
    if (std::fgets(line, sizeof line, stdin) == nullptr) return 0;
    rate = std::strtod(line, nullptr);
    std::printf("%llu\n", static_cast<unsigned long long>(came));
    std::fflush(stdout);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fputs("usage: paced_read DIR BYTES\n", stderr);
    return 2;
  }
  try {
    return serve(arguments[1], std::stoull(arguments[2]));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "paced_read: %s\n", error.what());
    return 1;
  }
}

#else

int main() {
  std::fputs("paced_read: this build has no io_uring: install liburing's headers and build again\n",
             stderr);
  return 2;
}

#endif
