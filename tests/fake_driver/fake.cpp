// The double's engine: streams, events, memory, and who may use what.
#include "fake.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <utility>

namespace fake {

namespace {

using Address = CUdeviceptr;

template <typename Type>
Type* pointer_to(Address address) {
  return reinterpret_cast<Type*>(address);  // NOLINT(performance-no-int-to-ptr)
}

// ---- clocks -------------------------------------------------------------------------------------

// By stream, the newest of its operations that has happened before.
class Clock {
 public:
  [[nodiscard]] std::uint64_t at(std::size_t stream) const {
    return stream < ticks_.size() ? ticks_[stream] : 0;
  }
  void set(std::size_t stream, std::uint64_t tick) {
    if (stream >= ticks_.size()) ticks_.resize(stream + 1);
    ticks_[stream] = tick;
  }
  void join(const Clock& other) {
    if (ticks_.size() < other.ticks_.size()) ticks_.resize(other.ticks_.size());
    for (std::size_t i = 0; i < other.ticks_.size(); ++i) {
      ticks_[i] = std::max(ticks_[i], other.ticks_[i]);
    }
  }

 private:
  std::vector<std::uint64_t> ticks_;
};

struct Mark {
  std::size_t stream = 0;
  std::uint64_t tick = 0;
};

// ---- operations ---------------------------------------------------------------------------------

// One copy of a batch: it takes its bytes and later puts them, in two steps.
struct Part {
  std::byte* to = nullptr;
  const std::byte* from = nullptr;
  std::size_t bytes = 0;
  bool late = false;  // reads when it writes, not when it starts
  int stage = 0;      // 0, 1: started, 2: done
  std::vector<std::byte> held;
};

struct Operation {
  std::size_t stream = 0;
  Clock clock;
  std::vector<std::shared_ptr<Operation>> before;  // besides the stream's own
  std::vector<Part> parts;
  std::function<void()> body;
  bool done = false;
  std::chrono::steady_clock::time_point at;
};
using Handle = std::shared_ptr<Operation>;

struct Stream {
  std::size_t number = 0;
  int device = 0;
  bool captured = false;  // what it is given goes into a graph, and is not done
  bool legacy = false;
  Clock clock;
  std::uint64_t tick = 0;
  std::deque<Handle> pending;
  Handle last;
};

Stream default_stream() {
  Stream stream;
  stream.legacy = true;
  return stream;
}

struct Event {
  bool timed = true;
  int device = 0;
  bool captured = false;  // marks a place in a graph
  Handle recorded;
};

// Bytes that were all used alike.
struct Cell {
  Address end = 0;
  Mark write;
  std::vector<Mark> reads;
};

// Device memory that is mapped.
struct Piece {
  std::size_t bytes = 0;
  int device = 0;
};

struct Reservation {
  std::byte* given = nullptr;    // without access
  std::byte* reached = nullptr;  // the double's own
  std::size_t bytes = 0;
};

class Machine {
 public:
  void set_order(Order order, std::uint64_t seed);

  Profile profile;
  std::uint64_t calls = 0;
  std::uint64_t failing = 0;
  CUresult failure = CUDA_SUCCESS;
  std::map<std::string, std::uint64_t> by_name;
  std::vector<std::string> violations;
  std::recursive_mutex mutex;

  // Counts a call; what it is to return at once, if it is to fail.
  CUresult enter(const char* name) {
    ++calls;
    ++by_name[name];
    return failing != 0 && calls == failing ? failure : CUDA_SUCCESS;
  }
  // Counts one that cannot fail.
  void note(const char* name) {
    const std::scoped_lock lock(mutex);
    ++by_name[name];
  }
  void complain(const std::string& words) { violations.push_back(words); }

  // Streams and events.
  Stream& stream(CUstream handle) {
    if (handle != nullptr) return *reinterpret_cast<Stream*>(handle);
    legacy_.device = std::max(0, device());
    return legacy_;
  }
  CUstream add_stream(int device);
  void remove_stream(CUstream handle);
  void enqueue(Stream& on, Operation operation, std::span<const Range> ranges);
  void copy(Stream& on, std::span<const CUdeviceptr> to, std::span<const CUdeviceptr> from,
            std::span<const std::size_t> bytes);
  void record(Event& event, Stream& on);
  void wait(Stream& on, Event& event);
  [[nodiscard]] bool query(Event& event);
  void force(const Handle& operation) {
    force_unseen(operation);
    host_.join(operation->clock);
  }
  void force_unseen(const Handle& operation);  // the host does not learn of it
  void force_all();

