// Long seeded runs of a cache on a simulated machine with faults, against the reference model, each
// invariant checked after each call.
//
// A run is a function of its seed, which is printed where it fails; PIE_SEED=n runs that one alone.
// PIE_SWARM_RUNS=n runs as many seeds of each kind, and each kind says how many it runs a minute.
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <iostream>
#include <optional>
#include <string>

#include "reference_model.hpp"

namespace pie {
namespace {

using testing::expect;
using testing::Mismatch;
using testing::Model;
using testing::ProxyBackend;

constexpr std::uint32_t operations = 2000;
constexpr std::uint32_t sequences_max = 6;
constexpr std::uint32_t tokens_max = 400;  // of a sequence; then it is cut or freed

// ---- one run ------------------------------------------------------------------------------------

// What a kind of run is about.
struct Kind {
  bool faults = false;
  bool streams = false;
  bool loses = false;  // the device, at some time
  double silent = 0;   // see SimFaults
};

// What was seen, so that a kind of run can be asked whether it saw what it is about.
struct Tally {
  std::uint64_t steps = 0;
  std::uint64_t forks = 0;
  std::uint64_t capacity_errors = 0;
  std::uint64_t io_errors = 0;
  std::uint64_t resizes = 0;
  std::uint64_t switches = 0;  // of the stream
  std::uint64_t losses = 0;
  std::uint64_t streamed_frames = 0;
};

class Run {
 public:
  // `wrap` puts something between the cache and the machine.
  using Wrap = std::unique_ptr<ProxyBackend> (*)(std::unique_ptr<SimBackend>);

  Run(std::uint64_t seed, const Kind& kind, Wrap wrap, Tally& tally)
      : random_(seed), kind_(kind), tally_(tally), geometry_(draw_geometry()) {
    options_ = draw_machine(seed);
    const std::string policies[] = {"fit",     "fit", "fit",  "fixed:0.5",
                                    "fixed:1", "off", "fuzz", "fuzz"};
    policy_ = policies[pick(8)];
    model_ = std::make_unique<Model>(geometry_, policy_, wrap(open_sim(options_)));
  }

  void all() {
    static_cast<void>(model_->add());
    for (std::uint32_t i = 0; i < operations; ++i) {
      operate();
      model_->check();
    }
    wind_up();
  }

 private:
  std::uint32_t pick(std::uint32_t below) { return static_cast<std::uint32_t>(random_() % below); }
  bool one_in(std::uint32_t n) { return pick(n) == 0; }

  Geometry draw_geometry() {
    Geometry geometry{1 + pick(4), 1, 8, testing::block_tokens, DType::bf16};
    if (one_in(3)) {
      for (std::uint32_t layer = 0; layer < geometry.layers; ++layer) {
        geometry.windows.push_back(pick(2) * (1 + pick(100)));
      }
    }
    return geometry;
  }

  SimOptions draw_machine(std::uint64_t seed) {
    const std::uint32_t layers = geometry_.layers;
    SimOptions options =
        testing::small_machine(geometry_, layers + 2 + (one_in(8) ? 0 : pick(layers * 20)),
                               one_in(5) ? 1 + pick(40) : 300 + pick(600));
    options.device_frames_max = options.device_frames + pick(layers * 20);
    options.pool_frames_max = options.pool_frames + pick(100);
    options.copy_bytes_best = options.frame_bytes << pick(5);
    options.load.jitter_ns = one_in(2) ? 200'000 : 2'000;
    options.write.jitter_ns = one_in(2) ? 400'000 : 2'000;
    options.load.copies_at_once = 1 + pick(16);
    options.streams = kind_.streams;
    options.seed = seed;
    if (kind_.faults) options.faults = draw_faults();
    options.faults.silent = kind_.silent;
    return options;
  }

  // A copy that fails behind a stream is the end of the device: there it is rare.
  SimFaults draw_faults() {
    SimFaults faults;
    if (one_in(2)) faults.failed = kind_.streams ? 6e-5 : (one_in(3) ? 0.3 : 0.02);
    if (one_in(3)) faults.corrupt = kind_.streams ? 6e-5 : 0.05;
    if (one_in(5)) faults.rotten = kind_.streams ? 3e-5 : 0.003;
    if (one_in(3)) faults.slow = 0.02;
    if (one_in(3)) faults.refused = 0.2;
    faults.lying = 0.3;
    faults.lying_bytes = Bytes{1} << 18;
    return faults;
  }

  // ---- operations

