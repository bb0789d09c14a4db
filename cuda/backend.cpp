// The CUDA backend: frames in GPU memory, a pool in CPU memory, copies beside the compute stream.
//
// A stream each way moves the tickets of its lane in turn, one batch of copies a ticket. Copies and
// computation are put in order by events alone: between opening and closing the host waits in
// `wait`, where memory is given back, and nowhere else. After an error of the driver nothing is
// known of what was under way, not even which copy failed: the device is lost, every ticket fails.
#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "backends/ledger.hpp"
#include "backends/plugin.hpp"
#include "cpu_memory.hpp"
#include "device.hpp"
#include "driver.hpp"
#include "events.hpp"
#include "memory_limit.hpp"
#include "pie/backends.hpp"
#include "pie/error.hpp"

namespace pie::cuda {

namespace {

constexpr Bytes copy_bytes_best = Bytes{2} << 20;  // PCIe and NVLink reach their rate by then
constexpr Bytes proof_bytes = Bytes{32} << 20;     // take far longer than asking for them
constexpr double coherent_bytes_per_s = 450e9;     // each way: NVLink-C2C, by NVIDIA's figures
constexpr std::size_t fences_kept = 256;           // until somebody looks which have passed
constexpr Nanos anchor_ns_max = 4'000'000'000;  // floats of milliseconds are exact to 0.5 us there
constexpr std::chrono::microseconds nap(20);

// What a ticket leaves on its lane's stream. When it began nobody marks, since each event costs the
// host about what a launch does: it began when the last that it had to wait for had passed.
struct Marks {
  CUevent ended = nullptr;
  Nanos submitted_ns = 0;
};
using Tickets = Ledger<Marks>;

// A fence that has not been seen to pass.
struct Pending {
  std::uint64_t id = 0;
  ComputeStream stream;
  CUevent event = nullptr;
  bool timed = false;  // somebody wants to know when it passed
};

CUstream stream_of(ComputeStream stream) {
  return reinterpret_cast<CUstream>(stream.handle);  // NOLINT(performance-no-int-to-ptr)
}

CUdeviceptr number_of(const std::byte* address) { return reinterpret_cast<CUdeviceptr>(address); }

// Memory of frames, shared with whoever holds tensors over it.
struct Arena {
  Arena(const Driver& driver, int number) : device(driver, number) {}
  Device device;
  std::unique_ptr<DeviceMemory> memory;
};

class Cuda final : public Backend {
 public:
  Cuda(const CudaOptions& options, Bytes stride);
  ~Cuda() override;

  [[nodiscard]] Capabilities capabilities() const override;
  [[nodiscard]] Nanos now() const override;
  std::uint32_t resize_device(std::uint32_t frames) override;
  PoolSize resize_pool(std::uint32_t frames) override;
  [[nodiscard]] std::string pool_refusal() const override { return pool_.refusal(); }
  Ticket submit(std::span<const Copy> copies, std::span<const Dep> after) override;
  std::size_t poll(std::span<Completion> out) override;
  void wait(Nanos timeout_ns) override;
  void require_usable(ComputeStream stream) const override;
  Fence record(ComputeStream stream, Timing timing) override;
  void depend(ComputeStream stream, const Dep& dep) override;
  void duplicate(ComputeStream stream, std::span<const Duplicate> frames) override;
  [[nodiscard]] std::byte* address(FrameIndex device_frame) const override;
  [[nodiscard]] const std::byte* pool_address() const override {
    return pool_.is_readable() ? pool_.start() : nullptr;
  }
  [[nodiscard]] std::shared_ptr<const void> memory() const override {
    return arena_->memory->is_given() ? nullptr : arena_;
  }
  [[nodiscard]] Health health() const override { return {lost_.empty(), lost_}; }

 private:
  [[nodiscard]] Current current() const { return {driver_, arena_->device.context()}; }
  [[nodiscard]] CUstream lane_stream(Lane lane) const {
    return lane_streams_[static_cast<std::size_t>(lane)];
  }
  [[nodiscard]] Log& ended_log(Lane lane) { return ended_[static_cast<std::size_t>(lane)]; }
  bool check(CUresult result, const char* what);
  void take_memory(const CudaOptions& options);
  void close();
  void anchor();
  [[nodiscard]] double share_in_place(double asked) const;