  std::size_t events = 0;
  [[nodiscard]] std::size_t streams() const { return streams_.size(); }

  // Memory.
  std::vector<Reservation> reservations;
  std::map<Address, Piece> pieces;            // by address
  std::map<Address, std::size_t> registered;  // of the host
  std::map<int, int> piece_devices;           // by file
  std::size_t used = 0;                       // of the device
  std::size_t pinned = 0;
  [[nodiscard]] std::byte* reach(Address address) const;
  [[nodiscard]] bool is_mapped(Address begin, std::size_t bytes) const;
  [[nodiscard]] int device_of(Address address) const;  // -1: it is no memory of any
  void forget(Address begin, std::size_t bytes, const char* what);
  // Nobody may capture while this is called, unless the thread asked for it.
  void refuse_in_capture(const char* name) {
    const auto is_captured = [](const auto& one) { return one->captured; };
    if (capture_mode == CU_STREAM_CAPTURE_MODE_GLOBAL &&
        std::ranges::any_of(streams_, is_captured)) {
      complain(std::string(name) + " ends the capture of a stream");
    }
  }
  void end_capture() {
    for (const auto& one : streams_) one->captured = false;
  }
  std::uint64_t captured = 0;  // operations that went into graphs
  static thread_local CUstreamCaptureMode capture_mode;
  static thread_local std::vector<CUcontext> contexts;
  // Of the context that is the thread's own; -1: none is.
  [[nodiscard]] static int device() {
    return contexts.empty() ? -1 : static_cast<int>(reinterpret_cast<Address>(contexts.back())) - 1;
  }
  [[nodiscard]] double draw() { return static_cast<double>(random_() >> 11U) * 0x1p-53; }

 private:
  void require_home(Address at, int device);
  void use(Address begin, std::size_t bytes, bool write, const Mark& mark, const Clock& clock);
  void split(Address at);
  [[nodiscard]] bool is_pageable(Address begin, std::size_t bytes);
  [[nodiscard]] bool step();
  void advance(Operation& operation);
  void go_on(Stream& of);
  void proceed();

