// What every backend must do, whatever it is made of: one suite, instantiated once per backend.
//
//   struct MyBackend {
//     static std::unique_ptr<pie::Backend> open(std::uint32_t device_frames,
//                                               std::uint32_t pool_frames) { ... }
//     static pie::ComputeStream stream(std::uint32_t number) { ... }
//     static void write(pie::Backend&, pie::ComputeStream, pie::FrameIndex, Contents) { ... }
//     static Read read(pie::Backend&, pie::ComputeStream, pie::FrameIndex) { ... }
//     static void synchronize(pie::Backend&, pie::ComputeStream) { ... }
//   };
//   INSTANTIATE_TYPED_TEST_SUITE_P(Mine, BackendConformance, MyBackend);
//
// `open` makes a backend with exactly these numbers of frames, each of any size of at least 64
// bytes. `write` and `read` are work of a stream, which takes a while and then writes a device
// frame or keeps what it finds there, where the calling thread computes at once; `synchronize`
// returns when that is done.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <thread>
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

// What a stream found in a frame, once it has been synchronized.
using Read = std::shared_ptr<const Contents>;

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

// Fills a frame, and says whether it holds what it was filled with, as the caller sees it.
template <class Fixture>
void fill(Backend& backend, FrameIndex frame, std::uint32_t seed) {
  Fixture::write(backend, Fixture::stream(0), frame, contents(backend, seed));
  Fixture::synchronize(backend, Fixture::stream(0));
}

template <class Fixture>
bool holds(Backend& backend, FrameIndex frame, std::uint32_t seed) {
  const auto found = Fixture::read(backend, Fixture::stream(0), frame);
  Fixture::synchronize(backend, Fixture::stream(0));
  return *found == contents(backend, seed);
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

template <class Fixture>
class BackendConformance : public testing::Test {
 protected:
  void SetUp() override {
    try {
      static_cast<void>(Fixture::open(1, 1));
    } catch (const ConfigError& error) {
      GTEST_SKIP() << "not on this machine: " << error.what();
    }
  }
};

TYPED_TEST_SUITE_P(BackendConformance);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(BackendConformance);

TYPED_TEST_P(BackendConformance, SaysWhatItHas) {
  const auto backend = TypeParam::open(8, 16);
  const Capabilities capabilities = backend->capabilities();
  EXPECT_EQ(capabilities.device_frames, 8U);
  EXPECT_EQ(capabilities.pool_frames, 16U);
  EXPECT_GE(capabilities.frame_stride, 64U);
  EXPECT_GT(capabilities.copy_bytes_best, 0U);
  EXPECT_FALSE(capabilities.pool_io.empty());
  EXPECT_TRUE(backend->health().ok);
  for (FrameIndex i = 1; i < 8; ++i) {
    EXPECT_EQ(backend->address(i), backend->address(0) + i * capabilities.frame_stride);
  }
}

TYPED_TEST_P(BackendConformance, TiersAreResizedBothWays) {
  const auto backend = TypeParam::open(4, 16);
  for (const std::uint32_t frames : {2U, 9U, 1U, 16U, 0U, 5U}) {
    EXPECT_EQ(grow_pool(*backend, frames), frames);
  }
  EXPECT_EQ(backend->pool_refusal(), "");
  for (const std::uint32_t frames : {4U, 1U, 3U, 4U}) {
    EXPECT_EQ(backend->resize_device(frames), frames);
  }
  EXPECT_LE(backend->resize_device(0xfffffffe), backend->capabilities().device_frames_max);
}

TYPED_TEST_P(BackendConformance, WhatIsWithinTheNewSizeStays) {
  const auto backend = TypeParam::open(4, 16);
  ASSERT_EQ(grow_pool(*backend, 16), 16U);
  fill<TypeParam>(*backend, 1, 7);
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{1, 3, 1}})));
  EXPECT_EQ(grow_pool(*backend, 4), 4U);
  EXPECT_EQ(backend->resize_device(2), 2U);
  EXPECT_THROW(submit(*backend, to_device, {{0, 4, 1}}), LogicError);
  EXPECT_THROW(submit(*backend, to_device, {{2, 3, 1}}), LogicError);
  EXPECT_TRUE(holds<TypeParam>(*backend, 1, 7));
  ASSERT_TRUE(is_ok(finish(*backend, to_device, {{0, 3, 1}})));
  EXPECT_TRUE(holds<TypeParam>(*backend, 0, 7));
  EXPECT_EQ(grow_pool(*backend, 16), 16U);
  EXPECT_EQ(backend->resize_device(4), 4U);
  ASSERT_TRUE(is_ok(finish(*backend, to_device, {{3, 3, 1}})));
  EXPECT_TRUE(holds<TypeParam>(*backend, 3, 7));
}

