// How to open a backend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
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
  // The arena, `device_bytes` of it, where the caller brings its own: aligned to 4096 bytes, and
  // alive for as long as the backend. It cannot grow, and nothing of it goes back to the system.
  // Null: memory is mapped.
  std::byte* device_memory = nullptr;
};

// Throws ConfigError for a directory that is missing, unwritable or on tmpfs, CapacityError where
// the arena cannot be mapped.
[[nodiscard]] std::unique_ptr<Backend> open_host(const HostOptions& options);

// How the host backend reaches a pool, and why not by a faster way (empty where there is none).
struct PoolWay {
  std::string io;
  std::string reason;
};

// Makes a pool's file in `dir` and gives it up again. Throws ConfigError where it cannot.
[[nodiscard]] PoolWay try_pool(const std::string& dir);

// The first of $TMPDIR, /var/tmp, /tmp that is a writable directory on a disk; throws ConfigError.
[[nodiscard]] std::string default_pool_dir();

// Free bytes in the file system of `dir` that this user may take.
[[nodiscard]] Bytes free_disk_bytes(const std::string& dir);

// Bytes of stride that `open_host` would give frames under these options.
[[nodiscard]] Bytes host_frame_stride(const HostOptions& options);

// A GPU computes: device tier is its memory, pool tier the CPU's, compute is on the caller's
// stream.
struct CudaOptions {
  int device = 0;          // the GPU's number
  Bytes frame_bytes = 0;   // payload of one frame; the stride is rounded up to 256 bytes
  Bytes device_bytes = 0;  // of the GPU's memory; it holds device_bytes / stride frames
  Bytes pool_bytes = 0;    // the most CPU memory the pool may ever take; 0: no pool
  // How CPU memory is made ready for copies: "pinned"; "coherent" where the GPU shares the CPU's
  // page tables (GH200, GB200), so that nothing is pinned, unless copies of such memory are seen to
  // hold up whoever submits them; "pageable", as it is, whose copies do; "auto" takes the best that
  // the device has.
  std::string pool_io = "auto";
  std::string driver = "libcuda.so.1";  // the driver's library, or a double of it
  // Capabilities::in_place_share, from 0 to 1. Negative: by what the device is. Attention is held
  // up by GPU memory, and what it reads over the link meanwhile comes on top of that; so on GH200
  // and GB200 link / (link + GPU memory), by their rates, and over PCIe, where that is a hundredth,
  // none.
  double in_place_share = -1;
  // Memory of the GPU, `device_bytes` of it, where the caller brings its own (a tensor's, say):
  // aligned to 256 bytes, and alive for as long as the backend. It cannot grow, and nothing of it
  // goes back to the device. Null: memory is mapped.
  std::byte* device_memory = nullptr;
};

// Loads the plugin libpie_cuda.so. Throws ConfigError where there is none, or no driver, GPU or
// toolkit that serves, CapacityError where the GPU has not so much memory free.
[[nodiscard]] std::unique_ptr<Backend> open_cuda(const CudaOptions& options);

// Bytes of stride that `open_cuda` gives frames of this payload.
[[nodiscard]] Bytes cuda_frame_stride(Bytes frame_bytes);

// One direction between the tiers of a simulated machine. A copy (a run of adjacent frames) first
// takes the latency, alone, then `overhead_ns` and its bytes' time, in which it has the link for
// itself; so `copies_at_once` is how many latencies may overlap. With jitter copies overtake each
// other.
struct SimLink {
  double bytes_per_s = 25e9;
  Nanos latency_ns = 10'000;
  Nanos jitter_ns = 0;  // up to this much is added to a latency, evenly distributed
  Nanos overhead_ns = 1'000;
  std::uint32_t copies_at_once = 16;
};

// The fault model: these are injected, each with its probability, and no others. Never injected: a
// ticket that does not end or ends twice, a copy of frames that were not named, a frame at rest
// that changes, a clock that goes back.
struct SimFaults {
  double slow = 0;  // of a copy: latency, overhead and bytes take `slow_factor` times as long
  double slow_factor = 20;
  double failed = 0;   // of a ticket: it ends failed (EIO), any part of its targets is garbage
  double corrupt = 0;  // of a load: it ends corrupt, its targets are garbage; again it may do
  double rotten = 0;   // of a write: it ends ok, and each load of its frames ends corrupt
  double refused = 0;  // of a call that grows a tier: it gives no frame more
  double lying = 0;    // of a lane, drawn once: its first `lying_bytes` go `lying_factor` times
  double lying_factor = 4;  // as fast as the link's rate, so what is measured there is a promise
  Bytes lying_bytes = Bytes{64} << 20;  // that is not held
  double silent = 0;  // of a ticket: garbage in its targets, and it ends ok. Nothing above the
                      // seam survives that: it is there to show that a test would notice
  std::uint64_t failed_ticket = 0;   // this one fails, counted from 1 over both lanes; 0: none does
  std::uint64_t failed_tickets = 1;  // and so many in all, from that one on
  std::uint64_t refused_growth = 0;  // the same for calls that grow a tier
};

// A machine that is not there: a virtual clock, modelled links and compute, faults by seed. For
// deterministic tests, and for planning a machine before it is bought.
struct SimOptions {
  std::uint32_t device_frames = 0;
  std::uint32_t device_frames_max = 0;  // resize_device gives no more; 0: device_frames
  std::uint32_t pool_frames = 0;
  std::uint32_t pool_frames_max = 0;  // resize_pool gives no more; 0: pool_frames
  Nanos pool_growth_ns = 0;           // until frames that the pool grows by are usable
  Bytes frame_bytes = 0;
  Bytes copy_bytes_best = 0;  // in Capabilities; 0: what a load's link moves in eight overheads
  SimLink load;
  SimLink write;
  SimFaults faults;
  std::uint64_t seed = 1;
  bool streams = false;  // compute runs beside the caller; false: the caller computes
  // Whether frames hold anything. With bytes the simulation is adversarial: a copy reads and writes
  // when it starts or when it ends, as the seed says, its targets are garbage from its start until
  // then, and so is every frame that was never written or was given back. Without, `address` names
  // memory that must not be touched, and a machine of any size costs a few bytes a frame.
  bool carry_bytes = true;
};

// Of one lane.
struct SimCounts {
  std::uint64_t tickets = 0;
  std::uint64_t failed = 0;  // of them, that have ended failed or corrupt
  std::uint64_t copies = 0;
  std::uint64_t frames = 0;
};

// A piece of computation: how long it takes.
struct Work {
  Nanos duration_ns = 0;
};

// Time passes in `wait`, in `synchronize`, and where the caller computes in `compute` and `launch`.
// It throws LogicError for two copies that use a frame at once and are not ordered by `after`,
// unless both only read it.
class SimBackend : public Backend {
 public:
  virtual void compute(ComputeStream stream, Work work) = 0;

  // Work with an effect: `body` runs when it is done. It must not call the backend.
  virtual void launch(ComputeStream stream, Work work, std::function<void()> body) = 0;

  // Returns when the stream has done all it was given.
  virtual void synchronize(ComputeStream stream) = 0;

  // Faults from now on; counts of tickets and growths go on. What is under way keeps its fate.
  virtual void set_faults(const SimFaults& faults) = 0;

  // From now on the device is lost: health() says so and every ticket fails.
  virtual void lose() = 0;

  [[nodiscard]] virtual SimCounts counts(Lane lane) const = 0;
};

// Throws ConfigError for a machine that cannot be.
[[nodiscard]] std::unique_ptr<SimBackend> open_sim(const SimOptions& options);

}  // namespace pie