  Order order_ = Order::earliest;
  std::mt19937_64 random_;
  Clock host_;
  Stream legacy_ = default_stream();
  std::vector<std::unique_ptr<Stream>> streams_;
  std::size_t streams_made_ = 1;
  std::map<Address, Cell> cells_;
};

thread_local CUstreamCaptureMode Machine::capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
thread_local std::vector<CUcontext> Machine::contexts;

void Machine::set_order(Order order, std::uint64_t seed) {
  order_ = order;
  random_.seed(seed);
}

// ---- doing --------------------------------------------------------------------------------------

CUstream Machine::add_stream(int device) {
  streams_.push_back(std::make_unique<Stream>());
  streams_.back()->device = device;
  streams_.back()->number = streams_made_++;
  return reinterpret_cast<CUstream>(streams_.back().get());
}

// What it was given is still done.
void Machine::remove_stream(CUstream handle) {
  Stream& gone = stream(handle);
  if (gone.last) force(gone.last);
  std::erase_if(streams_, [&](const auto& one) { return one.get() == &gone; });
}

void Machine::enqueue(Stream& on, Operation operation, std::span<const Range> ranges) {
  if (on.captured) {
    ++captured;
    return;
  }
  on.clock.join(host_);
  for (const Handle& before : operation.before) on.clock.join(before->clock);
  on.clock.set(on.number, ++on.tick);
  operation.clock = on.clock;
  operation.stream = on.number;
  for (const Range& range : ranges) {
    require_home(range.begin, on.device);
    use(range.begin, range.bytes, range.write, {on.number, on.tick}, on.clock);
  }
  on.last = std::make_shared<Operation>(std::move(operation));
  on.pending.push_back(on.last);
  proceed();
}

// Begins or ends one copy of the operation, or does all of it where it is none.
void Machine::advance(Operation& operation) {
  if (operation.body) operation.body();
  if (operation.parts.empty()) {
    operation.done = true;
    return;
  }
  std::vector<Part*> left;
  for (Part& part : operation.parts) {
    if (part.stage < 2) left.push_back(&part);
  }
  Part& part = *left[random_() % left.size()];
  if (part.stage == 0 || part.late) part.held.assign(part.from, part.from + part.bytes);
  if (part.stage == 0) {
    std::memset(part.to, 0xdb, part.bytes);
  } else {
    std::memcpy(part.to, part.held.data(), part.bytes);
    part.held = {};
  }
  ++part.stage;
  operation.done = left.size() == 1 && part.stage == 2;
}

// The first operation of a stream goes on as far as one step.
void Machine::go_on(Stream& of) {
  const Handle first = of.pending.front();
  advance(*first);
  if (!first->done) return;
  first->at = std::chrono::steady_clock::now();
  first->before.clear();
  of.pending.pop_front();
}

// One step of one stream that has one to do.
bool Machine::step() {
  std::vector<Stream*> able;
  const auto consider = [&](Stream& one) {
    const auto has_passed = [](const Handle& before) { return before->done; };
    if (!one.pending.empty() && std::ranges::all_of(one.pending.front()->before, has_passed)) {
      able.push_back(&one);
    }
  };
  consider(legacy_);
  for (const auto& one : streams_) consider(*one);
  if (able.empty()) return false;
  go_on(*able[random_() % able.size()]);
  return true;
}

void Machine::proceed() {
  if (order_ == Order::latest) return;
  while ((order_ == Order::earliest || draw() < 0.4) && step()) {
  }
}

// Does an operation and what it needs, and no more.
void Machine::force_unseen(const Handle& operation) {
  std::vector<Handle> needed{operation};
  while (!needed.empty()) {
    const Handle top = needed.back();
    if (top->done) {
      needed.pop_back();
      continue;
    }
    Stream* of = &legacy_;
    for (const auto& one : streams_) {
      if (one->number == top->stream) of = one.get();
    }
    const Handle first = of->pending.front();
    const auto waits =
        std::ranges::find_if(first->before, [](const Handle& h) { return !h->done; });
    if (waits != first->before.end()) {
      needed.push_back(*waits);
    } else {
      go_on(*of);
    }
  }
}

void Machine::force_all() {
  while (step()) {
  }
  host_.join(legacy_.clock);
  for (const auto& one : streams_) host_.join(one->clock);
}

// ---- what is done -------------------------------------------------------------------------------

void Machine::copy(Stream& on, std::span<const CUdeviceptr> to, std::span<const CUdeviceptr> from,
                   std::span<const std::size_t> bytes) {
  Operation operation;
  std::vector<Range> ranges;
  bool pageable = false;
  for (std::size_t i = 0; i < to.size(); ++i) {
    for (const Address address : {to[i], from[i]}) {
      pageable = is_pageable(address, bytes[i]) || pageable;
    }
    ranges.push_back({from[i], bytes[i], false});
    ranges.push_back({to[i], bytes[i], true});
    operation.parts.push_back({reach(to[i]), reach(from[i]), bytes[i], draw() < 0.5, 0, {}});
  }
  enqueue(on, std::move(operation), ranges);
  // As the driver does, through a buffer of its own; not where the GPU finds the pages itself.
  if (pageable && (!profile.coherent || profile.coherent_waits)) force(on.last);
}

void Machine::record(Event& event, Stream& on) {
  event.captured = on.captured;
  enqueue(on, {}, {});
  event.recorded = on.last;
}

// Who waits for a place in a graph is captured into it.
void Machine::wait(Stream& on, Event& event) {
  if (event.captured) {
    on.captured = true;
    ++captured;
    return;
  }
  if (!event.recorded) {
    complain("a stream waits for an event that was never recorded");
    return;
  }
  Operation operation;
  operation.before.push_back(event.recorded);
  enqueue(on, std::move(operation), {});
}

// Each time that somebody asks it comes a step nearer.
bool Machine::query(Event& event) {
  if (!event.recorded) return true;
  if (order_ == Order::latest && draw() < 0.5) force(event.recorded);
  if (order_ == Order::random) static_cast<void>(step());
  if (order_ == Order::earliest) proceed();  // what another order has left
  if (!event.recorded->done) return false;
  host_.join(event.recorded->clock);
  return true;
}

// ---- memory -------------------------------------------------------------------------------------

std::byte* Machine::reach(Address address) const {
  for (const Reservation& one : reservations) {
    const auto begin = reinterpret_cast<Address>(one.given);
    if (address >= begin && address < begin + one.bytes) return one.reached + (address - begin);
  }
  return pointer_to<std::byte>(address);
}

int Machine::device_of(Address address) const {
  if (!is_mapped(address, 1)) return -1;
  return (--pieces.upper_bound(address))->second.device;
}

bool Machine::is_mapped(Address begin, std::size_t bytes) const {
  Address at = begin;
  while (at < begin + bytes) {
    auto piece = pieces.upper_bound(at);
    if (piece == pieces.begin()) return false;
    --piece;
    if (at >= piece->first + piece->second.bytes) return false;
    at = piece->first + piece->second.bytes;
  }
  return true;
}

// Whether the system has given this process all pages of a range.
bool is_taken(void* start, std::size_t bytes) {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> taken((bytes + page - 1) / page);
  return ::mincore(start, bytes, taken.data()) == 0 &&
         std::ranges::all_of(taken, [](unsigned char one) { return (one & 1U) != 0; });
}

// Of the host, and not registered. No copy may be in part of one registration.
bool Machine::is_pageable(Address begin, std::size_t bytes) {
  if (reach(begin) != pointer_to<std::byte>(begin)) {
    if (!is_mapped(begin, bytes)) complain("a copy of device memory that is not mapped");
    return false;
  }
  auto after = registered.upper_bound(begin);
  if (after != registered.end() && after->first < begin + bytes) {
    complain("a copy reaches into registered memory from outside");
  }
  if (after == registered.begin()) return true;
  --after;
  if (begin >= after->first + after->second) return true;
  if (begin + bytes > after->first + after->second) complain("a copy spans two registrations");
  return false;
}

// The memory of another device is not mapped for this one.
void Machine::require_home(Address at, int device) {
  auto piece = pieces.upper_bound(at);
  if (piece == pieces.begin()) return;
  --piece;
  if (at < piece->first + piece->second.bytes && piece->second.device != device) {
    complain("a stream of GPU " + std::to_string(device) + " uses memory of GPU " +
             std::to_string(piece->second.device));
  }
}

void Machine::split(Address at) {
  auto cell = cells_.upper_bound(at);
  if (cell == cells_.begin()) return;
  --cell;
  if (cell->first == at || cell->second.end <= at) return;
  Cell rest = cell->second;
  cell->second.end = at;
  cells_.emplace(at, std::move(rest));
}

void Machine::use(Address begin, std::size_t bytes, bool write, const Mark& mark,
                  const Clock& clock) {
  const Address end = begin + bytes;
  split(begin);
  split(end);
  const auto is_ordered = [&](const Mark& other) { return other.tick <= clock.at(other.stream); };
  for (Address at = begin; at < end;) {
    auto cell = cells_.lower_bound(at);
    if (cell == cells_.end() || cell->first > at) {
      const Address until = cell == cells_.end() ? end : std::min(end, cell->first);
      cell = cells_.emplace(at, Cell{until, {}, {}}).first;
    }
    Cell& found = cell->second;
    if (!is_ordered(found.write)) {
      complain(std::string(write ? "a write" : "a read") + " races with a write, " +
               std::to_string(found.end - at) + " bytes");
    }
    if (write && !std::ranges::all_of(found.reads, is_ordered)) {
      complain("a write races with a read, " + std::to_string(found.end - at) + " bytes");
    }
    if (write) {
      found.write = mark;
      found.reads.clear();
    } else {
      std::erase_if(found.reads, [&](const Mark& other) { return other.stream == mark.stream; });
      found.reads.push_back(mark);
    }
    at = found.end;
  }
}

// The bytes go: the host must know that nobody uses them.
void Machine::forget(Address begin, std::size_t bytes, const char* what) {
  split(begin);
  split(begin + bytes);
  const auto is_known = [&](const Mark& mark) { return mark.tick <= host_.at(mark.stream); };
  for (auto cell = cells_.lower_bound(begin);
       cell != cells_.end() && cell->first < begin + bytes;) {
    if (!is_known(cell->second.write) || !std::ranges::all_of(cell->second.reads, is_known)) {
      complain(std::string(what) + " while it may be in use");
    }
    cell = cells_.erase(cell);
  }
}

// Whether no copy writes what another reads or writes.
bool are_independent(std::span<const CUdeviceptr> to, std::span<const CUdeviceptr> from,
                     std::span<const std::size_t> bytes) {
  std::vector<Range> ranges;
  for (std::size_t i = 0; i < to.size(); ++i) {
    ranges.push_back({to[i], bytes[i], true});
    ranges.push_back({from[i], bytes[i], false});
  }
  std::ranges::sort(ranges, {}, &Range::begin);
  Address end = 0;
  Address written = 0;
  for (const Range& range : ranges) {
    if (range.begin < (range.write ? end : written)) return false;
    end = std::max(end, range.begin + range.bytes);
    if (range.write) written = std::max(written, range.begin + range.bytes);
  }
  return true;
}

Machine& machine() {
  static Machine* one = new Machine;  // outlives whoever unloads last
  return *one;
}

// The locked machine, for the length of one call.
struct Call {
  explicit Call(const char* name) : lock(machine().mutex), result(machine().enter(name)) {}
  std::unique_lock<std::recursive_mutex> lock;
  CUresult result;
};

}  // namespace

// ---- control ------------------------------------------------------------------------------------

void set_profile(const Profile& profile) {
  const std::scoped_lock lock(machine().mutex);
  machine().profile = profile;
}

void set_order(Order order, std::uint64_t seed) {
  const std::scoped_lock lock(machine().mutex);
  machine().set_order(order, seed);
}

void fail_call(std::uint64_t number, CUresult result) {
  const std::scoped_lock lock(machine().mutex);
  machine().failing = number == 0 ? 0 : machine().calls + number;
  machine().failure = result;
}

std::uint64_t calls() {
  const std::scoped_lock lock(machine().mutex);
  return machine().calls;
}
std::map<std::string, std::uint64_t> calls_by_name() {
  const std::scoped_lock lock(machine().mutex);
  return machine().by_name;
}
std::vector<std::string> take_violations() {
  const std::scoped_lock lock(machine().mutex);
  return std::exchange(machine().violations, {});
}

Holdings holdings() {
  const std::scoped_lock lock(machine().mutex);
  const Machine& one = machine();
  return {one.streams(), one.events, one.reservations.size(), one.used, one.pinned};
}

void launch(CUstream stream, std::span<const Range> ranges, std::function<void()> body) {
  const std::scoped_lock lock(machine().mutex);
  Operation operation;
  operation.body = std::move(body);
  machine().enqueue(machine().stream(stream), std::move(operation), ranges);
}

void begin_capture(CUstream stream) {
  const std::scoped_lock lock(machine().mutex);
  machine().stream(stream).captured = true;
}

std::uint64_t end_capture() {
  const std::scoped_lock lock(machine().mutex);
  machine().end_capture();
  return std::exchange(machine().captured, 0);
}

std::byte* reach(CUdeviceptr address) {
  const std::scoped_lock lock(machine().mutex);
  return machine().reach(address);
}

}  // namespace fake

