// Finding the driver, and what its errors are called.
#include "driver.hpp"

#include <dlfcn.h>

#include "pie/error.hpp"

namespace pie::cuda {

namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

// The library stays loaded for good, as the driver wants it.
Driver::Driver(const std::string& library) {
  void* handle = ::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    throw ConfigError("device is 'cuda': there is no NVIDIA driver here (" + library +
                      " was not found); install one for CUDA " + version_text(oldest_driver) +
                      " or newer, or use device='cpu'.");
  }
  const auto find = [&](auto& member, const char* name) {
    *reinterpret_cast<void**>(&member) = ::dlsym(handle, name);
    return member != nullptr;
  };
  if (find(driver_version, "cuDriverGetVersion")) driver_version(&version);
  const char* missing = nullptr;
#define PIE_DRIVER_FIND(member, type, name) \
  if (!find(member, name)) missing = name;
  PIE_DRIVER_CALLS(PIE_DRIVER_FIND)
#undef PIE_DRIVER_FIND
  if (missing != nullptr || version < oldest_driver) {
    throw ConfigError(
        "device is 'cuda': the NVIDIA driver here is for CUDA " + version_text(version) +
        (missing ? std::string(" (no ") + missing + ")" : "") + ", and Pie needs one for " +
        version_text(oldest_driver) + " or newer: update it, or use device='cpu'.");
  }
  if (knows_batches && version >= batches_since) find(copy_batch, "cuMemcpyBatchAsync");
  require(init(0), "starting the driver");
}

std::string Driver::text(CUresult result) const {
  const char* words = nullptr;
  if (error_text == nullptr || error_text(result, &words) != CUDA_SUCCESS || words == nullptr) {
    words = "unknown error";
  }
  return std::string(words) + " (" + std::to_string(static_cast<int>(result)) + ")";
}

void Driver::require(CUresult result, const char* what) const {
  if (result == CUDA_SUCCESS) return;
  throw ConfigError(std::string("device is 'cuda': ") + what + " failed: " + text(result) + ".");
}

}  // namespace pie::cuda
