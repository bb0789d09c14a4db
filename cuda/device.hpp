// One GPU: its context, what it says of itself, and the memory that frames lie in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "driver.hpp"
#include "pie/types.hpp"

namespace pie::cuda {

// The primary context of a device, which torch uses too, for as long as this lives.
class Device {
 public:
  // Throws ConfigError where there is no such device, or it shares its memory with the CPU.
  Device(const Driver& driver, int number);
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device();

  [[nodiscard]] const Driver& driver() const { return driver_; }
  [[nodiscard]] CUcontext context() const { return context_; }
  [[nodiscard]] const std::string& name() const { return name_; }
  [[nodiscard]] int number() const { return number_; }
  [[nodiscard]] int attribute(CUdevice_attribute which) const;

  // Bytes of its memory.
  struct Room {
    Bytes free = 0;
    Bytes total = 0;
  };
  [[nodiscard]] Room room() const;

  // Whether memory of this device is there.
  [[nodiscard]] bool owns(const std::byte* address) const;

 private:
  Driver driver_;
  int number_;
  CUdevice handle_ = 0;
  CUcontext context_ = nullptr;
  std::string name_;
};

// A range of addresses on the device, mapped from its start as far as it is needed: what is cut off
// goes back to the device. Or memory of the caller's, all of which is there.
class DeviceMemory {
 public:
  // Reserves `most` bytes of addresses and maps none. The device outlives this.
  DeviceMemory(const Device& device, Bytes most);
  // Takes what the caller has. Throws ConfigError where it is not this device's.
  DeviceMemory(const Device& device, std::byte* given, Bytes bytes);
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory();

  [[nodiscard]] std::byte* start() const { return start_; }
  [[nodiscard]] bool is_given() const { return reserved_ == 0; }

  // Maps at least `bytes`, and of what lies behind them nothing but the rest of a piece. Returns
  // how many are mapped, which may be fewer where the device has no more. What is unmapped must not
  // be in use any more.
  Bytes resize(Bytes bytes);

 private:
  [[nodiscard]] bool grow();
  void shrink();

  const Device& device_;
  Bytes granule_ = 0;  // of mapping
  Bytes piece_ = 0;    // mapped at a time, a multiple of it
  Bytes reserved_ = 0;
  std::byte* start_ = nullptr;
  Bytes given_ = 0;  // of the caller's, from there on
  std::vector<CUmemGenericAllocationHandle> pieces_;
};

}  // namespace pie::cuda