TYPED_TEST_P(BackendConformance, SingleFramesComeBack) {
  const auto backend = TypeParam::open(4, 16);
  ASSERT_EQ(grow_pool(*backend, 16), 16U);
  for (std::uint32_t i = 0; i < 16; ++i) {
    fill<TypeParam>(*backend, i % 4, i);
    ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{i % 4, i, 1}})));
  }
  for (std::uint32_t i = 16; i-- > 0;) {
    ASSERT_TRUE(is_ok(finish(*backend, to_device, {{(i + 1) % 4, i, 1}})));
    EXPECT_TRUE(holds<TypeParam>(*backend, (i + 1) % 4, i)) << "pool frame " << i;
  }
}

TYPED_TEST_P(BackendConformance, RunsComeBack) {
  const auto backend = TypeParam::open(128, 256);
  ASSERT_EQ(grow_pool(*backend, 256), 256U);
  for (std::uint32_t i = 0; i < 128; ++i) fill<TypeParam>(*backend, i, i);
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{0, 100, 128}})));
  for (std::uint32_t i = 0; i < 128; ++i) fill<TypeParam>(*backend, i, 999);
  ASSERT_TRUE(is_ok(finish(*backend, to_device, {{5, 103, 120}})));
  for (std::uint32_t i = 0; i < 128; ++i) {
    const bool copied = i >= 5 && i < 125;
    EXPECT_TRUE(holds<TypeParam>(*backend, i, copied ? i - 2 : 999)) << "device frame " << i;
  }
}

TYPED_TEST_P(BackendConformance, OneTicketHasManyCopies) {
  const auto backend = TypeParam::open(64, 64);
  ASSERT_EQ(grow_pool(*backend, 64), 64U);
  std::vector<Pair> out;
  std::vector<Pair> back;
  for (std::uint32_t i = 0; i < 64; ++i) {
    fill<TypeParam>(*backend, i, i);
    out.push_back({i, 63 - i, 1});
  }
  for (std::uint32_t i = 0; i < 64; i += 2) back.push_back({i, i, 2});
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, out)));
  ASSERT_TRUE(is_ok(finish(*backend, to_device, back)));
  for (std::uint32_t i = 0; i < 64; ++i) EXPECT_TRUE(holds<TypeParam>(*backend, i, 63 - i));
}

TYPED_TEST_P(BackendConformance, TicketWithoutCopiesEnds) {
  const auto backend = TypeParam::open(2, 2);
  EXPECT_TRUE(is_ok(finish(*backend, to_device, {})));
}

TYPED_TEST_P(BackendConformance, EveryTicketEndsOnce) {
  const auto backend = TypeParam::open(200, 200);
  ASSERT_EQ(grow_pool(*backend, 200), 200U);
  std::vector<Ticket> tickets;
  for (std::uint32_t i = 0; i < 200; ++i) {
    if (i < 100) fill<TypeParam>(*backend, i, i);
    tickets.push_back(submit(*backend, i < 100 ? to_pool : to_device, {{i, i, 1}}));
  }
  const auto all = collect(*backend, 200);
  EXPECT_EQ(all.size(), 200U);
  for (const Ticket ticket : tickets) {
    EXPECT_EQ(std::ranges::count(all, ticket, &Completion::ticket), 1);
  }
  for (const Completion& completion : all) {
    EXPECT_TRUE(is_ok(completion));
    EXPECT_LE(completion.began, completion.ended);
    EXPECT_LE(completion.ended, backend->now());
  }
  std::array<Completion, 8> more;
  EXPECT_EQ(backend->poll(more), 0U);
}

