// What is learned from steps, what is decided from that, and a server that goes by it.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "pie/adapting.hpp"
#include "pie/error.hpp"
#include "reference_model.hpp"
#include "serving.hpp"

namespace pie {
namespace {

using testing::Request;
using testing::serve;
using testing::Server;
using testing::Serving;
using testing::small_machine;

// A machine whose steps take what they are told to, with some noise.
class Truth {
 public:
  double base_ns = 17e6;
  double kv_ns = 250;      // a frame
  double loaded_ns = 250;  // a frame, beside the link
  double load_ns = 2600;   // a frame on the link
  double any_ns = 0;       // where anything is streamed, however little
  bool times_only_stalls = false;

  explicit Truth(std::uint64_t seed) : random_(seed) {}

  [[nodiscard]] double alone_ns(double kv) const { return base_ns + kv_ns * kv; }
  [[nodiscard]] double computes_ns(double kv, double loaded) const {
    return alone_ns(kv) + loaded_ns * loaded + (loaded > 0 ? any_ns : 0);
  }
  [[nodiscard]] double takes_ns(double kv, double loaded) const {
    return std::max(computes_ns(kv, loaded), loaded * load_ns / 0.9);
  }

  StepReport step(double kv, double loaded) {
    const double noise = 1 + 0.003 * normal_(random_);
    const double computed = computes_ns(kv, loaded) * noise;
    const double takes = std::max(computed, loaded * load_ns / 0.9);
    StepReport report;
    report.kv_frames = static_cast<std::uint64_t>(kv);
    report.loaded_frames = static_cast<std::uint64_t>(loaded);
    report.step_ns = static_cast<Nanos>(takes);
    report.stall_ns = static_cast<Nanos>(takes - computed);
    const auto busy = static_cast<Nanos>(loaded * load_ns);
    report.loads = {report.loaded_frames, busy, report.loaded_frames, busy};
    if (times_only_stalls && report.stall_ns == 0) {  // the rest ends when somebody looks
      report.loads = {report.loaded_frames, report.loaded_frames > 0 ? report.step_ns : 0, 0, 0};
    }
    return report;
  }

 private:
  std::mt19937_64 random_;
  std::normal_distribution<double> normal_;
};

constexpr Demand demand{20'000, 200'000, 0, 48, 1, 0, true};

// A server that always fills what it is allowed, a sequence of 200 frames a step, for `steps`.
class Loop {
 public:
  Loop(const Truth& truth, Aim aim) : truth_(truth) { objective_.aim = aim; }

