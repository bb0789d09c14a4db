// The frames of a simulated machine: who uses them, and what they hold if anything.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "pie/backend.hpp"

namespace pie {

// Both tiers. Frame i of the device stays where it is for as long as this lives.
class SimFrames {
 public:
  SimFrames(std::uint32_t device_frames, std::uint32_t pool_frames, Bytes frame_bytes,
            bool carry_bytes);
  SimFrames(const SimFrames&) = delete;
  SimFrames& operator=(const SimFrames&) = delete;
  ~SimFrames();

  [[nodiscard]] std::byte* device(FrameIndex frame) const { return arena_ + frame * bytes_; }

  // From `claim` to `yield` a copy's frames are in use. Throws LogicError where another uses one of
  // them and not both only read it.
  void claim(const Copy& copy);
  void yield(const Copy& copy);

  void move(const Copy& copy);
  void duplicate(FrameIndex from, FrameIndex to);                // on the device
  void spoil(Tier tier, FrameIndex first, std::uint32_t count);  // they are garbage from now on

  // Rotten frames of the pool are those that no load can read: what a write left, what a load
  // meets.
  void set_rotten(const Copy& copy, bool rotten);
  [[nodiscard]] bool is_rotten(const Copy& copy) const;

 private:
  [[nodiscard]] std::int32_t& users(const Place& place, std::uint32_t i);
  [[nodiscard]] std::byte* at(const Place& place);
  [[nodiscard]] std::byte* pool(FrameIndex frame) { return pool_.data() + frame * bytes_; }

  Bytes bytes_;  // of a frame
  bool carry_;
  Bytes arena_bytes_;
  std::byte* arena_;
  std::vector<std::byte> pool_;
  std::array<std::vector<std::int32_t>, 2>
      users_;                 // by tier and frame: readers, or -1 for one writer
  std::vector<bool> rotten_;  // by pool frame
};

}  // namespace pie