TYPED_TEST_P(BackendConformance, TicketsCountUpWithinTheirLane) {
  const auto backend = TypeParam::open(4, 4);
  ASSERT_EQ(grow_pool(*backend, 4), 4U);
  const Ticket first = submit(*backend, to_pool, {{0, 0, 1}});
  const Ticket second = submit(*backend, to_pool, {{1, 1, 1}});
  const Ticket other = submit(*backend, to_device, {{2, 2, 1}});
  EXPECT_GT(first.id, 0U);
  EXPECT_GT(second.id, first.id);
  EXPECT_GT(other.id, 0U);
  EXPECT_EQ(first.lane, to_pool);
  EXPECT_EQ(other.lane, to_device);
  EXPECT_EQ(collect(*backend, 3).size(), 3U);
}

// One frame travels through every other frame of both tiers, each step waiting for the one before.
TYPED_TEST_P(BackendConformance, DependentTicketsSeeWhatTheyWaitFor) {
  constexpr std::uint32_t frames = 40;
  const auto backend = TypeParam::open(frames, frames);
  ASSERT_EQ(grow_pool(*backend, frames), frames);
  for (std::uint32_t i = 0; i < frames; ++i) fill<TypeParam>(*backend, i, i);
  std::vector<Dep> previous;
  for (std::uint32_t i = 0; i + 1 < frames; ++i) {
    previous = {after(submit(*backend, to_pool, {{i, i, 1}}, previous))};
    previous = {after(submit(*backend, to_device, {{i + 1, i, 1}}, previous))};
  }
  EXPECT_EQ(collect(*backend, std::size_t{2} * (frames - 1)).size(), std::size_t{2} * (frames - 1));
  EXPECT_TRUE(holds<TypeParam>(*backend, frames - 1, 0));
}

TYPED_TEST_P(BackendConformance, OneTicketWaitsForSeveral) {
  const auto backend = TypeParam::open(16, 16);
  ASSERT_EQ(grow_pool(*backend, 16), 16U);
  std::vector<Dep> writes;
  for (std::uint32_t i = 0; i < 8; ++i) {
    fill<TypeParam>(*backend, i, i);
    writes.push_back(after(submit(*backend, to_pool, {{i, i, 1}})));
  }
  submit(*backend, to_device, {{8, 0, 8}}, writes);
  submit(*backend, to_device, {},
         {{}, {backend->record(TypeParam::stream(0), Timing::unwanted), {}}});
  EXPECT_EQ(collect(*backend, 10).size(), 10U);
  for (std::uint32_t i = 0; i < 8; ++i) EXPECT_TRUE(holds<TypeParam>(*backend, 8 + i, i));
}

TYPED_TEST_P(BackendConformance, WaitsForATicketThatWasPolledLongAgo) {
  const auto backend = TypeParam::open(2, 2);
  ASSERT_EQ(grow_pool(*backend, 2), 2U);
  fill<TypeParam>(*backend, 0, 7);
  const Ticket write = submit(*backend, to_pool, {{0, 0, 1}});
  ASSERT_EQ(collect(*backend, 1).size(), 1U);
  backend->depend(TypeParam::stream(0), after(write));
  submit(*backend, to_device, {{1, 0, 1}}, {after(write)});
  ASSERT_EQ(collect(*backend, 1).size(), 1U);
  EXPECT_TRUE(holds<TypeParam>(*backend, 1, 7));
}

