// A CUDA backend for tests: over the double of the driver, or over the driver that PIE_TEST_DRIVER
// names, such as libcuda.so.1 on a machine with a GPU.
#pragma once

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "conformance.hpp"
#include "driver.hpp"
#include "pie/backends.hpp"

namespace pie::testing {

using conformance::Contents;
using conformance::Read;
using conformance::Subject;

[[nodiscard]] inline std::string driver_name() {
  const char* named = std::getenv("PIE_TEST_DRIVER");
  return named == nullptr ? PIE_FAKE_DRIVER : named;
}
[[nodiscard]] inline bool is_double() { return driver_name() == PIE_FAKE_DRIVER; }

// The driver as the test uses it: streams of the caller's, and memory that copies of his use.
class Caller {
 public:
  static Caller& get() {
    static Caller one;
    return one;
  }
  Caller(const Caller&) = delete;
  Caller& operator=(const Caller&) = delete;

  [[nodiscard]] const cuda::Driver& driver() const { return driver_; }
  [[nodiscard]] CUcontext context() const { return context_; }

  // Forgets streams and memory of a machine that is no more.
  void forget() {
    streams_.clear();
    slab_ = nullptr;
  }

  CUstream stream(std::uint32_t number) {
    CUstream& found = streams_[number];
    const cuda::Current current(driver_, context_);
    if (found == nullptr)
      driver_.require(driver_.stream_create(&found, CU_STREAM_NON_BLOCKING), "");
    return found;
  }

  // A stream of another GPU, which the double's machine may well have.
  ComputeStream stream_elsewhere() {
    CUcontext context = nullptr;
    driver_.require(driver_.context_retain(&context, 1), "");
    const cuda::Current current(driver_, context);
    CUstream& found = streams_[elsewhere];
    if (found == nullptr)
      driver_.require(driver_.stream_create(&found, CU_STREAM_NON_BLOCKING), "");
    return {reinterpret_cast<std::uintptr_t>(found)};
  }

  // Registered memory, taken in turn.
  std::byte* take(Bytes bytes) {
    if (slab_ == nullptr) {
      const cuda::Current current(driver_, context_);
      void* mapped = ::mmap(nullptr, slab_bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
      slab_ = static_cast<std::byte*>(mapped);
      driver_.require(driver_.host_register(slab_, slab_bytes, 0), "");
    }
    if (used_ + bytes > slab_bytes) used_ = 0;
    std::byte* taken = slab_ + used_;
    used_ += bytes;
    return taken;
  }

  void copy(const std::byte* to, const std::byte* from, Bytes bytes, CUstream stream) {
    const cuda::Current current(driver_, context_);
    driver_.require(driver_.copy(reinterpret_cast<CUdeviceptr>(to),
                                 reinterpret_cast<CUdeviceptr>(from), bytes, stream),
                    "");
  }

  // Something that takes a while.
  void dawdle(CUstream stream) {
    const cuda::Current current(driver_, context_);
    host_function_(stream, [](void*) { std::this_thread::sleep_for(nap); }, nullptr);
  }

  void synchronize(CUstream stream) {
    const cuda::Current current(driver_, context_);
    driver_.require(driver_.stream_synchronize(stream), "");
  }

 private:
  Caller() : driver_(driver_name()) {
    CUdevice device = 0;
    driver_.require(driver_.device_get(&device, 0), "");
    driver_.require(driver_.context_retain(&context_, device), "");
    void* library = ::dlopen(driver_name().c_str(), RTLD_NOW);
    *reinterpret_cast<void**>(&host_function_) = ::dlsym(library, "cuLaunchHostFunc");
  }

  static constexpr std::uint32_t elsewhere = UINT32_MAX;
  static constexpr Bytes slab_bytes = Bytes{8} << 20;
  static constexpr std::chrono::milliseconds nap{1};

  cuda::Driver driver_;
  CUcontext context_ = nullptr;
  CUresult (*host_function_)(CUstream, CUhostFn, void*) = nullptr;
  std::map<std::uint32_t, CUstream> streams_;
  std::byte* slab_ = nullptr;
  Bytes used_ = 0;
};

inline CUstream handle_of(ComputeStream stream) {
  return reinterpret_cast<CUstream>(stream.handle);  // NOLINT(performance-no-int-to-ptr)
}

// Hooks of the conformance suite.
struct OnCuda {
  static ComputeStream stream(std::uint32_t number) {
    return {reinterpret_cast<std::uintptr_t>(Caller::get().stream(number))};
  }
  static void write(Backend& backend, ComputeStream stream, FrameIndex frame,
                    const Contents& bytes) {
    std::byte* held = Caller::get().take(bytes.size());
    std::memcpy(held, bytes.data(), bytes.size());
    if (!is_double()) Caller::get().dawdle(handle_of(stream));
    Caller::get().copy(backend.address(frame), held, bytes.size(), handle_of(stream));
  }

  // What it found is where the copy put it, once the stream has been synchronized.
  static Read read(Backend& backend, ComputeStream stream, FrameIndex frame) {
    const Bytes bytes = backend.capabilities().frame_stride;
    std::byte* held = Caller::get().take(bytes);
    if (!is_double()) Caller::get().dawdle(handle_of(stream));
    Caller::get().copy(held, backend.address(frame), bytes, handle_of(stream));
    return [held, bytes] { return Contents(held, held + bytes); };
  }
  static void synchronize(Backend& /*backend*/, ComputeStream stream) {
    Caller::get().synchronize(handle_of(stream));
  }
  static Subject subject(std::string name = "", Subject::Open open = {}) {
    return {std::move(name), std::move(open), stream, write, read, synchronize};
  }
};

}  // namespace pie::testing
