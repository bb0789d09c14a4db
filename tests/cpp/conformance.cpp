// The conformance suite of backends: copies, what they wait for, streams, sizes, what is refused.
#include "conformance.hpp"

#include <algorithm>
#include <array>
#include <thread>
#include <vector>

namespace pie::conformance {

TEST_P(BackendConformance, SaysWhatItHas) {
  const auto backend = subject().open(8, 16);
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

TEST_P(BackendConformance, TiersAreResizedBothWays) {
  const auto backend = subject().open(4, 16);
  for (const std::uint32_t frames : {2U, 9U, 1U, 16U, 0U, 5U}) {
    EXPECT_EQ(grow_pool(*backend, frames), frames);
  }
  EXPECT_EQ(backend->pool_refusal(), "");
  for (const std::uint32_t frames : {4U, 1U, 3U, 4U}) {
    EXPECT_EQ(backend->resize_device(frames), frames);
  }
  EXPECT_LE(backend->resize_device(0xfffffffe), backend->capabilities().device_frames_max);
}

TEST_P(BackendConformance, WhatIsWithinTheNewSizeStays) {
  const auto backend = subject().open(4, 16);
  ASSERT_EQ(grow_pool(*backend, 16), 16U);
  subject().fill(*backend, 1, 7);
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{1, 3, 1}})));
  EXPECT_EQ(grow_pool(*backend, 4), 4U);
  EXPECT_EQ(backend->resize_device(2), 2U);
  EXPECT_THROW(submit(*backend, to_device, {{0, 4, 1}}), LogicError);
  EXPECT_THROW(submit(*backend, to_device, {{2, 3, 1}}), LogicError);
  EXPECT_TRUE(subject().holds(*backend, 1, 7));
  ASSERT_TRUE(is_ok(finish(*backend, to_device, {{0, 3, 1}})));
  EXPECT_TRUE(subject().holds(*backend, 0, 7));
  EXPECT_EQ(grow_pool(*backend, 16), 16U);
  EXPECT_EQ(backend->resize_device(4), 4U);
  ASSERT_TRUE(is_ok(finish(*backend, to_device, {{3, 3, 1}})));
  EXPECT_TRUE(subject().holds(*backend, 3, 7));
}

TEST_P(BackendConformance, SingleFramesComeBack) {
  const auto backend = subject().open(4, 16);
  ASSERT_EQ(grow_pool(*backend, 16), 16U);
  for (std::uint32_t i = 0; i < 16; ++i) {
    subject().fill(*backend, i % 4, i);
    ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{i % 4, i, 1}})));
  }
  for (std::uint32_t i = 16; i-- > 0;) {
    ASSERT_TRUE(is_ok(finish(*backend, to_device, {{(i + 1) % 4, i, 1}})));
    EXPECT_TRUE(subject().holds(*backend, (i + 1) % 4, i)) << "pool frame " << i;
  }
}

TEST_P(BackendConformance, RunsComeBack) {
  const auto backend = subject().open(128, 256);
  ASSERT_EQ(grow_pool(*backend, 256), 256U);
  for (std::uint32_t i = 0; i < 128; ++i) subject().fill(*backend, i, i);
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{0, 100, 128}})));
  for (std::uint32_t i = 0; i < 128; ++i) subject().fill(*backend, i, 999);
  ASSERT_TRUE(is_ok(finish(*backend, to_device, {{5, 103, 120}})));
  for (std::uint32_t i = 0; i < 128; ++i) {
    const bool copied = i >= 5 && i < 125;
    EXPECT_TRUE(subject().holds(*backend, i, copied ? i - 2 : 999)) << "device frame " << i;
  }
}

TEST_P(BackendConformance, OneTicketHasManyCopies) {
  const auto backend = subject().open(64, 64);
  ASSERT_EQ(grow_pool(*backend, 64), 64U);
  std::vector<Pair> out;
  std::vector<Pair> back;
  for (std::uint32_t i = 0; i < 64; ++i) {
    subject().fill(*backend, i, i);
    out.push_back({i, 63 - i, 1});
  }
  for (std::uint32_t i = 0; i < 64; i += 2) back.push_back({i, i, 2});
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, out)));
  ASSERT_TRUE(is_ok(finish(*backend, to_device, back)));
  for (std::uint32_t i = 0; i < 64; ++i) EXPECT_TRUE(subject().holds(*backend, i, 63 - i));
}

TEST_P(BackendConformance, TicketWithoutCopiesEnds) {
  const auto backend = subject().open(2, 2);
  EXPECT_TRUE(is_ok(finish(*backend, to_device, {})));
}

