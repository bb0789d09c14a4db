// Reserving, pinning and giving back.
#include "cpu_memory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>

#include "pie/error.hpp"

namespace pie::cuda {

namespace {

constexpr Bytes chunk_bytes_least = Bytes{64} << 20;

Bytes page_bytes() { return static_cast<Bytes>(::sysconf(_SC_PAGESIZE)); }

Bytes rounded_up(Bytes bytes, Bytes unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

CpuMemory::CpuMemory(const Device& device, Bytes stride, std::uint32_t frames_max)
    : device_(device), stride_(stride), frames_max_(frames_max) {
  // Whole frames and whole pages.
  const Bytes step = std::lcm(stride, page_bytes());
  const Bytes chunk =
      rounded_up(std::min(chunk_bytes_least, rounded_up(frames_max * stride, step)), step);
  chunk_frames_ = static_cast<std::uint32_t>(chunk / stride);
  reserved_ = rounded_up(Bytes{frames_max} * stride, page_bytes());
  if (reserved_ == 0) return;
  void* start = ::mmap(nullptr, reserved_, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) {
    throw CapacityError("pool_bytes is " + sized(reserved_) +
                        ": there are no addresses for so much CPU memory (" + std::strerror(errno) +
                        "); give less.");
  }
  start_ = static_cast<std::byte*>(start);
  ::madvise(start_, reserved_, MADV_HUGEPAGE);
  ::madvise(start_, reserved_, MADV_DONTFORK);  // a child's writes would move the pages away
  try_pinning();
}

CpuMemory::~CpuMemory() {
  if (start_ == nullptr) return;
  {
    const std::scoped_lock lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
  unpin(0);
  ::munmap(start_, reserved_);
}

// A page is enough to know whether the system lets this process pin memory at all.
void CpuMemory::try_pinning() {
  const Driver& driver = device_.driver();
  const Current current(driver, device_.context());
  const CUresult result = driver.host_register(start_, page_bytes(), CU_MEMHOSTREGISTER_PORTABLE);
  if (result == CUDA_SUCCESS) {
    driver.host_unregister(start_);
  } else {
    unpinned_reason_ = "the driver does not pin this process's memory: " + driver.text(result);
  }
}

Bytes CpuMemory::chunk_bytes(std::uint32_t chunk) const {
  const Bytes begin = Bytes{chunk} * chunk_frames_ * stride_;
  return std::min(Bytes{chunk_frames_} * stride_, reserved_ - begin);
}

std::byte* CpuMemory::chunk_start(std::uint32_t chunk) const {
  return start_ + Bytes{chunk} * chunk_frames_ * stride_;
}

std::uint32_t CpuMemory::chunks_of(std::uint32_t frames) const {
  return frames / chunk_frames_ + (frames % chunk_frames_ == 0 ? 0 : 1);
}

std::uint32_t CpuMemory::pinned_frames() const {
  return static_cast<std::uint32_t>(
      std::min<std::uint64_t>(std::uint64_t{pinned_} * chunk_frames_, frames_max_));
}

PoolSize CpuMemory::resize(std::uint32_t frames) {
  std::unique_lock lock(mutex_);
  if (frames > asked_) refusal_.clear();
  asked_ = std::min(frames, frames_max_);
  wanted_ = chunks_of(asked_);
  if (!unpinned_reason_.empty()) {
    pinned_ = wanted_;  // by name only
    if (asked_ < usable_) {
      const Bytes keep = rounded_up(Bytes{asked_} * stride_, page_bytes());
      ::madvise(start_ + keep, reserved_ - keep, MADV_DONTNEED);
    }
  } else if (pinned_ > wanted_ || pinning_) {
    changed_.wait(lock, [&] { return !pinning_ || pinned_ < wanted_; });
    unpin(wanted_);
  }
  if (wants_more()) {
    if (!thread_.joinable()) thread_ = std::thread([this] { pin(); });
    changed_.notify_all();
  }
  if (frames > frames_max_ && refusal_.empty()) {
    refusal_ = "the pool was opened for " + sized(Bytes{frames_max_} * stride_);
  }
  usable_ = std::min(asked_, pinned_frames());
  return {usable_, wants_more()};
}

std::string CpuMemory::refusal() const {
  const std::scoped_lock lock(mutex_);
  return refusal_;
}

bool CpuMemory::is_growing() const {
  const std::scoped_lock lock(mutex_);
  return wants_more() || pinning_;
}

bool CpuMemory::has_grown() const {
  const std::scoped_lock lock(mutex_);
  return std::min(asked_, pinned_frames()) > usable_ && !wants_more();
}

// The thread. It captures nothing that the caller may be capturing into a graph.
void CpuMemory::pin() {
  const Driver& driver = device_.driver();
  const Current current(driver, device_.context());
  CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  driver.capture_mode(&mode);
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return ending_ || wants_more(); });
    if (ending_) return;
    const std::uint32_t chunk = pinned_;
    pinning_ = true;
    lock.unlock();
    const CUresult result =
        driver.host_register(chunk_start(chunk), chunk_bytes(chunk), CU_MEMHOSTREGISTER_PORTABLE);
    lock.lock();
    pinning_ = false;
    if (result == CUDA_SUCCESS) {
      ++pinned_;
    } else {
      refusal_ = "pinning more CPU memory failed: " + driver.text(result);
    }
    changed_.notify_all();
  }
}

// Gives chunks back to the system, from the last on.
void CpuMemory::unpin(std::uint32_t keep) {
  const Driver& driver = device_.driver();
  const Current current(driver, device_.context());
  for (; pinned_ > keep; --pinned_) {
    std::byte* start = chunk_start(pinned_ - 1);
    if (unpinned_reason_.empty()) driver.host_unregister(start);
    ::madvise(start, chunk_bytes(pinned_ - 1), MADV_DONTNEED);
  }
}

}  // namespace pie::cuda
