// The host backend: the CPU computes, an arena in RAM is the device tier, a file on disk the pool.
//
// Here copies are cut into segments and counted until they end; ledger.hpp orders them,
// segment_io.hpp moves the bytes. Whatever is ready goes to the kernel inside
// submit, poll and wait, reads before writes. A batch that waits for another does not hold up later
// ones.
//
// Frames are equally far apart in both tiers and every address is as aligned as direct I/O wants
// it, so a run of frames is one contiguous transfer into the arena with no copy in between.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <system_error>
#include <utility>
#include <vector>

#include "checksum.hpp"
#include "ledger.hpp"
#include "pie/backends.hpp"
#include "pie/error.hpp"
#include "pie/parallel.hpp"
#include "pool_file.hpp"
#include "process.hpp"
#include "segment_io.hpp"

namespace pie {

Nanos clock_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

namespace {

// Frames of so many bytes are a share of a parallel loop over checksums.
constexpr Bytes checked_bytes = Bytes{64} << 10;

constexpr Bytes huge_page_bytes = Bytes{2} << 20;

// Of memory that the caller brings: what any direct I/O asks for.
constexpr Bytes memory_alignment = 4096;

// A single wait below never exceeds this, so that no sum of times overflows.
constexpr Nanos wait_ns_max = Nanos{60} * 1'000'000'000;

// Private memory on huge pages, which may grow in place to `bytes_max`, or, where so much address
// space is not to be had, not at all. A page takes memory from the first time it is used; until
// then it is address space alone. Children of a fork do not get it: transfers may be on their way
// into it. Or memory of the caller's, which is left as it is.
class Arena {
 public:
  explicit Arena(std::byte* memory) : start_(memory) {}

  Arena(Bytes bytes, Bytes bytes_max) : base_(map(bytes_max)) {
    if (base_ == MAP_FAILED) {
      bytes_max = bytes;
      base_ = map(bytes_max);
    }
    if (base_ == MAP_FAILED) refuse(bytes);
    mapped_ = bytes_max + huge_page_bytes;
    const auto address = reinterpret_cast<std::uintptr_t>(base_);
    start_ = static_cast<std::byte*>(base_) + (round_up(address, huge_page_bytes) - address);
    ::madvise(base_, mapped_, MADV_HUGEPAGE);
    ::madvise(base_, mapped_, MADV_DONTFORK);
    if (!open(bytes)) {
      ::munmap(base_, mapped_);
      refuse(bytes);
    }
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    // In a forked child other memory may have come to lie where this did not follow.
    if (base_ != nullptr && process_.is_this()) ::munmap(base_, mapped_);
  }

  [[nodiscard]] std::byte* start() const { return start_; }

  [[nodiscard]] bool is_mapped() const { return base_ != nullptr; }
  [[nodiscard]] Bytes bytes_max() const { return mapped_ - huge_page_bytes; }

  // Makes the first `bytes` usable; false, with errno set, where the system refuses.
  [[nodiscard]] bool open(Bytes bytes) const {
    return base_ == nullptr || ::mprotect(start_, bytes, PROT_READ | PROT_WRITE) == 0;
  }

  // Gives back the pages from `begin` to `end`, but for those that hold what lies before or after;
  // they read as zeros.
  void give_back(Bytes begin, Bytes end) const {
    if (base_ == nullptr) return;
    const auto page = static_cast<Bytes>(::sysconf(_SC_PAGESIZE));
    const Bytes first = round_up(begin, page);
    const Bytes last = end / page * page;
    if (first < last) ::madvise(start_ + first, last - first, MADV_DONTNEED);
  }

