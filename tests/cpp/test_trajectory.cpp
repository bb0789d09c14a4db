// What fixed histories cost on a simulated machine, exactly: a change of the order, the size or the
// number of copies shows here though every result is right. Where such a change is meant, the new
// figures go in, and their difference is what the change was worth.
#include <gtest/gtest.h>

#include <ostream>
#include <random>

#include "reference_model.hpp"

namespace pie {
namespace {

using testing::Model;
using testing::small_geometry;
using testing::small_machine;

struct Cost {
  Nanos now_ns = 0;  // what all of it took
  Nanos stall_ns = 0;
  std::uint64_t loads = 0;  // tickets
  std::uint64_t loaded_frames = 0;
  std::uint64_t writes = 0;
  std::uint64_t written_frames = 0;

  friend bool operator==(const Cost&, const Cost&) = default;
  friend std::ostream& operator<<(std::ostream& out, const Cost& cost) {
    return out << "{" << cost.now_ns << ", " << cost.stall_ns << ", " << cost.loads << ", "
               << cost.loaded_frames << ", " << cost.writes << ", " << cost.written_frames << "}";
  }
};

Cost cost_of(Model& model) {
  model.check();
  const SimCounts loads = model.sim().counts(Lane::pool_to_device);
  const SimCounts writes = model.sim().counts(Lane::device_to_pool);
  return {model.sim().now(), model.cache().stats().stall_ns,
          loads.tickets,     loads.frames,
          writes.tickets,    writes.frames};
}

// Copies end in the order of their submission, 20 us after it at the earliest.
SimOptions orderly_machine(std::uint32_t layers, std::uint32_t device_frames,
                           std::uint32_t pool_frames) {
  SimOptions options = small_machine(small_geometry(layers), device_frames, pool_frames);
  options.device_frames_max = 100;
  options.pool_frames_max = 1000;
  options.load = {.bytes_per_s = 0.5e9,
                  .latency_ns = 20'000,
                  .jitter_ns = 0,
                  .overhead_ns = 2'000,
                  .copies_at_once = 8};
  options.write = options.load;
  return options;
}

void steps(Model& model, const std::vector<StepEntry>& batch, int count,
           Reader reader = Reader::kernel) {
  for (int i = 0; i < count; ++i) model.step(batch, reader, model.layers());
}

TEST(Trajectory, OneSequenceBeyondTheDevice) {
  Model model(small_geometry(6), "fit", orderly_machine(6, 60, 1000));
  const SequenceId id = model.add();
  steps(model, {{id, 320}}, 1);
  steps(model, {{id, 1}}, 40);
  EXPECT_EQ(cost_of(model), (Cost{20228712, 12634518, 1050, 3874, 45, 132}));
}

TEST(Trajectory, SeveralSequencesStreamedWhole) {
  Model model(small_geometry(4), "fixed:1", orderly_machine(4, 60, 1000));
  std::vector<StepEntry> prompts;
  std::vector<StepEntry> tokens;
  for (std::uint32_t i = 0; i < 4; ++i) {
    prompts.push_back({model.add(), 60 + 20 * i});
    tokens.push_back({prompts.back().sequence, 1});
  }
  steps(model, prompts, 1);
  steps(model, tokens, 30);
  EXPECT_EQ(cost_of(model), (Cost{15367431, 11751185, 803, 2923, 59, 112}));
}

TEST(Trajectory, TurnsBetweenTwoSequences) {
  Model model(small_geometry(3), "fit", orderly_machine(3, 40, 300));
  const SequenceId first = model.add();
  const SequenceId second = model.add();
  for (int i = 0; i < 8; ++i) {
    steps(model, {{first, 23}}, 1);
    steps(model, {{second, 1}}, 3);
    steps(model, {{first, 1}, {second, 17}}, 1);
  }
  EXPECT_EQ(cost_of(model), (Cost{4464671, 821942, 97, 276, 54, 60}));
}

TEST(Trajectory, APromptOfSeveralWaves) {
  Model model(small_geometry(2), "fit", orderly_machine(2, 40, 400));
  const SequenceId id = model.add();
  steps(model, {{id, 700}}, 1, Reader::attend);
  steps(model, {{id, 500}}, 1, Reader::attend);
  EXPECT_EQ(cost_of(model), (Cost{8294618, 8192285, 505, 1446, 66, 148}));
}

TEST(Trajectory, ABudgetThatMoves) {
  Model model(small_geometry(3), "fit", orderly_machine(3, 80, 300));
  const SequenceId first = model.add();
  steps(model, {{first, 300}}, 1);
  const SequenceId second = model.fork(first);
  for (const std::uint32_t device : {30U, 60U, 16U, 80U}) {
    model.resize(device, 300);
    steps(model, {{first, 1}, {second, 3}}, 6);
  }
  EXPECT_EQ(cost_of(model), (Cost{6784872, 4651651, 554, 982, 36, 75}));
}

// The step after the cut fills what is partial now, and was full and in the pool before.
TEST(Trajectory, ACutIntoAFullBlock) {
  Model model(small_geometry(3), "fixed:1", orderly_machine(3, 40, 300));
  const SequenceId id = model.add();
  steps(model, {{id, 300}}, 1);
  for (int i = 0; i < 6; ++i) {
    steps(model, {{id, 1}}, 1);
    model.truncate(id, model.length(id) - 40);
    steps(model, {{id, 12}}, 2);
  }
  EXPECT_EQ(cost_of(model), (Cost{5145483, 3585813, 248, 861, 45, 81}));
}

// Steps, forks, cuts and budgets as a seed has it: for what no history above comes to.
void random_history(Model& model, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto pick = [&](std::uint64_t below) {
    return static_cast<std::uint32_t>(random() % below);
  };
  static_cast<void>(model.add());
  for (int i = 0; i < 2000; ++i) {
    auto some = model.salts().begin();
    std::advance(some, pick(model.salts().size()));
    const SequenceId id = some->first;
    try {
      switch (pick(12)) {
        case 0:
          if (model.salts().size() < 4) static_cast<void>(model.add());
          break;
        case 1:
          if (model.salts().size() < 5) static_cast<void>(model.fork(id));
          break;
        case 2:
          model.truncate(id, model.length(id) - std::min(model.length(id), pick(50)));
          break;
        case 3:
          model.resize(8 + pick(50), 60 + pick(200));
          break;
        case 4:
          if (model.salts().size() > 1) model.free(id);
          break;
        default:
          model.step({{id, pick(2) == 0 ? 1 : 1 + pick(60)}}, Reader::kernel, model.layers());
      }
    } catch (const CapacityError&) {
      if (model.salts().size() > 1) model.free(id);
    }
    model.check();
  }
}

TEST(Trajectory, ARandomHistoryThatStreamsWhatItMust) {
  Model model(small_geometry(3), "fit", orderly_machine(3, 40, 200));
  random_history(model, 1);
  EXPECT_EQ(cost_of(model), (Cost{337866373, 238342168, 15193, 36060, 3140, 4252}));
}

TEST(Trajectory, ARandomHistoryThatStreamsHalf) {
  Model model(small_geometry(3), "fixed:0.5", orderly_machine(3, 40, 200));
  random_history(model, 2);
  EXPECT_EQ(cost_of(model), (Cost{302961502, 201395028, 15770, 25508, 3339, 4336}));
}

// A link that fails now and then costs what it costs, and no more.
TEST(Trajectory, RetriesOnALinkThatFails) {
  SimOptions options = orderly_machine(4, 40, 400);
  options.faults.failed = 0.1;
  Model model(small_geometry(4), "fit", options);
  const SequenceId id = model.add();
  std::uint32_t failed = 0;
  for (int i = 0; i < 60; ++i) {
    try {
      steps(model, {{id, 7}}, 1);
    } catch (const IoError&) {
      ++failed;
    }
  }
  EXPECT_EQ(failed, 1U) << "a copy that fails three times fails its step";
  EXPECT_EQ(cost_of(model), (Cost{15019603, 7958859, 625, 2173, 95, 113}));
}

}  // namespace
}  // namespace pie
