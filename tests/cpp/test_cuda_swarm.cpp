// Seeded histories of a cache on the CUDA backend, over the double of the driver: each step under
// an order of its own among all that streams and events allow, against the reference model, and no
// two uses of a frame that race. Then the same with a bug planted in the backend, which must be
// seen.
#include <gtest/gtest.h>

#include <array>
#include <functional>
#include <iostream>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "fake.hpp"
#include "gpu_fixture.hpp"
#include "pie/backends.hpp"
#include "reference_model.hpp"

namespace pie {
namespace {

using testing::Caller;
using testing::IdleKernel;
using testing::Mismatch;
using testing::Model;

constexpr std::uint32_t histories = 45;
constexpr std::uint32_t operations = 400;
constexpr std::uint32_t sequences_max = 5;
constexpr std::uint32_t tokens_max = 300;

struct Tally {
  std::uint64_t schedules = 0;  // steps, each in an order of its own
  std::uint64_t streamed = 0;   // frames
  std::uint64_t in_place = 0;   // frames
  std::uint64_t wraps = 0;      // of the ring
  std::uint64_t dropped = 0;    // frames prefetched, overwritten unread
  std::uint64_t aborts = 0;
  std::uint64_t forks = 0;
  std::uint64_t resizes = 0;
  std::uint64_t truncations = 0;
  std::uint64_t switches = 0;  // of the stream
  std::uint64_t refusals = 0;
};

// The backend, and how often the host has waited; with a bug, if one is asked for.
enum class Bug : std::uint8_t {
  none,
  no_depend,
  no_write_waits,
  no_fences,
  no_ticket_deps,
  wrong_frame,
  wrong_device
};

class Watched final : public Backend {
 public:
  Watched(std::unique_ptr<Backend> inner, Bug bug) : inner_(std::move(inner)), bug_(bug) {}

  [[nodiscard]] std::uint64_t waits() const { return waits_; }

  // Loads into frames before those of the load before, and frames loaded that were loaded before
  // and not read since.
  [[nodiscard]] std::uint64_t wraps() const { return wraps_; }
  [[nodiscard]] std::uint64_t dropped() const { return dropped_; }

  // What lies there is read; perhaps not on the device.
  void note_read(const std::byte* at) {
    const std::ptrdiff_t bytes = at - inner_->address(0);
    const auto stride = static_cast<std::ptrdiff_t>(inner_->capabilities().frame_stride);
    if (bytes >= 0) unread_.erase(bytes / stride);
  }

  [[nodiscard]] Capabilities capabilities() const override {
    Capabilities all = inner_->capabilities();
    all.copy_bytes_best = 2048;  // so that small caches have segments
    return all;
  }
  [[nodiscard]] Nanos now() const override { return inner_->now(); }
  std::uint32_t resize_device(std::uint32_t frames) override {
    return inner_->resize_device(frames);
  }
  PoolSize resize_pool(std::uint32_t frames) override {
    const PoolSize size = inner_->resize_pool(frames);
    growing_ = size.pending;
    return size;
  }
  [[nodiscard]] std::string pool_refusal() const override { return inner_->pool_refusal(); }
  Ticket submit(std::span<const Copy> copies, std::span<const Dep> after) override {
    if (!copies.empty() && copies[0].from.tier == Tier::pool) note_loads(copies);
    std::vector<Copy> all(copies.begin(), copies.end());
    std::vector<Dep> deps(after.begin(), after.end());
    for (Dep& dep : deps) {
      if (bug_ == Bug::no_fences) dep.fence = {};
      if (bug_ == Bug::no_ticket_deps) dep.ticket = {};
    }
    if (bug_ == Bug::wrong_frame && ++submitted_ % 50 == 0 && all[0].to.first > 0) {
      --all[0].to.first;
    }
    return inner_->submit(all, deps);
  }
  std::size_t poll(std::span<Completion> out) override { return inner_->poll(out); }
  void wait(Nanos timeout_ns) override {
    if (!growing_) ++waits_;  // a pool that grows for the first time is waited for
    inner_->wait(timeout_ns);
  }
  void require_usable(ComputeStream stream) const override { inner_->require_usable(stream); }
  Fence record(ComputeStream stream, Timing timing) override {
    const bool elsewhere = bug_ == Bug::wrong_device && ++recorded_ % 50 == 0;
    return inner_->record(elsewhere ? Caller::get().stream_elsewhere() : stream, timing);
  }
  void depend(ComputeStream stream, const Dep& dep) override {
    const bool write = dep.ticket.id != 0 && dep.ticket.lane == Lane::device_to_pool;
    if (bug_ == Bug::no_depend || (bug_ == Bug::no_write_waits && write)) return;
    inner_->depend(stream, dep);
  }
  void duplicate(ComputeStream stream, std::span<const Duplicate> frames) override {
    inner_->duplicate(stream, frames);
  }
  [[nodiscard]] std::byte* address(FrameIndex frame) const override {
    return inner_->address(frame);
  }
  [[nodiscard]] const std::byte* pool_address() const override { return inner_->pool_address(); }
  [[nodiscard]] std::shared_ptr<const void> memory() const override { return inner_->memory(); }
  [[nodiscard]] Health health() const override { return inner_->health(); }

