// The simulated backend: the conformance suite, with compute on the caller's thread and on streams,
// and what only it promises: a clock that can be foretold, links, faults, streams, no bytes at all.
#include <array>
#include <string>
#include <vector>

#include "conformance.hpp"
#include "pie/backends.hpp"

namespace pie {
namespace {

using namespace conformance;

constexpr Bytes frame_bytes = 1000;

SimOptions options_for(std::uint32_t device_frames, std::uint32_t pool_frames) {
  SimOptions options;
  options.device_frames = device_frames;
  options.device_frames_max = 1024;
  options.pool_frames = pool_frames;
  options.pool_frames_max = 2048;
  options.frame_bytes = frame_bytes;
  return options;
}

// Copies one after the other, at 1 byte a nanosecond after 100 ns of latency and 10 of overhead.
SimOptions simple_machine() {
  SimOptions options = options_for(64, 64);
  const SimLink link{.bytes_per_s = 1e9,
                     .latency_ns = 100,
                     .jitter_ns = 0,
                     .overhead_ns = 10,
                     .copies_at_once = 1};
  options.load = link;
  options.write = link;
  return options;
}

std::unique_ptr<SimBackend> open(const SimOptions& options) {
  auto sim = open_sim(options);
  EXPECT_EQ(sim->resize_pool(options.pool_frames).frames, options.pool_frames);
  return sim;
}

// ---- conformance --------------------------------------------------------------------------------

constexpr Work a_while{1'000'000};

SimBackend& sim(Backend& backend) { return dynamic_cast<SimBackend&>(backend); }

Subject simulated(std::string name, Subject::Open open) {
  return {.name = std::move(name),
          .open = std::move(open),
          .stream = [](std::uint32_t number) -> ComputeStream { return {number}; },
          .write =
              [](Backend& backend, ComputeStream stream, FrameIndex frame, const Contents& bytes) {
                std::byte* at = backend.address(frame);
                sim(backend).launch(stream, a_while, [at, bytes] { std::ranges::copy(bytes, at); });
              },
          .read = [](Backend& backend, ComputeStream stream, FrameIndex frame) -> Read {
            const std::byte* at = backend.address(frame);
            auto found = std::make_shared<Contents>(backend.capabilities().frame_stride);
            sim(backend).launch(stream, a_while,
                                [at, found] { std::copy_n(at, found->size(), found->data()); });
            return [found] { return *found; };
          },
          .synchronize = [](Backend& backend,
                            ComputeStream stream) { sim(backend).synchronize(stream); }};
}

std::unique_ptr<Backend> caller_computes(std::uint32_t device_frames, std::uint32_t pool_frames) {
  return open_sim(options_for(device_frames, pool_frames));
}

std::unique_ptr<Backend> streams_compute(std::uint32_t device_frames, std::uint32_t pool_frames) {
  SimOptions options = options_for(device_frames, pool_frames);
  options.streams = true;
  options.load.jitter_ns = 100'000;
  options.write.jitter_ns = 100'000;
  return open_sim(options);
}

INSTANTIATE_TEST_SUITE_P(Sim, BackendConformance,
                         testing::Values(simulated("CallerComputes", caller_computes),
                                         simulated("StreamsCompute", streams_compute)),
                         subject_name);

// ---- what is known of tickets
// ----------------------------------------------------------------------

TEST(SimTickets, FailuresAreNotRememberedForEver) {
  SimOptions options = simple_machine();
  options.faults.failed = 1;
  const auto sim = open(options);
  std::vector<Ticket> failed;
  for (int i = 0; i < 3000; ++i) {
    failed.push_back(submit(*sim, to_pool, {{0, 0, 1}}));
    ASSERT_EQ(collect(*sim, 1).size(), 1U);
  }
  sim->set_faults({});
  submit(*sim, to_device, {{1, 0, 1}}, {after(failed.back())});
  EXPECT_EQ(collect(*sim, 1).at(0).status, Status::failed);
  submit(*sim, to_device, {{1, 0, 1}}, {after(failed.front())});
  EXPECT_TRUE(is_ok(collect(*sim, 1).at(0)));
}

TEST(SimTickets, APoolThatGrowsSlowlySaysWhen) {
  SimOptions options = simple_machine();
  options.pool_growth_ns = 5000;
  const auto sim = open_sim(options);
  PoolSize size = sim->resize_pool(8);
  EXPECT_TRUE(size.pending);
  EXPECT_EQ(size.frames, 0U);
  EXPECT_THROW(submit(*sim, to_pool, {{0, 0, 1}}), LogicError);
  sim->wait(4999);
  EXPECT_TRUE(sim->resize_pool(8).pending);
  sim->wait(forever);
  EXPECT_EQ(sim->now(), 5000);
  size = sim->resize_pool(8);
  EXPECT_FALSE(size.pending);
  EXPECT_EQ(size.frames, 8U);
  EXPECT_TRUE(is_ok(finish(*sim, to_pool, {{0, 7, 1}})));
}

// ---- time ---------------------------------------------------------------------------------------

TEST(SimClock, StandsStillUnlessWaitedFor) {
  const auto sim = open(simple_machine());
  EXPECT_EQ(sim->now(), 0);
  const Ticket ticket = submit(*sim, to_pool, {{0, 0, 3}});
  std::array<Completion, 1> ended;
  EXPECT_EQ(sim->poll(ended), 0U);
  EXPECT_EQ(sim->now(), 0);
  sim->wait(1000);
  EXPECT_EQ(sim->now(), 1000) << "not yet there";
  sim->wait(forever);
  EXPECT_EQ(sim->now(), 100 + 10 + 3000);
  ASSERT_EQ(sim->poll(ended), 1U);
  EXPECT_EQ(ended[0].ticket, ticket);
  EXPECT_EQ(ended[0].began, 0);
  EXPECT_EQ(ended[0].ended, 3110);
  sim->wait(forever);
  EXPECT_EQ(sim->now(), 3110) << "nothing is in flight";
}

TEST(SimClock, CopiesProgressWhileTheCallerComputes) {
  const auto sim = open(simple_machine());
  submit(*sim, to_pool, {{0, 0, 1}});
  sim->compute({}, {1109});
  std::array<Completion, 1> ended;
  EXPECT_EQ(sim->poll(ended), 0U);
  sim->compute({}, {1});
  EXPECT_EQ(sim->poll(ended), 1U);
  EXPECT_EQ(sim->now(), 1110);
}

TEST(SimClock, ALaneServesCopiesInTurnAndLanesRunBesideEachOther) {
  const auto sim = open(simple_machine());
  submit(*sim, to_pool, {{0, 0, 1}, {1, 5, 1}});
  submit(*sim, to_device, {{8, 8, 2}});
  const auto all = collect(*sim, 2);
  ASSERT_EQ(all.size(), 2U);
  EXPECT_EQ(all[0].ended, 100 + 10 + 2000);
  EXPECT_EQ(all[1].ended, 2 * (100 + 10 + 1000));
}

TEST(SimClock, LatenciesOverlapAndBytesDoNot) {
  SimOptions options = simple_machine();
  options.write.copies_at_once = 4;
  const auto sim = open(options);
  submit(*sim, to_pool, {{0, 0, 1}, {2, 2, 1}, {4, 4, 1}, {6, 6, 1}, {8, 8, 1}});
  EXPECT_EQ(collect(*sim, 1).at(0).ended, 100 + 5 * (10 + 1000)) << "the fifth waits in no gap";
}

TEST(SimClock, WithJitterCopiesOvertakeAndTheSeedSaysHow) {
  const auto order = [](std::uint64_t seed) {
    SimOptions options = simple_machine();
    options.write.copies_at_once = 16;
    options.write.jitter_ns = 1'000'000;
    options.seed = seed;
    const auto sim = open(options);
    for (std::uint32_t i = 0; i < 16; ++i) submit(*sim, to_pool, {{i, i, 1}});
    std::vector<std::uint64_t> ids;
    for (const Completion& completion : collect(*sim, 16)) ids.push_back(completion.ticket.id);
    return ids;
  };
  EXPECT_EQ(order(7), order(7));
  EXPECT_NE(order(7), order(8));
  EXPECT_FALSE(std::ranges::is_sorted(order(7)));
}

TEST(SimClock, SaysWhatCopiesAreLargeEnough) {
  SimOptions options = simple_machine();
  options.frame_bytes = 8;
  EXPECT_EQ(open_sim(options)->capabilities().copy_bytes_best, 80U) << "8 overheads of 10 ns";
  options.copy_bytes_best = 4096;
  EXPECT_EQ(open_sim(options)->capabilities().copy_bytes_best, 4096U);
}

TEST(SimClock, CountsWhatMoved) {
  const auto sim = open(simple_machine());
  submit(*sim, to_pool, {{0, 0, 1}, {2, 2, 3}});
  submit(*sim, to_pool, {{8, 8, 1}});
  collect(*sim, 2);
  EXPECT_EQ(sim->counts(to_pool).tickets, 2U);
  EXPECT_EQ(sim->counts(to_pool).copies, 3U);
  EXPECT_EQ(sim->counts(to_pool).frames, 5U);
  EXPECT_EQ(sim->counts(to_device).tickets, 0U);
}

// ---- streams ------------------------------------------------------------------------------------

SimOptions streaming_machine() {
  SimOptions options = simple_machine();
  options.streams = true;
  return options;
}

TEST(SimStream, ComputesBesideTheCallerAndInOrder) {
  const auto sim = open(streaming_machine());
  std::vector<std::pair<int, Nanos>> done;
  for (int i = 0; i < 3; ++i) {
    sim->launch({}, {50}, [&, i] { done.emplace_back(i, sim->now()); });
  }
  sim->launch({1}, {70}, [&] { done.emplace_back(9, sim->now()); });
  EXPECT_EQ(sim->now(), 0);
  sim->synchronize({});
  EXPECT_EQ(sim->now(), 150);
  EXPECT_EQ(done, (std::vector<std::pair<int, Nanos>>{{0, 50}, {9, 70}, {1, 100}, {2, 150}}));
}

TEST(SimStream, FencesHoldCopiesBack) {
  const auto sim = open(streaming_machine());
  fill(*sim, 0, 1);
  ASSERT_TRUE(is_ok(finish(*sim, to_pool, {{0, 0, 1}})));
  const Nanos began = sim->now();
  fill(*sim, 1, 2);
  bool intact = false;
  sim->launch({}, {5000}, [&] { intact = holds(*sim, 1, 2); });
  const Fence fence = sim->record({}, Timing::unwanted);
  EXPECT_GT(fence.id, 0U);
  submit(*sim, to_device, {{1, 0, 1}}, {{fence, {}}});
  submit(*sim, to_device, {{2, 0, 1}});
  const auto all = collect(*sim, 2);
  ASSERT_EQ(all.size(), 2U);
  EXPECT_EQ(all[0].ended, began + 1110) << "what does not wait goes first";
  EXPECT_EQ(all[1].began, began + 5000);
  EXPECT_TRUE(intact);
  EXPECT_TRUE(holds(*sim, 1, 1));
  EXPECT_EQ(sim->record({}, Timing::unwanted).id, 0U) << "nothing is ahead";
}

// As on the host: what was submitted first goes first once it may.
TEST(SimStream, WhatWasHeldGoesBeforeWhatCameLater) {
  const auto sim = open(streaming_machine());
  sim->launch({}, {500}, [] {});
  submit(*sim, to_pool, {{0, 0, 1}}, {{sim->record({}, Timing::unwanted), {}}});
  for (FrameIndex frame = 1; frame < 4; ++frame) submit(*sim, to_pool, {{frame, frame, 1}});
  const auto all = collect(*sim, 4);
  ASSERT_EQ(all.size(), 4U);
  EXPECT_EQ(all[1].ticket.id, 1U) << "second, since one had begun before it might";
}

TEST(SimStream, WithoutTheFenceTheReaderSeesIt) {
  const auto sim = open(streaming_machine());
  fill(*sim, 1, 2);
  bool intact = true;
  sim->launch({}, {5000}, [&] { intact = holds(*sim, 1, 2); });
  submit(*sim, to_device, {{1, 0, 1}});
  collect(*sim, 1);
  sim->synchronize({});
  EXPECT_FALSE(intact);
}

TEST(SimStream, WaitsForATicket) {
  const auto sim = open(streaming_machine());
  fill(*sim, 0, 1);
  const Ticket write = submit(*sim, to_pool, {{0, 0, 1}});
  const Ticket load = submit(*sim, to_device, {{1, 0, 1}}, {after(write)});
  sim->depend({}, after(load));
  bool there = false;
  sim->launch({}, {30}, [&] { there = holds(*sim, 1, 1); });
  sim->synchronize({});
  EXPECT_TRUE(there);
  EXPECT_EQ(sim->now(), 2 * 1110 + 30);
}

// ---- faults -------------------------------------------------------------------------------------

std::uint32_t count_of(const std::vector<Completion>& all, Status status) {
  return static_cast<std::uint32_t>(std::ranges::count(all, status, &Completion::status));
}

// A hundred tickets of one frame, one after the other.
std::vector<Completion> run_hundred(SimBackend& sim, Lane lane) {
  std::vector<Completion> all;
  for (std::uint32_t i = 0; i < 100; ++i) {
    all.push_back(finish(sim, lane, {{i % 64, i % 64, 1}}));
  }
  return all;
}

TEST(SimFaults, WithoutAnyEverythingIsOk) {
  const auto sim = open(simple_machine());
  EXPECT_EQ(count_of(run_hundred(*sim, to_pool), Status::ok), 100U);
  EXPECT_EQ(count_of(run_hundred(*sim, to_device), Status::ok), 100U);
}

TEST(SimFaults, FailedAndCorruptComeAsOftenAsAskedFor) {
  SimOptions options = simple_machine();
  options.faults.failed = 0.2;
  options.faults.corrupt = 0.3;
  const auto sim = open(options);
  const auto writes = run_hundred(*sim, to_pool);
  EXPECT_NEAR(count_of(writes, Status::failed), 20, 12);
  EXPECT_EQ(count_of(writes, Status::corrupt), 0U);
  const auto loads = run_hundred(*sim, to_device);
  EXPECT_NEAR(count_of(loads, Status::failed), 20, 12);
  EXPECT_NEAR(count_of(loads, Status::corrupt), 24, 13);
  for (const Completion& completion : loads) EXPECT_EQ(completion.error != 0, !is_ok(completion));
}

TEST(SimFaults, RottenFramesAreCorruptUntilTheyAreWrittenAgain) {
  SimOptions options = simple_machine();
  options.faults.rotten = 1;
  auto sim = open(options);
  EXPECT_TRUE(is_ok(finish(*sim, to_pool, {{0, 0, 4}})));
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(finish(*sim, to_device, {{8, 3, 1}}).status, Status::corrupt);
  }
  EXPECT_TRUE(is_ok(finish(*sim, to_device, {{8, 4, 1}}))) << "not one of them";
}

TEST(SimFaults, SlowCopiesTakeLonger) {
  SimOptions options = simple_machine();
  options.faults.slow = 1;
  options.faults.slow_factor = 3;
  const auto sim = open(options);
  EXPECT_EQ(finish(*sim, to_pool, {{0, 0, 1}}).ended, 3 * 1110);
}

TEST(SimFaults, ALyingLinkIsFastAtFirst) {
  SimOptions options = simple_machine();
  options.faults.lying = 1;
  options.faults.lying_factor = 4;
  options.faults.lying_bytes = 2 * frame_bytes;
  const auto sim = open(options);
  const auto taken = [&] {
    const Completion completion = finish(*sim, to_pool, {{0, 0, 1}});
    return completion.ended - completion.began;
  };
  EXPECT_EQ(taken(), 110 + 250);
  EXPECT_EQ(taken(), 110 + 250);
  EXPECT_EQ(taken(), 1110);
}

TEST(SimFaults, TheOneTicketThatWasNamedFails) {
  SimOptions options = simple_machine();
  options.faults.failed_ticket = 3;
  const auto sim = open(options);
  for (std::uint32_t i = 1; i < 6; ++i) {
    EXPECT_EQ(is_ok(finish(*sim, i % 2 == 0 ? to_pool : to_device, {{0, 0, 1}})), i != 3);
  }
}

TEST(SimFaults, GrowthMayBeRefused) {
  SimOptions options = simple_machine();
  options.faults.refused_growth = 2;
  const auto sim = open_sim(options);
  EXPECT_EQ(sim->resize_pool(10).frames, 10U);
  EXPECT_EQ(sim->resize_pool(20).frames, 10U);
  EXPECT_NE(sim->pool_refusal(), "");
  EXPECT_EQ(sim->resize_pool(20).frames, 20U);
  EXPECT_EQ(sim->pool_refusal(), "");
  EXPECT_EQ(sim->resize_pool(4000).frames, 2048U);
  EXPECT_NE(sim->pool_refusal().find("2048"), std::string::npos);
}

TEST(SimFaults, ABrokenLinkFailsEverythingUntilItIsMended) {
  const auto sim = open(simple_machine());
  sim->set_faults({.failed = 1});
  EXPECT_FALSE(is_ok(finish(*sim, to_pool, {{0, 0, 1}})));
  sim->set_faults({});
  EXPECT_TRUE(is_ok(finish(*sim, to_pool, {{0, 0, 1}})));
  EXPECT_TRUE(sim->health().ok);
}

TEST(SimFaults, ALostDeviceSaysSo) {
  const auto sim = open(simple_machine());
  sim->lose();
  EXPECT_FALSE(is_ok(finish(*sim, to_pool, {{0, 0, 1}})));
  EXPECT_FALSE(sim->health().ok);
  EXPECT_NE(sim->health().first_error, "");
}

TEST(SimFaults, FailureIsInheritedAlongAChain) {
  SimOptions options = simple_machine();
  options.faults.failed_ticket = 1;
  const auto sim = open(options);
  const Ticket first = submit(*sim, to_pool, {{0, 0, 1}});
  const Ticket second = submit(*sim, to_device, {{1, 0, 1}}, {after(first)});
  const Ticket third = submit(*sim, to_pool, {{1, 1, 1}}, {after(second)});
  const Ticket other = submit(*sim, to_pool, {{2, 2, 1}});
  const auto all = collect(*sim, 4);
  for (const Ticket ticket : {first, second, third}) EXPECT_FALSE(is_ok(*find(all, ticket)));
  EXPECT_TRUE(is_ok(*find(all, other)));
}

// ---- bytes --------------------------------------------------------------------------------------

TEST(SimBytes, TwoCopiesOfOneFrameAreRefused) {
  const auto sim = open(simple_machine());
  submit(*sim, to_device, {{0, 0, 4}});
  EXPECT_THROW(submit(*sim, to_device, {{3, 9, 1}}), LogicError);
}

TEST(SimBytes, TwoReadersOfOneFrameAreNot) {
  const auto sim = open(simple_machine());
  submit(*sim, to_device, {{0, 0, 4}});
  submit(*sim, to_device, {{4, 0, 4}});
  EXPECT_EQ(collect(*sim, 2).size(), 2U);
}

// A copy may read its source at its start or at its end, and its target is not to be read between.
TEST(SimBytes, MoveWhenTheSeedSays) {
  std::uint32_t early = 0;
  for (std::uint64_t seed = 1; seed <= 100; ++seed) {
    SimOptions options = simple_machine();
    options.seed = seed;
    const auto sim = open(options);
    fill(*sim, 0, 1);
    submit(*sim, to_pool, {{0, 0, 1}});
    fill(*sim, 0, 2);
    collect(*sim, 1);
    ASSERT_TRUE(is_ok(finish(*sim, to_device, {{1, 0, 1}})));
    early += holds(*sim, 1, 1) ? 1 : 0;
    ASSERT_TRUE(holds(*sim, 1, 1) || holds(*sim, 1, 2));
    fill(*sim, 2, 3);
    submit(*sim, to_device, {{2, 0, 1}});
    EXPECT_FALSE(holds(*sim, 2, 3)) << "garbage, or what is to come";
  }
  EXPECT_NEAR(early, 50, 25);
}

TEST(SimBytes, FailedCopiesAndWhatWasGivenBackAreGarbage) {
  SimOptions options = simple_machine();
  options.faults.silent = 1;
  const auto sim = open(options);
  fill(*sim, 0, 1);
  fill(*sim, 63, 1);
  ASSERT_TRUE(is_ok(finish(*sim, to_pool, {{0, 0, 1}})));
  ASSERT_TRUE(is_ok(finish(*sim, to_device, {{1, 0, 1}})));
  EXPECT_FALSE(holds(*sim, 1, 1));
  EXPECT_EQ(sim->resize_device(63), 63U);
  EXPECT_THROW(static_cast<void>(sim->address(63)), LogicError);
  EXPECT_EQ(sim->resize_device(64), 64U);
  EXPECT_FALSE(holds(*sim, 63, 1));
  EXPECT_TRUE(holds(*sim, 0, 1));
}

TEST(SimBytes, FramesInFlightCannotBeGivenBack) {
  const auto sim = open(simple_machine());
  submit(*sim, to_pool, {{10, 20, 2}});
  EXPECT_THROW(sim->resize_device(11), LogicError);
  EXPECT_THROW(sim->resize_pool(21).frames, LogicError);
  EXPECT_EQ(sim->resize_device(12), 12U);
  EXPECT_EQ(sim->resize_pool(22).frames, 22U);
}

// A machine of 1 TiB of device memory and 8 of pool, in frames of 1 MiB.
TEST(SimBytes, NoneAreNeededForAHugeMachine) {
  SimOptions options;
  options.device_frames = 1U << 20U;
  options.pool_frames = 8U << 20U;
  options.frame_bytes = Bytes{1} << 20U;
  options.carry_bytes = false;
  const auto sim = open(options);
  EXPECT_EQ(sim->address(1), sim->address(0) + options.frame_bytes);
  EXPECT_TRUE(is_ok(finish(*sim, to_pool, {{0, 1U << 22U, 1U << 20U}})));
  EXPECT_NEAR(static_cast<double>(sim->now()), (1ULL << 40U) / 25.0, 20'000);
}

TEST(SimOptions, RefusesWhatCannotBe) {
  SimOptions options = simple_machine();
  options.frame_bytes = 0;
  EXPECT_THROW(static_cast<void>(open_sim(options)), ConfigError);
  options = simple_machine();
  options.device_frames = 0;
  EXPECT_THROW(static_cast<void>(open_sim(options)), ConfigError);
  options = simple_machine();
  options.device_frames_max = 1;
  EXPECT_THROW(static_cast<void>(open_sim(options)), ConfigError);
  options = simple_machine();
  options.write.bytes_per_s = 0;
  EXPECT_THROW(static_cast<void>(open_sim(options)), ConfigError);
  options = simple_machine();
  options.load.copies_at_once = 0;
  EXPECT_THROW(static_cast<void>(open_sim(options)), ConfigError);
}

}  // namespace
}  // namespace pie
