// What a cache is made from.
#pragma once

#include <cstddef>
#include <string>

#include "pie/types.hpp"

namespace pie {

struct CacheOptions {
  std::string device = "cpu";       // or "cuda", "cuda:1": see CudaOptions
  Geometry geometry;                // block_tokens 0: chosen from device_bytes
  Bytes device_bytes = 0;           // bounds everything held on the device: frames, ring, staging
  Bytes pool_bytes = 0;             // 0: no pool
  std::string pool_dir;             // see HostOptions
  std::string policy = "adaptive";  // or "fit", "fixed:F" with F in [0, 1], "off"
  std::string objective = "transparent";  // of `headroom`; or "throughput": see Objective
  double slack = 0.05;                    // share that a step may take longer, where transparent
  double max_tpot_ms = 0;                 // that a decode step may take; 0: no bound
  std::string pool_io = "auto";           // see HostOptions, CudaOptions
  std::byte* device_memory = nullptr;     // see HostOptions, CudaOptions
  std::string driver = "libcuda.so.1";    // see CudaOptions
  double in_place_share = -1;             // see CudaOptions
};

}  // namespace pie