 private:
  void note_loads(std::span<const Copy> copies) {
    if (copies[0].to.first < last_load_) ++wraps_;
    last_load_ = copies[0].to.first;
    for (const Copy& copy : copies) {
      for (FrameIndex i = 0; i < copy.count; ++i) {
        if (!unread_.insert(copy.to.first + i).second) ++dropped_;
      }
    }
  }

  std::unique_ptr<Backend> inner_;
  Bug bug_;
  std::set<std::ptrdiff_t> unread_;  // frames loaded
  FrameIndex last_load_ = 0;
  std::uint64_t wraps_ = 0;
  std::uint64_t dropped_ = 0;
  bool growing_ = false;
  std::uint64_t waits_ = 0;
  std::uint64_t submitted_ = 0;
  std::uint64_t recorded_ = 0;
};

class FakeMachine final : public testing::Machine {
 public:
  explicit FakeMachine(Watched& backend) : backend_(backend) {}

  void launch(ComputeStream stream, Nanos /*duration_ns*/, std::byte* at, Bytes bytes,
              Access access, Body body) override {
    if (access == Access::read) backend_.note_read(at);
    const auto address = reinterpret_cast<CUdeviceptr>(at);
    const fake::Range range{address, bytes, access == Access::write};
    fake::launch(testing::handle_of(stream), {&range, 1},
                 [at = fake::reach(address), body = std::move(body)] { body(at); });
  }
  void run(ComputeStream stream, Nanos /*duration_ns*/) override {
    Caller::get().synchronize(testing::handle_of(stream));
  }
  // How often the host has waited, for the driver or in the backend.
  [[nodiscard]] Nanos host_time() const override {
    std::uint64_t waits = backend_.waits();
    for (const auto& [name, count] : fake::calls_by_name()) {
      if (name.ends_with("Synchronize")) waits += count;
    }
    return static_cast<Nanos>(waits);
  }
  [[nodiscard]] std::uint64_t failed_copies() const override { return 0; }