  void order(CUstream stream, const Dep& dep, bool for_ticket);
  void enqueue(Tickets::Entry& entry);
  void copy(CUstream stream, std::span<const Copy> copies);
  void reap();
  void reap_lane(Lane lane);
  void reap_fences();
  void end(Tickets::Entry& entry);
  void abandon();
  [[nodiscard]] Nanos time_of(CUevent event);
  [[nodiscard]] Nanos began_at(const Tickets::Entry& entry);

  const Driver driver_;
  const Bytes stride_;
  std::shared_ptr<Arena> arena_;
  CpuMemory pool_;
  const std::uint32_t pool_frames_;
  const double in_place_share_;
  std::uint32_t device_opened_ = 0;
  std::uint32_t device_most_ = 0;
  std::uint32_t device_usable_ = 0;
  std::array<CUstream, 2> lane_streams_{};
  Events events_;
  CUevent anchor_ = nullptr;  // whose time on the host's clock is known
  Nanos anchor_ns_ = 0;
  std::array<Log, 2> ended_;  // tickets, by lane
  Log passed_;                // fences that tickets waited for
  Tickets tickets_;
  std::deque<Pending> fences_;   // in the order of their ids
  std::vector<CUdeviceptr> to_;  // of one batch, as the next two
  std::vector<CUdeviceptr> from_;
  std::vector<std::size_t> bytes_;
  std::string lost_;
};

std::uint32_t frames_in(Bytes bytes, Bytes stride) {
  return static_cast<std::uint32_t>(std::min<Bytes>(bytes / stride, no_frame - 1));
}

// ---- opening and closing ------------------------------------------------------------------------

Cuda::Cuda(const CudaOptions& options, Bytes stride)
    : driver_(options.driver),
      stride_(stride),
      arena_(std::make_shared<Arena>(driver_, options.device)),
      pool_(arena_->device, stride_, frames_in(options.pool_bytes, stride_), options.pool_io),
      pool_frames_(frames_in(options.pool_bytes, stride_)),
      in_place_share_(share_in_place(options.in_place_share)),
      events_(driver_) {
  if (options.pool_bytes > 0 && arena_->device.attribute(CU_DEVICE_ATTRIBUTE_INTEGRATED) != 0) {
    throw ConfigError("pool_bytes is " + sized(options.pool_bytes) + ": " + arena_->device.name() +
                      " shares its memory with the CPU, so a pool there would add nothing; give "
                      "pool_bytes=0 and a larger device_bytes.");
  }
  const Current mine = current();
  const Relaxed relaxed(driver_);
  take_memory(options);
  try {
    for (CUstream& stream : lane_streams_) {
      driver_.require(driver_.stream_create(&stream, CU_STREAM_NON_BLOCKING), "making a stream");
    }
    driver_.require(events_.take(anchor_), "making an event");
    pool_.prove(lane_streams_.front(), anchor_, number_of(arena_->memory->start()),
                std::min(proof_bytes, Bytes{device_opened_} * stride_));
    anchor();
  } catch (...) {
    close();
    throw;
  }
}

// See CudaOptions.
double Cuda::share_in_place(double asked) const {
  const bool numbered = pool_frames_ > 0 && pool_frames_ <= in_pool_bit;  // by what tables can say
  const bool readable = numbered && pool_.is_readable();
  if (asked > 0 && pool_frames_ > 0 && !readable) {
    throw ConfigError("in_place_share is " + std::to_string(asked) + ": " + arena_->device.name() +
                      " cannot read a pool that is '" + pool_.name() +
                      "' where it lies; leave in_place_share out.");
  }
  if (asked >= 0) return readable ? asked : 0;
  if (!readable || pool_.kind() != CpuMemoryKind::coherent) return 0;
  // Memory moves its bus's width twice a cycle.
  const Device& device = arena_->device;
  const double cycles_per_s = 1e3 * device.attribute(CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE);
  const double bytes = device.attribute(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH) / 8.0;
  const double bytes_per_s = 2 * cycles_per_s * bytes;
  return bytes_per_s == 0 ? 0 : coherent_bytes_per_s / (coherent_bytes_per_s + bytes_per_s);
}

void Cuda::take_memory(const CudaOptions& options) {
  device_opened_ = frames_in(options.device_bytes, stride_);
  const Bytes wanted = Bytes{device_opened_} * stride_;
  if (options.device_memory != nullptr) {
    arena_->memory = std::make_unique<DeviceMemory>(arena_->device, options.device_memory, wanted);
    device_usable_ = device_most_ = device_opened_;
    return;
  }
  const auto [free, total] = arena_->device.room();
  arena_->memory = std::make_unique<DeviceMemory>(arena_->device, std::max(total, wanted));
  device_most_ = std::max(device_opened_, frames_in(total, stride_));
  if (wanted > free || arena_->memory->resize(wanted) < wanted) {
    throw CapacityError("device_bytes is " + sized(options.device_bytes) + ", and of the " +
                        sized(total) + " of " + arena_->device.name() + " " + sized(free) +
                        " are free: give less, or free some.");
  }
  device_usable_ = device_opened_;
}

Cuda::~Cuda() {
  const Current mine = current();
  const Relaxed relaxed(driver_);
  close();
}

// What still copies or reads ends first: the memory under it goes.
void Cuda::close() {
  if (in_place_share_ > 0) driver_.context_synchronize();
  for (CUstream stream : lane_streams_) {
    if (stream == nullptr) continue;
    driver_.stream_synchronize(stream);
    driver_.stream_destroy(stream);
  }
  for (Pending& fence : fences_) events_.give_back(fence.event);
  for (const Lane lane : {Lane::pool_to_device, Lane::device_to_pool}) {
    for (auto& [id, entry] : tickets_.live(lane)) {
      events_.give_back(entry.work.ended);
    }
  }
  events_.give_back(anchor_);
}

Capabilities Cuda::capabilities() const {
  Capabilities result;
  result.device_frames = device_opened_;
  result.device_frames_max = device_most_;
  result.pool_frames = pool_frames_;
  result.frame_stride = stride_;
  result.copy_bytes_best = copy_bytes_best;
  result.streams = true;
  result.pool_io = pool_frames_ == 0 ? "none" : pool_.name();
  result.pool_io_reason = pool_.reason();
  result.in_place_share = in_place_share_;
  return result;
}

// Keeps the first error. Whether all is well.
bool Cuda::check(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return true;
  if (lost_.empty()) lost_ = std::string(what) + ": " + driver_.text(result);
  return false;
}

// ---- time ---------------------------------------------------------------------------------------

Nanos Cuda::now() const {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

// A moment that both clocks know.
void Cuda::anchor() {
  driver_.require(driver_.event_record(anchor_, lane_streams_.front()), "recording an event");
  driver_.require(driver_.event_synchronize(anchor_), "waiting for an event");
  anchor_ns_ = now();
}

// Of an event that has passed, on the host's clock.
Nanos Cuda::time_of(CUevent event) {
  float elapsed_ms = 0;
  check(driver_.event_elapsed(&elapsed_ms, anchor_, event), "timing an event");
  return anchor_ns_ + static_cast<Nanos>(static_cast<double>(elapsed_ms) * 1e6);
}

// ---- both tiers ---------------------------------------------------------------------------------

std::uint32_t Cuda::resize_device(std::uint32_t frames) {
  const Current mine = current();
  const Relaxed relaxed(driver_);
  const std::uint32_t wanted = std::min(frames, device_most_);
  if (wanted < device_usable_) {
    // Before memory is unmapped all that was given to any stream must be done with it.
    check(driver_.context_synchronize(), "waiting for the GPU");
    reap();
    require(!tickets_.reaches(Tier::device, wanted),
            "resize_device: a copy uses a frame that would go.");
  }
  const Bytes mapped = arena_->memory->resize(Bytes{wanted} * stride_);
  device_usable_ = std::min(wanted, frames_in(mapped, stride_));
  return device_usable_;
}

PoolSize Cuda::resize_pool(std::uint32_t frames) {
  if (frames < pool_.usable()) {
    const Current mine = current();
    const Relaxed relaxed(driver_);
    if (in_place_share_ > 0) check(driver_.context_synchronize(), "waiting for the GPU");
    reap();
    require(!tickets_.reaches(Tier::pool, frames),
            "resize_pool: a copy uses a frame that would go.");
  }
  return pool_.resize(frames);
}

std::byte* Cuda::address(FrameIndex device_frame) const {
  require(device_frame < device_usable_, "address: no such device frame");
  return arena_->memory->start() + device_frame * stride_;
}

// ---- copies -------------------------------------------------------------------------------------

Ticket Cuda::submit(std::span<const Copy> copies, std::span<const Dep> after) {
  require_in_range(copies, device_usable_, pool_.usable());
  const Ticket ticket = tickets_.open(copies, after);
  const Current mine = current();
  Tickets::Entry& entry = tickets_.at(ticket);
  if (lost_.empty()) enqueue(entry);
  if (!lost_.empty()) abandon();
  return ticket;
}

void Cuda::enqueue(Tickets::Entry& entry) {
  CUstream stream = lane_stream(entry.completion.ticket.lane);
  for (const Dep& dep : entry.after) order(stream, dep, true);
  if (!lost_.empty()) return;  // what it could not wait for it must not follow
  Marks& marks = entry.work;
  marks.submitted_ns = now();
  if (check(events_.take(marks.ended), "making an event")) {
    copy(stream, entry.copies);
    check(driver_.event_record(marks.ended, stream), "recording an event");
  }
}

// What `stream` is given from now on comes after `dep`, of which a ticket may want to know when it
// passed.
void Cuda::order(CUstream stream, const Dep& dep, bool for_ticket) {
  if (dep.fence.id != 0) {
    const auto found = std::ranges::lower_bound(fences_, dep.fence.id, {}, &Pending::id);
    if (found != fences_.end() && found->id == dep.fence.id) {
      found->timed = found->timed || for_ticket;
      check(driver_.stream_wait(stream, found->event, 0), "waiting for a fence");
    }
  }
  if (dep.ticket.id == 0) return;
  const auto& live = tickets_.live(dep.ticket.lane);
  const auto found = live.find(dep.ticket.id);
  if (found != live.end() && found->second.work.ended != nullptr) {
    check(driver_.stream_wait(stream, found->second.work.ended, 0), "waiting for a ticket");
  }
}

// All at once where the driver takes a batch, else one after the other. Parts end where the memory
// they lie in was pinned in another piece.
void Cuda::copy(CUstream stream, std::span<const Copy> copies) {
  to_.clear();
  from_.clear();
  bytes_.clear();
  for (const Copy& one : copies) {
    const bool load = one.from.tier == Tier::pool;
    const FrameIndex device_first = first_in(Tier::device, one);
    const FrameIndex pool_first = first_in(Tier::pool, one);
    pool_.each_part(
        pool_first, one.count, [&](std::byte* at, std::uint32_t first, std::uint32_t count) {
          const CUdeviceptr pool = number_of(at);
          const CUdeviceptr device =
              number_of(arena_->memory->start()) + (device_first + first - pool_first) * stride_;
          to_.push_back(load ? device : pool);
          from_.push_back(load ? pool : device);
          bytes_.push_back(count * stride_);
        });
  }
#if CUDA_VERSION >= 12080
  if (driver_.copy_batch != nullptr && to_.size() > 1) {
    CUmemcpyAttributes attributes{};
    attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
    attributes.flags = CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE;
    std::size_t first = 0;
    std::size_t failed = 0;
    check(driver_.copy_batch(to_.data(), from_.data(), bytes_.data(), to_.size(), &attributes,
                             &first, 1, &failed, stream),
          "copying");
    return;
  }
#endif
  for (std::size_t i = 0; i < to_.size() && lost_.empty(); ++i) {
    check(driver_.copy(to_[i], from_[i], bytes_[i], stream), "copying");
  }
}

void Cuda::duplicate(ComputeStream stream, std::span<const Duplicate> frames) {
  for (const auto& [from, to] : frames) {
    require(from < device_usable_ && to < device_usable_, "duplicate: no such device frame");
  }
  if (!lost_.empty()) return;
  const Current mine = current();
  const CUdeviceptr start = number_of(arena_->memory->start());
  for (const auto& [from, to] : frames) {
    if (!check(
            driver_.copy(start + to * stride_, start + from * stride_, stride_, stream_of(stream)),
            "duplicating a frame")) {
      break;
    }
  }
}

// ---- streams ------------------------------------------------------------------------------------

void Cuda::require_usable(ComputeStream stream) const {
  if (!lost_.empty()) return;
  const Current mine = current();
  const auto number = "'cuda:" + std::to_string(arena_->device.number()) + "'";
  CUcontext context = nullptr;
  CUstreamCaptureStatus capture = CU_STREAM_CAPTURE_STATUS_NONE;
  if (driver_.stream_context(stream_of(stream), &context) != CUDA_SUCCESS ||
      context != arena_->device.context()) {
    throw LogicError("the compute stream is not one of " + number +
                     ", where the cache is: make it there, in the device's primary context.");
  }
  if (driver_.stream_capturing(stream_of(stream), &capture) != CUDA_SUCCESS ||
      capture != CU_STREAM_CAPTURE_STATUS_NONE) {
    throw LogicError("the compute stream of " + number +
                     " is being captured into a CUDA graph: copies of KV cannot be, so give steps "
                     "to the stream outside the capture.");
  }
}

Fence Cuda::record(ComputeStream stream, Timing timing) {
  const Current mine = current();
  if (fences_.size() >= fences_kept) {
    const Relaxed relaxed(driver_);
    reap_fences();
  }
  const Fence fence = tickets_.record(timing);
  Pending pending{fence.id, stream, {}, timing == Timing::wanted};
  if (lost_.empty() && check(events_.take(pending.event), "making an event") &&
      check(driver_.event_record(pending.event, stream_of(stream)), "recording an event")) {
    fences_.push_back(pending);
  } else {
    events_.give_back(pending.event);
    tickets_.pass(fence, now());
    abandon();
  }
  return fence;
}

void Cuda::depend(ComputeStream stream, const Dep& dep) {
  tickets_.require_issued(dep, "depend: waits for a fence or ticket that was never submitted");
  if (!lost_.empty() || tickets_.has_passed(dep)) return;
  const Current mine = current();
  order(stream_of(stream), dep, false);
  if (!lost_.empty()) abandon();
}

// ---- completions --------------------------------------------------------------------------------

std::size_t Cuda::poll(std::span<Completion> out) {
  const Current mine = current();
  reap();
  return tickets_.poll(out);
}

void Cuda::wait(Nanos timeout_ns) {
  const Current mine = current();
  const auto until = std::chrono::steady_clock::now() +
                     std::chrono::nanoseconds(std::min<Nanos>(timeout_ns, Nanos{1} << 60));
  for (;;) {
    reap();
    const bool under_way = !tickets_.is_idle() || pool_.is_growing();
    if (tickets_.has_completions() || pool_.has_grown() || !under_way) return;
    if (std::chrono::steady_clock::now() >= until) return;
    std::this_thread::sleep_for(nap);
  }
}

void Cuda::reap() {
  if (fences_.empty() && tickets_.is_idle()) return;
  const Relaxed relaxed(driver_);
  reap_fences();
  for (const Lane lane : {Lane::device_to_pool, Lane::pool_to_device}) reap_lane(lane);
  if (!lost_.empty()) abandon();
}

// Tickets of a lane end in turn, as its stream runs them.
void Cuda::reap_lane(Lane lane) {
  Tickets::Entries& live = tickets_.live(lane);
  while (!live.empty() && lost_.empty()) {
    Tickets::Entry& entry = live.begin()->second;
    const CUresult result = driver_.event_query(entry.work.ended);
    if (result == CUDA_ERROR_NOT_READY || !check(result, "copying")) return;
    if (std::ranges::any_of(entry.after, [&](const Dep& d) { return !tickets_.has_passed(d); })) {
      reap_fences();  // they have by now
    }
    entry.completion.ended = std::min(time_of(entry.work.ended), now());
    entry.completion.began = std::min(began_at(entry), entry.completion.ended);
    ended_log(lane).add(entry.completion.ticket.id, entry.completion.ended);
    end(entry);
  }
}

Nanos Cuda::began_at(const Tickets::Entry& entry) {
  Nanos began = std::max(entry.work.submitted_ns, ended_log(entry.completion.ticket.lane).last());
  for (const Dep& dep : entry.after) {
    began =
        std::max({began, passed_.at(dep.fence.id), ended_log(dep.ticket.lane).at(dep.ticket.id)});
  }
  return began;
}

// Those of a stream pass in turn.
void Cuda::reap_fences() {
  std::vector<ComputeStream> ahead;  // streams with one that has not passed
  std::erase_if(fences_, [&](Pending& fence) {
    if (!lost_.empty() || std::ranges::find(ahead, fence.stream) != ahead.end()) return false;
    const CUresult result = driver_.event_query(fence.event);
    if (result == CUDA_ERROR_NOT_READY || !check(result, "computing")) {
      ahead.push_back(fence.stream);
      return false;
    }
    const Nanos passed_ns = fence.timed ? std::min(time_of(fence.event), now()) : 0;
    if (fence.timed) passed_.add(fence.id, passed_ns);
    tickets_.pass({fence.id}, passed_ns);
    events_.give_back(fence.event);
    return true;
  });
}

// `time_of` is exact near the anchor only, so that moves on.
void Cuda::end(Tickets::Entry& entry) {
  Marks& marks = entry.work;
  if (entry.completion.ended - anchor_ns_ > anchor_ns_max && lost_.empty()) {
    std::swap(anchor_, marks.ended);
    anchor_ns_ = entry.completion.ended;
  }
  events_.give_back(marks.ended);
  tickets_.end(entry.completion.ticket);
}

// The device is lost: all that is under way has failed.
void Cuda::abandon() {
  for (const Lane lane : {Lane::pool_to_device, Lane::device_to_pool}) {
    Tickets::Entries& live = tickets_.live(lane);
    while (!live.empty()) {
      Tickets::Entry& entry = live.begin()->second;
      entry.completion.status = Status::failed;
      entry.completion.error = EIO;
      entry.completion.began = entry.completion.ended = now();
      end(entry);
    }
  }
  for (Pending& fence : fences_) {
    tickets_.pass({fence.id}, now());
    events_.give_back(fence.event);
  }
  fences_.clear();
}

}  // namespace

std::unique_ptr<Backend> open(const CudaOptions& options) {
  if (options.frame_bytes == 0) throw ConfigError("cuda: a frame has at least one byte.");
  if (const Bytes limit = memory_limit(); options.pool_bytes > limit) {
    throw ConfigError("pool_bytes is " + sized(options.pool_bytes) + ": this process may have " +
                      sized(limit) +
                      " of CPU memory, by the machine and its control groups; give less.");
  }
  return std::make_unique<Cuda>(options, plugin_stride(options.frame_bytes));
}

}  // namespace pie::cuda

// ---- the plugin's one name ----------------------------------------------------------------------

namespace {

pie::PluginResult told(pie::PluginResult result, const char* words, char* error,
                       std::size_t error_bytes) {
  if (error_bytes > 0) {
    std::strncpy(error, words, error_bytes - 1);
    error[error_bytes - 1] = '\0';
  }
  return result;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) pie::PluginResult pie_cuda_open(
    std::uint32_t abi, const pie::CudaOptions* options, pie::Backend** backend, char* error,
    std::size_t error_bytes) {
  using pie::PluginResult;
  if (abi != pie::plugin_abi) return told(PluginResult::wrong_abi, "", error, error_bytes);
  try {
    *backend = pie::cuda::open(*options).release();
    return PluginResult::ok;
  } catch (const pie::ConfigError& refusal) {
    return told(PluginResult::config, refusal.what(), error, error_bytes);
  } catch (const pie::CapacityError& refusal) {
    return told(PluginResult::capacity, refusal.what(), error, error_bytes);
  } catch (const std::exception& failure) {
    return told(PluginResult::failure, failure.what(), error, error_bytes);
  }
}
