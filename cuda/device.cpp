// Contexts, attributes, mapped memory.
#include "device.hpp"

#include <algorithm>
#include <array>

#include "pie/error.hpp"

namespace pie::cuda {

namespace {

constexpr Bytes memory_alignment = 256;
constexpr Bytes mapped_at_once = Bytes{16} << 20;

CUmemAllocationProp pinned_on(int device) {
  CUmemAllocationProp prop{};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
  return prop;
}

CUdeviceptr number_of(const std::byte* address) { return reinterpret_cast<CUdeviceptr>(address); }

}  // namespace

// ---- the device ---------------------------------------------------------------------------------

Device::Device(const Driver& driver, int number) : driver_(driver), number_(number) {
  int count = 0;
  driver_.require(driver_.device_count(&count), "counting the GPUs");
  if (number < 0 || number >= count) {
    throw ConfigError("device is 'cuda:" + std::to_string(number) + "': there are " +
                      std::to_string(count) + " GPUs here, numbered from 0.");
  }
  driver_.require(driver_.device_get(&handle_, number), "finding the GPU");
  std::array<char, 256> name{};
  driver_.device_name(name.data(), static_cast<int>(name.size()) - 1, handle_);
  name_ = name.data();
  if (attribute(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED) == 0) {
    throw ConfigError("device is 'cuda:" + std::to_string(number) + "': " + name_ +
                      " cannot map memory in pieces, which Pie needs.");
  }
  driver_.require(driver_.context_retain(&context_, handle_), "opening the GPU");
}

Device::~Device() { driver_.context_release(handle_); }

int Device::attribute(CUdevice_attribute which) const {
  int value = 0;
  return driver_.device_attribute(&value, which, handle_) == CUDA_SUCCESS ? value : 0;
}

Device::Room Device::room() const {
  const Current current(driver_, context_);
  std::size_t free = 0;
  std::size_t total = 0;
  driver_.require(driver_.memory_info(&free, &total), "asking for free memory");
  return {free, total};
}

bool Device::owns(const std::byte* address) const {
  const Current current(driver_, context_);
  unsigned kind = 0;
  int device = -1;
  const CUdeviceptr at = number_of(address);
  return driver_.pointer_attribute(&kind, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, at) == CUDA_SUCCESS &&
         driver_.pointer_attribute(&device, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, at) ==
             CUDA_SUCCESS &&
         kind == CU_MEMORYTYPE_DEVICE && device == number_;
}

// ---- its memory ---------------------------------------------------------------------------------

DeviceMemory::DeviceMemory(const Device& device, Bytes most) : device_(device) {
  const Driver& driver = device_.driver();
  const CUmemAllocationProp prop = pinned_on(device_.number());
  std::size_t granule = 0;
  driver.require(driver.granularity(&granule, &prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
                 "asking how memory is mapped");
  granule_ = granule;
  piece_ = (mapped_at_once + granule_ - 1) / granule_ * granule_;
  reserved_ = (most + piece_ - 1) / piece_ * piece_;
  CUdeviceptr start = 0;
  driver.require(driver.address_reserve(&start, reserved_, 0, 0, 0), "reserving addresses");
  start_ = reinterpret_cast<std::byte*>(start);  // NOLINT(performance-no-int-to-ptr)
}

DeviceMemory::DeviceMemory(const Device& device, std::byte* given, Bytes bytes)
    : device_(device), start_(given), given_(bytes) {
  if (number_of(given) % memory_alignment != 0) {
    throw ConfigError("device_memory is not aligned to " + std::to_string(memory_alignment) +
                      " bytes, as frames are.");
  }
  if (bytes > 0 && !(device_.owns(given) && device_.owns(given + bytes - 1))) {
    throw ConfigError("device_memory is not " + std::to_string(bytes) +
                      " bytes of 'cuda:" + std::to_string(device_.number()) +
                      "': give memory of that GPU, device_bytes of it, or leave it out.");
  }
}

DeviceMemory::~DeviceMemory() {
  const Current current(device_.driver(), device_.context());
  const Relaxed relaxed(device_.driver());
  device_.driver().context_synchronize();  // kernels of the caller's may be reading it still
  if (is_given()) return;
  while (!pieces_.empty()) shrink();
  device_.driver().address_free(number_of(start_), reserved_);
}

Bytes DeviceMemory::resize(Bytes bytes) {
  if (is_given()) return std::min(bytes, given_);
  const Bytes wanted = (std::min(bytes, reserved_) + piece_ - 1) / piece_;
  while (pieces_.size() > wanted) shrink();
  while (pieces_.size() < wanted && grow()) {
  }
  return pieces_.size() * piece_;
}

bool DeviceMemory::grow() {
  const Driver& driver = device_.driver();
  const CUmemAllocationProp prop = pinned_on(device_.number());
  const CUdeviceptr at = number_of(start_) + pieces_.size() * piece_;
  CUmemAccessDesc access{};
  access.location = prop.location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  pieces_.reserve(pieces_.size() + 1);
  CUmemGenericAllocationHandle piece = 0;
  if (driver.memory_create(&piece, piece_, &prop, 0) != CUDA_SUCCESS) return false;
  if (driver.memory_map(at, piece_, 0, piece, 0) == CUDA_SUCCESS) {
    if (driver.memory_access(at, piece_, &access, 1) == CUDA_SUCCESS) {
      pieces_.push_back(piece);
      return true;
    }
    driver.memory_unmap(at, piece_);
  }
  driver.memory_release(piece);
  return false;
}

void DeviceMemory::shrink() {
  const Driver& driver = device_.driver();
  driver.memory_unmap(number_of(start_) + (pieces_.size() - 1) * piece_, piece_);
  driver.memory_release(pieces_.back());
  pieces_.pop_back();
}

}  // namespace pie::cuda