 private:
  Watched& backend_;
};

// ---- a history ----------------------------------------------------------------------------------

class History {
 public:
  History(std::uint64_t seed, Bug bug, Tally& tally)
      : random_(seed), tally_(tally), geometry_(draw_geometry()) {
    const Bytes stride = geometry_.frame_bytes();
    const std::uint32_t layers = geometry_.layers;
    const std::uint32_t frames = layers + 2 + (one_in(6) ? 0 : pick(layers * 20));
    fake::set_order(fake::Order::random, seed);
    const std::array shares = {-1.0, 0.2, 0.5, 1.0};
    auto watched =
        std::make_unique<Watched>(open_cuda({.frame_bytes = stride,
                                             .device_bytes = frames * stride,
                                             .pool_bytes = (300 + pick(600)) * stride,
                                             .driver = testing::driver_name(),
                                             .in_place_share = shares[pick(shares.size())]}),
                                  bug);
    watched_ = watched.get();
    auto machine = std::make_unique<FakeMachine>(*watched);
    const std::array policies = {"fit", "fit", "fixed:0.5", "fixed:1", "fuzz"};
    model_ = std::make_unique<Model>(geometry_, policies[pick(policies.size())], std::move(watched),
                                     std::move(machine));
    model_->set_stream(stream(1));
  }

  void all() {
    static_cast<void>(model_->add());
    for (std::uint32_t i = 0; i < operations; ++i) {
      try {
        operate();
      } catch (const CapacityError&) {
        ++tally_.refusals;
        free_one();
      } catch (const LogicError&) {
        ++tally_.refusals;  // of a truncation, by a window
      }
      model_->check();
      const std::vector<std::string> found = fake::take_violations();
      if (!found.empty()) throw Mismatch(found.front());
    }
    model_->settle();
    model_->check();
    const Stats stats = model_->cache().stats();
    tally_.streamed += stats.streamed_bytes / geometry_.frame_bytes();
    tally_.wraps += watched_->wraps();
    tally_.dropped += watched_->dropped();
    tally_.in_place += stats.in_place_bytes / geometry_.frame_bytes();
  }

 private:
  std::uint32_t pick(std::size_t below) { return static_cast<std::uint32_t>(random_() % below); }
  bool one_in(std::uint32_t n) { return pick(n) == 0; }
  static ComputeStream stream(std::uint32_t number) {
    return {reinterpret_cast<std::uintptr_t>(Caller::get().stream(number))};
  }

  Geometry draw_geometry() {
    Geometry geometry{1 + pick(4), 1, 8, testing::block_tokens, DType::bf16};
    if (one_in(3)) {
      for (std::uint32_t layer = 0; layer < geometry.layers; ++layer) {
        geometry.windows.push_back(pick(2) * (1 + pick(100)));
      }
    }
    return geometry;
  }

  SequenceId any() {
    auto found = model_->salts().begin();
    std::advance(found, pick(model_->salts().size()));
    return found->first;
  }

  void free_one() {
    if (model_->salts().size() > 1) model_->free(any());
  }

  void operate() {
    const std::size_t count = model_->salts().size();
    const std::uint32_t what = pick(20);
    if (what < 13 || count == 0) return step();
    const bool full = count >= sequences_max;
    if (what < 15) {
      if (full) return free_one();
      if (one_in(2)) {
        static_cast<void>(model_->add());
      } else {
        static_cast<void>(model_->fork(any()));
        ++tally_.forks;
      }
    } else if (what < 17) {
      const SequenceId id = any();
      model_->truncate(id, pick(model_->length(id) + 1));
      ++tally_.truncations;
    } else if (what == 17) {
      model_->resize(geometry_.layers + 2 + pick(geometry_.layers * 20), 200 + pick(700));
      ++tally_.resizes;
    } else if (what == 18) {
      model_->set_stream(stream(1 + pick(2)));
      ++tally_.switches;
    } else {
      model_->settle();
    }
  }