TYPED_TEST_P(BackendConformance, CopiesWaitForFences) {
  const auto backend = TypeParam::open(4, 4);
  ASSERT_EQ(grow_pool(*backend, 4), 4U);
  fill<TypeParam>(*backend, 0, 1);
  TypeParam::write(*backend, TypeParam::stream(5), 0, contents(*backend, 2));
  const Fence filled = backend->record(TypeParam::stream(5), Timing::unwanted);
  const Ticket write = submit(*backend, to_pool, {{0, 0, 1}}, {{filled, {}}});
  // What is read on the stream is not loaded into before it was read.
  const auto read = TypeParam::read(*backend, TypeParam::stream(5), 0);
  const Fence done = backend->record(TypeParam::stream(5), Timing::unwanted);
  submit(*backend, to_device, {{0, 1, 1}}, {{done, write}});
  ASSERT_EQ(collect(*backend, 2).size(), 2U);
  EXPECT_EQ(*read, contents(*backend, 2));
  ASSERT_TRUE(is_ok(finish(*backend, to_device, {{1, 0, 1}})));
  EXPECT_TRUE(holds<TypeParam>(*backend, 1, 2)) << "the write began before the frame was filled";
}

TYPED_TEST_P(BackendConformance, StreamsWaitForTickets) {
  const auto backend = TypeParam::open(4, 4);
  ASSERT_EQ(grow_pool(*backend, 4), 4U);
  fill<TypeParam>(*backend, 0, 1);
  fill<TypeParam>(*backend, 1, 2);
  const Ticket write = submit(*backend, to_pool, {{0, 0, 1}});
  const Ticket load = submit(*backend, to_device, {{1, 0, 1}}, {after(write)});
  order(*backend, TypeParam::stream(5), load);
  const auto read = TypeParam::read(*backend, TypeParam::stream(5), 1);
  TypeParam::synchronize(*backend, TypeParam::stream(5));
  EXPECT_EQ(*read, contents(*backend, 1)) << "the stream did not wait for the load";
}

TYPED_TEST_P(BackendConformance, StreamsWaitForEachOther) {
  const auto backend = TypeParam::open(2, 2);
  ASSERT_EQ(grow_pool(*backend, 2), 2U);
  fill<TypeParam>(*backend, 0, 1);
  TypeParam::write(*backend, TypeParam::stream(5), 0, contents(*backend, 2));
  backend->depend(TypeParam::stream(6),
                  {backend->record(TypeParam::stream(5), Timing::unwanted), {}});
  const auto read = TypeParam::read(*backend, TypeParam::stream(6), 0);
  TypeParam::synchronize(*backend, TypeParam::stream(6));
  EXPECT_EQ(*read, contents(*backend, 2)) << "the second stream did not wait for the first";
}

TYPED_TEST_P(BackendConformance, DuplicatesInTheOrderOfTheStream) {
  const auto backend = TypeParam::open(6, 2);
  ASSERT_EQ(grow_pool(*backend, 2), 2U);
  for (FrameIndex i = 0; i < 6; ++i) fill<TypeParam>(*backend, i, 10 + i);
  TypeParam::write(*backend, TypeParam::stream(5), 0, contents(*backend, 1));
  const std::array pairs{Duplicate{0, 3}, Duplicate{1, 4}, Duplicate{0, 5}};
  backend->duplicate(TypeParam::stream(5), pairs);
  TypeParam::write(*backend, TypeParam::stream(5), 0, contents(*backend, 2));
  backend->duplicate(TypeParam::stream(5), {});
  TypeParam::synchronize(*backend, TypeParam::stream(5));
  EXPECT_TRUE(holds<TypeParam>(*backend, 3, 1));
  EXPECT_TRUE(holds<TypeParam>(*backend, 4, 11));
  EXPECT_TRUE(holds<TypeParam>(*backend, 5, 1));
  EXPECT_TRUE(holds<TypeParam>(*backend, 0, 2));
  const Duplicate beyond{0, 6};
  EXPECT_THROW(backend->duplicate(TypeParam::stream(5), {&beyond, 1}), LogicError);
}

