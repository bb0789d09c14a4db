// Policies are pure: each plan is judged against its snapshot alone.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "pie/error.hpp"
#include "pie/policy.hpp"

namespace pie {
namespace {

Snapshot make_snapshot(std::uint32_t layers, std::uint32_t device_frames,
                       const std::vector<BranchView>& branches) {
  Snapshot snapshot;
  snapshot.layers = layers;
  snapshot.device_frames = device_frames;
  snapshot.pool_frames = 1000000;
  snapshot.copy_frames_best = 8;
  snapshot.branches = branches;
  return snapshot;
}

TEST(Policy, FitStreamsNothingThatFits) {
  const std::vector<BranchView> branches{{4, 10, 1, true}, {4, 5, 1, false}};
  const Plan plan = make_policy("fit")->plan(make_snapshot(4, 4 * 17, branches));
  EXPECT_EQ(plan.streamed(), 0U);
  EXPECT_EQ(plan.ring_frames, 0U);
}

TEST(Policy, FitStreamsJustWhatDoesNotFit) {
  const std::vector<BranchView> branches{{30, 100, 1, true}};
  for (std::uint32_t device = 40; device < 3030; device += 13) {
    const Snapshot snapshot = make_snapshot(30, device, branches);
    const Plan plan = make_policy("fit")->plan(snapshot);
    EXPECT_LE(device_frames_needed(snapshot, plan), device);
    // No more than the excess and the ring: the device is full, but for rounding.
    if (plan.streamed() > 0 && plan.streamed() < 3000) {
      EXPECT_EQ(device_frames_needed(snapshot, plan), device);
    }
  }
}

TEST(Policy, FitSetsIdleSequencesAsideFirst) {
  const std::vector<BranchView> branches{{2, 20, 1, true}, {2, 20, 1, false}};
  const Plan plan = make_policy("fit")->plan(make_snapshot(2, 2 * 30, branches));
  EXPECT_EQ(plan.streamed_frames[0], 0U);
  EXPECT_EQ(plan.streamed_frames[1], 24U);
  EXPECT_EQ(plan.ring_frames, 0U);
}

TEST(Policy, FitStreamsWhatIsWantedThoughAllFits) {
  const std::vector<BranchView> branches{{4, 64, 1, true}, {4, 32, 1, true}};
  Snapshot snapshot = make_snapshot(4, 4000, branches);
  for (const std::uint32_t wanted : {1U, 100U, 384U, 1000U}) {
    snapshot.wanted_frames = wanted;
    const Plan plan = make_policy("adaptive")->plan(snapshot);
    EXPECT_EQ(plan.streamed(), std::min(wanted, 384U));
    EXPECT_GT(plan.ring_frames, 0U);
    EXPECT_TRUE(plan.write_behind);
  }
  snapshot.device_frames = 200;
  snapshot.wanted_frames = 1;
  EXPECT_GT(make_policy("adaptive")->plan(snapshot).streamed(), 384U + 8 - 200) << "what must be";
}

// A ring that finds room takes none from residents, so that no more is streamed than is wanted.
TEST(Policy, ARingThatIsLargerThanTheShareTakesWhatIsSpare) {
  const std::vector<BranchView> branches{{3, 6, 1, true}, {3, 6, 1, true}};
  Snapshot snapshot = make_snapshot(3, 1000, branches);
  snapshot.copy_frames_best = 128;
  const Plan plan = make_policy("fixed:0.25")->plan(snapshot);
  EXPECT_EQ(plan.streamed(), 9U);
  EXPECT_GT(plan.ring_frames, 36U);
  snapshot.device_frames = 50;  // of 42, and a ring of 5 beside them
  const Plan tight = make_policy("fixed:0.05")->plan(snapshot);
  EXPECT_LE(device_frames_needed(snapshot, tight), 50U);
  EXPECT_EQ(tight.streamed(), 2U);
}

TEST(Policy, FixedStreamsItsShareEvenWhereAllFits) {
  const std::vector<BranchView> branches{{4, 64, 1, true}, {4, 32, 0, true}};
  for (const auto& [name, share] : {std::pair{"fixed:0.25", 0.25}, std::pair{"fixed:1", 1.0}}) {
    const Plan plan = make_policy(name)->plan(make_snapshot(4, 4000, branches));
    EXPECT_EQ(plan.streamed(), static_cast<std::uint64_t>(share * 4 * 96));
    EXPECT_GT(plan.ring_frames, 0U);
    EXPECT_TRUE(plan.write_behind);
  }
}

TEST(Policy, FixedStreamsMoreWhereTheBudgetDemands) {
  const std::vector<BranchView> branches{{4, 100, 1, true}};
  const Snapshot snapshot = make_snapshot(4, 100, branches);
  const Plan fixed = make_policy("fixed:0.1")->plan(snapshot);
  EXPECT_EQ(fixed.streamed(), make_policy("fit")->plan(snapshot).streamed());
}

TEST(Policy, OffStreamsNothing) {
  const std::vector<BranchView> branches{{4, 100, 1, true}};
  const Snapshot snapshot = make_snapshot(4, 100, branches);
  const Plan plan = make_policy("off")->plan(snapshot);
  EXPECT_EQ(plan.streamed(), 0U);
  EXPECT_FALSE(plan.write_behind);
  EXPECT_GT(device_frames_needed(snapshot, plan), 100U);
}

TEST(Policy, EveryPlanThatCanFitFits) {
  std::minstd_rand random(3);
  const char* names[] = {"fit", "fixed:0.3", "fixed:1"};
  for (int i = 0; i < 20000; ++i) {
    const auto layers = static_cast<std::uint32_t>(1 + random() % 40);
    std::vector<BranchView> branches(1 + random() % 6);
    std::uint64_t pinned = 0;
    for (BranchView& view : branches) {
      view = {layers, static_cast<std::uint32_t>(random() % 50),
              static_cast<std::uint32_t>(random() % 3), random() % 3 != 0};
      pinned += std::uint64_t{view.pinned_blocks} * layers;
    }
    const auto device = static_cast<std::uint32_t>(pinned + 1 + random() % (layers * 60));
    const Snapshot snapshot = make_snapshot(layers, device, branches);
    const Plan plan = make_policy(names[i % 3])->plan(snapshot);
    ASSERT_LE(device_frames_needed(snapshot, plan), device);
    for (std::size_t s = 0; s < branches.size(); ++s) {
      ASSERT_LE(plan.streamed_frames[s], branches[s].full_blocks * layers);
    }
  }
}

TEST(Policy, StreamedBlocksAddUpAndAreEven) {
  for (std::uint32_t layers = 1; layers < 40; ++layers) {
    for (std::uint32_t frames = 0; frames < 200; ++frames) {
      std::uint32_t sum = 0;
      for (std::uint32_t layer = 0; layer < layers; ++layer) {
        const std::uint32_t blocks = streamed_blocks(frames, layer, layers);
        EXPECT_GE(blocks, frames / layers);
        EXPECT_LE(blocks, frames / layers + 1);
        sum += blocks;
      }
      EXPECT_EQ(sum, frames);
    }
  }
}

// Four sequences that grow by a token a step: what blocks fill moves few boundaries, seldom, and
// each the same way.
TEST(Policy, BoundariesStayWhereTheyAre) {
  constexpr std::uint32_t layers = 6;
  std::vector<BranchView> branches(4, {layers, 40, 1, true});
  std::uint32_t steps_that_moved = 0;
  for (int step = 0; step < 64; ++step) {
    branches[step % 4].full_blocks += step % 2 == 0 ? 1 : 0;
    Snapshot snapshot = make_snapshot(layers, layers * 100, branches);
    snapshot.growth_frames = layers / 2;
    const Plan plan = make_policy("fit")->plan(snapshot);
    ASSERT_LE(device_frames_needed(snapshot, plan), snapshot.device_frames);
    std::uint32_t moved = 0;
    for (std::size_t i = 0; i < branches.size(); ++i) {
      if (step > 0) {
        ASSERT_GE(plan.streamed_frames[i], branches[i].streamed_frames) << "step " << step;
        moved += plan.streamed_frames[i] > branches[i].streamed_frames ? 1 : 0;
      }
      branches[i].streamed_frames = plan.streamed_frames[i];
    }
    steps_that_moved += moved > 0 ? 1 : 0;
  }
  EXPECT_LE(steps_that_moved, 24U) << "32 blocks filled in each layer";
}

// Prompts beside idle sequences, of which some was set aside: while all would fit, and when it does
// not any more, what is in the pool already is what lies there.
TEST(Policy, WhatIsSetAsideStaysWhereItIs) {
  std::vector<BranchView> branches{{4, 40, 1, false}, {4, 40, 1, false}, {4, 0, 1, true}};
  branches[0].streamed_frames = 30;
  branches[1].streamed_frames = 18;
  for (std::uint32_t prompt = 0; prompt <= 24; prompt += 4) {  // all would fit up to 16 blocks
    branches.back().full_blocks = prompt;
    Snapshot snapshot = make_snapshot(4, 4 * 99, branches);
    snapshot.ring_frames = 8;
    const Plan plan = make_policy("fit")->plan(snapshot);
    EXPECT_EQ(plan.streamed_frames, (std::vector<std::uint32_t>{30, 18, 0})) << prompt;
    EXPECT_EQ(plan.ring_frames, 8U) << prompt;
  }
  branches.back().full_blocks = 0;
  Snapshot smaller = make_snapshot(4, 4 * 99, branches);
  smaller.pool_frames = 20;
  EXPECT_EQ(make_policy("fit")->plan(smaller).streamed(), 20U) << "of 48, in a pool made smaller";
  for (BranchView& view : branches) view.active = true;  // read, it comes back where there is room
  EXPECT_EQ(make_policy("fit")->plan(make_snapshot(4, 4 * 99, branches)).streamed(), 0U);
}

// Layers of two windows never share the ring: it is as large as the widest of them asks.
TEST(Policy, TheRingHoldsTwoOfTheWidestLayers) {
  const std::vector<BranchView> branches{{2, 60, 1, true, 0}, {28, 3, 1, true, 1}};
  const Snapshot snapshot = make_snapshot(30, 400, branches);
  const Plan plan = make_policy("fixed:1")->plan(snapshot);
  EXPECT_GE(plan.ring_frames, 2U * 60 - 2 * 60 / 8);
  EXPECT_LE(plan.ring_frames, 2U * 60);
}

TEST(Policy, FixedKeepsWithinThePool) {
  const std::vector<BranchView> branches{{4, 64, 1, true}, {4, 32, 0, true}};
  Snapshot snapshot = make_snapshot(4, 4000, branches);
  snapshot.pool_frames = 50;
  EXPECT_EQ(make_policy("fixed:1")->plan(snapshot).streamed(), 50U);
}

TEST(Policy, PlansAreForTheirSnapshot) {
  const std::vector<BranchView> branches{{4, 10, 1, true}, {4, 5, 0, false}};
  const Snapshot snapshot = make_snapshot(4, 40, branches);
  Plan plan = make_policy("fixed:0.5")->plan(snapshot);
  EXPECT_TRUE(is_plan_for(snapshot, plan));
  plan.streamed_frames[1] = 21;
  EXPECT_FALSE(is_plan_for(snapshot, plan)) << "more than there are";
  plan.streamed_frames[1] = 20;
  EXPECT_TRUE(is_plan_for(snapshot, plan));
  plan.ring_frames = 0;
  EXPECT_FALSE(is_plan_for(snapshot, plan)) << "nothing to stream through";
  plan.streamed_frames[0] = 0;
  EXPECT_TRUE(is_plan_for(snapshot, plan)) << "idle ones are not read";
  plan.streamed_frames.pop_back();
  EXPECT_FALSE(is_plan_for(snapshot, plan));
}

TEST(Policy, UnknownNamesAreRefused) {
  for (const char* name : {"", "fixed", "fixed:", "fixed:2", "fixed:-0.1", "fixed:0.5x", "Fit",
                           "Adaptive", "fixed:nan"}) {
    EXPECT_THROW(static_cast<void>(make_policy(name)), ConfigError) << name;
  }
}

}  // namespace
}  // namespace pie
