// The cache against a reference model, with every reader: seeded random steps, forks, truncations,
// aborts and failures, every short history, and every copy and growth failing in turn; every
// invariant checked after every operation.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "pie/backends.hpp"
#include "reference_model.hpp"

namespace pie {
namespace {

using testing::Model;
using testing::small_geometry;
using testing::small_machine;

// ---- seeded random runs -------------------------------------------------------------------------

struct Swarm {
  explicit Swarm(std::uint64_t seed) : random(seed) {}
  std::mt19937_64 random;

  std::uint32_t pick(std::uint32_t below) { return static_cast<std::uint32_t>(random() % below); }
};

std::vector<StepEntry> random_batch(Swarm& swarm, const Model& model) {
  std::vector<StepEntry> batch;
  for (const auto& [id, salts] : model.salts()) {
    if (swarm.pick(3) == 0) continue;
    const std::uint32_t length[] = {
        1, 1, 1, 1 + swarm.pick(16), 1 + swarm.pick(90), 16 * (1 + swarm.pick(5))};
    batch.push_back({id, length[swarm.pick(6)]});
  }
  std::shuffle(batch.begin(), batch.end(), swarm.random);
  return batch;
}

void random_operation(Swarm& swarm, Model& model) {
  const auto& salts = model.salts();
  auto some = salts.begin();
  if (!salts.empty()) std::advance(some, swarm.pick(static_cast<std::uint32_t>(salts.size())));
  switch (swarm.pick(11)) {
    case 0:
      if (salts.size() < 4) model.add();
      break;
    case 3:
      if (!salts.empty() && salts.size() < 5) model.fork(some->first);
      break;
    case 1:
      if (!salts.empty()) model.free(some->first);
      break;
    case 2:
      if (!salts.empty()) {
        const auto length = static_cast<std::uint32_t>(some->second.size());
        model.truncate(some->first, swarm.pick(length + 1));
      }
      break;
    default: {
      const std::vector<StepEntry> batch = random_batch(swarm, model);
      if (batch.empty()) break;
      const Reader readers[] = {Reader::attend, Reader::attend, Reader::gather, Reader::pages};
      const Reader reader = readers[swarm.pick(4)];
      const bool aborts = swarm.pick(6) == 0;
      model.step(batch, reader, aborts ? swarm.pick(model.layers()) : model.layers());
    }
  }
}

struct Tally {
  std::uint64_t streamed = 0;
  std::uint64_t capacity_errors = 0;
  std::uint64_t io_errors = 0;
  std::uint64_t refusals = 0;
};

// A geometry in which, of some seeds, some layers have a window.
Geometry random_geometry(Swarm& swarm) {
  Geometry geometry = small_geometry(1 + swarm.pick(4));
  if (swarm.pick(3) == 0) {
    for (std::uint32_t layer = 0; layer < geometry.layers; ++layer) {
      geometry.windows.push_back(swarm.pick(2) * (1 + swarm.pick(60)));
    }
  }
  return geometry;
}

void run_operations(Swarm& swarm, Model& model, Tally& tally) try {
  model.add();
  for (int i = 0; i < 60; ++i) {
    try {
      random_operation(swarm, model);
    } catch (const CapacityError&) {
      ++tally.capacity_errors;
    } catch (const IoError&) {
      ++tally.io_errors;
    } catch (const LogicError&) {
      ++tally.refusals;  // a truncation that a window forbids
    }
    model.check();
  }
  tally.streamed += model.cache().stats().streamed_bytes;
  const auto salts = model.salts();
  for (const auto& [id, tokens] : salts) model.free(id);
  model.check();
  EXPECT_EQ(model.cache().stats().resident_frames, 0U);
  EXPECT_EQ(model.cache().stats().pool_bytes_used, 0U);
} catch (const std::exception& error) {
  ADD_FAILURE() << error.what();
}

void run_seed(std::uint64_t seed, Tally& tally, double failures) {
  SCOPED_TRACE("SEED=" + std::to_string(seed));
  Swarm swarm(seed);
  const Geometry geometry = random_geometry(swarm);
  const std::uint32_t layers = geometry.layers;
  SimOptions options =
      small_machine(geometry, layers + 2 + (swarm.pick(8) == 0 ? 0 : swarm.pick(layers * 12)),
                    swarm.pick(5) == 0 ? swarm.pick(20) : 200 + swarm.pick(400));
  options.copy_bytes_best = options.frame_bytes << swarm.pick(5);
  options.seed = seed;
  options.faults.failed = failures;
  const std::string policies[] = {"fit", "fit", "fixed:0.5", "fixed:1", "off"};
  Model model(geometry, policies[swarm.pick(5)], options);
  run_operations(swarm, model, tally);
}

// The same over RAM and a file, where the timing of copies is the disk's.
void run_host_seed(std::uint64_t seed, Tally& tally, const std::string& pool_io) {
  SCOPED_TRACE("SEED=" + std::to_string(seed));
  Swarm swarm(seed);
  const Geometry geometry = random_geometry(swarm);
  const std::uint32_t layers = geometry.layers;
  HostOptions options;
  options.frame_bytes = geometry.frame_bytes();
  options.pool_bytes = 800 * options.frame_bytes;
  options.pool_io = pool_io;
  options.device_bytes = host_frame_stride(options) * (layers + 2 + swarm.pick(layers * 12));
  Model model(geometry, "fit", open_host(options));
  run_operations(swarm, model, tally);
}

TEST(CacheSwarm, HoldsWhatTheReferenceHolds) {
  Tally tally;
  for (std::uint64_t seed = 1; seed <= 400 && !HasFailure(); ++seed) run_seed(seed, tally, 0);
  EXPECT_GT(tally.streamed, 0U);
  EXPECT_GT(tally.capacity_errors, 0U);
  EXPECT_EQ(tally.io_errors, 0U);
}

TEST(CacheSwarm, SurvivesFailingTransfers) {
  Tally tally;
  for (std::uint64_t seed = 1; seed <= 200 && !HasFailure(); ++seed) run_seed(seed, tally, 0.3);
  EXPECT_GT(tally.io_errors, 0U);
}

TEST(CacheOverRamAndAFile, HoldsWhatTheReferenceHolds) {
  for (const char* pool_io : {"auto", "direct-threads", "buffered-threads"}) {
    SCOPED_TRACE(pool_io);
    Tally tally;
    for (std::uint64_t seed = 1; seed <= 20 && !HasFailure(); ++seed) {
      run_host_seed(seed, tally, pool_io);
    }
    EXPECT_GT(tally.streamed, 0U);
    EXPECT_EQ(tally.io_errors, 0U);
  }
}

// ---- every short history ------------------------------------------------------------------------

enum class Act : std::uint8_t {
  add,
  fork,
  token,
  block_and_more,
  truncate,
  free_first,
  aborted_step
};
constexpr std::uint32_t acts = 7;

void apply(Act act, Model& model) {
  if (model.salts().empty() || act == Act::add) {
    if (model.salts().size() < 2) model.add();
    return;
  }
  const SequenceId first = model.salts().begin()->first;
  const SequenceId last = model.salts().rbegin()->first;
  switch (act) {
    case Act::fork:
      if (model.salts().size() < 3) model.fork(last);
      return;
    case Act::token: {
      std::vector<StepEntry> all;
      for (const auto& [id, salts] : model.salts()) all.push_back({id, 1});
      return model.step(all, Reader::attend, model.layers());
    }
    case Act::block_and_more:
      return model.step({{last, 17}}, Reader::attend, model.layers());
    case Act::truncate: {
      const auto length = static_cast<std::uint32_t>(model.salts().at(first).size());
      return model.truncate(first, length / 2);
    }
    case Act::free_first:
      return model.free(first);
    case Act::aborted_step:
      return model.step({{first, 18}}, Reader::attend, 1);
    case Act::add:
      return;
  }
}

// All histories of five acts from a cache with one sequence of 40 tokens whose device holds two
// layers' worth of three blocks.
TEST(CacheExhaustive, EveryShortHistoryHolds) {
  constexpr std::uint32_t length = 5;
  std::uint32_t histories = 1;
  for (std::uint32_t i = 0; i < length; ++i) histories *= acts;
  for (std::uint32_t history = 0; history < histories && !HasFailure(); ++history) {
    SCOPED_TRACE("HISTORY=" + std::to_string(history));
    SimOptions options = small_machine(small_geometry(2), 8, 40);
    options.seed = history + 1;
    Model model(small_geometry(2), "fit", options);
    model.step({{model.add(), 40}}, Reader::attend, 2);
    for (std::uint32_t i = 0, rest = history; i < length; ++i, rest /= acts) {
      try {
        apply(static_cast<Act>(rest % acts), model);
      } catch (const CapacityError&) {
        // Refused whole: the next acts go on from what was there.
      }
      model.check();
    }
  }
}

// ---- every copy and every growth that fails -----------------------------------------------------

// A fixed history with all that a cache does; what is refused or fails is left out.
struct History {
  explicit History(const SimFaults& faults) : model(small_geometry(2), "fit", machine(faults)) {
    const SequenceId first = model.add();
    step({{first, 100}});
    SequenceId second = first;
    act([&] { second = model.fork(first); });
    for (int i = 0; i < 6; ++i) step({{first, 5}, {second, 9}});
    act([&] { model.truncate(second, 90); });
    act([&] { model.resize(16, 60); });
    for (int i = 0; i < 4; ++i) step({{first, 1}, {second, 30}});
    act([&] { model.resize(12, 120); });
    step({{second, 40}});
    act([&] { model.free(first); });
    model.sim().set_faults({});
    for (int i = 0; i < 8; ++i) step({{second, 1}});
    goes_on = failed_last == false;
  }

