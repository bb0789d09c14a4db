// A double of the NVIDIA driver: the calls that the CUDA backend makes, without a GPU.
//
// What is given to streams is done one piece after the other, in one of the orders that the streams
// and events allow, which a seed chooses; batches of copies are in no order among themselves, a
// copy reads and writes at different times, and what it is about to write is garbage until then.
// Whether two uses of the same bytes are ordered is asked when the later one is enqueued (by vector
// clocks over byte ranges), so a race is found whether or not it did harm this time.
//
// Device memory is mapped twice. The address that the driver gives out has no access rights: what
// touches it from the host ends there. Only the double uses the other.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace fake {

// The machine that there seems to be: an H100 behind PCIe, if it is not told otherwise.
struct Profile {
  std::string name = "NVIDIA H100 PCIe";
  int driver_version = 13000;
  int devices = 1;
  std::size_t memory_bytes = std::size_t{256} << 20;
  std::size_t pinnable_bytes = std::size_t{1} << 40;
  bool pins = true;  // whether registering memory is allowed at all
  bool integrated = false;
  bool coherent = false;        // shares the CPU's page tables
  bool coherent_waits = false;  // and yet copies of memory that is not pinned hold up the caller
  int memory_clock_khz = 1'593'000;
  int memory_bus_bits = 5120;
};
[[nodiscard]] inline Profile gh200() {
  return {.name = "NVIDIA GH200 480GB",
          .coherent = true,
          .memory_clock_khz = 2'619'000,
          .memory_bus_bits = 6144};
}
[[nodiscard]] inline Profile gb10() {
  return {.name = "NVIDIA GB10",
          .integrated = true,
          .coherent = true,
          .memory_clock_khz = 4'266'000,
          .memory_bus_bits = 256};
}

// When what may be done is done.
enum class Order : std::uint8_t {
  earliest,  // as soon as it can be
  latest,    // when somebody waits for it, and then no more than that
  random,    // a bit of it at any call
};

// What the machine is from now on, and how it goes on with what it was given.
void set_profile(const Profile& profile);
void set_order(Order order, std::uint64_t seed);

// The call of this number from now on, counted from 1, fails.
void fail_call(std::uint64_t number, CUresult result);
[[nodiscard]] std::uint64_t calls();
[[nodiscard]] std::map<std::string, std::uint64_t> calls_by_name();

// What was found wrong since this was asked last, in words.
[[nodiscard]] std::vector<std::string> take_violations();

// What there is now: nothing, once all is closed.
struct Holdings {
  std::size_t streams = 0;
  std::size_t events = 0;
  std::size_t reservations = 0;
  std::size_t device_bytes = 0;
  std::size_t pinned_bytes = 0;
  friend bool operator==(const Holdings&, const Holdings&) = default;
};
[[nodiscard]] Holdings holdings();

// Bytes that a kernel uses, by their addresses on the device or in registered memory.
struct Range {
  CUdeviceptr begin = 0;
  std::size_t bytes = 0;
  bool write = false;
};

// A kernel: `body` runs when its turn comes.
void launch(CUstream stream, std::span<const Range> ranges, std::function<void()> body);

// What the stream is given until the end of captures goes into a graph instead of being done, in
// the mode that forbids most; how many operations did.
void begin_capture(CUstream stream);
std::uint64_t end_capture();

// Where the double itself reaches an address of the device.
[[nodiscard]] std::byte* reach(CUdeviceptr address);

}  // namespace fake

extern "C" {
// For kernels that run outside, at once: does all that comes before them on the stream, and notes
// what they use. `writes[i]` says whether range i is written.
void fake_run(std::uintptr_t stream, const std::uint64_t* begins, const std::uint64_t* bytes,
              const std::uint8_t* writes, std::uint64_t count);
// The host has written there: nothing on a stream may still be reading it.
void fake_host_write(std::uint64_t begin, std::uint64_t bytes);
std::uintptr_t fake_reach(std::uint64_t address);
// How often each call was made, as "name=count;".
void fake_counts(char* text, std::uint64_t bytes);
void fake_set_order(std::uint32_t order, std::uint64_t seed);
void fake_set_devices(std::int32_t count);
// How many violations there were since this was asked last; the first of them in `text`.
std::uint64_t fake_take_violations(char* text, std::uint64_t bytes);
}