TYPED_TEST_P(BackendConformance, TellsWhenFencesPass) {
  const auto backend = TypeParam::open(2, 2);
  const Nanos before = backend->now();
  std::vector<Fence> fences;
  for (int i = 0; i < 3; ++i) {
    TypeParam::write(*backend, TypeParam::stream(5), 0, contents(*backend, 1));
    static_cast<void>(backend->record(TypeParam::stream(5), Timing::unwanted));
    fences.push_back(backend->record(TypeParam::stream(5), Timing::wanted));
  }
  if (backend->capabilities().streams) {
    ASSERT_EQ(grow_pool(*backend, 2), 2U);
    submit(*backend, to_device, {}, {{fences.back(), {}}});
  }
  const auto all = collect(*backend, backend->capabilities().streams ? 4 : 3);
  Nanos last = before;
  for (const Fence fence : fences) {
    const auto found = std::ranges::find(all, fence, &Completion::fence);
    ASSERT_NE(found, all.end());
    EXPECT_EQ(found->ticket.id, 0U);
    EXPECT_TRUE(is_ok(*found));
    EXPECT_GE(found->ended, last);
    EXPECT_EQ(found->began, found->ended);
    last = found->ended;
  }
  for (const Completion& one : all) {
    if (one.ticket.id == 0) continue;
    EXPECT_GE(one.began, last) << "before what it had to wait for";
  }
  EXPECT_LE(last, backend->now());
}

TYPED_TEST_P(BackendConformance, RefusesCopiesThatNoLaneMakes) {
  const auto backend = TypeParam::open(4, 4);
  ASSERT_EQ(grow_pool(*backend, 4), 4U);
  const Place device{Tier::device, 0};
  const Place pool{Tier::pool, 0};
  const Copy load{pool, device, 1};
  const Copy write{{Tier::device, 1}, {Tier::pool, 1}, 1};
  EXPECT_THROW(backend->submit({}, {}), LogicError) << "of no lane";
  for (const auto& copies : {std::vector<Copy>{load, write},
                             {{device, device, 1}},
                             {{pool, pool, 1}},
                             {{device, {Tier::disk, 0}, 1}},
                             {{{Tier::disk, 0}, device, 1}}}) {
    EXPECT_THROW(backend->submit(copies, {}), LogicError);
  }
  backend->wait(forever);
  std::array<Completion, 1> none;
  EXPECT_EQ(backend->poll(none), 0U);
}

TYPED_TEST_P(BackendConformance, RefusesFramesOutOfRange) {
  const auto backend = TypeParam::open(4, 8);
  ASSERT_EQ(grow_pool(*backend, 6), 6U);
  for (const Lane lane : {to_device, to_pool}) {
    EXPECT_THROW(submit(*backend, lane, {{4, 0, 1}}), LogicError);
    EXPECT_THROW(submit(*backend, lane, {{3, 0, 2}}), LogicError);
    EXPECT_THROW(submit(*backend, lane, {{0, 6, 1}}), LogicError) << "grown to 6 only";
    EXPECT_THROW(submit(*backend, lane, {{0, 5, 2}}), LogicError);
    EXPECT_THROW(submit(*backend, lane, {{no_frame, 0, 1}}), LogicError);
    EXPECT_THROW(submit(*backend, lane, {{0, no_frame, 1}}), LogicError);
    EXPECT_THROW(submit(*backend, lane, {{1, 1, 0xffffffff}}), LogicError) << "must not wrap";
    EXPECT_THROW(submit(*backend, lane, {{0, 0, 1}, {4, 1, 1}}), LogicError);
  }
  EXPECT_THROW(static_cast<void>(backend->address(4)), LogicError);
  backend->wait(forever);  // returns, since nothing of the above was started
  std::array<Completion, 1> none;
  EXPECT_EQ(backend->poll(none), 0U);
}

TYPED_TEST_P(BackendConformance, RefusesToWaitForWhatWasNeverSubmitted) {
  const auto backend = TypeParam::open(2, 2);
  ASSERT_EQ(grow_pool(*backend, 2), 2U);
  EXPECT_THROW(submit(*backend, to_device, {{0, 0, 1}}, {after({to_device, 1})}), LogicError);
  EXPECT_THROW(submit(*backend, to_device, {{0, 0, 1}}, {after({to_pool, 1})}), LogicError);
  EXPECT_THROW(submit(*backend, to_device, {{0, 0, 1}}, {{Fence{12345}, {}}}), LogicError);
  EXPECT_THROW(backend->depend(TypeParam::stream(0), after({to_device, 1})), LogicError);
}

