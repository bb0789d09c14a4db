// Reserving, pinning or taking, and giving back.
#include "cpu_memory.hpp"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstring>
#include <numeric>
#include <utility>

#include "memory_limit.hpp"
#include "pie/error.hpp"

namespace pie::cuda {

namespace {

// While a chunk is pinned, nobody launches anything: an H200's driver takes 0.3 ms for this much.
constexpr Bytes chunk_bytes_least = Bytes{8} << 20;
constexpr Nanos retry_ns = 1'000'000'000;

Nanos now_ns() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

Bytes page_bytes() { return static_cast<Bytes>(::sysconf(_SC_PAGESIZE)); }

Bytes rounded_up(Bytes bytes, Bytes unit) { return (bytes + unit - 1) / unit * unit; }

// The node of CPU memory next to a GPU; negative where it is not known.
int node_of(const Device& device) {
#if CUDA_VERSION >= 12020
  constexpr int asked_since = 12020;
  if (device.driver().version < asked_since) return -1;
  return device.attribute(CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID);
#else
  static_cast<void>(device);
  return -1;
#endif
}

// Takes pages from the system by a call where the kernel has it (5.14), else by reading and writing
// a byte of each.
bool populate(std::byte* start, Bytes bytes) {
#ifdef MADV_POPULATE_WRITE
  if (::madvise(start, bytes, MADV_POPULATE_WRITE) == 0) return true;
  if (errno != EINVAL) return false;
#endif
  for (Bytes at = 0; at < bytes; at += page_bytes()) {
    auto* byte = reinterpret_cast<volatile unsigned char*>(start + at);
    *byte = *byte;
  }
  return true;
}

}  // namespace

CpuMemory::CpuMemory(const Device& device, Bytes stride, std::uint32_t frames_max,
                     const std::string& kind)
    : device_(device), stride_(stride), frames_max_(frames_max) {
  choose(kind);
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
  if (kind_ == CpuMemoryKind::coherent) bind();
  if (kind_ != CpuMemoryKind::pinned) return;
  const std::string refusal = pinning_refusal();
  pins_ = refusal.empty();
  if (pins_) return;
  kind_ = CpuMemoryKind::pageable;
  reason_ = refusal;
}

CpuMemory::~CpuMemory() {
  if (start_ == nullptr) return;
  {
    const std::scoped_lock lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
  give_back(0);
  ::munmap(start_, reserved_);
}

const char* CpuMemory::name() const {
  switch (kind_) {
    case CpuMemoryKind::pinned:
      return "pinned";
    case CpuMemoryKind::coherent:
      return pins_ ? "pinned" : "coherent";
    case CpuMemoryKind::pageable:
      break;
  }
  return "pageable";
}

// Where the GPU shares the CPU's page tables it reads all of the CPU's memory.
bool CpuMemory::is_readable() const {
  if (start_ == nullptr || kind_ == CpuMemoryKind::pageable) return false;
  return kind_ == CpuMemoryKind::coherent ||
         device_.attribute(CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM) != 0;
}

void CpuMemory::choose(const std::string& kind) {
  const bool coherent =
      device_.attribute(CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES) != 0;
  if (kind == "auto") {
    kind_ = coherent ? CpuMemoryKind::coherent : CpuMemoryKind::pinned;
  } else if (kind == "pinned") {
    kind_ = CpuMemoryKind::pinned;
  } else if (kind == "coherent" && coherent) {
    kind_ = CpuMemoryKind::coherent;
  } else if (kind == "coherent") {
    throw ConfigError("pool_io is 'coherent': " + device_.name() +
                      " does not share the CPU's page tables, as a GH200 does; use 'pinned' or "
                      "'auto'.");
  } else if (kind == "pageable") {
    kind_ = CpuMemoryKind::pageable;
    reason_ = "pool_io is 'pageable'";
  } else {
    throw ConfigError("pool_io is '" + kind +
                      "': behind a GPU use 'auto', 'pinned', 'coherent' or 'pageable'.");
  }
}

// Away from the CPU that the GPU is joined to, the link would be slower; and where GPU memory is a
// node as well, pages could come to lie there.
void CpuMemory::bind() {
  constexpr std::size_t word_bits = sizeof(unsigned long) * CHAR_BIT;
  std::array<unsigned long, 16> nodes{};
  const int node = node_of(device_);
  if (node < 0 || static_cast<std::size_t>(node) >= nodes.size() * word_bits) {
    reason_ = "the driver does not say which CPU memory is next to the GPU";
    return;
  }
  const auto number = static_cast<std::size_t>(node);
  nodes[number / word_bits] = 1UL << number % word_bits;
  const unsigned long bits = nodes.size() * word_bits + 1;
  if (::syscall(SYS_mbind, start_, reserved_, MPOL_BIND, nodes.data(), bits, 0) != 0) {
    reason_ = "memory cannot be bound to the CPU next to the GPU, NUMA node " +
              std::to_string(node) + " (" + std::strerror(errno) + ")";
  }
}

// Why the system lets this process pin no memory, which a page is enough to know; empty where it
// does.
std::string CpuMemory::pinning_refusal() const {
  const Driver& driver = device_.driver();
  const Current current(driver, device_.context());
  const Relaxed relaxed(driver);
  populate(start_, page_bytes());
  const CUresult result = driver.host_register(start_, page_bytes(), CU_MEMHOSTREGISTER_PORTABLE);
  if (result == CUDA_SUCCESS) driver.host_unregister(start_);
  if (result == CUDA_SUCCESS) return {};
  return "the driver does not pin this process's memory: " + driver.text(result);
}

void CpuMemory::prove(CUstream stream, CUevent event, CUdeviceptr device, Bytes bytes) {
  bytes = std::min(bytes, reserved_);
  if (kind_ != CpuMemoryKind::coherent || bytes == 0) return;
  populate(start_, bytes);
  const Driver& driver = device_.driver();
  const auto host = reinterpret_cast<CUdeviceptr>(start_);
  const bool beside = runs_beside(stream, event, host, device, bytes) &&
                      runs_beside(stream, event, device, host, bytes);
  driver.require(driver.stream_synchronize(stream), "copying");
  ::madvise(start_, bytes, MADV_DONTNEED);
  if (beside) return;
  const std::string refusal = pinning_refusal();
  pins_ = refusal.empty();
  if (!reason_.empty()) reason_ += "; ";
  reason_ += "copies of memory that is not pinned hold up who asks for them";
  if (!pins_) reason_ += ", and " + refusal;
}

// Whether the second of two copies is asked for while the first is still under way. Once is enough:
// a copy that holds up its caller ends after the one before it.
bool CpuMemory::runs_beside(CUstream stream, CUevent event, CUdeviceptr to, CUdeviceptr from,
                            Bytes bytes) const {
  constexpr int tries = 4;
  const Driver& driver = device_.driver();
  for (int i = 0; i < tries; ++i) {
    driver.require(driver.copy(to, from, bytes, stream), "copying");
    driver.require(driver.event_record(event, stream), "recording an event");
    driver.require(driver.copy(to, from, bytes, stream), "copying");
    if (driver.event_query(event) == CUDA_ERROR_NOT_READY) return true;
  }
  return false;
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

std::uint32_t CpuMemory::ready_frames() const {
  return static_cast<std::uint32_t>(
      std::min<std::uint64_t>(std::uint64_t{ready_} * chunk_frames_, frames_max_));
}

PoolSize CpuMemory::resize(std::uint32_t frames) {
  std::unique_lock lock(mutex_);
  // Who asks for no more than before asks again, but not all the time.
  if (frames > asked_ || now_ns() > refused_ns_ + retry_ns) refusal_.clear();
  asked_ = std::min(frames, frames_max_);
  wanted_ = chunks_of(asked_);
  if (kind_ == CpuMemoryKind::pageable) {
    ready_ = wanted_;  // by name only
    if (asked_ < usable_) {
      const Bytes keep = rounded_up(Bytes{asked_} * stride_, page_bytes());
      ::madvise(start_ + keep, reserved_ - keep, MADV_DONTNEED);
    }
  } else if (ready_ > wanted_ || preparing_) {
    changed_.wait(lock, [&] { return !preparing_ || ready_ < wanted_; });
    give_back(wanted_);
  }
  if (wants_more()) {
    if (!thread_.joinable()) thread_ = std::thread([this] { make_ready(); });
    changed_.notify_all();
  }
  if (frames > frames_max_ && refusal_.empty()) {
    refusal_ = "the pool was opened for " + sized(Bytes{frames_max_} * stride_);
  }
  usable_ = std::min(asked_, ready_frames());
  return {usable_, wants_more()};
}

std::string CpuMemory::refusal() const {
  const std::scoped_lock lock(mutex_);
  return refusal_;
}

bool CpuMemory::is_growing() const {
  const std::scoped_lock lock(mutex_);
  return wants_more() || preparing_;
}

bool CpuMemory::has_grown() const {
  const std::scoped_lock lock(mutex_);
  return std::min(asked_, ready_frames()) > usable_ && !wants_more();
}

// The thread.
void CpuMemory::make_ready() {
  const Driver& driver = device_.driver();
  const Current current(driver, device_.context());
  const Relaxed relaxed(driver);
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return ending_ || wants_more(); });
    if (ending_) return;
    const std::uint32_t chunk = ready_;
    preparing_ = true;
    lock.unlock();
    std::string failure = make_ready(chunk);
    lock.lock();
    preparing_ = false;
    if (failure.empty()) {
      ++ready_;
    } else {
      refusal_ = std::move(failure);
      refused_ns_ = now_ns();
    }
    changed_.notify_all();
  }
}

