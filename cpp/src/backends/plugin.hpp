// What libpie and the plugin libpie_cuda agree on: one function.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "pie/backends.hpp"

namespace pie {

// Counts up with every change of what crosses: Backend, its structures, CudaOptions.
inline constexpr std::uint32_t plugin_abi = 6;

// Frames begin on multiples of 256 bytes, for wide loads.
[[nodiscard]] constexpr Bytes plugin_stride(Bytes frame_bytes) {
  return (frame_bytes + 255) / 256 * 256;
}

// How opening ended: what libpie throws, with the words in the buffer.
enum class PluginResult : std::uint8_t { ok, wrong_abi, config, capacity, failure };

// `pie_cuda_open`, the plugin's one name. On success `*backend` is the caller's.
using PluginOpen = PluginResult (*)(std::uint32_t abi, const CudaOptions* options,
                                    Backend** backend, char* error, std::size_t error_bytes);

}  // namespace pie
