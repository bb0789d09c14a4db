// What a step moves and when: one-way traffic, discards, prefetch, large copies, least budgets,
// failures and exhausted tiers. Contents are checked by the reference model throughout.
#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "reference_model.hpp"

namespace pie {
namespace {

using testing::small_geometry;
using testing::small_machine;

// Models of this file: a small geometry of so many layers on a small machine.
struct Model : testing::Model {
  Model(std::uint32_t layers, const std::string& policy, const SimOptions& options)
      : testing::Model(small_geometry(layers), policy, options) {}
};

SimOptions options_for(std::uint32_t layers, std::uint32_t device_frames,
                       std::uint32_t pool_frames) {
  return small_machine(small_geometry(layers), device_frames, pool_frames);
}

void grow(Model& model, SequenceId id, std::uint32_t tokens) {
  model.step({{id, tokens}}, Reader::attend, model.layers());
  model.check();
}

std::uint64_t frames(Bytes bytes) { return bytes / small_geometry(1).frame_bytes(); }

TEST(Scheduler, MovesNothingWhileEverythingFits) {
  for (const char* policy : {"fit", "off"}) {
    Model model(4, policy, options_for(4, 100, 1000));
    const SequenceId id = model.add();
    grow(model, id, 100);
    for (int i = 0; i < 40; ++i) grow(model, id, 1);
    EXPECT_EQ(model.tickets(), 0U) << policy;
    EXPECT_EQ(model.cache().stats().stall_ns, 0);
  }
}

TEST(Scheduler, WritesEachFilledFrameOnce) {
  Model model(3, "fit", options_for(3, 20, 1000));
  const SequenceId id = model.add();
  grow(model, id, 200);
  for (int i = 0; i < 100; ++i) grow(model, id, 1);
  const Stats stats = model.cache().stats();
  EXPECT_GT(stats.streamed_bytes, stats.written_bytes);
  EXPECT_LE(frames(stats.written_bytes), 3U * (300 / 16));
  EXPECT_GE(frames(stats.written_bytes), 3U * (300 / 16) - 20);
}

TEST(Scheduler, StreamsJustThePlanEachStep) {
  constexpr std::uint32_t layers = 6;
  for (const auto& [policy, device_frames] :
       std::vector<std::pair<const char*, std::uint32_t>>{{"fixed:1", 200}, {"fit", 60}}) {
    Model model(layers, policy, options_for(layers, device_frames, 1000));
    const SequenceId id = model.add();
    grow(model, id, 16 * 20);
    grow(model, id, 1);
    grow(model, id, 1);
    const Bytes before = model.cache().stats().streamed_bytes;
    for (int i = 0; i < 10; ++i) grow(model, id, 1);
    const std::uint64_t per_step = frames(model.cache().stats().streamed_bytes - before) / 10;
    if (policy == std::string("fixed:1")) {
      EXPECT_NEAR(static_cast<double>(per_step), layers * 20, 2);  // prefetch crosses the ends
    } else {
      // What is over, the ring, and what an unlucky order of completions evicts early.
      // Prefetch crosses the ends of the ten steps by a ring at most.
      const std::uint64_t ring = model.cache().stats().ring_frames;
      const std::uint64_t excess = layers * 21U - (60 - ring - 1);
      EXPECT_GE(per_step + 1 + ring / 10, excess);
      EXPECT_LE(per_step, excess + excess / 4);
    }
  }
}

TEST(Scheduler, PrefetchesTheNextStepAtTheEndOfThisOne) {
  Model model(4, "fixed:1", options_for(4, 100, 1000));
  const SequenceId id = model.add();
  for (int i = 0; i < 3; ++i) grow(model, id, 64);
  grow(model, id, 1);
  const Stats stats = model.cache().stats();
  EXPECT_GT(stats.ring_frames, 0U);
  // Frames beyond the tails (one a layer) and staging are the ring's, filled or being filled.
  const std::uint64_t used = frames(stats.device_bytes_used);
  EXPECT_GT(used, 4U + 1U);
}

TEST(Scheduler, MovesAdjacentFramesAsOneTicket) {
  Model model(2, "fixed:1", options_for(2, 200, 1000));
  const SequenceId id = model.add();
  grow(model, id, 16 * 64);
  grow(model, id, 1);
  const std::uint64_t tickets = model.tickets();
  const Bytes bytes = model.cache().stats().streamed_bytes;
  for (int i = 0; i < 8; ++i) grow(model, id, 1);
  const double moved = static_cast<double>(frames(model.cache().stats().streamed_bytes - bytes));
  const double per_ticket = moved / static_cast<double>(model.tickets() - tickets);
  EXPECT_GT(per_ticket, 3.0);  // copies of this backend are best at four frames
}

TEST(Scheduler, ThreeFramesALayerAreEnoughForOneSequence) {
  for (std::uint32_t layers = 1; layers <= 6; ++layers) {
    for (const char* policy : {"fit", "fixed:0.5"}) {
      Model model(layers, policy, options_for(layers, 3 * layers, 1000));
      const SequenceId id = model.add();
      if (layers == 1) {
        for (int i = 0; i < 70; ++i) grow(model, id, 1);
      } else {
        for (const std::uint32_t tokens : {100U, 1U, 30U, 1U, 1U, 64U, 1U}) grow(model, id, tokens);
      }
      EXPECT_GT(model.cache().stats().streamed_bytes, 0U);
      EXPECT_LE(model.cache().stats().device_bytes_peak, model.cache().stats().device_bytes);
    }
  }
}

// Many query heads on few KV heads have more state than KV: it must not count against the frames.
TEST(Scheduler, ThreeFramesALayerAreEnoughForManyQueryHeads) {
  const Geometry geometry{3, 1, 64, 16, DType::f32};
  Cache cache(geometry, "fit", open_sim(small_machine(geometry, 9, 500)));
  const std::vector<StepEntry> batch{{cache.add(), 70}};
  const std::vector<float> q(70 * 71 * 64, 0.1F);
  const Rows kv{q.data(), 64, 64};
  std::vector<float> out(q.size());
  for (int step = 0; step < 4; ++step) {
    cache.begin(batch, Reader::attend);
    for (std::uint32_t layer = 0; layer < 3; ++layer) {
      cache.attend(layer, {kv, kv}, {q.data(), 71 * 64, 64}, {out.data(), 71 * 64, 64}, 71,
                   {.scale = 0.1F}, nullptr);
    }
    cache.finish();
    cache.check();
  }
  EXPECT_EQ(cache.length(batch[0].sequence), 280U);
  EXPECT_GT(cache.stats().streamed_bytes, 0U);
}

TEST(Scheduler, RefusesWholeWhatNoTierCanHold) {
  SimOptions options = options_for(2, 12, 1000);
  options.pool_frames_max = 20;
  Model model(2, "fit", options);
  const SequenceId first = model.add();
  const SequenceId second = model.add();
  grow(model, first, 120);
  grow(model, second, 40);
  EXPECT_THROW(grow(model, second, 400), CapacityError);
  EXPECT_EQ(model.cache().length(second), 40U);
  model.check();
  for (int i = 0; i < 4; ++i) grow(model, first, 1);  // the other goes on
  model.free(first);
  for (int i = 0; i < 40; ++i) grow(model, second, 1);
}

TEST(Scheduler, PoliciesWithoutAPoolSayWhatIsMissing) {
  Model model(2, "fit", options_for(2, 12, 0));
  const SequenceId id = model.add();
  grow(model, id, 60);
  try {
    grow(model, id, 60);
    FAIL() << "the device holds more than it has";
  } catch (const CapacityError& error) {
    EXPECT_NE(std::string(error.what()).find("pool_bytes"), std::string::npos);
  }
  grow(model, id, 1);
}

// Two sequences in a pool that is full or nearly so, with copies of blocks that stay on the device:
// those give way to blocks that must leave it.
TEST(Scheduler, AFullPoolGivesUpCopiesOfWhatStays) {
  std::uint32_t refused = 0;
  for (std::uint32_t device = 10; device < 60; device += 3) {
    for (std::uint32_t pool = 3; pool < 60; pool += 2) {
      Model model(2, "fit", options_for(2, device, pool));
      const SequenceId first = model.add();
      const SequenceId second = model.add();
      for (int i = 0; i < 12 && !HasFailure(); ++i) {
        try {
          grow(model, i % 2 == 0 ? first : second, 48);
        } catch (const CapacityError& error) {
          ++refused;
          EXPECT_NE(std::string(error.what()).find("cannot hold this step"), std::string::npos)
              << error.what();
        }
        model.check();
      }
    }
  }
  EXPECT_GT(refused, 0U);
}

TEST(Scheduler, WritesAreFewWhereThePoolIsNearlyFull) {
  Bytes written[2];
  for (const std::uint32_t pool : {4000U, 900U}) {
    Model model(2, "fit", options_for(2, 1000, pool));
    const SequenceId id = model.add();
    grow(model, id, 16 * 560);
    for (int i = 0; i < 16 * 4; ++i) grow(model, id, 1);
    written[pool == 900U ? 1 : 0] = model.cache().stats().written_bytes;
  }
  EXPECT_LE(written[1], written[0]);
}

TEST(Scheduler, AStepOfSeveralWavesRunsOrIsRefusedWhole) {
  for (std::uint32_t device = 5; device < 16; ++device) {
    for (const std::uint32_t tokens : {24U, 40U, 72U, 88U, 89U, 120U}) {
      Model model(3, "fit", options_for(3, device, 1000));
      const SequenceId id = model.add();
      grow(model, id, 8);
      try {
        grow(model, id, tokens);
      } catch (const CapacityError& error) {
        EXPECT_NE(std::string(error.what()).find("cannot hold this step"), std::string::npos)
            << "device " << device << ", " << tokens << " tokens: " << error.what();
      }
      model.check();
    }
  }
}

TEST(Scheduler, TruncationNeedsNoMoreThanTheLeastBudget) {
  Model model(2, "fit", options_for(2, 4, 200));
  const SequenceId id = model.add();
  for (int i = 0; i < 55; ++i) grow(model, id, 1);
  model.truncate(id, 44);
  model.check();
  for (int i = 0; i < 30; ++i) grow(model, id, 1);
}

// The i-th copy fails once, for every i: a retry hides it.
TEST(Scheduler, OneFailedCopyIsTriedAgain) {
  std::uint64_t tickets = 1;
  std::uint64_t retries = 0;
  for (std::uint64_t failing = 0; failing <= tickets; ++failing) {
    SimOptions options = options_for(2, 10, 200);
    options.faults.failed_ticket = failing;
    Model model(2, "fit", options);
    const SequenceId id = model.add();
    for (int i = 0; i < 20; ++i) grow(model, id, 7);
    if (failing == 0) tickets = model.tickets();
    EXPECT_LE(model.cache().stats().retries, failing == 0 ? 0U : 1U);
    retries += model.cache().stats().retries;
  }
  EXPECT_GT(tickets, 20U);
  EXPECT_GT(retries, tickets * 3 / 4);  // the last ones may still be in flight
}

// A link that stays broken fails the step that needs it, and only that: when it is back, what was
// committed is all there.
TEST(Scheduler, ABrokenLinkLosesNothing) {
  for (int healthy_steps = 0; healthy_steps < 30; ++healthy_steps) {
    Model model(2, "fit", options_for(2, 10, 200));
    const SequenceId id = model.add();
    for (int i = 0; i < healthy_steps; ++i) grow(model, id, 7);
    model.sim().set_faults({.failed = 1});
    std::uint32_t failures = 0;
    for (int i = 0; i < 6; ++i) {
      try {
        grow(model, id, 5);
      } catch (const IoError& error) {
        ++failures;
        EXPECT_NE(std::string(error.what()).find("Sequence 1"), std::string::npos);
      }
      model.check();
    }
    if (healthy_steps > 10) {
      EXPECT_GT(failures, 0U);
    }
    model.sim().set_faults({});
    std::uint32_t good = 0;
    for (int i = 0; i < 4; ++i) {
      try {
        grow(model, id, 5);
        ++good;
      } catch (const IoError&) {
        // The first step after the repair may still tell of an earlier failure.
      }
    }
    EXPECT_GE(good, 3U);
  }
}

TEST(Scheduler, AFailureTouchesOnlyItsSequence) {
  Model model(2, "fit", options_for(2, 20, 400));
  const SequenceId streamed = model.add();
  const SequenceId resident = model.add();
  grow(model, streamed, 160);
  grow(model, resident, 9);  // no full block, so nothing of it can be set aside
  model.step({{streamed, 1}, {resident, 1}}, Reader::attend, 2);
  model.sim().set_faults({.failed = 1});
  EXPECT_THROW(grow(model, streamed, 1), IoError);
  grow(model, resident, 1);
  model.sim().set_faults({});
  grow(model, resident, 1);
  try {
    grow(model, streamed, 1);  // may tell of a copy that failed before the repair
  } catch (const IoError&) {
    grow(model, streamed, 1);
  }
  EXPECT_GE(model.cache().length(streamed), 162U);
}

TEST(Scheduler, StepsOutOfTurnAreRefused) {
  Model model(2, "fit", options_for(2, 24, 400));
  Cache& cache = model.cache();
  const SequenceId id = model.add();
  const std::vector<StepEntry> batch{{id, 1}};
  const std::vector<float> row(64);
  const Rows rows{row.data(), 16, 8};
  EXPECT_THROW(static_cast<void>(cache.gather(0, {rows, rows})), LogicError);
  EXPECT_THROW(cache.begin({}, Reader::gather), LogicError);
  EXPECT_THROW(cache.begin(std::vector<StepEntry>{{id, 0}}, Reader::gather), LogicError);
  EXPECT_THROW(cache.begin(std::vector<StepEntry>{{id, 1}, {id, 1}}, Reader::gather), LogicError);
  EXPECT_THROW(cache.begin(std::vector<StepEntry>{{id + 1, 1}}, Reader::gather), LogicError);
  EXPECT_THROW(cache.begin(std::vector<StepEntry>{{id, 0xffffffff}}, Reader::gather), LogicError);
  cache.begin(batch, Reader::gather);
  EXPECT_THROW(cache.begin(batch, Reader::gather), LogicError);
  EXPECT_THROW(cache.free(id), LogicError);
  EXPECT_THROW(cache.truncate(id, 0), LogicError);
  EXPECT_THROW(static_cast<void>(cache.gather(1, {rows, rows})), LogicError);
  static_cast<void>(cache.gather(0, {rows, rows}));
  EXPECT_THROW(static_cast<void>(cache.gather(0, {rows, rows})), LogicError);
  EXPECT_THROW(cache.finish(), LogicError);  // a layer is missing: aborted
  EXPECT_FALSE(cache.open_step().rows > 0);
  EXPECT_EQ(cache.length(id), 0U);
  cache.free(id);
  EXPECT_THROW(static_cast<void>(cache.length(id)), LogicError);
  cache.close();
  cache.close();
  EXPECT_THROW(static_cast<void>(cache.add()), LogicError);
}

// ---- a backend that throws ----------------------------------------------------------------------

// Throws from submit, or from wait, as often as it is told to.
class Throwing final : public testing::ProxyBackend {
 public:
  using ProxyBackend::ProxyBackend;
  Ticket submit(std::span<const Copy> copies, std::span<const Dep> after) override {
    if (good_submits_ == 1) submits_ = 1;
    good_submits_ -= good_submits_ > 0 ? 1 : 0;
    fail(submits_);
    return ProxyBackend::submit(copies, after);
  }
  void wait(Nanos timeout_ns) override {
    fail(waits_);
    ProxyBackend::wait(timeout_ns);
  }
  void fail_submits(int times) { submits_ = times; }
  void fail_submit(std::uint64_t number) { good_submits_ = number; }  // the next is number 1
  [[nodiscard]] bool to_fail() const { return good_submits_ > 0; }
  void fail_waits(int times) { waits_ = times; }