// Why it cannot be; empty where it is. What is pinned is taken from the system before: else the
// driver would take it, for several times as long, while launches wait for it.
std::string CpuMemory::make_ready(std::uint32_t chunk) const {
  std::byte* start = chunk_start(chunk);
  const Bytes bytes = chunk_bytes(chunk);
  std::string refusal = memory_refusal(bytes);
  if (!refusal.empty()) return refusal;
  if (!populate(start, bytes)) {
    refusal = std::string("the system gives no more CPU memory: ") + std::strerror(errno);
  } else if (pins_) {
    const Driver& driver = device_.driver();
    const CUresult result = driver.host_register(start, bytes, CU_MEMHOSTREGISTER_PORTABLE);
    if (result != CUDA_SUCCESS) refusal = "pinning more CPU memory failed: " + driver.text(result);
  }
  if (!refusal.empty()) ::madvise(start, bytes, MADV_DONTNEED);
  return refusal;
}

// Gives chunks back to the system, from the last on.
void CpuMemory::give_back(std::uint32_t keep) {
  const Driver& driver = device_.driver();
  const Current current(driver, device_.context());
  const Relaxed relaxed(driver);
  for (; ready_ > keep; --ready_) {
    std::byte* start = chunk_start(ready_ - 1);
    if (pins_) driver.host_unregister(start);
    ::madvise(start, chunk_bytes(ready_ - 1), MADV_DONTNEED);
  }
}

}  // namespace pie::cuda