  static SimOptions machine(const SimFaults& faults) {
    SimOptions options = small_machine(small_geometry(2), 14, 80);
    options.device_frames_max = 20;
    options.pool_frames_max = 200;
    options.faults = faults;
    return options;
  }

  template <typename Act>
  void act(const Act& what) {
    failed_last = false;
    try {
      what();
    } catch (const CapacityError&) {
      ++refused;
      failed_last = true;
    } catch (const IoError&) {
      ++failed;
      failed_last = true;
    }
    model.check();
  }

  void step(const std::vector<StepEntry>& batch) {
    act([&] { model.step(batch, Reader::kernel, 2); });
  }

  Model model;
  std::uint32_t refused = 0;
  std::uint32_t failed = 0;
  bool failed_last = false;
  bool goes_on = false;  // with the faults over
};

// From the i-th on eight copies fail, for every i: more than the tries of one.
TEST(CacheFaults, EveryCopyMayFail) {
  const std::uint64_t tickets = History({}).model.tickets();
  EXPECT_GT(tickets, 50U);
  std::uint32_t failed = 0;
  for (std::uint64_t i = 1; i <= tickets; ++i) {
    SCOPED_TRACE("copy " + std::to_string(i));
    SimFaults faults;
    faults.failed_ticket = i;
    faults.failed_tickets = 8;
    const History history(faults);
    EXPECT_TRUE(history.goes_on);
    failed += history.failed;
  }
  EXPECT_GT(failed, tickets / 4);
}

TEST(CacheFaults, EveryGrowthMayBeRefused) {
  std::uint32_t refused = 0;
  for (std::uint64_t i = 1; i <= 12; ++i) {
    SCOPED_TRACE("growth " + std::to_string(i));
    SimFaults faults;
    faults.refused_growth = i;
    const History history(faults);
    EXPECT_TRUE(history.goes_on);
    EXPECT_EQ(history.failed, 0U);
    refused += history.refused;
  }
  EXPECT_GT(refused, 0U);
}

}  // namespace
}  // namespace pie
