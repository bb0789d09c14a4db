// The file behind the pool tier: where it may lie, how it is made, and how it grows.
//
// It has no name (nobody else can open it, and a killed process leaves nothing behind), is readable
// by its owner alone, and is not inherited by programs that the process starts. Its space is taken
// from the disk before the first write to it, so a write never meets a full disk.
#pragma once

#include <string>

#include "pie/types.hpp"

namespace pie {

class PoolFile {
 public:
  // Makes the file for frames of `frame_bytes` in `dir`, which may be empty or prefixed as
  // HostOptions::pool_dir says. Direct I/O is used if `direct` asks for it and the file can do it.
  // Throws ConfigError.
  PoolFile(const std::string& dir, bool direct, Bytes frame_bytes);
  PoolFile(const PoolFile&) = delete;
  PoolFile& operator=(const PoolFile&) = delete;
  ~PoolFile();

  // Grows to `asked` bytes. Returns the bytes there are, which are fewer where the disk refuses.
  Bytes grow(Bytes asked);

  // Gives back to the disk what lies beyond `bytes`.
  void shrink(Bytes bytes);

  // Why the last growth fell short; empty where it did not.
  [[nodiscard]] const std::string& refusal() const { return refusal_; }

  [[nodiscard]] int descriptor() const { return descriptor_; }
  [[nodiscard]] bool direct() const { return direct_; }
  [[nodiscard]] const std::string& dir() const { return dir_; }

  // Every offset, size and address of a transfer is a multiple of this.
  [[nodiscard]] Bytes alignment() const { return alignment_; }

 private:
  int extend(Bytes to);  // all or nothing; returns 0 or an errno value

  std::string dir_;
  int descriptor_ = -1;
  bool direct_ = false;
  Bytes alignment_ = 0;
  Bytes bytes_ = 0;
  std::string refusal_;
};

// Rounded up to a multiple of `alignment`.
[[nodiscard]] constexpr Bytes round_up(Bytes bytes, Bytes alignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

// Stride granularity where direct I/O asks for none: a cache line.
inline constexpr Bytes buffered_alignment = 64;

}  // namespace pie
