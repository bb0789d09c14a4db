// What every backend must do, whatever it is made of: the suite of conformance.cpp, run for each
// backend that a test program has as its subject.
//
//   const Subject mine{"mine", open, stream, write, read, synchronize};
//   INSTANTIATE_TEST_SUITE_P(Mine, BackendConformance, testing::Values(mine), subject_name);
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <ostream>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "pie/backend.hpp"
#include "pie/error.hpp"

namespace pie::conformance {

constexpr Lane to_device = Lane::pool_to_device;
constexpr Lane to_pool = Lane::device_to_pool;
constexpr Nanos forever = std::numeric_limits<Nanos>::max();

// Bytes that differ between frames, between seeds, and within a frame.
inline std::uint8_t pattern(std::uint32_t seed, Bytes at) {
  const Bytes mixed = (Bytes{seed} + 1) * 0x9e3779b97f4a7c15ULL + at * 0xbf58476d1ce4e5b9ULL;
  return static_cast<std::uint8_t>(mixed >> 40U);
}

// What a frame holds.
using Contents = std::vector<std::byte>;

// Says what a stream found in a frame, once it has been synchronized.
using Read = std::function<Contents()>;

inline Contents contents(const Backend& backend, std::uint32_t seed) {
  Contents bytes(backend.capabilities().frame_stride);
  for (Bytes i = 0; i < bytes.size(); ++i) bytes[i] = std::byte{pattern(seed, i)};
  return bytes;
}

// Where the caller can touch device frames.
inline void fill(Backend& backend, FrameIndex frame, std::uint32_t seed) {
  const Contents bytes = contents(backend, seed);
  std::ranges::copy(bytes, backend.address(frame));
}
inline bool holds(const Backend& backend, FrameIndex frame, std::uint32_t seed) {
  const Contents bytes = contents(backend, seed);
  return std::ranges::equal(bytes, std::span(backend.address(frame), bytes.size()));
}

// Frames of the device and of the pool that a lane copies, one way or the other.
struct Pair {
  FrameIndex device_first = no_frame;
  FrameIndex pool_first = no_frame;
  std::uint32_t count = 0;
};

// A ticket without pairs has one copy, of no frames.
inline std::vector<Copy> copies_of(Lane lane, std::vector<Pair> pairs) {
  if (pairs.empty()) pairs.push_back({0, 0, 0});
  std::vector<Copy> copies;
  for (const Pair& pair : pairs) {
    copies.push_back(
        {{Tier::pool, pair.pool_first}, {Tier::device, pair.device_first}, pair.count});
    if (lane == to_pool) std::swap(copies.back().from, copies.back().to);
  }
  return copies;
}

inline Ticket submit(Backend& backend, Lane lane, std::vector<Pair> pairs,
                     std::vector<Dep> after = {}) {
  return backend.submit(copies_of(lane, std::move(pairs)), after);
}

inline Dep after(Ticket ticket) { return {.fence = {}, .ticket = ticket}; }

// Polls until `count` tickets have ended. Ends early only if the backend says nothing is in flight.
inline std::vector<Completion> collect(Backend& backend, std::size_t count) {
  std::vector<Completion> all;
  while (all.size() < count) {
    backend.wait(forever);
    std::array<Completion, 3> some;  // fewer than there may be
    const std::size_t got = backend.poll(some);
    if (got == 0) break;
    all.insert(all.end(), some.begin(), some.begin() + static_cast<std::ptrdiff_t>(got));
  }
  return all;
}

inline const Completion* find(const std::vector<Completion>& all, Ticket ticket) {
  const auto found = std::ranges::find(all, ticket, &Completion::ticket);
  return found == all.end() ? nullptr : &*found;
}

// Has a pool of this many usable frames, which may take a while.
inline std::uint32_t grow_pool(Backend& backend, std::uint32_t frames) {
  PoolSize size = backend.resize_pool(frames);
  while (size.pending) {
    backend.wait(forever);
    size = backend.resize_pool(frames);
  }
  return size.frames;
}

// Has `stream` wait for a ticket; the caller waits where it is the one who computes.
inline void order(Backend& backend, ComputeStream stream, Ticket ticket) {
  if (!backend.capabilities().streams) {
    while (find(collect(backend, 1), ticket) == nullptr) {
    }
  }
  backend.depend(stream, after(ticket));
}

// Runs one ticket to its end.
inline Completion finish(Backend& backend, Lane lane, std::vector<Pair> copies) {
  const Ticket ticket = submit(backend, lane, std::move(copies));
  const auto all = collect(backend, 1);
  const Completion* ended = find(all, ticket);
  EXPECT_NE(ended, nullptr) << "the ticket did not end";
  Completion none;
  none.status = Status::failed;
  return ended == nullptr ? none : *ended;
}

inline bool is_ok(const Completion& completion) { return completion.status == Status::ok; }

// A backend and, on its streams, work that takes a while, where the calling thread does not compute
// at once.
struct Subject {
  std::string name;  // letters and digits
  // With exactly these numbers of frames, each of any size of at least 64 bytes. Throws ConfigError
  // where the machine has no such backend.
  using Open = std::function<std::unique_ptr<Backend>(std::uint32_t device_frames,
                                                      std::uint32_t pool_frames)>;
  Open open;
  ComputeStream (*stream)(std::uint32_t number);
  // A stream writes a device frame, or keeps what it finds there; the last returns when it has.
  void (*write)(Backend& backend, ComputeStream stream, FrameIndex frame, const Contents& bytes);
  Read (*read)(Backend& backend, ComputeStream stream, FrameIndex frame);
  void (*synchronize)(Backend& backend, ComputeStream stream);

  // Fills a frame, and says whether it holds what it was filled with, as the caller sees it.
  void fill(Backend& backend, FrameIndex frame, std::uint32_t seed) const {
    write(backend, stream(0), frame, contents(backend, seed));
    synchronize(backend, stream(0));
  }
  [[nodiscard]] bool holds(Backend& backend, FrameIndex frame, std::uint32_t seed) const {
    const Read found = read(backend, stream(0), frame);
    synchronize(backend, stream(0));
    return found() == contents(backend, seed);
  }

  friend std::ostream& operator<<(std::ostream& out, const Subject& subject) {
    return out << subject.name;
  }
};

inline std::string subject_name(const testing::TestParamInfo<Subject>& info) {
  return info.param.name;
}

class BackendConformance : public testing::TestWithParam<Subject> {
 protected:
  void SetUp() override {
    try {
      static_cast<void>(subject().open(1, 1));
    } catch (const ConfigError& error) {
      GTEST_SKIP() << "not on this machine: " << error.what();
    }
  }
  static const Subject& subject() { return GetParam(); }
};

}  // namespace pie::conformance