  void operate() {
    try {
      if (model_->cache().open_step().rows > 0) {
        go_on();
      } else {
        between_steps();
      }
    } catch (const CapacityError& error) {
      ++tally_.capacity_errors;
      full_ = true;
      // Only what was asked for may be refused; what runs goes on unless the machine refuses room.
      expect(asking_ || kind_.faults || broken_once_ || lost_, "in mid-step: ", error.what());
      expect(!fits_ || kind_.faults || lost_, "there is room for all of it: ", error.what());
    } catch (const IoError& error) {
      ++tally_.io_errors;
      if (kind_.streams && model_->failed_copies() > 0 && !std::exchange(lost_, true)) {
        ++tally_.losses;
      }
      expect(kind_.faults || broken_ || broken_once_ || lost_, "no fault: ", error.what());
      expect(model_->salts().contains(error.sequence()) || (lost_ && error.sequence() == 0),
             "an error of no sequence");
    } catch (const LogicError& error) {
      // A truncation that a window forbids.
      expect(truncating_, error.what());
    }
    asking_ = fits_ = truncating_ = false;
  }

  void go_on() {
    if (kind_.loses && one_in(1500)) lose();
    if (one_in(60)) return model_->abort();
    if (model_->layer_next() < geometry_.layers) return model_->layer();
    model_->finish();
    ++tally_.steps;
  }

  void between_steps() {
    // Where something was refused, room is often made: else a small machine is stuck for ever.
    const std::uint32_t act = std::exchange(full_, false) && one_in(2) ? 16 + pick(14) : pick(100);
    const auto& salts = model_->salts();
    if (salts.empty() || (act < 6 && salts.size() < sequences_max)) {
      static_cast<void>(model_->add());
      return;
    }
    auto some = salts.begin();
    std::advance(some, pick(static_cast<std::uint32_t>(salts.size())));
    const SequenceId id = some->first;
    const std::uint32_t length = model_->length(id);
    if (act < 16) {
      if (salts.size() < sequences_max) {
        static_cast<void>(model_->fork(id));
        ++tally_.forks;
      }
    } else if (act < 26) {
      truncating_ = true;
      // Often within the last block or two, sometimes anywhere.
      model_->truncate(id, one_in(2) ? length - std::min(length, pick(40)) : pick(length + 1));
    } else if (act < 30 || length > tokens_max) {
      model_->free(id);
    } else if (act < 33) {
      resize();
    } else if (act < 35) {
      if (!kind_.streams || one_in(200)) set_broken(!broken_ && one_in(2));
    } else if (act < 37 && kind_.streams) {
      model_->set_stream({7 + pick(3)});
      ++tally_.switches;
    } else if (act == 37 && kind_.loses && one_in(20)) {
      lose();
    } else {
      begin();
    }
  }

  void resize() {
    asking_ = true;
    const std::uint32_t device = options_.device_frames;
    const std::uint32_t pool = options_.pool_frames;
    model_->resize(std::max(geometry_.layers + 1, device / 2 + pick(device)),
                   std::max(1U, pool / 2 + pick(pool)));
    ++tally_.resizes;
  }

  void lose() {
    model_->sim().lose();
    if (!std::exchange(lost_, true)) ++tally_.losses;
  }

  void set_broken(bool broken) {
    broken_once_ = broken_once_ || broken;
    broken_ = broken;
    SimFaults faults = options_.faults;
    if (broken) faults.failed = 1;
    model_->sim().set_faults(faults);
  }

  void begin() {
    batch_.clear();
    for (const auto& [id, salts] : model_->salts()) {
      if (one_in(3) || salts.size() > tokens_max) continue;
      const std::uint32_t tokens[] = {1, 1, 1, 1 + pick(16), 1 + pick(90), 16 * (1 + pick(5))};
      batch_.push_back({id, tokens[pick(6)]});
    }
    std::shuffle(batch_.begin(), batch_.end(), random_);
    if (batch_.empty()) return;
    asking_ = true;
    fits_ = fits();
    model_->begin(batch_, Reader::kernel);
  }

  // Whether the device can hold all sequences after the step side by side, nothing shared and
  // nothing streamed: then the policy "fit" has no reason to refuse.
  [[nodiscard]] bool fits() const {
    std::uint64_t frames = 0;
    const auto blocks = [&](std::uint64_t tokens) { return (tokens + 15) / 16 * geometry_.layers; };
    for (const auto& [id, salts] : model_->salts()) frames += blocks(salts.size());
    for (const StepEntry& entry : batch_) frames += blocks(entry.new_tokens) + geometry_.layers;
    return policy_ == "fit" &&
           frames * geometry_.frame_bytes() <= model_->cache().stats().device_bytes;
  }