TYPED_TEST_P(BackendConformance, WaitReturnsWhenNothingIsInFlight) {
  const auto backend = TypeParam::open(2, 2);
  backend->wait(forever);
  ASSERT_EQ(grow_pool(*backend, 2), 2U);
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{0, 0, 2}})));
  backend->wait(forever);
}

TYPED_TEST_P(BackendConformance, WaitReturnsWhileSomethingIsThereToPoll) {
  const auto backend = TypeParam::open(4, 4);
  ASSERT_EQ(grow_pool(*backend, 4), 4U);
  submit(*backend, to_pool, {{0, 0, 1}});
  submit(*backend, to_pool, {{1, 1, 1}});
  std::array<Completion, 1> one;
  std::size_t ended = 0;
  while (ended < 2) {
    backend->wait(forever);
    ended += backend->poll(one);
  }
  backend->wait(0);
  EXPECT_EQ(backend->poll(one), 0U);
}

TYPED_TEST_P(BackendConformance, PollWithoutRoomLosesNothing) {
  const auto backend = TypeParam::open(2, 2);
  ASSERT_EQ(grow_pool(*backend, 2), 2U);
  submit(*backend, to_pool, {{0, 0, 1}});
  backend->wait(forever);
  EXPECT_EQ(backend->poll({}), 0U);
  EXPECT_EQ(collect(*backend, 1).size(), 1U);
}

// One thread at a time, but not always the same: the one that submitted may be gone by then.
TYPED_TEST_P(BackendConformance, ThreadsMayTakeTurns) {
  const auto backend = TypeParam::open(256, 256);
  ASSERT_EQ(grow_pool(*backend, 256), 256U);
  for (std::uint32_t i = 0; i < 256; ++i) fill<TypeParam>(*backend, i, i);
  std::thread([&] { submit(*backend, to_pool, {{0, 0, 256}}); }).join();
  ASSERT_EQ(collect(*backend, 1).size(), 1U);
  for (std::uint32_t i = 0; i < 256; ++i) fill<TypeParam>(*backend, i, 999);
  std::thread([&] {
    for (std::uint32_t i = 0; i < 256; ++i) submit(*backend, to_device, {{i, i, 1}});
  }).join();
  const auto all = collect(*backend, 256);
  ASSERT_EQ(all.size(), 256U);
  for (const Completion& completion : all) EXPECT_TRUE(is_ok(completion));
  for (std::uint32_t i = 0; i < 256; ++i) EXPECT_TRUE(holds<TypeParam>(*backend, i, i));
}

TYPED_TEST_P(BackendConformance, CanBeDestroyedWhileCopiesAreInFlight) {
  for (int round = 0; round < 4; ++round) {
    const auto backend = TypeParam::open(384, 512);
    ASSERT_EQ(grow_pool(*backend, 512), 512U);
    const Ticket write = submit(*backend, to_pool, {{0, 0, 128}});
    submit(*backend, to_device, {{128, 256, 128}});
    submit(*backend, to_device, {{256, 0, 128}}, {after(write)});
  }
}

REGISTER_TYPED_TEST_SUITE_P(BackendConformance, SaysWhatItHas, TiersAreResizedBothWays,
                            WhatIsWithinTheNewSizeStays, SingleFramesComeBack, RunsComeBack,
                            OneTicketHasManyCopies, TicketWithoutCopiesEnds, EveryTicketEndsOnce,
                            TicketsCountUpWithinTheirLane, DependentTicketsSeeWhatTheyWaitFor,
                            OneTicketWaitsForSeveral, WaitsForATicketThatWasPolledLongAgo,
                            CopiesWaitForFences, StreamsWaitForTickets, StreamsWaitForEachOther,
                            DuplicatesInTheOrderOfTheStream, TellsWhenFencesPass,
                            RefusesCopiesThatNoLaneMakes, RefusesFramesOutOfRange,
                            RefusesToWaitForWhatWasNeverSubmitted, WaitReturnsWhenNothingIsInFlight,
                            WaitReturnsWhileSomethingIsThereToPoll, PollWithoutRoomLosesNothing,
                            ThreadsMayTakeTurns, CanBeDestroyedWhileCopiesAreInFlight);

}  // namespace pie::conformance
