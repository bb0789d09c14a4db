// From the options of a cache to its geometry and its backend; what cannot work is refused here.
#pragma once

#include <cstdint>
#include <memory>

#include "pie/backend.hpp"
#include "pie/options.hpp"
#include "pie/types.hpp"

namespace pie {

// Throws ConfigError for a geometry that no cache can have.
void check_geometry(const Geometry& geometry);

// Device frames that one sequence needs to gain a token: its partial blocks and a ring.
[[nodiscard]] std::uint64_t least_frames(const Geometry& geometry);

// The geometry asked for, its block_tokens chosen where that was left open. Throws ConfigError.
[[nodiscard]] Geometry resolve(const CacheOptions& options);

// The backend of the device. Throws ConfigError where the budgets cannot hold one step of one
// sequence.
[[nodiscard]] std::unique_ptr<Backend> open_backend(const CacheOptions& options,
                                                    const Geometry& geometry);

}  // namespace pie
