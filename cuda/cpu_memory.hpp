// The pool: CPU memory that copies to and from the device run beside the computation from.
//
// It is made ready, chunk by chunk, by a thread of its own: that takes a tenth of a second a
// gigabyte, and what is ready already is usable meanwhile. It is taken from the system, and by
// default pinned: a chunk is one registration, and no copy may span two, so copies are split where
// chunks end. Where the GPU shares the CPU's page tables (GH200, GB200) memory is bound to the
// GPU's own CPU, and not pinned unless it turns out that copies of it then hold up whoever submits
// them, as they do elsewhere. Where the system pins nothing the memory is used as it is.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>

#include "device.hpp"
#include "pie/backend.hpp"
#include "pie/types.hpp"

namespace pie::cuda {

enum class CpuMemoryKind : std::uint8_t { pinned, coherent, pageable };

class CpuMemory {
 public:
  // Room for `frames_max` frames, of which none is usable yet; `kind` is a word of
  // CudaOptions::pool_io. Throws CapacityError where there are no addresses for them, ConfigError
  // for a kind that the device does not have. The device outlives this.
  CpuMemory(const Device& device, Bytes stride, std::uint32_t frames_max, const std::string& kind);
  CpuMemory(const CpuMemory&) = delete;
  CpuMemory& operator=(const CpuMemory&) = delete;
  ~CpuMemory();

  // "pinned", "coherent" or "pageable", and why it is not another; empty where it is as it should.
  [[nodiscard]] const char* name() const;
  [[nodiscard]] const std::string& reason() const { return reason_; }

  [[nodiscard]] CpuMemoryKind kind() const { return kind_; }

  // Where frame 0 lies, and whether kernels may read what is usable of it there.
  [[nodiscard]] const std::byte* start() const { return start_; }
  [[nodiscard]] bool is_readable() const;

  // Copies `bytes` of the device, which stay what they are, to coherent memory and back, and pins
  // the pool after all where that holds up the caller. Before the first `resize`.
  void prove(CUstream stream, CUevent event, CUdeviceptr device, Bytes bytes);

  // See Backend::resize_pool; nothing may be copied to or from frames that go, or read in them.
  PoolSize resize(std::uint32_t frames);
  [[nodiscard]] std::uint32_t usable() const { return usable_; }
  [[nodiscard]] std::string refusal() const;

  // Whether more frames are on their way, and whether all that were have come, or will not.
  [[nodiscard]] bool is_growing() const;
  [[nodiscard]] bool has_grown() const;

  // Calls `run(address, first, count)` for each part of a run of frames that lies in one chunk.
  template <typename Run>
  void each_part(std::uint32_t first, std::uint32_t count, const Run& run) const {
    while (count > 0) {
      const std::uint32_t part = std::min(count, chunk_frames_ - first % chunk_frames_);
      run(start_ + first * stride_, first, part);
      first += part;
      count -= part;
    }
  }

 private:
  [[nodiscard]] Bytes chunk_bytes(std::uint32_t chunk) const;
  [[nodiscard]] std::byte* chunk_start(std::uint32_t chunk) const;
  [[nodiscard]] std::uint32_t chunks_of(std::uint32_t frames) const;
  [[nodiscard]] std::uint32_t ready_frames() const;
  [[nodiscard]] bool wants_more() const { return ready_ < wanted_ && refusal_.empty(); }
  void choose(const std::string& kind);
  [[nodiscard]] bool runs_beside(CUstream stream, CUevent event, CUdeviceptr to, CUdeviceptr from,
                                 Bytes bytes) const;
  [[nodiscard]] std::string pinning_refusal() const;
  void bind();
  void make_ready();
  [[nodiscard]] std::string make_ready(std::uint32_t chunk) const;
  void give_back(std::uint32_t keep);

  const Device& device_;
  const Bytes stride_;
  const std::uint32_t frames_max_;
  std::uint32_t chunk_frames_ = 0;
  Bytes reserved_ = 0;
  std::byte* start_ = nullptr;
  CpuMemoryKind kind_ = CpuMemoryKind::pinned;
  bool pins_ = false;  // chunks, one by one
  std::string reason_;
  std::uint32_t usable_ = 0;  // frames; the owner's thread alone
  std::uint32_t asked_ = 0;   // frames, of the last `resize`

  mutable std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  std::uint32_t wanted_ = 0;  // chunks
  std::uint32_t ready_ = 0;   // chunks
  bool preparing_ = false;    // one more, now
  bool ending_ = false;
  std::string refusal_;
  Nanos refused_ns_ = 0;  // when
  std::thread thread_;
};

}  // namespace pie::cuda