  void step() {
    if (model_->salts().empty()) static_cast<void>(model_->add());
    const std::array orders = {fake::Order::earliest, fake::Order::latest, fake::Order::random,
                               fake::Order::random};
    fake::set_order(orders[pick(orders.size())], random_());
    std::vector<StepEntry> batch;
    const bool several = one_in(2);
    for (const auto& [id, salts] : model_->salts()) {
      if (one_in(4) && !batch.empty()) continue;
      const auto room =
          static_cast<std::uint32_t>(tokens_max - std::min<std::size_t>(tokens_max, salts.size()));
      if (room == 0) continue;
      batch.push_back({id, several && one_in(3) ? 1 + pick(std::min(room, 40U)) : 1});
    }
    if (batch.empty()) return free_one();
    const bool whole = !one_in(10);
    model_->step(batch, Reader::pool_kernel, whole ? model_->layers() : pick(model_->layers()));
    ++tally_.schedules;
    if (!whole) ++tally_.aborts;
  }

  std::mt19937_64 random_;
  Tally& tally_;
  Geometry geometry_;
  Watched* watched_ = nullptr;
  std::unique_ptr<Model> model_;
};

TEST(CudaSwarm, NoOrderOfDoingThingsIsSeen) {
  static_cast<void>(fake::take_violations());
  Tally tally;
  for (std::uint64_t seed = 1; seed <= histories; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    try {
      History(seed, Bug::none, tally).all();
    } catch (const std::exception& error) {
      FAIL() << error.what();
    }
    for (const std::string& words : fake::take_violations()) ADD_FAILURE() << words;
  }
  std::cout << tally.schedules << " schedules, " << tally.streamed << " frames streamed, "
            << tally.in_place << " read in place, " << tally.wraps << " wraps of the ring, "
            << tally.dropped << " frames prefetched in vain, " << tally.aborts << " aborts, "
            << tally.forks << " forks, " << tally.resizes << " resizes, " << tally.truncations
            << " truncations, " << tally.switches << " switches of the stream, " << tally.refusals
            << " refusals\n";
  EXPECT_GE(tally.schedules, 10'000U);
  EXPECT_GT(tally.streamed, 10'000U);
  EXPECT_GT(tally.in_place, 10'000U);
  for (const std::uint64_t count :
       {tally.wraps, tally.dropped, tally.aborts, tally.forks, tally.resizes, tally.truncations}) {
    EXPECT_GT(count, 100U);
  }
}

// What a decode step of 256 sequences through 60 layers, half of whose KV is streamed, asks of the
// driver: two loads a layer, what is left of one layer and what there is room for of the next, and
// a write or two a step.
TEST(CudaSteps, CostFewCalls) {
  constexpr std::uint32_t sequences = 256;
  constexpr std::uint32_t layers = 60;
  constexpr std::uint32_t tokens = 80;
  constexpr std::uint32_t steps = 4;
  const Geometry geometry{layers, 1, 8, 16, DType::bf16};
  const Bytes stride = geometry.frame_bytes();
  const Bytes frames = sequences * layers * (tokens / 16 + 2);
  fake::set_order(fake::Order::latest, 1);
  auto backend = std::make_unique<Watched>(open_cuda({.frame_bytes = stride,
                                                      .device_bytes = frames * stride,
                                                      .pool_bytes = frames * stride,
                                                      .driver = testing::driver_name()}),
                                           Bug::none);
  CUstream stream = Caller::get().stream(1);
  const cuda::Current current(Caller::get().driver(), Caller::get().context());  // as torch has it
  Cache cache(geometry, "fixed:0.5", std::move(backend));
  cache.set_stream({reinterpret_cast<std::uintptr_t>(stream)});
  IdleKernel kernel;
  const auto step = [&](std::span<const StepEntry> batch) {
    cache.begin(batch, Reader::kernel);
    for (std::uint32_t layer = 0; layer < layers; ++layer) cache.run(layer, kernel);
    cache.finish();
    Caller::get().synchronize(stream);
  };
  std::vector<StepEntry> batch;
  for (std::uint32_t i = 0; i < sequences; ++i) batch.push_back({cache.add(), tokens - i % 16});
  step(batch);
  for (StepEntry& entry : batch) entry.new_tokens = 1;
  for (int i = 0; i < 3; ++i) step(batch);
  auto made = fake::calls_by_name();
  for (auto& [name, count] : made) count = 0 - count;
  for (std::uint32_t i = 0; i < steps; ++i) step(batch);
  for (const auto& [name, count] : fake::calls_by_name()) made[name] += count;
  const auto a_layer = [&](const char* name) {
    return static_cast<double>(made[name]) / (steps * layers);
  };
  const double copies = a_layer("cuMemcpyBatchAsync") + a_layer("cuMemcpyAsync");
  std::cout << copies << " copies' submissions and " << a_layer("cuEventRecord")
            << " events a layer\n";
  double all = 0;
  for (const auto& [name, count] : made) all += a_layer(name.c_str());
  std::cout << all << " calls of all kinds a layer\n";
  EXPECT_LE(all, 22);
  EXPECT_LE(copies, 1.05);
  EXPECT_LE(a_layer("cuEventRecord"), 2.7);
  EXPECT_EQ(fake::take_violations(), std::vector<std::string>());
}

// Steps on a stream that is another GPU's, or that is being captured into a graph, are refused at
// the door, and the next is served; what others capture meanwhile stays whole.
TEST(CudaSteps, RefuseStreamsThatCannotBeOrdered) {
  const Geometry geometry{2, 1, 8, 16, DType::bf16};
  const Bytes stride = geometry.frame_bytes();
  fake::set_order(fake::Order::random, 1);
  Cache cache(geometry, "fixed:0.5",
              open_cuda({.frame_bytes = stride,
                         .device_bytes = 40 * stride,
                         .pool_bytes = 80 * stride,
                         .driver = testing::driver_name()}));
  const auto says = [](const auto& call) {
    try {
      call();
    } catch (const LogicError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  const std::string elsewhere = says([&] { cache.set_stream(Caller::get().stream_elsewhere()); });
  EXPECT_NE(elsewhere.find("is not one of 'cuda:0'"), std::string::npos) << elsewhere;

  const CUstream mine = Caller::get().stream(1);
  cache.set_stream({reinterpret_cast<std::uintptr_t>(mine)});
  const StepEntry entry{cache.add(), 64};
  fake::begin_capture(mine);
  const std::string captured = says([&] { cache.begin({&entry, 1}, Reader::kernel); });
  EXPECT_NE(captured.find("is being captured into a CUDA graph"), std::string::npos) << captured;
  EXPECT_EQ(fake::end_capture(), 0U);

  fake::begin_capture(Caller::get().stream(2));
  IdleKernel kernel;
  for (int i = 0; i < 3; ++i) {
    cache.begin({&entry, 1}, Reader::kernel);
    for (std::uint32_t layer = 0; layer < 2; ++layer) cache.run(layer, kernel);
    cache.finish();
  }
  cache.resize(20 * stride, 80 * stride);
  EXPECT_EQ(fake::end_capture(), 0U);
  EXPECT_GT(cache.stats().streamed_bytes, 0U);
  Caller::get().synchronize(mine);
  EXPECT_EQ(fake::take_violations(), std::vector<std::string>());
}

class PlantedBug : public ::testing::TestWithParam<Bug> {};

// In a few histories, by a race if not by what is read.
TEST_P(PlantedBug, IsSeen) {
  Tally tally;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    try {
      History(seed, GetParam(), tally).all();
    } catch (const std::exception&) {
      static_cast<void>(fake::take_violations());
      return;
    }
    static_cast<void>(fake::take_violations());
  }
  ADD_FAILURE() << "nobody noticed in " << tally.schedules << " schedules";
}

INSTANTIATE_TEST_SUITE_P(InTheBackend, PlantedBug,
                         ::testing::Values(Bug::no_depend, Bug::no_write_waits, Bug::no_fences,
                                           Bug::no_ticket_deps, Bug::wrong_frame,
                                           Bug::wrong_device));

}  // namespace
}  // namespace pie
