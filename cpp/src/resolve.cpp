// Geometry, block size and budgets, checked before anything is made.
#include "resolve.hpp"

#include <optional>
#include <string>

#include "pie/backends.hpp"
#include "pie/error.hpp"

namespace pie {

void check_geometry(const Geometry& geometry) {
  const auto positive = [](std::uint32_t value, const char* name) {
    if (value == 0) throw ConfigError(std::string(name) + " is 0: it must be at least 1.");
  };
  positive(geometry.layers, "num_layers");
  positive(geometry.kv_heads, "num_kv_heads");
  if (geometry.head_dim == 0 || geometry.head_dim % 8 != 0 || geometry.head_dim > 256) {
    throw ConfigError("head_dim is " + std::to_string(geometry.head_dim) +
                      ": it must be a multiple of 8 from 8 to 256.");
  }
  if (geometry.block_tokens == 0 || geometry.block_tokens % granule_tokens != 0) {
    throw ConfigError("block_tokens is " + std::to_string(geometry.block_tokens) +
                      ": it must be a positive multiple of " + std::to_string(granule_tokens) +
                      ".");
  }
  if (!geometry.windows.empty() && geometry.windows.size() != geometry.layers) {
    throw ConfigError("windows has " + std::to_string(geometry.windows.size()) +
                      " entries: give one for each of the " + std::to_string(geometry.layers) +
                      " layers, or none.");
  }
}

std::uint64_t least_frames(const Geometry& geometry) { return std::uint64_t{geometry.layers} + 1; }

namespace {

HostOptions host_options(const CacheOptions& options, const Geometry& geometry) {
  HostOptions host;
  host.frame_bytes = geometry.frame_bytes();
  host.device_bytes = options.device_bytes;
  host.pool_bytes = options.pool_bytes;
  host.pool_dir = options.pool_dir;
  host.pool_io = options.pool_io;
  host.device_memory = options.device_memory;
  return host;
}

// The GPU's number; none where the CPU computes. Throws ConfigError for another word.
std::optional<int> gpu_of(const std::string& device) {
  if (device == "cpu") return std::nullopt;
  if (device == "cuda") return 0;
  const std::string prefix = "cuda:";
  const std::string digits = device.starts_with(prefix) ? device.substr(prefix.size()) : "";
  const bool is_number = !digits.empty() && digits.size() < 4 &&
                         digits.find_first_not_of("0123456789") == std::string::npos;
  if (!is_number) {
    throw ConfigError("device is '" + device + "': use 'cpu', 'cuda' or 'cuda:N'.");
  }
  return std::stoi(digits);
}

Bytes stride_of(const CacheOptions& options, const Geometry& geometry) {
  return gpu_of(options.device) ? cuda_frame_stride(geometry.frame_bytes())
                                : host_frame_stride(host_options(options, geometry));
}

// Large blocks make large copies and small tables, but every sequence holds one partial block a
// layer: take the largest that leaves room for the partial blocks of some 16 sequences.
std::uint32_t choose_block_tokens(const CacheOptions& options) {
  constexpr std::uint64_t sequences = 16;
  Geometry geometry = options.geometry;
  for (const std::uint32_t tokens : {64U, 32U}) {
    geometry.block_tokens = tokens;
    if (3 * sequences * least_frames(geometry) * stride_of(options, geometry) <=
        options.device_bytes) {
      return tokens;
    }
  }
  return granule_tokens;
}

}  // namespace

Geometry resolve(const CacheOptions& options) {
  Geometry geometry = options.geometry;
  if (geometry.block_tokens == 0) {
    geometry.block_tokens = granule_tokens;
    check_geometry(geometry);
    geometry.block_tokens = choose_block_tokens(options);
  }
  check_geometry(geometry);
  return geometry;
}

std::unique_ptr<Backend> open_backend(const CacheOptions& options, const Geometry& geometry) {
  const Bytes stride = stride_of(options, geometry);
  const Bytes least = least_frames(geometry) * stride;
  if (options.device_bytes < least) {
    throw ConfigError(
        "device_bytes is " + std::to_string(options.device_bytes) +
        ", which cannot hold one step of one sequence: the partial block of each of " +
        std::to_string(geometry.layers) + " layers and a ring take " + std::to_string(least) +
        " bytes with blocks of " + std::to_string(geometry.block_tokens) +
        " tokens. Give at least that.");
  }
  if (options.pool_bytes > 0 && options.pool_bytes < stride) {
    throw ConfigError("pool_bytes is " + std::to_string(options.pool_bytes) +
                      ", less than one block of one layer (" + std::to_string(stride) +
                      " bytes). Give more, or 0 for no pool.");
  }
  const std::optional<int> gpu = gpu_of(options.device);
  if (options.in_place_share > 1 || (!gpu && options.in_place_share > 0)) {
    throw ConfigError("in_place_share is " + std::to_string(options.in_place_share) +
                      ": it is a share of the KV, from 0 to 1, that a GPU reads in CPU memory" +
                      (gpu ? "." : "; with device '" + options.device + "' leave it out."));
  }
  if (!gpu) return open_host(host_options(options, geometry));
  if (!options.pool_dir.empty()) {
    throw ConfigError("pool_dir is '" + options.pool_dir +
                      "': behind a GPU the pool is CPU memory; leave pool_dir out.");
  }
  CudaOptions cuda;
  cuda.device = *gpu;
  cuda.frame_bytes = geometry.frame_bytes();
  cuda.device_bytes = options.device_bytes;
  cuda.pool_bytes = options.pool_bytes;
  cuda.pool_io = options.pool_io;
  cuda.driver = options.driver;
  cuda.in_place_share = options.in_place_share;
  cuda.device_memory = options.device_memory;
  return open_cuda(cuda);
}

}  // namespace pie
