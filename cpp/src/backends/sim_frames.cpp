// Memory of a simulated machine: garbage where nothing was written, claimed while it is copied.
#include "sim_frames.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "pie/error.hpp"

namespace pie {

namespace {

// Not zero, which could be taken for something, and not a value that a test would write.
constexpr int garbage = 0x7f;

// Address space alone where no bytes are carried: touching it ends the process, and nothing is
// taken from the machine.
std::byte* map_arena(Bytes bytes, bool carry) {
  void* base = ::mmap(nullptr, bytes, carry ? PROT_READ | PROT_WRITE : PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | (carry ? 0 : MAP_NORESERVE), -1, 0);
  if (base == MAP_FAILED) {
    throw CapacityError("sim: a device tier of " + sized(bytes) +
                        " cannot be mapped. Simulate fewer device frames, or without bytes.");
  }
  return static_cast<std::byte*>(base);
}

}  // namespace

SimFrames::SimFrames(std::uint32_t device_frames, std::uint32_t pool_frames, Bytes frame_bytes,
                     bool carry_bytes)
    : bytes_(frame_bytes),
      carry_(carry_bytes),
      arena_bytes_(std::max<Bytes>(1, device_frames * frame_bytes)),
      arena_(map_arena(arena_bytes_, carry_bytes)),
      pool_(carry_bytes ? pool_frames * frame_bytes : 0),
      rotten_(pool_frames) {
  users_[static_cast<std::size_t>(Tier::device)].resize(device_frames);
  users_[static_cast<std::size_t>(Tier::pool)].resize(pool_frames);
  spoil(Tier::device, 0, device_frames);
  spoil(Tier::pool, 0, pool_frames);
}

SimFrames::~SimFrames() { ::munmap(arena_, arena_bytes_); }

std::int32_t& SimFrames::users(const Place& place, std::uint32_t i) {
  return users_[static_cast<std::size_t>(place.tier)][place.first + i];
}

std::byte* SimFrames::at(const Place& place) {
  return place.tier == Tier::device ? device(place.first) : pool(place.first);
}

void SimFrames::claim(const Copy& copy) {
  for (std::uint32_t i = 0; i < copy.count; ++i) {
    require(users(copy.from, i) >= 0 && users(copy.to, i) == 0,
            "submit: a frame is in two copies at once, and one of them writes to it.");
    ++users(copy.from, i);
    users(copy.to, i) = -1;
  }
}

void SimFrames::yield(const Copy& copy) {
  for (std::uint32_t i = 0; i < copy.count; ++i) {
    --users(copy.from, i);
    users(copy.to, i) = 0;
  }
}

void SimFrames::move(const Copy& copy) {
  if (carry_) std::memcpy(at(copy.to), at(copy.from), copy.count * bytes_);
}

void SimFrames::duplicate(FrameIndex from, FrameIndex to) {
  if (carry_) std::memcpy(device(to), device(from), bytes_);
}

void SimFrames::spoil(Tier tier, FrameIndex first, std::uint32_t count) {
  if (!carry_ || count == 0) return;
  std::memset(tier == Tier::device ? device(first) : pool(first), garbage, count * bytes_);
}

void SimFrames::set_rotten(const Copy& copy, bool rotten) {
  std::fill_n(rotten_.begin() + copy.to.first, copy.count, rotten);
}

bool SimFrames::is_rotten(const Copy& copy) const {
  const auto first = rotten_.begin() + copy.from.first;
  return std::find(first, first + copy.count, true) != first + copy.count;
}

}  // namespace pie