  void run(int steps) {
    for (int i = 0; i < steps; ++i) {
      const double allowed = room(demand, state_.budget.frames);
      held_ = held_ + 200 <= allowed ? held_ + 200 : std::min(held_, allowed);
      const double excess = std::max(0.0, held_ - 20'000) * 48 / 45.5;
      const double loaded = std::max(excess, static_cast<double>(state_.budget.probe));
      observe_one(loaded);
      slow_ += truth_.takes_ns(held_, loaded) > 1.05 * truth_.alone_ns(held_) ? 1 : 0;
    }
  }
  void observe_one(double loaded) { observe_one(truth_.step(held_, loaded)); }

  // Kernels are compiled in the step that first needs them.
  void run_cold(double compile_ns) {
    held_ = 15'000;
    StepReport first = truth_.step(held_, 0);
    first.step_ns += static_cast<Nanos>(compile_ns);
    observe_one(first);
    while (state_.budget.probe == 0) run(1);
    for (int i = 0; i < 2; ++i) {
      const auto loaded = static_cast<double>(state_.budget.probe);
      StepReport report = truth_.step(held_, loaded);
      report.step_ns += static_cast<Nanos>(compile_ns);
      observe_one(report);
    }
  }
  void observe_one(const StepReport& report) {
    state_ = observe(state_, report);
    Demand now = demand;
    now.active_frames = static_cast<std::uint64_t>(held_);
    const Budget next = decide(now, state_, objective_);
    const int sign = next.frames > state_.budget.frames   ? 1
                     : next.frames < state_.budget.frames ? -1
                                                          : 0;
    reversals_ += sign * sign_ < 0 ? 1 : 0;
    if (sign != 0) sign_ = sign;
    state_.budget = next;
  }

  [[nodiscard]] const State& state() const { return state_; }
  [[nodiscard]] double held() const { return held_; }
  [[nodiscard]] double rate() const {
    return held_ / truth_.takes_ns(held_, std::max(0.0, held_ - 20'000) * 48 / 45.5);
  }
  Truth& truth() { return truth_; }
  int take_slow() { return std::exchange(slow_, 0); }
  int take_reversals() { return std::exchange(reversals_, 0); }

 private:
  Truth truth_;
  Objective objective_;
  State state_;
  double held_ = 200;
  int slow_ = 0;
  int sign_ = 0;  // of the budget's last move
  int reversals_ = 0;
};

// The most frames with which the truth keeps within 5 %, and the best rate it has.
double most_transparent(const Truth& truth) {
  double held = 20'000;
  for (std::uint64_t s = 0; s < 100'000; s += 20) {
    const double kv = room(demand, s);
    if (truth.takes_ns(kv, static_cast<double>(s)) > 1.05 * truth.alone_ns(kv)) break;
    held = kv;
  }
  return held;
}
double best_rate(const Truth& truth) {
  double best = 0;
  for (std::uint64_t s = 0; s < 100'000; s += 20) {
    const double kv = room(demand, s);
    best = std::max(best, kv / truth.takes_ns(kv, static_cast<double>(s)));
  }
  return best;
}

// ---- observe and decide -------------------------------------------------------------------------

TEST(Adapting, TellsWhatStreamingAddsFromWhatKvCosts) {
  for (const double loaded_ns : {0.0, 250.0, 1000.0}) {
    Truth truth(7);
    truth.loaded_ns = loaded_ns;
    Loop loop(truth, Aim::transparent);
    loop.run(400);
    EXPECT_NEAR(loop.state().decode.interference_ns(), loaded_ns, 60 + loaded_ns / 10);
    EXPECT_NEAR(loop.state().decode.predict_ns(20'000, 0) / truth.alone_ns(20'000), 1, 0.01);
    EXPECT_NEAR(loop.state().load_ns, truth.load_ns, 20);
  }
}

TEST(Adapting, StaysTransparent) {
  for (const double loaded_ns : {50.0, 250.0, 1000.0}) {
    for (const double load_ns : {300.0, 2600.0, 20'000.0}) {
      SCOPED_TRACE(std::to_string(loaded_ns) + ", " + std::to_string(load_ns));
      Truth truth(3);
      truth.loaded_ns = loaded_ns;
      truth.load_ns = load_ns;
      Loop loop(truth, Aim::transparent);
      loop.run(300);
      loop.take_slow();
      loop.run(300);
      EXPECT_LE(loop.take_slow(), 6) << "of 300 steps took more than 1.05";
      EXPECT_GE(loop.held(), 0.9 * most_transparent(truth))
          << loop.state().usable << " " << loop.state().margin << " " << loop.state().budget.frames
          << " " << loop.state().load_ns << " " << loop.state().decode.interference_ns()
          << name_of(loop.state().budget.reason) << " "
          << loop.state().decode.predict_ns(40000, 0) / truth.alone_ns(40000);
    }
  }
}

// As on a GPU, where the first steps compile kernels for seconds, and where events and tables take
// a part of a step that does not depend on how much is streamed.
TEST(Adapting, StaysTransparentAfterAColdStart) {
  for (const double any_ns : {0.0, 0.4e6, 0.8e6}) {
    for (const double load_ns : {300.0, 2600.0}) {
      SCOPED_TRACE(std::to_string(any_ns) + ", " + std::to_string(load_ns));
      Truth truth(3);
      truth.any_ns = any_ns;
      truth.load_ns = load_ns;
      Loop loop(truth, Aim::transparent);
      loop.run_cold(3e9);
      loop.run(400);
      loop.take_slow();
      loop.run(300);
      EXPECT_LE(loop.take_slow(), 6) << "of 300 steps took more than 1.05";
      EXPECT_GE(loop.held(), 0.9 * most_transparent(truth));
      EXPECT_NEAR(loop.state().decode.predict_ns(20'000, 0) / truth.alone_ns(20'000), 1, 0.01);
    }
  }
}

TEST(Adapting, FindsTheBestThroughput) {
  for (const double base_ns : {1e6, 5e6, 17e6}) {
    for (const double load_ns : {300.0, 2600.0, 20'000.0}) {
      SCOPED_TRACE(std::to_string(base_ns) + ", " + std::to_string(load_ns));
      Truth truth(5);
      truth.base_ns = base_ns;
      truth.load_ns = load_ns;
      Loop loop(truth, Aim::throughput);
      loop.run(600);
      EXPECT_GE(loop.rate(), 0.95 * best_rate(truth));
    }
  }
}

TEST(Adapting, FollowsALinkThatChanges) {
  Loop loop(Truth(11), Aim::throughput);
  loop.run(400);
  const std::uint64_t fast = loop.state().budget.frames;
  loop.truth().load_ns *= 4;
  loop.run(32);
  EXPECT_LE(loop.state().budget.frames, fast / 3);
  EXPECT_GE(loop.rate(), 0.95 * best_rate(loop.truth()));
  loop.truth().load_ns /= 4;
  loop.run(64);
  EXPECT_GE(loop.rate(), 0.95 * best_rate(loop.truth()));
}

// As on a backend that sees the ends of copies between layers only.
TEST(Adapting, AsksMoreOfALinkWhoseCopiesNobodyTimes) {
  for (const double load_ns : {300.0, 2600.0}) {
    for (const Aim aim : {Aim::transparent, Aim::throughput}) {
      SCOPED_TRACE(std::to_string(load_ns));
      Truth truth(19);
      truth.load_ns = load_ns;
      truth.times_only_stalls = true;
      Loop loop(truth, aim);
      loop.run(400);
      loop.take_slow();
      loop.run(200);
      if (aim == Aim::transparent) {
        EXPECT_LE(loop.take_slow(), 8);
        EXPECT_GE(loop.held(), 0.9 * most_transparent(truth));
      } else {
        EXPECT_GE(loop.rate(), 0.95 * best_rate(truth));
      }
    }
  }
}

TEST(Adapting, RestsWhereNothingChanges) {
  for (const Aim aim : {Aim::transparent, Aim::throughput}) {
    Loop loop(Truth(13), aim);
    loop.run(400);
    loop.take_reversals();
    loop.run(256);
    EXPECT_LE(loop.take_reversals(), 4);
  }
}

TEST(Adapting, OneStepThatIsFarOffIsLeftOut) {
  Loop loop(Truth(17), Aim::transparent);
  loop.run(300);
  const double before = loop.state().decode.predict_ns(20'000, 0);
  const double slow = loop.truth().base_ns;
  loop.truth().base_ns = 5 * slow;
  loop.run(1);
  EXPECT_EQ(loop.state().decode.predict_ns(20'000, 0), before);
  loop.run(10);  // it stays: the model or the clock has changed
  EXPECT_NEAR(loop.state().decode.predict_ns(20'000, 0) / loop.truth().alone_ns(20'000), 1, 0.03);
}

// What a step is found to be beyond the prediction, always to the same side, is no noise.
TEST(Adapting, FollowsStepsThatGrow) {
  State state;
  for (int i = 0; i < 240; ++i) {
    const double read = i < 16 ? 800 * (i + 1) : 12'800 + 13 * (i - 16);
    StepReport report;
    report.kv_frames = i < 16 ? static_cast<std::uint64_t>(read) : 12'800;  // as far as it is known
    report.step_ns = static_cast<Nanos>(8e6 + read * 2200);
    state = observe(state, report);
    EXPECT_LE(state.slowdown, 0.01) << i;
  }
}

TEST(Adapting, SaysWhatBoundsIt) {
  State state;
  EXPECT_EQ(decide(demand, state, {}).reason, Reason::starting);
  EXPECT_EQ(decide(demand, state, {}).frames, 0U);
  Truth truth(1);
  for (int kv = 100; kv < 20'000; kv += 100) state = observe(state, truth.step(kv, 0));
  EXPECT_EQ(decide(demand, state, {}).reason, Reason::exploring);
  EXPECT_GT(decide(demand, state, {}).frames, 0U);
  Loop slow_link(truth, Aim::transparent);
  slow_link.truth().load_ns = 40'000;
  slow_link.run(300);
  EXPECT_EQ(name_of(slow_link.state().budget.reason), "link");
  Loop costly(truth, Aim::transparent);
  costly.truth().loaded_ns = 2000;
  costly.run(300);
  EXPECT_EQ(name_of(costly.state().budget.reason), "interference");
  const State learned = slow_link.state();
  const Objective bounded{Aim::throughput, 0.05, static_cast<Nanos>(truth.alone_ns(20'000) * 1.02)};
  EXPECT_EQ(decide(demand, learned, bounded).reason, Reason::latency);
  EXPECT_EQ(decide(demand, learned, {Aim::throughput, 0.05, 0}).reason, Reason::best);
  EXPECT_EQ(decide({20'000, 10, 0, 48}, learned, {}).reason, Reason::pool);
}

// What fits is streamed to learn from it only where somebody admits by what is learned, when that
// will soon be of use, and until it is known.
TEST(Adapting, ProbesWhereSomebodyAsks) {
  Truth truth(23);
  State state;
  for (int kv = 100; kv < 15'000; kv += 100) state = observe(state, truth.step(kv, 0));
  state.steps = 160;  // when as much is tried as does no harm
  Demand now = demand;
  now.active_frames = 15'000;
  const std::uint64_t probe = decide(now, state, {}).probe;
  EXPECT_GT(probe, 100U);
  EXPECT_LE(probe, 20'000U / 16);
  EXPECT_GT(decide(now, state, {Aim::throughput, 0, 0}).probe, 100U);
  EXPECT_EQ(decide(now, state, {Aim::transparent, 0, 0}).probe, 0U);
  state.steps = 176;  // and when a part of that is
  EXPECT_NEAR(static_cast<double>(decide(now, state, {}).probe), static_cast<double>(probe) / 4, 1);
  state.steps = 160;
  now.asked = false;
  EXPECT_EQ(decide(now, state, {}).probe, 0U);
  now.asked = true;
  now.active_frames = 4'000;
  EXPECT_EQ(decide(now, state, {}).probe, 0U);
  now.active_frames = 15'000;
  int probes = 0;
  for (int i = 0; i < 400; ++i) {
    state.budget = decide(now, state, {});
    probes += state.budget.probe > 0 ? 1 : 0;
    state = observe(state, truth.step(15'000, static_cast<double>(state.budget.probe)));
  }
  EXPECT_GT(probes, 2);
  EXPECT_LE(probes, 128);
  EXPECT_EQ(static_cast<int>(state.probes), probes);
  EXPECT_NEAR(state.decode.interference_ns(), truth.loaded_ns, truth.loaded_ns);
}

TEST(Adapting, RefusesObjectivesThatCannotBe) {
  EXPECT_EQ(make_objective("throughput", 0.1, 50).step_ns_max, 50'000'000);
  EXPECT_THROW(static_cast<void>(make_objective("fast", 0.05, 0)), ConfigError);
  for (const double slack : {-0.1, 11.0, std::nan("")}) {
    EXPECT_THROW(static_cast<void>(make_objective("transparent", slack, 0)), ConfigError);
  }
  for (const double bound : {-1.0, std::nan("")}) {
    EXPECT_THROW(static_cast<void>(make_objective("transparent", 0.05, bound)), ConfigError);
  }
}

// ---- a server -----------------------------------------------------------------------------------

TEST(Serving, ReachesTheBestOfFixedBatches) {
  const Objective throughput = make_objective("throughput", 0.05, 0);
  double best = 0;
  for (const std::size_t running : {28U, 34U, 40U, 48U, 56U, 68U, 80U}) {
    Server server(small_machine(), "fit", throughput);
    best = std::max(best, serve(server, 240, running, 2048).tokens_per_s);
  }
  Server server(small_machine(), "adaptive", throughput);
  const double reached = serve(server, 240, 0, 2048).tokens_per_s;
  std::cout << reached << " tokens a second, by fixed batches at best " << best << '\n';
  EXPECT_GE(reached, 0.95 * best);
  EXPECT_GT(server.cache().stats().streamed_bytes, 0U);
}

// Contexts grow until what the headroom promised is taken.
TEST(Serving, IsTransparentWhileContextsGrow) {
  Server server(small_machine(), "adaptive", {}, 400);
  int slow = 0;
  for (int i = 0; i < 400; ++i) {
    for (int more = 0; more < 2 && i < 300 && server.admit({2048, 400}); ++more) {
    }
    server.decode();
    if (i >= 200) slow += server.step_ns() > 1.05 * server.alone_ns() ? 1 : 0;
  }
  EXPECT_GT(server.streamed_share(), 0.05) << "it admits more than the device holds";
  EXPECT_LE(slow, 10);  // of 200, most of them by less than a hundredth
}

// Requests that are larger than what could be tried blindly are admitted once it is known what
// streaming costs, and none before makes a step slow, whatever it costs.
TEST(Serving, LearnsWhatStreamingCostsBeforeItAdmits) {
  Server server(testing::cpu_small(), "adaptive", {}, 192);
  int slow = 0;
  for (int i = 0; i < 200; ++i) {
    if (server.running() < 19) server.admit({1024, 128});
    server.decode();
    slow += server.step_ns() > 1.05 * server.alone_ns() ? 1 : 0;
    if (i == 40) {
      EXPECT_GT(server.cache().stats().link_bytes_per_s, 1e9);
    }
  }
  EXPECT_LE(slow, 4);
}

// Where the system gives no more memory or disk the pool is what there is, until it gives some.
TEST(Serving, HeadroomIsWhatTheSystemGives) {
  Server server(small_machine(), "adaptive", {}, 64);
  SimFaults short_of_memory;
  short_of_memory.refused = 1;
  server.sim().set_faults(short_of_memory);
  const std::uint64_t most = server.cache().headroom().tokens_most;
  for (int i = 0; i < 30; ++i) {
    server.start({1024, 400});
    server.decode();
  }
  const std::uint64_t held = std::uint64_t{30} * 1088;
  EXPECT_EQ(server.cache().stats().streamed_bytes, 0U);
  EXPECT_LT(server.cache().headroom().tokens_most, most / 4);
  EXPECT_GE(server.cache().headroom().tokens_most, server.cache().headroom().tokens);
  server.sim().set_faults({});
  for (int i = 0; i < 20; ++i) server.decode();
  EXPECT_GT(server.cache().stats().streamed_bytes, 0U);
  EXPECT_GT(server.cache().headroom().tokens_most, most - 2 * held);
}

// Prompts that end where a block does: the next token of each begins another.
TEST(Serving, HeadroomCountsWhatTheNextTokensTake) {
  Server server(small_machine(), "adaptive", {});
  const Serving serving = small_machine();
  const std::uint64_t block = serving.geometry.block_tokens;
  std::uint64_t running = 0;
  for (; server.cache().headroom().tokens >= 4 * block; ++running) {
    server.start({static_cast<std::uint32_t>(3 * block), 64});
  }
  const auto blocks =
      serving.device_bytes / serving.geometry.frame_bytes() / serving.geometry.layers;
  EXPECT_LE(4 * running, blocks);
  EXPECT_GT(4 * (running + 2), blocks);
}

// What others hold in blocks that are not full is held, whoever took the last step.
TEST(Serving, HeadroomIsTheSameAfterAPrompt) {
  Server server(small_machine(), "adaptive", {}, 64);
  for (int i = 0; i < 20; ++i) server.start({2010, 400});
  server.decode();
  const std::uint64_t before = server.cache().headroom().tokens;
  server.prefill({2010, 0});
  EXPECT_EQ(server.cache().headroom().tokens, before);
}

// Each streamed frame comes over the link once a step, and each that fills goes out once: nothing
// is fetched twice or for nobody. What the plan streams is what a layer finds in the pool as it
// begins.
TEST(Serving, MovesHardlyMoreThanThePlanStreams) {
  Server server(small_machine(), "adaptive", make_objective("throughput", 0.05, 0));
  for (int i = 0; i < 60; ++i) server.start({2048, 400});
  for (int i = 0; i < 40; ++i) server.decode();
  const Stats before = server.cache().stats();
  server.cache().start_trace(1'000'000);
  for (int i = 0; i < 128; ++i) server.decode();
  const Trace trace = server.cache().take_trace();
  const Stats after = server.cache().stats();
  ASSERT_EQ(trace.dropped, 0U);
  std::uint64_t streamed = 0;
  for (const Event& event : trace.events) {
    streamed += event.kind == EventKind::layer ? event.streamed : 0;
  }
  const Bytes filled = after.kv_bytes - before.kv_bytes;
  const auto planned = static_cast<double>(streamed * trace.frame_bytes + filled);
  const auto moved = static_cast<double>(after.streamed_bytes - before.streamed_bytes +
                                         after.written_bytes - before.written_bytes);
  std::cout << moved / planned << " of what was planned, of which "
            << 100 * static_cast<double>(filled) / planned << " % is what filled\n";
  EXPECT_GT(streamed, 0U);
  EXPECT_LE(moved, 1.05 * planned);
  EXPECT_GE(moved, 0.9 * planned);
}

TEST(Serving, GivesUpWhatALinkDoesNotBringAnyMore) {
  Server server(small_machine(), "adaptive", make_objective("throughput", 0.05, 0));
  serve(server, 160, 0, 2048);
  const Bytes before = server.cache().stats().budget_bytes;
  SimFaults slow;
  slow.slow = 1;
  slow.slow_factor = 4;
  server.sim().set_faults(slow);
  for (int i = 0; i < 32; ++i) server.decode();
  EXPECT_LT(server.cache().stats().budget_bytes, before / 2);
}

TEST(Serving, HeadroomWithoutStreamingIsTheDevice) {
  Server server(small_machine(), "off", {});
  for (int i = 0; i < 2; ++i) {
    const Headroom found = server.cache().headroom();
    EXPECT_GT(found.tokens, 2048U);
    EXPECT_EQ(found.tokens_most, found.tokens);
    EXPECT_EQ(found.slowdown_most, 0);
    server.start({2048, 40});
    server.decode();
  }
}

TEST(Serving, HeadroomIsWhatCanBeAdmitted) {
  Server server(small_machine(), "adaptive", {});
  Cache& cache = server.cache();
  const Headroom empty = cache.headroom();
  EXPECT_EQ(empty.slowdown_most, 0) << "nothing is known yet";
  EXPECT_GT(empty.tokens_most, 4 * empty.tokens);
  server.start({2048, 4000});
  const Headroom one = cache.headroom();
  EXPECT_EQ(empty.tokens - one.tokens, 2048U + 64) << "and the block that its next token begins";
  while (server.admit({2048, 4000})) server.decode();
  EXPECT_LT(cache.headroom().tokens, 2048U + 32U * (server.running() + 1));
  for (int i = 0; i < 20; ++i) server.decode();
  EXPECT_GT(cache.headroom().slowdown_most, 0.1) << "the link does not bring it all";
  server.leave(10);
  EXPECT_GT(cache.headroom().tokens, 4 * 2048U);
}

// Tells how many frames of the pool are usable.
class PoolWatcher final : public testing::ProxyBackend {
 public:
  using ProxyBackend::ProxyBackend;
  [[nodiscard]] std::uint32_t usable() const { return usable_; }
  PoolSize resize_pool(std::uint32_t frames) override {
    const PoolSize size = ProxyBackend::resize_pool(frames);
    usable_ = size.frames;
    return size;
  }

 private:
  std::uint32_t usable_ = 0;
};

// Loads that repeat find the pool as large as they left it; what only one of them needed goes back
// to the system when the next that is smaller is over.
TEST(Adaptive, ThePoolGivesBackWhatIsNotHeldAgain) {
  const Geometry geometry{2, 8, 128, 64, DType::bf16};
  SimOptions options;
  options.frame_bytes = geometry.frame_bytes();
  options.device_frames = 64;
  options.pool_frames = 4000;
  options.carry_bytes = false;
  auto owned = std::make_unique<PoolWatcher>(open_sim(options));
  PoolWatcher& backend = *owned;
  Cache cache(geometry, "fit", std::move(owned));
  testing::IdleKernel kernel;
  const auto serve = [&](std::uint32_t blocks) {
    const SequenceId sequence = cache.add();
    for (std::uint32_t done = 0; done < blocks; done += 8) {
      backend.rest();
      const StepEntry entry{sequence, 8 * geometry.block_tokens};
      cache.begin({&entry, 1}, Reader::kernel);
      for (std::uint32_t layer = 0; layer < geometry.layers; ++layer) cache.run(layer, kernel);
      cache.finish();
    }
    cache.check();
    cache.free(sequence);
    cache.check();
  };
  serve(800);
  EXPECT_GE(backend.usable(), 1500U);
  serve(800);
  EXPECT_GE(backend.usable(), 1500U);
  serve(40);
  EXPECT_LE(backend.usable(), 400U);
  serve(800);
  EXPECT_GE(backend.usable(), 1500U);
}

}  // namespace
}  // namespace pie
