// How to open a backend.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "pie/backend.hpp"

namespace pie {

// The CPU computes: device tier is an arena in RAM, pool tier an unlinked file on disk.
struct HostOptions {
  Bytes frame_bytes = 0;  // payload of one frame; the stride is rounded up to what direct I/O needs
  Bytes device_bytes = 0;  // size of the arena; it holds device_bytes / stride frames
  Bytes pool_bytes = 0;    // the most the file may ever take; 0: no pool, no file, no threads
  std::string pool_dir;  // where the file is made; empty: default_pool_dir(). On tmpfs only if the
                         // name is prefixed by "tmpfs:", since that is memory, not disk
  // Forces a fallback; "auto" takes the best that works: "direct-uring", "direct-threads",
  // "buffered-threads". What was taken is in Capabilities::pool_io.
  std::string pool_io = "auto";
};

// Throws ConfigError for a directory that is missing, unwritable or on tmpfs, CapacityError where
// the arena cannot be mapped.
[[nodiscard]] std::unique_ptr<Backend> open_host(const HostOptions& options);

// The first of $TMPDIR, /var/tmp, /tmp that is a writable directory on a disk; throws ConfigError.
[[nodiscard]] std::string default_pool_dir();

// Free bytes in the file system of `dir` that this user may take.
[[nodiscard]] Bytes free_disk_bytes(const std::string& dir);

// Bytes of stride that `open_host` would give frames under these options.
[[nodiscard]] Bytes host_frame_stride(const HostOptions& options);

}  // namespace pie