 private:
  static void* map(Bytes bytes) {
    return ::mmap(nullptr, bytes + huge_page_bytes, PROT_NONE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }

  [[noreturn]] static void refuse(Bytes bytes) {
    throw CapacityError("device tier: " + std::to_string(bytes) +
                        " bytes of memory were asked for and cannot be mapped: " +
                        std::generic_category().message(errno) +
                        ". Ask for fewer device_bytes, or raise the limit on this process's "
                        "address space (ulimit -v).");
  }

  Process process_;
  Bytes mapped_ = 0;
  void* base_ = nullptr;  // null where the memory is the caller's
  std::byte* start_ = nullptr;
};

// How far a ticket is.
struct Progress {
  std::size_t copy_next = 0;  // what has been started: all copies before this one,
  Bytes copy_done = 0;        // and so many bytes of it
  std::uint32_t in_flight = 0;
  bool ended = false;  // and about to be looked at
};
using Tickets = Ledger<Progress>;

// An error ends a batch early: what has not been started by then never is.
bool all_started(const Tickets::Entry& entry) {
  return entry.completion.error != 0 || entry.work.copy_next == entry.copies.size();
}

constexpr std::array lanes_by_urgency = {Lane::pool_to_device, Lane::device_to_pool};

std::uint32_t in_flight_max(Lane lane) {
  return lane == Lane::pool_to_device ? reads_in_flight_max : writes_in_flight_max;
}

// How the pool is reached. All empty but the name where there is no pool.
struct Pool {
  std::unique_ptr<PoolFile> file;
  std::unique_ptr<SegmentIo> io;
  std::string name = "none";
  std::string reason;  // why not a faster way
};

class HostBackend final : public Backend {
 public:
  HostBackend(Capabilities capabilities, std::shared_ptr<const Arena> arena, Pool pool)
      : capabilities_(std::move(capabilities)),
        arena_(std::move(arena)),
        device_frames_(capabilities_.device_frames),
        file_(std::move(pool.file)),
        io_(std::move(pool.io)) {}

  [[nodiscard]] Capabilities capabilities() const override { return capabilities_; }
  [[nodiscard]] Nanos now() const override { return clock_ns(); }

  std::uint32_t resize_device(std::uint32_t frames) override {
    const Bytes stride = capabilities_.frame_stride;
    const std::uint32_t asked = std::min(frames, capabilities_.device_frames_max);
    require(!tickets_.reaches(Tier::device, asked),
            "resize_device: a copy uses a frame to give up");
    if (asked < device_frames_) arena_->give_back(asked * stride, device_frames_ * stride);
    if (asked <= device_frames_ || arena_->open(asked * stride)) device_frames_ = asked;
    return device_frames_;
  }

  PoolSize resize_pool(std::uint32_t frames) override {
    if (file_ == nullptr) return {};
    const Bytes stride = capabilities_.frame_stride;
    if (frames > pool_frames_) {
      const Bytes bytes = file_->grow(frames * stride);
      pool_frames_ = std::max(pool_frames_,
                              static_cast<std::uint32_t>(std::min<Bytes>(frames, bytes / stride)));
    } else if (frames < pool_frames_) {
      require(!tickets_.reaches(Tier::pool, frames), "resize_pool: a copy uses a frame to give up");
      file_->shrink(frames * stride);
      pool_frames_ = frames;
    }
    checksums_.resize(pool_frames_);
    return {pool_frames_, false};
  }

  [[nodiscard]] std::string pool_refusal() const override {
    return file_ == nullptr ? "there is no pool: pool_bytes is 0" : file_->refusal();
  }

  Ticket submit(std::span<const Copy> copies, std::span<const Dep> after) override;
  std::size_t poll(std::span<Completion> out) override;
  void wait(Nanos timeout_ns) override;

  // Compute is on the calling thread: when it asks, all it was given before has passed.
  Fence record(ComputeStream /*stream*/, Timing timing) override {
    if (timing == Timing::unwanted) return {};
    const Fence fence = tickets_.record(timing);
    tickets_.pass(fence, now());
    return fence;
  }

  // The stream cannot be made to wait here, since it is the caller.
  void depend(ComputeStream /*stream*/, const Dep& dep) override {
    tickets_.require_issued(dep, "depend: waits for a fence or ticket that was never submitted");
    pump();
    require(tickets_.has_passed(dep),
            "depend: here the calling thread computes; wait for the ticket first");
  }

  void duplicate(ComputeStream /*stream*/, std::span<const Duplicate> frames) override {
    for (const auto& [from, to] : frames) {
      std::memcpy(address(to), address(from), capabilities_.frame_stride);
    }
  }

  [[nodiscard]] std::byte* address(FrameIndex device_frame) const override {
    require(device_frame < device_frames_, "address: no such device frame");
    return arena_->start() + device_frame * capabilities_.frame_stride;
  }

  [[nodiscard]] std::shared_ptr<const void> memory() const override {
    return arena_->is_mapped() ? arena_ : nullptr;
  }