  // ---- the end: with the machine mended, everything is still there, and goes without a trace.
  // What a lost device held is not, but goes as well.
  void wind_up() {
    if (model_->cache().open_step().rows > 0) model_->abort();
    if (kind_.streams) expect_told();
    model_->sim().set_faults({});
    while (!model_->salts().empty()) {
      const SequenceId id = model_->salts().begin()->first;
      batch_ = {{id, 1}};
      for (int tries = 0; !lost_ && !read_once() && options_.faults.rotten == 0; ++tries) {
        expect(tries < 20, "a sequence cannot be read though all is mended");
      }
      model_->free(id);
      model_->check();
    }
    const Stats stats = model_->cache().stats();
    tally_.streamed_frames += stats.streamed_bytes / geometry_.frame_bytes();
    expect(stats.resident_frames == 0 && stats.pool_bytes_used == 0 && stats.kv_bytes == 0,
           "frames are in use though there is no sequence");
  }

  // A copy that failed behind a stream is told by the next step, and by each one after it.
  void expect_told() {
    model_->settle();
    if (model_->failed_copies() == 0 || model_->salts().empty()) return;
    batch_ = {{model_->salts().begin()->first, 1}};
    for (int i = 0; i < 2; ++i) {
      try {
        model_->step(batch_, Reader::kernel, geometry_.layers);
        expect(false, "a step went on though the device is lost");
      } catch (const IoError& error) {
        expect(error.sequence() == 0, "a lost device is everybody's");
      } catch (const CapacityError&) {
        return;
      }
    }
    lost_ = true;
  }

  // Whether there is nothing more to try: it was read, or there is no room for it.
  bool read_once() {
    try {
      model_->step(batch_, Reader::kernel, geometry_.layers);
    } catch (const IoError&) {
      return false;  // may tell of what failed before
    } catch (const CapacityError&) {
      return true;
    }
    return true;
  }

