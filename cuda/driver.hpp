// The NVIDIA driver, found when it is needed: one table of the calls that the backend makes.
//
// Pie calls the driver and no runtime library of a toolkit: so what was built once serves every
// driver from 12.0 on, and a test puts a double of libcuda in the driver's place.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include <string>

namespace pie::cuda {

// The oldest driver that serves, as cuDriverGetVersion says it.
inline constexpr int oldest_driver = 12000;

// What cuMemcpyBatchAsync takes since driver 12.8, and still does.
inline constexpr int batches_since = 12080;
#if CUDA_VERSION >= 12080
using CopyBatch = PFN_cuMemcpyBatchAsync_v12080;
inline constexpr bool knows_batches = true;
#else
using CopyBatch = void*;
inline constexpr bool knows_batches = false;
#endif

// member, type, name in libcuda
#define PIE_DRIVER_CALLS(CALL)                                                                 \
  CALL(init, PFN_cuInit_v2000, "cuInit")                                                       \
  CALL(driver_version, PFN_cuDriverGetVersion_v2020, "cuDriverGetVersion")                     \
  CALL(error_text, PFN_cuGetErrorString_v6000, "cuGetErrorString")                             \
  CALL(device_count, PFN_cuDeviceGetCount_v2000, "cuDeviceGetCount")                           \
  CALL(device_get, PFN_cuDeviceGet_v2000, "cuDeviceGet")                                       \
  CALL(device_name, PFN_cuDeviceGetName_v2000, "cuDeviceGetName")                              \
  CALL(device_attribute, PFN_cuDeviceGetAttribute_v2000, "cuDeviceGetAttribute")               \
  CALL(context_retain, PFN_cuDevicePrimaryCtxRetain_v7000, "cuDevicePrimaryCtxRetain")         \
  CALL(context_release, PFN_cuDevicePrimaryCtxRelease_v11000, "cuDevicePrimaryCtxRelease_v2")  \
  CALL(context_current, PFN_cuCtxGetCurrent_v4000, "cuCtxGetCurrent")                          \
  CALL(context_push, PFN_cuCtxPushCurrent_v4000, "cuCtxPushCurrent_v2")                        \
  CALL(context_pop, PFN_cuCtxPopCurrent_v4000, "cuCtxPopCurrent_v2")                           \
  CALL(context_synchronize, PFN_cuCtxSynchronize_v2000, "cuCtxSynchronize")                    \
  CALL(capture_mode, PFN_cuThreadExchangeStreamCaptureMode_v10010,                             \
       "cuThreadExchangeStreamCaptureMode")                                                    \
  CALL(memory_info, PFN_cuMemGetInfo_v3020, "cuMemGetInfo_v2")                                 \
  CALL(pointer_attribute, PFN_cuPointerGetAttribute_v4000, "cuPointerGetAttribute")            \
  CALL(granularity, PFN_cuMemGetAllocationGranularity_v10020, "cuMemGetAllocationGranularity") \
  CALL(address_reserve, PFN_cuMemAddressReserve_v10020, "cuMemAddressReserve")                 \
  CALL(address_free, PFN_cuMemAddressFree_v10020, "cuMemAddressFree")                          \
  CALL(memory_create, PFN_cuMemCreate_v10020, "cuMemCreate")                                   \
  CALL(memory_release, PFN_cuMemRelease_v10020, "cuMemRelease")                                \
  CALL(memory_map, PFN_cuMemMap_v10020, "cuMemMap")                                            \
  CALL(memory_unmap, PFN_cuMemUnmap_v10020, "cuMemUnmap")                                      \
  CALL(memory_access, PFN_cuMemSetAccess_v10020, "cuMemSetAccess")                             \
  CALL(host_register, PFN_cuMemHostRegister_v6050, "cuMemHostRegister_v2")                     \
  CALL(host_unregister, PFN_cuMemHostUnregister_v4000, "cuMemHostUnregister")                  \
  CALL(stream_create, PFN_cuStreamCreate_v2000, "cuStreamCreate")                              \
  CALL(stream_destroy, PFN_cuStreamDestroy_v4000, "cuStreamDestroy_v2")                        \
  CALL(stream_synchronize, PFN_cuStreamSynchronize_v2000, "cuStreamSynchronize")               \
  CALL(stream_context, PFN_cuStreamGetCtx_v9020, "cuStreamGetCtx")                             \
  CALL(stream_capturing, PFN_cuStreamIsCapturing_v10000, "cuStreamIsCapturing")                \
  CALL(stream_wait, PFN_cuStreamWaitEvent_v3020, "cuStreamWaitEvent")                          \
  CALL(event_create, PFN_cuEventCreate_v2000, "cuEventCreate")                                 \
  CALL(event_destroy, PFN_cuEventDestroy_v4000, "cuEventDestroy_v2")                           \
  CALL(event_record, PFN_cuEventRecord_v2000, "cuEventRecord")                                 \
  CALL(event_query, PFN_cuEventQuery_v2000, "cuEventQuery")                                    \
  CALL(event_synchronize, PFN_cuEventSynchronize_v2000, "cuEventSynchronize")                  \
  CALL(event_elapsed, PFN_cuEventElapsedTime_v2000, "cuEventElapsedTime")                      \
  CALL(copy, PFN_cuMemcpyAsync_v4000, "cuMemcpyAsync")

struct Driver {
#define PIE_DRIVER_MEMBER(member, type, name) type member = nullptr;
  PIE_DRIVER_CALLS(PIE_DRIVER_MEMBER)
#undef PIE_DRIVER_MEMBER
  CopyBatch copy_batch = nullptr;  // null: a driver before 12.8
  int version = 0;

  // Throws ConfigError, in one sentence, where there is no driver, or one that is too old.
  explicit Driver(const std::string& library);

  // "out of memory (2)".
  [[nodiscard]] std::string text(CUresult result) const;

  // Throws ConfigError that says what was tried, unless it went well.
  void require(CUresult result, const char* what) const;
};

// Makes a device's context the thread's own for as long as this lives, where it is not.
class Current {
 public:
  Current(const Driver& driver, CUcontext context) : driver_(driver) {
    CUcontext now = nullptr;
    if (driver_.context_current(&now) == CUDA_SUCCESS && now == context) return;
    driver_.context_push(context);
    pushed_ = true;
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  ~Current() {
    CUcontext left = nullptr;
    if (pushed_) driver_.context_pop(&left);
  }

 private:
  const Driver& driver_;
  bool pushed_ = false;
};

// For what asks or waits for the device, or takes memory: as long as this lives none of it ends
// what somebody is capturing into a graph on a stream of his own.
class Relaxed {
 public:
  explicit Relaxed(const Driver& driver) : driver_(driver) { driver_.capture_mode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;
  ~Relaxed() { driver_.capture_mode(&mode_); }

 private:
  const Driver& driver_;
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;  // the caller's, once exchanged
};

}  // namespace pie::cuda