  [[nodiscard]] Health health() const override {
    const int error = io_ == nullptr ? 0 : io_->lost();
    if (error == 0) return {};
    return {false, "the pool file can no longer be reached through " + capabilities_.pool_io +
                       ": " + std::generic_category().message(error)};
  }

 private:
  template <typename Visitor>
  void for_each_frame(const Tickets::Entry& entry, const Visitor& visitor);
  void note_checksums(const Tickets::Entry& entry);
  [[nodiscard]] bool is_as_written(const Tickets::Entry& entry);
  void pump();
  void account();
  void start_ready(Lane lane);
  void start_segments(Tickets::Entry& entry);
  void end(Tickets::Entry& entry);
  void complete(Ticket ticket);

  const Capabilities capabilities_;
  std::shared_ptr<const Arena> arena_;
  std::uint32_t device_frames_;  // usable now
  std::unique_ptr<PoolFile> file_;
  std::unique_ptr<SegmentIo> io_;  // goes first: it waits for transfers in the arena and the file
  std::uint32_t pool_frames_ = 0;  // usable now
  std::vector<std::uint64_t> checksums_;  // by pool frame, of what was last written; 0: nothing was
  Tickets tickets_;
  std::array<std::uint32_t, lane_count> in_flight_{};      // segments, by lane
  std::vector<Ticket> ended_;                              // empty between calls
  std::vector<std::pair<std::byte*, FrameIndex>> frames_;  // of a ticket; kept for their memory
  std::vector<SegmentEnd> segment_ends_;  // empty between calls; kept for its memory
};

Ticket HostBackend::submit(std::span<const Copy> copies, std::span<const Dep> after) {
  require(io_ != nullptr, "submit: this backend was opened without a pool");
  require_in_range(copies, device_frames_, pool_frames_);
  return tickets_.open(copies, after);
}

std::size_t HostBackend::poll(std::span<Completion> out) {
  pump();
  return tickets_.poll(out);
}

// After a pump that ended nothing something is in flight, or nothing is left at all: the oldest
// ticket waits for none, so it was started.
void HostBackend::wait(Nanos timeout_ns) {
  const Nanos began = clock_ns();
  for (;;) {
    pump();
    const Nanos left = timeout_ns - (clock_ns() - began);
    if (tickets_.has_completions() || tickets_.is_idle() || left <= 0) return;
    io_->wait(std::min(left, wait_ns_max));
  }
}

// Takes note of what ended, then starts what can be started, and looks at what came while that is
// under way. Never blocks.
void HostBackend::pump() {
  if (io_ == nullptr) return;
  account();
  for (const Lane lane : lanes_by_urgency) start_ready(lane);
  while (!ended_.empty()) {  // what waited for these may start, or fails with them
    for (const Ticket ticket : ended_) complete(ticket);
    ended_.clear();
    for (const Lane lane : lanes_by_urgency) start_ready(lane);
  }
  io_->hand_on();
}

void HostBackend::account() {
  io_->reap(segment_ends_);
  for (const SegmentEnd& segment : segment_ends_) {
    --in_flight_[static_cast<std::size_t>(segment.lane)];
    Tickets::Entry& entry = tickets_.at({segment.lane, segment.ticket_id});
    Completion& completion = entry.completion;
    completion.ended = std::max(completion.ended, segment.ended);
    completion.exact = segment.exact;  // the last one's counts
    if (completion.error == 0) completion.error = segment.error;
    if (--entry.work.in_flight == 0 && all_started(entry)) end(entry);
  }
  segment_ends_.clear();
}

// Oldest first, past those that are held. Ends what has nothing to start and nothing in flight:
// empty tickets, and those that follow a failure.
void HostBackend::start_ready(Lane lane) {
  for (auto& [id, entry] : tickets_.live(lane)) {
    if (in_flight_[static_cast<std::size_t>(lane)] == in_flight_max(lane)) return;
    if (entry.work.ended || tickets_.is_held(entry)) continue;
    start_segments(entry);
    if (entry.work.in_flight > 0 || !all_started(entry)) continue;
    entry.completion.began = entry.completion.ended = clock_ns();
    end(entry);
  }
}

void HostBackend::start_segments(Tickets::Entry& entry) {
  const Ticket ticket = entry.completion.ticket;
  std::uint32_t& in_flight = in_flight_[static_cast<std::size_t>(ticket.lane)];
  const Bytes stride = capabilities_.frame_stride;
  Progress& progress = entry.work;
  while (!all_started(entry) && in_flight < in_flight_max(ticket.lane)) {
    const Copy& copy = entry.copies[progress.copy_next];
    const Bytes total = copy.count * stride;
    const Bytes bytes = std::min(segment_bytes, total - progress.copy_done);
    if (entry.completion.began == 0) {
      entry.completion.began = clock_ns();
      if (ticket.lane == Lane::device_to_pool) note_checksums(entry);
    }
    io_->start({ticket.lane,
                arena_->start() + first_in(Tier::device, copy) * stride + progress.copy_done,
                first_in(Tier::pool, copy) * stride + progress.copy_done, bytes, ticket.id});
    ++progress.in_flight;
    ++in_flight;
    progress.copy_done += bytes;
    if (progress.copy_done < total) continue;
    ++progress.copy_next;
    progress.copy_done = 0;
  }
}

void HostBackend::end(Tickets::Entry& entry) {
  entry.work.ended = true;
  ended_.push_back(entry.completion.ticket);
}

void HostBackend::complete(Ticket ticket) {
  Tickets::Entry& entry = tickets_.at(ticket);
  Completion& completion = entry.completion;
  if (completion.error == 0 && ticket.lane == Lane::pool_to_device && !is_as_written(entry)) {
    completion.status = Status::corrupt;
    completion.error = EBADMSG;
  } else if (completion.error != 0 && completion.status == Status::ok) {
    completion.status = Status::failed;
  }
  tickets_.end(ticket);
}

// Calls visitor(memory, pool frame) for each, on several threads where there are many: what has
// just come from the disk lies in no cache, and one thread reads it at two thirds of the rate of
// two.
template <typename Visitor>
void HostBackend::for_each_frame(const Tickets::Entry& entry, const Visitor& visitor) {
  frames_.clear();
  for (const Copy& copy : entry.copies) {
    for (std::uint32_t i = 0; i < copy.count; ++i) {
      frames_.emplace_back(address(first_in(Tier::device, copy) + i),
                           first_in(Tier::pool, copy) + i);
    }
  }
  struct Loop {
    const Visitor& visitor;
    const std::vector<std::pair<std::byte*, FrameIndex>>& frames;
    std::size_t share;
  };
  Loop loop{visitor, frames_, std::max<Bytes>(1, checked_bytes / capabilities_.frame_stride)};
  const auto run = [](void* context, std::size_t i) {
    const auto& [visit, frames, share] = *static_cast<const Loop*>(context);
    const std::size_t end = std::min(frames.size(), (i + 1) * share);
    for (std::size_t at = i * share; at < end; ++at) visit(frames[at].first, frames[at].second);
  };
  parallel_for((frames_.size() + loop.share - 1) / loop.share, run, &loop);
}

// At the start of a write and not at its submission: until then it may wait for what fills the
// frames. From there to its end they do not change.
void HostBackend::note_checksums(const Tickets::Entry& entry) {
  for_each_frame(entry, [&](const std::byte* frame, FrameIndex pool) {
    checksums_[pool] = checksum_of(frame, capabilities_.frame_stride);
  });
}

bool HostBackend::is_as_written(const Tickets::Entry& entry) {
  std::atomic<bool> same = true;
  for_each_frame(entry, [&](const std::byte* frame, FrameIndex pool) {
    const std::uint64_t written = checksums_[pool];
    if (written != 0 && written != checksum_of(frame, capabilities_.frame_stride)) same = false;
  });
  return same;
}

// The best way that works, or the one that was named. Throws ConfigError where that one does not.
Pool open_pool(const HostOptions& options) {
  const std::string& wanted = options.pool_io;
  const bool any = wanted == "auto";
  if (!any && wanted != "direct-uring" && wanted != "direct-threads" &&
      wanted != "buffered-threads") {
    throw ConfigError("pool_io is '" + wanted +
                      "'; it can be auto, direct-uring, direct-threads or buffered-threads.");
  }
  auto file = std::make_unique<PoolFile>(options.pool_dir, wanted != "buffered-threads",
                                         options.frame_bytes);
  const int descriptor = file->descriptor();
  const Bytes alignment = file->alignment();
  std::string why = "files in '" + file->dir() +
                    "' cannot be read and written directly: name a pool_dir on a local disk";
  if (file->direct() && (any || wanted == "direct-uring")) {
    auto io = open_uring_io(descriptor, alignment, why);
    if (io != nullptr) return {std::move(file), std::move(io), "direct-uring", ""};
  }
  if (wanted == "direct-uring" || (wanted == "direct-threads" && !file->direct())) {
    throw ConfigError("pool_io '" + wanted + "' does not work here: " + why +
                      ". Leave it at auto for the best that does.");
  }
  auto io = open_thread_io(descriptor, alignment, !file->direct());
  const char* name = file->direct() ? "direct-threads" : "buffered-threads";
  return {std::move(file), std::move(io), name, any ? why : ""};
}

// The caller's memory, which cannot grow, or memory that may as far as the machine has any; says in
// `capabilities` how far it can.
std::shared_ptr<const Arena> make_arena(std::byte* memory, Capabilities& capabilities) {
  const Bytes stride = capabilities.frame_stride;
  capabilities.device_frames_max = capabilities.device_frames;
  if (memory != nullptr) {
    if (reinterpret_cast<std::uintptr_t>(memory) % memory_alignment == 0) {
      return std::make_shared<Arena>(memory);
    }
    throw ConfigError("device_memory is not aligned to " + std::to_string(memory_alignment) +
                      " bytes, which direct I/O into it asks for. Allocate it so.");
  }
  const auto machine =
      static_cast<Bytes>(::sysconf(_SC_PHYS_PAGES)) * static_cast<Bytes>(::sysconf(_SC_PAGESIZE));
  const Bytes most = std::clamp<Bytes>(machine / stride, capabilities.device_frames, no_frame - 1);
  auto arena = std::make_shared<Arena>(capabilities.device_frames * stride, most * stride);
  capabilities.device_frames_max = static_cast<std::uint32_t>(arena->bytes_max() / stride);
  return arena;
}

// As many frames as fit, of which there is at least one.
std::uint32_t frames_in(Bytes bytes, Bytes stride, const std::string& name) {
  if (bytes < stride) {
    throw ConfigError(name + " is " + std::to_string(bytes) + ", but one frame takes " +
                      std::to_string(stride) + " bytes. Give at least that.");
  }
  return static_cast<std::uint32_t>(std::min<Bytes>(bytes / stride, no_frame));
}

}  // namespace

std::unique_ptr<Backend> open_host(const HostOptions& options) {
  if (options.frame_bytes == 0) {
    throw ConfigError("frame_bytes is 0; a frame has at least one byte.");
  }
  Pool pool;
  if (options.pool_bytes > 0) pool = open_pool(options);
  const Bytes alignment = pool.file == nullptr ? buffered_alignment : pool.file->alignment();

  Capabilities capabilities;
  capabilities.frame_stride = round_up(options.frame_bytes, alignment);
  capabilities.device_frames =
      frames_in(options.device_bytes, capabilities.frame_stride, "device_bytes");
  if (pool.file != nullptr) {
    capabilities.pool_frames =
        frames_in(options.pool_bytes, capabilities.frame_stride, "pool_bytes");
  }
  const std::shared_ptr<const Arena> arena = make_arena(options.device_memory, capabilities);
  capabilities.copy_bytes_best = segment_bytes;
  capabilities.pool_io = pool.name;
  capabilities.pool_io_reason = pool.reason;
  return std::make_unique<HostBackend>(std::move(capabilities), arena, std::move(pool));
}

PoolWay try_pool(const std::string& dir) {
  HostOptions options;
  options.frame_bytes = huge_page_bytes;
  options.pool_dir = dir;
  const Pool pool = open_pool(options);
  return {pool.name, pool.reason};
}

Bytes host_frame_stride(const HostOptions& options) {
  if (options.pool_bytes == 0) return round_up(options.frame_bytes, buffered_alignment);
  const bool direct = options.pool_io != "buffered-threads";
  const PoolFile file(options.pool_dir, direct, options.frame_bytes);
  return round_up(options.frame_bytes, file.alignment());
}

}  // namespace pie