  std::mt19937_64 random_;
  Kind kind_;
  Tally& tally_;
  Geometry geometry_;
  SimOptions options_;
  std::string policy_;
  std::unique_ptr<Model> model_;
  std::vector<StepEntry> batch_;
  bool asking_ = false;      // the call that runs may be refused
  bool fits_ = false;        // but not for want of room on the device
  bool truncating_ = false;  // the call that runs may be forbidden
  bool full_ = false;        // the last call was refused
  bool broken_ = false;
  bool broken_once_ = false;
  bool lost_ = false;
};

std::unique_ptr<ProxyBackend> plain(std::unique_ptr<SimBackend> sim) {
  return std::make_unique<ProxyBackend>(std::move(sim));
}

// What went wrong in the run of this seed; nothing where all was well.
std::optional<std::string> failure_of(std::uint64_t seed, const Kind& kind, Run::Wrap wrap,
                                      Tally& tally) {
  try {
    Run(seed, kind, wrap, tally).all();
  } catch (const std::exception& error) {
    return error.what();
  }
  return std::nullopt;
}

// ---- many runs ----------------------------------------------------------------------------------

std::uint64_t number_from(const char* name, std::uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::uint64_t runs_default = 20;
#elif defined(NDEBUG)
constexpr std::uint64_t runs_default = 340;
#else
constexpr std::uint64_t runs_default = 20;
#endif

Tally run_many(const Kind& kind) {
  Tally tally;
  const std::uint64_t one = number_from("PIE_SEED", 0);
  const std::uint64_t runs = one > 0 ? 1 : number_from("PIE_SWARM_RUNS", runs_default);
  const auto began = std::chrono::steady_clock::now();
  for (std::uint64_t i = 1; i <= runs; ++i) {
    const std::uint64_t seed = one > 0 ? one : i;
    const auto failure = failure_of(seed, kind, plain, tally);
    if (failure) ADD_FAILURE() << "PIE_SEED=" << seed << ": " << *failure;
  }
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - began;
  std::cout << runs << " runs of " << operations << " operations, "
            << static_cast<std::uint64_t>(static_cast<double>(runs) / taken.count() * 60)
            << " a minute: " << tally.steps << " steps, " << tally.forks << " forks, "
            << tally.resizes << " resizes, " << tally.switches << " switches of stream, "
            << tally.losses << " lost devices, " << tally.streamed_frames << " frames streamed, "
            << tally.capacity_errors << " refused, " << tally.io_errors << " failed\n";
  return tally;
}

TEST(Swarm, HoldsOnAMachineWithoutFaults) {
  const Tally tally = run_many({});
  EXPECT_GT(tally.streamed_frames, 0U);
  EXPECT_GT(tally.forks, 0U);
  EXPECT_GT(tally.resizes, 0U);
}

TEST(Swarm, HoldsOnAMachineWithFaults) {
  const Tally tally = run_many({.faults = true});
  EXPECT_GT(tally.io_errors, 0U);
}

TEST(Swarm, HoldsOnStreamsWithFaults) {
  const Tally tally = run_many({.faults = true, .streams = true});
  EXPECT_GT(tally.io_errors, 0U);
  EXPECT_GT(tally.switches, 0U);
  EXPECT_GT(tally.losses, 0U);
}

TEST(Swarm, HoldsWhereTheDeviceIsLost) {
  for (const bool streams : {false, true}) {
    const Tally tally = run_many({.streams = streams, .loses = true});
    EXPECT_GT(tally.losses, 0U);
    EXPECT_GT(tally.io_errors, 0U);
  }
}

TEST(Swarm, HoldsWhereComputeRunsOnStreams) {
  const Tally tally = run_many({.streams = true});
  EXPECT_GT(tally.streamed_frames, 0U);
}

// ---- canaries: what must be seen ----------------------------------------------------------------

// Lets copies of one lane begin before the stream has come to where they may.
template <Tier from>
class WithoutFences final : public ProxyBackend {
 public:
  using ProxyBackend::ProxyBackend;
  Ticket submit(std::span<const Copy> copies, std::span<const Dep> after) override {
    std::vector<Dep> deps(after.begin(), after.end());
    for (Dep& dep : deps) {
      if (copies.front().from.tier == from) dep.fence = {};
    }
    return ProxyBackend::submit(copies, deps);
  }
};

// Says of now and then a write that it is done, and does not do it.
class LosesWrites final : public ProxyBackend {
 public:
  using ProxyBackend::ProxyBackend;
  Ticket submit(std::span<const Copy> copies, std::span<const Dep> after) override {
    Copy nothing = copies.front();
    nothing.count = 0;
    const bool lost = nothing.from.tier == Tier::device && ++writes_ % 64 == 0;
    return ProxyBackend::submit(lost ? std::span<const Copy>{&nothing, 1} : copies, after);
  }

 private:
  std::uint32_t writes_ = 0;
};

// Lets the stream run ahead of the copies that it should wait for.
class WithoutDepends final : public ProxyBackend {
 public:
  using ProxyBackend::ProxyBackend;
  void depend(ComputeStream /*stream*/, const Dep& /*dep*/) override {}
};

// Lets copies overtake those that they should wait for.
class WithoutTickets final : public ProxyBackend {
 public:
  using ProxyBackend::ProxyBackend;
  Ticket submit(std::span<const Copy> copies, std::span<const Dep> after) override {
    std::vector<Dep> deps(after.begin(), after.end());
    for (Dep& dep : deps) dep.ticket = {};
    return ProxyBackend::submit(copies, deps);
  }
};

template <class Wrapper>
std::unique_ptr<ProxyBackend> wrapped(std::unique_ptr<SimBackend> sim) {
  return std::make_unique<Wrapper>(std::move(sim));
}

void expect_seen(const Kind& kind, Run::Wrap wrap) {
  std::uint32_t seen = 0;
  constexpr std::uint32_t seeds = 10;
  for (std::uint64_t seed = 1; seed <= seeds; ++seed) {
    Tally tally;
    const auto failure = failure_of(seed, kind, wrap, tally);
    const bool told =
        failure && (failure->find("does not hold what was stored") != std::string::npos ||
                    failure->find("a frame is in two copies at once") != std::string::npos);
    seen += told ? 1 : 0;
    EXPECT_TRUE(told || tally.streamed_frames == 0) << "PIE_SEED=" << seed << " saw nothing";
  }
  EXPECT_GT(seen, seeds / 2);
}

TEST(SwarmCanary, SeesDataThatChangeOnTheirWay) { expect_seen({.silent = 0.02}, plain); }

TEST(SwarmCanary, SeesWritesThatNeverArrive) { expect_seen({}, wrapped<LosesWrites>); }

TEST(SwarmCanary, SeesReadsOfFramesThatAreNotLoaded) {
  expect_seen({.streams = true}, wrapped<WithoutDepends>);
}

TEST(SwarmCanary, SeesCopiesThatOvertakeEachOther) {
  expect_seen({.streams = true}, wrapped<WithoutTickets>);
}

TEST(SwarmCanary, SeesLoadsIntoFramesThatAreRead) {
  expect_seen({.streams = true}, wrapped<WithoutFences<Tier::pool>>);
}

TEST(SwarmCanary, SeesWritesOfFramesThatAreNotFilled) {
  expect_seen({.streams = true}, wrapped<WithoutFences<Tier::device>>);
}

}  // namespace
}  // namespace pie