// cuda.h may call the newest of each by the plain name; the backend asks for the oldest.
#undef cuEventElapsedTime
#undef cuMemcpyBatchAsync

// ---- the driver's calls -------------------------------------------------------------------------

using fake::Call;
using fake::machine;

#define FAKE_CALL(name) \
  Call call(name);      \
  if (call.result != CUDA_SUCCESS) return call.result

// One that the driver does not allow while somebody captures a stream in the strictest mode.
#define FAKE_UNSAFE_CALL(name) \
  FAKE_CALL(name);             \
  machine().refuse_in_capture(name)

extern "C" {

CUresult cuInit(unsigned) {
  FAKE_CALL("cuInit");
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  *version = machine().profile.driver_version;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult result, const char** text) {
  *text = result == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "an error of the double";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  FAKE_CALL("cuDeviceGetCount");
  *count = machine().profile.devices;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int number) {
  FAKE_CALL("cuDeviceGet");
  *device = number;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int bytes, CUdevice) {
  std::strncpy(name, machine().profile.name.c_str(), static_cast<std::size_t>(bytes));
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  const fake::Profile& profile = machine().profile;
  *value = 1;
  if (which == CU_DEVICE_ATTRIBUTE_INTEGRATED) *value = profile.integrated ? 1 : 0;
  if (which == CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES) {
    *value = profile.coherent ? 1 : 0;
  }
  if (which == CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE) *value = profile.memory_clock_khz;
  if (which == CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH) *value = profile.memory_bus_bits;
#if CUDA_VERSION >= 12020
  if (which == CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID) *value = profile.coherent ? 0 : -1;
#endif
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  FAKE_CALL("cuDevicePrimaryCtxRetain");
  *context = fake::pointer_to<CUctx_st>(static_cast<fake::Address>(device) + 1);
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }

CUresult cuCtxGetCurrent(CUcontext* context) {
  machine().note("cuCtxGetCurrent");
  *context = fake::Machine::contexts.empty() ? nullptr : fake::Machine::contexts.back();
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
  machine().note("cuCtxPushCurrent");
  fake::Machine::contexts.push_back(context);
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  machine().note("cuCtxPopCurrent");
  *context = fake::Machine::contexts.back();
  fake::Machine::contexts.pop_back();
  return CUDA_SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  machine().note("cuThreadExchangeStreamCaptureMode");
  std::swap(*mode, fake::Machine::capture_mode);
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize() {
  FAKE_UNSAFE_CALL("cuCtxSynchronize");
  machine().force_all();
  return CUDA_SUCCESS;
}

CUresult cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
  FAKE_CALL("cuMemGetInfo");
  *total = machine().profile.memory_bytes;
  *free = *total - machine().used;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr address) {
  FAKE_CALL("cuPointerGetAttribute");
  const int device = machine().device_of(address);
  if (device < 0) return CUDA_ERROR_INVALID_VALUE;
  *static_cast<int*>(value) =
      which == CU_POINTER_ATTRIBUTE_MEMORY_TYPE ? static_cast<int>(CU_MEMORYTYPE_DEVICE) : device;
  return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationGranularity(std::size_t* bytes, const CUmemAllocationProp*,
                                       CUmemAllocationGranularity_flags) {
  FAKE_CALL("cuMemGetAllocationGranularity");
  *bytes = std::size_t{64} << 10;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* start, std::size_t bytes, std::size_t, CUdeviceptr,
                             unsigned long long) {
  FAKE_CALL("cuMemAddressReserve");
  const auto map = [&] {
    return static_cast<std::byte*>(
        ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  };
  machine().reservations.push_back({map(), map(), bytes});
  *start = reinterpret_cast<CUdeviceptr>(machine().reservations.back().given);
  return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr start, std::size_t bytes) {
  const Call call("cuMemAddressFree");
  std::erase_if(machine().reservations, [&](const fake::Reservation& one) {
    if (reinterpret_cast<CUdeviceptr>(one.given) != start) return false;
    ::munmap(one.given, bytes);
    ::munmap(one.reached, bytes);
    return true;
  });
  return CUDA_SUCCESS;
}

// A piece is a file of its own, which is mapped for the device and for the double.
CUresult cuMemCreate(CUmemGenericAllocationHandle* piece, std::size_t bytes,
                     const CUmemAllocationProp* prop, unsigned long long) {
  FAKE_UNSAFE_CALL("cuMemCreate");
  if (machine().used + bytes > machine().profile.memory_bytes) return CUDA_ERROR_OUT_OF_MEMORY;
  const int file = ::memfd_create("device", MFD_CLOEXEC);
  if (file < 0 || ::ftruncate(file, static_cast<off_t>(bytes)) != 0) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  machine().used += bytes;
  machine().piece_devices[file] = prop->location.id;
  *piece = static_cast<CUmemGenericAllocationHandle>(file);
  return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle piece) {
  const Call call("cuMemRelease");
  const int file = static_cast<int>(piece);
  machine().used -= static_cast<std::size_t>(::lseek(file, 0, SEEK_END));
  ::close(file);
  return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr at, std::size_t bytes, std::size_t,
                  CUmemGenericAllocationHandle piece, unsigned long long) {
  FAKE_CALL("cuMemMap");
  const int file = static_cast<int>(piece);
  std::byte* reached = machine().reach(at);
  constexpr int flags = MAP_SHARED | MAP_FIXED;
  if (::mmap(fake::pointer_to<void>(at), bytes, PROT_NONE, flags, file, 0) == MAP_FAILED ||
      ::mmap(reached, bytes, PROT_READ | PROT_WRITE, flags, file, 0) == MAP_FAILED) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  std::memset(reached, 0xa5, bytes);
  machine().pieces[at] = {bytes, machine().piece_devices[file]};
  return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr at, std::size_t bytes) {
  const Call call("cuMemUnmap");
  machine().forget(at, bytes, "device memory is unmapped");
  std::byte* reached = machine().reach(at);
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  for (void* mapped : {fake::pointer_to<void>(at), static_cast<void*>(reached)}) {
    if (::mmap(mapped, bytes, PROT_NONE, flags, -1, 0) == MAP_FAILED) {
      return CUDA_ERROR_INVALID_VALUE;
    }
  }
  machine().pieces.erase(at);
  return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr, std::size_t, const CUmemAccessDesc*, std::size_t) {
  FAKE_CALL("cuMemSetAccess");
  return CUDA_SUCCESS;
}

CUresult cuMemHostRegister_v2(void* start, std::size_t bytes, unsigned) {
  FAKE_UNSAFE_CALL("cuMemHostRegister");
  if (!machine().profile.pins) return CUDA_ERROR_NOT_PERMITTED;
  if (machine().pinned + bytes > machine().profile.pinnable_bytes) return CUDA_ERROR_OUT_OF_MEMORY;
  if (!fake::is_taken(start, bytes)) {
    machine().complain("memory is pinned whose pages the driver has to take from the system first");
  }
  machine().pinned += bytes;
  machine().registered[reinterpret_cast<std::uint64_t>(start)] = bytes;
  return CUDA_SUCCESS;
}

CUresult cuMemHostUnregister(void* start) {
  const Call call("cuMemHostUnregister");
  machine().refuse_in_capture("cuMemHostUnregister");
  const auto found = machine().registered.find(reinterpret_cast<std::uint64_t>(start));
  if (found == machine().registered.end()) {
    machine().complain("memory is unregistered that never was registered");
    return CUDA_ERROR_INVALID_VALUE;
  }
  machine().forget(found->first, found->second, "CPU memory is unregistered");
  machine().pinned -= found->second;
  machine().registered.erase(found);
  return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* stream, unsigned) {
  FAKE_CALL("cuStreamCreate");
  if (fake::Machine::device() < 0) return CUDA_ERROR_INVALID_CONTEXT;
  *stream = machine().add_stream(fake::Machine::device());
  return CUDA_SUCCESS;
}

CUresult cuStreamDestroy_v2(CUstream stream) {
  const Call call("cuStreamDestroy");
  machine().remove_stream(stream);
  return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream) {
  FAKE_UNSAFE_CALL("cuStreamSynchronize");
  fake::Stream& one = machine().stream(stream);
  if (one.last) machine().force(one.last);
  return CUDA_SUCCESS;
}

CUresult cuStreamGetCtx(CUstream stream, CUcontext* context) {
  FAKE_CALL("cuStreamGetCtx");
  const fake::Stream& one = machine().stream(stream);
  const int device = one.legacy ? fake::Machine::device() : one.device;
  *context = fake::pointer_to<CUctx_st>(static_cast<fake::Address>(device) + 1);
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  FAKE_CALL("cuStreamIsCapturing");
  *status = machine().stream(stream).captured ? CU_STREAM_CAPTURE_STATUS_ACTIVE
                                              : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned) {
  FAKE_CALL("cuStreamWaitEvent");
  machine().wait(machine().stream(stream), *reinterpret_cast<fake::Event*>(event));
  return CUDA_SUCCESS;
}

CUresult cuEventCreate(CUevent* event, unsigned flags) {
  FAKE_CALL("cuEventCreate");
  if (fake::Machine::device() < 0) return CUDA_ERROR_INVALID_CONTEXT;
  ++machine().events;
  const bool timed = (flags & CU_EVENT_DISABLE_TIMING) == 0;
  *event = reinterpret_cast<CUevent>(new fake::Event{timed, fake::Machine::device(), false, {}});
  return CUDA_SUCCESS;
}

CUresult cuEventDestroy_v2(CUevent event) {
  const Call call("cuEventDestroy");
  --machine().events;
  delete reinterpret_cast<fake::Event*>(event);
  return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
  FAKE_CALL("cuEventRecord");
  fake::Event& one = *reinterpret_cast<fake::Event*>(event);
  fake::Stream& on = machine().stream(stream);
  if (!on.legacy && on.device != one.device) return CUDA_ERROR_INVALID_HANDLE;
  machine().record(one, on);
  return CUDA_SUCCESS;
}

CUresult cuEventQuery(CUevent event) {
  FAKE_UNSAFE_CALL("cuEventQuery");
  fake::Event& one = *reinterpret_cast<fake::Event*>(event);
  if (one.captured) return CUDA_ERROR_CAPTURED_EVENT;
  return machine().query(one) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

CUresult cuEventSynchronize(CUevent event) {
  FAKE_UNSAFE_CALL("cuEventSynchronize");
  const fake::Event& one = *reinterpret_cast<fake::Event*>(event);
  if (one.captured) return CUDA_ERROR_CAPTURED_EVENT;
  if (one.recorded) machine().force(one.recorded);
  return CUDA_SUCCESS;
}

CUresult cuEventElapsedTime(float* elapsed_ms, CUevent from, CUevent to) {
  FAKE_CALL("cuEventElapsedTime");
  const fake::Event& first = *reinterpret_cast<fake::Event*>(from);
  const fake::Event& last = *reinterpret_cast<fake::Event*>(to);
  if (!first.timed || !last.timed || !first.recorded || !last.recorded) {
    machine().complain("the time between events is asked that have none");
    return CUDA_ERROR_INVALID_HANDLE;
  }
  if (!first.recorded->done || !last.recorded->done) return CUDA_ERROR_NOT_READY;
  *elapsed_ms =
      std::chrono::duration<float, std::milli>(last.recorded->at - first.recorded->at).count();
  return CUDA_SUCCESS;
}

CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data) {
  FAKE_CALL("cuLaunchHostFunc");
  fake::Operation operation;
  operation.body = [function, data] { function(data); };
  machine().enqueue(machine().stream(stream), std::move(operation), {});
  return CUDA_SUCCESS;
}

CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, std::size_t bytes, CUstream stream) {
  FAKE_CALL("cuMemcpyAsync");
  machine().copy(machine().stream(stream), {&to, 1}, {&from, 1}, {&bytes, 1});
  return CUDA_SUCCESS;
}

CUresult cuMemcpyBatchAsync(CUdeviceptr* to, CUdeviceptr* from, std::size_t* bytes,
                            std::size_t count, CUmemcpyAttributes* attributes,
                            std::size_t* attribute_firsts, std::size_t attribute_count,
                            std::size_t* failed, CUstream stream) {
  FAKE_CALL("cuMemcpyBatchAsync");
  *failed = SIZE_MAX;
  fake::Stream& on = machine().stream(stream);
  bool increasing = attribute_count > 0 && attribute_firsts[0] == 0;
  for (std::size_t i = 1; i < attribute_count; ++i) {
    increasing = increasing && attribute_firsts[i] > attribute_firsts[i - 1];
  }
  if (on.legacy || count == 0 || attributes == nullptr || !increasing) {
    machine().complain("a batch of copies that the driver refuses");
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (!fake::are_independent({to, count}, {from, count}, {bytes, count})) {
    machine().complain("copies of one batch depend on each other");
  }
  machine().copy(on, {to, count}, {from, count}, {bytes, count});
  return CUDA_SUCCESS;
}

// ---- for kernels that run outside ---------------------------------------------------------------

void fake_run(std::uintptr_t stream, const std::uint64_t* begins, const std::uint64_t* bytes,
              const std::uint8_t* writes, std::uint64_t count) {
  const std::scoped_lock lock(machine().mutex);
  std::vector<fake::Range> ranges;
  for (std::uint64_t i = 0; i < count; ++i) ranges.push_back({begins[i], bytes[i], writes[i] != 0});
  fake::Stream& on = machine().stream(fake::pointer_to<CUstream_st>(stream));
  machine().enqueue(on, {}, ranges);
  machine().force_unseen(on.last);
}

void fake_host_write(std::uint64_t begin, std::uint64_t bytes) {
  const std::scoped_lock lock(machine().mutex);
  machine().forget(begin, bytes, "CPU memory is written");
}

std::uintptr_t fake_reach(std::uint64_t address) {
  return reinterpret_cast<std::uintptr_t>(machine().reach(address));
}

void fake_set_order(std::uint32_t order, std::uint64_t seed) {
  fake::set_order(static_cast<fake::Order>(order), seed);
}

void fake_set_devices(std::int32_t count) {
  fake::Profile profile;
  profile.devices = count;
  fake::set_profile(profile);
}

void fake_counts(char* text, std::uint64_t bytes) {
  std::string all;
  for (const auto& [name, count] : fake::calls_by_name()) {
    all += name + "=" + std::to_string(count) + ";";
  }
  std::strncpy(text, all.c_str(), bytes - 1);
  text[bytes - 1] = '\0';
}

std::uint64_t fake_take_violations(char* text, std::uint64_t bytes) {
  const std::vector<std::string> all = fake::take_violations();
  if (!all.empty() && bytes > 0) {
    std::strncpy(text, all.front().c_str(), bytes - 1);
    text[bytes - 1] = '\0';
  }
  return all.size();
}
}