 private:
  static void fail(int& times) {
    if (times == 0) return;
    --times;
    throw std::runtime_error("the backend broke");
  }
  std::uint64_t good_submits_ = 0;
  int submits_ = 0;
  int waits_ = 0;
};

struct ThrowingModel {
  explicit ThrowingModel(std::uint32_t device_frames, const std::string& policy = "fit") {
    SimOptions options = options_for(3, device_frames, 1000);
    options.device_frames_max = 100;
    auto backend = std::make_unique<Throwing>(open_sim(options));
    throwing = backend.get();
    model = std::make_unique<testing::Model>(small_geometry(3), policy, std::move(backend));
  }
  void grow(SequenceId id, std::uint32_t tokens) const {
    model->step({{id, tokens}}, Reader::attend, 3);
  }
  Throwing* throwing = nullptr;
  std::unique_ptr<testing::Model> model;
};

TEST(SchedulerBackendThrows, FromSubmitLosesNothing) {
  const ThrowingModel model(20);
  const SequenceId id = model.model->add();
  model.grow(id, 200);
  for (int i = 0; i < 40; ++i) {
    model.throwing->fail_submits(1 + i % 3);
    for (bool done = false; !done;) {
      try {
        model.grow(id, 1);
        done = true;
      } catch (const std::runtime_error& error) {
        EXPECT_STREQ(error.what(), "the backend broke");
        if (model.model->cache().open_step().rows > 0) model.model->abort();
      }
      model.model->check();
    }
    model.throwing->fail_submits(0);
  }
  EXPECT_EQ(model.model->cache().length(id), 240U);
}

// Sequences that stream, part, are cut and go while budgets move. What throws is tried no more.
void live(const ThrowingModel& model) {
  const auto attempt = [&](const auto& act) {
    try {
      act();
    } catch (const std::runtime_error& error) {
      ASSERT_STREQ(error.what(), "the backend broke");
      if (model.model->cache().open_step().rows > 0) model.model->abort();
    }
    model.model->check();
  };
  const auto step = [&](const std::vector<StepEntry>& batch) {
    attempt([&] { model.model->step(batch, Reader::kernel, 3); });
  };
  const SequenceId first = model.model->add();
  const SequenceId second = model.model->add();
  step({{first, 200}});
  step({{second, 90}});
  const SequenceId third = model.model->fork(first);
  for (int i = 0; i < 3; ++i) step({{first, 1}, {second, 3}, {third, 20}});
  model.model->truncate(third, model.model->length(third) / 2);
  attempt([&] { model.model->resize(60, 1000); });
  for (int i = 0; i < 3; ++i) step({{second, 1}, {third, 1}, {first, 1}});
  model.model->free(first);
  attempt([&] { model.model->resize(30, 1000); });
  for (int i = 0; i < 3; ++i) step({{third, 17}, {second, 1}});
  model.model->free(third);
  model.model->free(second);
  model.model->check();
}

TEST(SchedulerBackendThrows, FromAnySubmitLosesNothing) {
  for (const char* policy : {"fit", "fixed:0.5"}) {
    std::uint64_t number = 0;
    for (bool thrown = true; thrown;) {
      const ThrowingModel model(30, policy);
      model.throwing->fail_submit(++number);
      live(model);
      thrown = !model.throwing->to_fail();
    }
    EXPECT_GT(number, 100U) << policy;
  }
}

TEST(SchedulerBackendThrows, AfterTheEndOfAStepTheNextOneTells) {
  const ThrowingModel model(100, "fixed:1");
  const SequenceId id = model.model->add();
  model.grow(id, 15);
  model.throwing->fail_submits(1);
  model.grow(id, 1);  // fills a block of each layer, which is then written behind
  EXPECT_EQ(model.model->cache().length(id), 16U);
  EXPECT_THROW(model.grow(id, 1), std::runtime_error);
  model.grow(id, 1);
  model.model->check();
}

TEST(SchedulerBackendThrows, FromWaitInAnAbortEndsTheCacheAndNotTheProcess) {
  const ThrowingModel model(12, "fixed:1");
  const SequenceId id = model.model->add();
  model.grow(id, 100);
  Cache& cache = model.model->cache();
  model.model->begin({{id, 40}}, Reader::attend);
  model.throwing->fail_waits(1'000'000);
  EXPECT_THROW(model.model->layer(), std::runtime_error);
  for (int i = 0; i < 2; ++i) {
    try {
      static_cast<void>(cache.length(id));
      ADD_FAILURE() << "nobody knows what the cache holds";
    } catch (const IoError& error) {
      EXPECT_NE(std::string(error.what()).find("the backend broke"), std::string::npos);
    }
  }
  cache.close();  // the backend waits by itself
}

// ---- writes that need not be --------------------------------------------------------------------

TEST(Scheduler, AWriteBehindThatFailsStopsNoStep) {
  SimOptions options = options_for(3, 40, 1000);
  options.faults.failed = 1;
  Model model(3, "fit", options);
  const SequenceId id = model.add();
  grow(model, id, 120);  // over half of the device: what fills is written behind
  for (int i = 0; i < 40; ++i) grow(model, id, 1);
  EXPECT_GT(model.cache().stats().failed_writes, 0U);
  EXPECT_EQ(model.cache().stats().written_bytes, 0U);
  model.sim().set_faults({});
  for (int i = 0; i < 40; ++i) grow(model, id, 1);
  EXPECT_GT(model.cache().stats().written_bytes, 0U) << "they are tried again";
}

TEST(Scheduler, FramesThatLeaveAWindowWaitForNoOther) {
  Geometry geometry = small_geometry(2);
  geometry.windows = {20, 0};
  SimOptions options = small_machine(geometry, 60, 1000);
  options.write.latency_ns = 1'000'000'000;  // what is written stays in flight for long
  testing::Model model(geometry, "fixed:1", options);
  const SequenceId id = model.add();
  model.step({{id, 150}}, Reader::kernel, 2);
  for (int i = 0; i < 10; ++i) model.step({{id, 1}}, Reader::kernel, 2);
  // Now the block of tokens 144 to 159 is being written; that of 128 to 143 leaves the window.
  const Nanos before = model.cache().stats().stall_ns;
  for (int i = 0; i < 6; ++i) model.step({{id, 1}}, Reader::kernel, 2);
  EXPECT_LT(model.cache().stats().stall_ns - before, 500'000'000);
  model.check();
}

// ---- what is counted ----------------------------------------------------------------------------

TEST(Scheduler, CountsWhatIsLeftAfterACutInsideTheLastFullBlock) {
  Model model(3, "fit", options_for(3, 100, 100));
  const SequenceId id = model.add();
  grow(model, id, 64);
  const Bytes token = 3 * small_geometry(1).frame_bytes() / 16;
  EXPECT_EQ(model.cache().stats().kv_bytes, 64 * token);
  model.truncate(id, 60);
  EXPECT_EQ(model.cache().stats().kv_bytes, 60 * token);
  grow(model, id, 1);
  EXPECT_EQ(model.cache().stats().kv_bytes, 61 * token);
}

TEST(Scheduler, ADecodeStepIsStalledWhileItBegins) {
  Model model(2, "fit", options_for(2, 12, 1000));
  const SequenceId first = model.add();
  const SequenceId second = model.add();
  for (const SequenceId id : {first, second}) grow(model, id, 80);
  grow(model, first, 1);  // has the other set aside
  model.truncate(second, 70);
  const Stats before = model.cache().stats();
  grow(model, second, 1);
  const Stats after = model.cache().stats();
  EXPECT_GT(after.stall_ns, before.stall_ns);
  EXPECT_EQ(after.decode_stall_ns - before.decode_stall_ns, after.stall_ns - before.stall_ns);
}

// The model checks after each call that the clock has stood still; this is the plain case of it.
// Takes as long for a layer as it is told to, on a stream, and reads nothing.
class PacedKernel final : public LayerKernel {
 public:
  PacedKernel(SimBackend& sim, Nanos layer_ns) : sim_(sim), layer_ns_(layer_ns) {}
  void append(const Append& /*rows*/) override {}
  void attend(std::uint32_t /*layer*/, std::span<const KvPiece> /*pieces*/) override {
    sim_.compute({1}, {layer_ns_});
  }