TEST_P(BackendConformance, EveryTicketEndsOnce) {
  const auto backend = subject().open(200, 200);
  ASSERT_EQ(grow_pool(*backend, 200), 200U);
  std::vector<Ticket> tickets;
  for (std::uint32_t i = 0; i < 200; ++i) {
    if (i < 100) subject().fill(*backend, i, i);
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

TEST_P(BackendConformance, TicketsCountUpWithinTheirLane) {
  const auto backend = subject().open(4, 4);
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
TEST_P(BackendConformance, DependentTicketsSeeWhatTheyWaitFor) {
  constexpr std::uint32_t frames = 40;
  const auto backend = subject().open(frames, frames);
  ASSERT_EQ(grow_pool(*backend, frames), frames);
  for (std::uint32_t i = 0; i < frames; ++i) subject().fill(*backend, i, i);
  std::vector<Dep> previous;
  for (std::uint32_t i = 0; i + 1 < frames; ++i) {
    previous = {after(submit(*backend, to_pool, {{i, i, 1}}, previous))};
    previous = {after(submit(*backend, to_device, {{i + 1, i, 1}}, previous))};
  }
  EXPECT_EQ(collect(*backend, std::size_t{2} * (frames - 1)).size(), std::size_t{2} * (frames - 1));
  EXPECT_TRUE(subject().holds(*backend, frames - 1, 0));
}

TEST_P(BackendConformance, OneTicketWaitsForSeveral) {
  const auto backend = subject().open(16, 16);
  ASSERT_EQ(grow_pool(*backend, 16), 16U);
  std::vector<Dep> writes;
  for (std::uint32_t i = 0; i < 8; ++i) {
    subject().fill(*backend, i, i);
    writes.push_back(after(submit(*backend, to_pool, {{i, i, 1}})));
  }
  submit(*backend, to_device, {{8, 0, 8}}, writes);
  submit(*backend, to_device, {},
         {{}, {backend->record(subject().stream(0), Timing::unwanted), {}}});
  EXPECT_EQ(collect(*backend, 10).size(), 10U);
  for (std::uint32_t i = 0; i < 8; ++i) EXPECT_TRUE(subject().holds(*backend, 8 + i, i));
}

TEST_P(BackendConformance, WaitsForATicketThatWasPolledLongAgo) {
  const auto backend = subject().open(2, 2);
  ASSERT_EQ(grow_pool(*backend, 2), 2U);
  subject().fill(*backend, 0, 7);
  const Ticket write = submit(*backend, to_pool, {{0, 0, 1}});
  ASSERT_EQ(collect(*backend, 1).size(), 1U);
  backend->depend(subject().stream(0), after(write));
  submit(*backend, to_device, {{1, 0, 1}}, {after(write)});
  ASSERT_EQ(collect(*backend, 1).size(), 1U);
  EXPECT_TRUE(subject().holds(*backend, 1, 7));
}

TEST_P(BackendConformance, CopiesWaitForFences) {
  const auto backend = subject().open(4, 4);
  ASSERT_EQ(grow_pool(*backend, 4), 4U);
  subject().fill(*backend, 0, 1);
  subject().write(*backend, subject().stream(5), 0, contents(*backend, 2));
  const Fence filled = backend->record(subject().stream(5), Timing::unwanted);
  const Ticket write = submit(*backend, to_pool, {{0, 0, 1}}, {{filled, {}}});
  // What is read on the stream is not loaded into before it was read.
  const auto read = subject().read(*backend, subject().stream(5), 0);
  const Fence done = backend->record(subject().stream(5), Timing::unwanted);
  submit(*backend, to_device, {{0, 1, 1}}, {{done, write}});
  ASSERT_EQ(collect(*backend, 2).size(), 2U);
  EXPECT_EQ(read(), contents(*backend, 2));
  ASSERT_TRUE(is_ok(finish(*backend, to_device, {{1, 0, 1}})));
  EXPECT_TRUE(subject().holds(*backend, 1, 2)) << "the write began before the frame was filled";
}

TEST_P(BackendConformance, StreamsWaitForTickets) {
  const auto backend = subject().open(4, 4);
  ASSERT_EQ(grow_pool(*backend, 4), 4U);
  subject().fill(*backend, 0, 1);
  subject().fill(*backend, 1, 2);
  const Ticket write = submit(*backend, to_pool, {{0, 0, 1}});
  const Ticket load = submit(*backend, to_device, {{1, 0, 1}}, {after(write)});
  order(*backend, subject().stream(5), load);
  const auto read = subject().read(*backend, subject().stream(5), 1);
  subject().synchronize(*backend, subject().stream(5));
  EXPECT_EQ(read(), contents(*backend, 1)) << "the stream did not wait for the load";
}

TEST_P(BackendConformance, StreamsWaitForEachOther) {
  const auto backend = subject().open(2, 2);
  ASSERT_EQ(grow_pool(*backend, 2), 2U);
  subject().fill(*backend, 0, 1);
  subject().write(*backend, subject().stream(5), 0, contents(*backend, 2));
  backend->depend(subject().stream(6),
                  {backend->record(subject().stream(5), Timing::unwanted), {}});
  const auto read = subject().read(*backend, subject().stream(6), 0);
  subject().synchronize(*backend, subject().stream(6));
  EXPECT_EQ(read(), contents(*backend, 2)) << "the second stream did not wait for the first";
}

TEST_P(BackendConformance, DuplicatesInTheOrderOfTheStream) {
  const auto backend = subject().open(6, 2);
  ASSERT_EQ(grow_pool(*backend, 2), 2U);
  for (FrameIndex i = 0; i < 6; ++i) subject().fill(*backend, i, 10 + i);
  subject().write(*backend, subject().stream(5), 0, contents(*backend, 1));
  const std::array pairs{Duplicate{0, 3}, Duplicate{1, 4}, Duplicate{0, 5}};
  backend->duplicate(subject().stream(5), pairs);
  subject().write(*backend, subject().stream(5), 0, contents(*backend, 2));
  backend->duplicate(subject().stream(5), {});
  subject().synchronize(*backend, subject().stream(5));
  EXPECT_TRUE(subject().holds(*backend, 3, 1));
  EXPECT_TRUE(subject().holds(*backend, 4, 11));
  EXPECT_TRUE(subject().holds(*backend, 5, 1));
  EXPECT_TRUE(subject().holds(*backend, 0, 2));
  const Duplicate beyond{0, 6};
  EXPECT_THROW(backend->duplicate(subject().stream(5), {&beyond, 1}), LogicError);
}

TEST_P(BackendConformance, TellsWhenFencesPass) {
  const auto backend = subject().open(2, 2);
  const Nanos before = backend->now();
  std::vector<Fence> fences;
  for (int i = 0; i < 3; ++i) {
    subject().write(*backend, subject().stream(5), 0, contents(*backend, 1));
    static_cast<void>(backend->record(subject().stream(5), Timing::unwanted));
    fences.push_back(backend->record(subject().stream(5), Timing::wanted));
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

TEST_P(BackendConformance, RefusesCopiesThatNoLaneMakes) {
  const auto backend = subject().open(4, 4);
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

TEST_P(BackendConformance, RefusesFramesOutOfRange) {
  const auto backend = subject().open(4, 8);
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

TEST_P(BackendConformance, RefusesToWaitForWhatWasNeverSubmitted) {
  const auto backend = subject().open(2, 2);
  ASSERT_EQ(grow_pool(*backend, 2), 2U);
  EXPECT_THROW(submit(*backend, to_device, {{0, 0, 1}}, {after({to_device, 1})}), LogicError);
  EXPECT_THROW(submit(*backend, to_device, {{0, 0, 1}}, {after({to_pool, 1})}), LogicError);
  EXPECT_THROW(submit(*backend, to_device, {{0, 0, 1}}, {{Fence{12345}, {}}}), LogicError);
  EXPECT_THROW(backend->depend(subject().stream(0), after({to_device, 1})), LogicError);
}

TEST_P(BackendConformance, WaitReturnsWhenNothingIsInFlight) {
  const auto backend = subject().open(2, 2);
  backend->wait(forever);
  ASSERT_EQ(grow_pool(*backend, 2), 2U);
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{0, 0, 2}})));
  backend->wait(forever);
}

TEST_P(BackendConformance, WaitReturnsWhileSomethingIsThereToPoll) {
  const auto backend = subject().open(4, 4);
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

TEST_P(BackendConformance, PollWithoutRoomLosesNothing) {
  const auto backend = subject().open(2, 2);
  ASSERT_EQ(grow_pool(*backend, 2), 2U);
  submit(*backend, to_pool, {{0, 0, 1}});
  backend->wait(forever);
  EXPECT_EQ(backend->poll({}), 0U);
  EXPECT_EQ(collect(*backend, 1).size(), 1U);
}

// One thread at a time, but not always the same: the one that submitted may be gone by then.
TEST_P(BackendConformance, ThreadsMayTakeTurns) {
  const auto backend = subject().open(256, 256);
  ASSERT_EQ(grow_pool(*backend, 256), 256U);
  for (std::uint32_t i = 0; i < 256; ++i) subject().fill(*backend, i, i);
  std::thread([&] { submit(*backend, to_pool, {{0, 0, 256}}); }).join();
  ASSERT_EQ(collect(*backend, 1).size(), 1U);
  for (std::uint32_t i = 0; i < 256; ++i) subject().fill(*backend, i, 999);
  std::thread([&] {
    for (std::uint32_t i = 0; i < 256; ++i) submit(*backend, to_device, {{i, i, 1}});
  }).join();
  const auto all = collect(*backend, 256);
  ASSERT_EQ(all.size(), 256U);
  for (const Completion& completion : all) EXPECT_TRUE(is_ok(completion));
  for (std::uint32_t i = 0; i < 256; ++i) EXPECT_TRUE(subject().holds(*backend, i, i));
}

TEST_P(BackendConformance, CanBeDestroyedWhileCopiesAreInFlight) {
  for (int round = 0; round < 4; ++round) {
    const auto backend = subject().open(384, 512);
    ASSERT_EQ(grow_pool(*backend, 512), 512U);
    const Ticket write = submit(*backend, to_pool, {{0, 0, 128}});
    submit(*backend, to_device, {{128, 256, 128}});
    submit(*backend, to_device, {{256, 0, 128}}, {after(write)});
  }
}

}  // namespace pie::conformance