 private:
  SimBackend& sim_;
  Nanos layer_ns_;
};

// Time of a decode step of many sequences against the time that its computation takes, where what
// is streamed takes `load` times as long on the link.
double slowdown(double share, double load) {
  constexpr std::uint32_t sequences = 64;
  constexpr std::uint32_t layers = 8;
  const Geometry geometry{layers, 8, 128, 64, DType::bf16};
  SimOptions options;
  options.device_frames = sequences * layers * 18;
  options.pool_frames = sequences * layers * 18;
  options.frame_bytes = geometry.frame_bytes();
  options.copy_bytes_best = Bytes{2} << 20;
  options.streams = true;
  options.carry_bytes = false;
  options.load.bytes_per_s = options.write.bytes_per_s = 55e9;
  auto owned = open_sim(options);
  SimBackend& sim = *owned;
  Cache cache(geometry, "fixed:" + std::to_string(share), std::move(owned));
  cache.set_stream({1});
  Nanos layer_ns = 1'000'000;
  const auto step = [&](std::span<const StepEntry> batch) {
    PacedKernel kernel(sim, layer_ns);
    cache.begin(batch, Reader::kernel);
    for (std::uint32_t layer = 0; layer < layers; ++layer) cache.run(layer, kernel);
    cache.finish();
  };
  std::vector<StepEntry> batch;
  for (std::uint32_t i = 0; i < sequences; ++i) {
    const StepEntry prompt{cache.add(), 1024};
    step({&prompt, 1});
    sim.synchronize({1});
    batch.push_back({prompt.sequence, 1});
  }
  for (int i = 0; i < 4; ++i) step(batch);
  const Bytes before = cache.stats().streamed_bytes;
  step(batch);
  const auto streamed = static_cast<double>(cache.stats().streamed_bytes - before);
  const auto frame_bytes = static_cast<double>(options.frame_bytes);
  EXPECT_NEAR(streamed, share * sequences * 16 * layers * frame_bytes, 0.15 * streamed);
  layer_ns = static_cast<Nanos>(streamed / layers / 55 / load);
  for (int i = 0; i < 2; ++i) step(batch);
  sim.synchronize({1});
  const Nanos began = sim.now();
  for (int i = 0; i < 10; ++i) step(batch);
  sim.synchronize({1});
  return static_cast<double>(sim.now() - began) / static_cast<double>(10 * layers * layer_ns);
}

TEST(Scheduler, OnAStreamWhatTheLinkCanBringCostsNothing) {
  for (const double share : {0.02, 0.03, 0.05, 0.07, 0.11, 0.125, 0.2, 0.5}) {
    SCOPED_TRACE("share " + std::to_string(share));
    EXPECT_LE(slowdown(share, 0.5), 1.01);
    EXPECT_LE(slowdown(share, 0.75), 1.02);
    EXPECT_LE(slowdown(share, 0.9), 1.2);
    EXPECT_GT(slowdown(share, 2), 1.9);
  }
}

TEST(Scheduler, OnAStreamTheHostWaitsForNothing) {
  Geometry geometry = small_geometry(4);
  geometry.windows = {0, 40, 0, 40};
  SimOptions options = small_machine(geometry, 24, 1000);
  options.streams = true;
  testing::Model model(geometry, "fit", options);
  const SequenceId first = model.add();
  model.step({{first, 90}}, Reader::kernel, 4);
  const SequenceId second = model.fork(first);
  for (int i = 0; i < 50; ++i) {
    const std::uint32_t more = i % 7 == 0 ? 20 : 1;
    model.step({{first, 1}, {second, more}}, Reader::kernel, 4);
    model.check();
  }
  const Stats stats = model.cache().stats();
  EXPECT_GT(stats.streamed_bytes, stats.device_bytes);
  EXPECT_GT(stats.stall_ns, 0) << "of the stream, which is told by fences";
}

TEST(Scheduler, ACopyThatFailsBehindAStreamIsALostDevice) {
  SimOptions options = options_for(2, 12, 100);
  options.streams = true;
  options.faults.failed_ticket = 3;
  testing::Model model(small_geometry(2), "fit", options);
  const SequenceId id = model.add();
  std::uint32_t failed = 0;
  for (int i = 0; i < 12; ++i) {
    try {
      model.step({{id, 30}}, Reader::kernel, 2);
      model.settle();
    } catch (const IoError& error) {
      EXPECT_EQ(error.sequence(), 0U);
      EXPECT_NE(std::string(error.what()).find("behind the stream"), std::string::npos);
      ++failed;
    }
  }
  EXPECT_GT(failed, 6U) << "it stays lost";
  model.free(id);
  EXPECT_EQ(model.cache().stats().device_bytes_used, 0U);
}

TEST(Scheduler, ComputesOnNoStreamItself) {
  SimOptions options = options_for(2, 40, 100);
  options.streams = true;
  testing::Model model(small_geometry(2), "fit", options);
  const SequenceId id = model.add();
  for (const Reader reader : {Reader::attend, Reader::gather, Reader::pages}) {
    EXPECT_THROW(model.begin({{id, 4}}, reader), LogicError);
  }
  model.step({{id, 4}}, Reader::kernel, 2);
}

// ---- the ring and the pool ----------------------------------------------------------------------

// One layer that sees all and five that see little: the ring holds two of the first, not of the
// average.
TEST(Scheduler, TheRingHoldsTwoOfTheWidestLayers) {
  Geometry geometry = small_geometry(6);
  geometry.windows = {0, 20, 20, 20, 20, 20};
  testing::Model model(geometry, "fixed:1", small_machine(geometry, 120, 1000));
  const SequenceId id = model.add();
  model.step({{id, 330}}, Reader::kernel, 6);
  for (int i = 0; i < 3; ++i) model.step({{id, 1}}, Reader::kernel, 6);
  EXPECT_GE(model.cache().stats().ring_frames, 2U * 20 - 5);
  model.check();
}

TEST(Scheduler, AFixedShareKeepsWithinThePool) {
  Model model(3, "fixed:1", options_for(3, 100, 10));
  const SequenceId id = model.add();
  for (const std::uint32_t tokens : {300U, 1U, 1U}) {
    model.step({{id, tokens}}, Reader::kernel, 3);
    model.check();
  }
  EXPECT_EQ(frames(model.cache().stats().pool_bytes_used), 10U);
}

// The pool is full of copies of what stays on the device when other blocks have to go there: as
// many of the copies are given up as it takes, so that few are written a second time.
TEST(Scheduler, PressureOnThePoolTakesNoMoreCopiesThanItNeeds) {
  Model model(2, "fixed:0.3", options_for(2, 100, 80));
  const SequenceId first = model.add();
  const SequenceId second = model.add();
  for (int i = 0; i < 33; ++i) model.step({{first, 16}}, Reader::kernel, 2);
  for (int i = 0; i < 43; ++i) model.step({{second, 16}}, Reader::kernel, 2);
  EXPECT_EQ(frames(model.cache().stats().pool_bytes_used), 80U);
  EXPECT_LE(frames(model.cache().stats().written_bytes), 2U * (33 + 43));
  model.check();
}

// ---- who may be inside --------------------------------------------------------------------------

// Calls the cache that runs it, as an embedder's kernel may.
class Calling final : public LayerKernel {
 public:
  explicit Calling(Cache& cache) : cache_(cache) {}
  void append(const Append& /*rows*/) override {}
  void attend(std::uint32_t layer, std::span<const KvPiece> pieces) override {
    EXPECT_EQ(cache_.length(pieces[0].sequence), 0U);
    EXPECT_EQ(cache_.open_step().next_layer, layer);
    EXPECT_EQ(cache_.stats().sequences, 1U);
    EXPECT_THROW(static_cast<void>(cache_.add()), LogicError);
    EXPECT_THROW(cache_.finish(), LogicError);
    if (layer == 1) std::thread([&] { call_from_elsewhere(); }).join();
  }

 private:
  void call_from_elsewhere() {
    try {
      static_cast<void>(cache_.stats());
      ADD_FAILURE() << "a second thread was let in";
    } catch (const LogicError& error) {
      EXPECT_NE(std::string(error.what()).find("second thread"), std::string::npos);
    }
    cache_.abort();
  }

  Cache& cache_;
};

TEST(CacheTurn, KernelsMayAskAndOtherThreadsMayNot) {
  Cache cache(small_geometry(3), "fit", open_sim(options_for(3, 40, 100)));
  const std::vector<StepEntry> batch{{cache.add(), 20}};
  Calling kernel(cache);
  cache.begin(batch, Reader::kernel);
  cache.run(0, kernel);
  EXPECT_EQ(cache.open_step().rows, 20U);
  cache.run(1, kernel);  // meanwhile another thread aborts
  EXPECT_EQ(cache.open_step().rows, 0U) << "the next call carries it out";
  EXPECT_THROW(cache.run(2, kernel), LogicError);
  cache.close();
  EXPECT_THROW(static_cast<void>(cache.stats()), LogicError);
  cache.abort();
  cache.close();
}

}  // namespace
}  // namespace pie
