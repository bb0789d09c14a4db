// What the core costs by itself: planning one step, all of a step's bookkeeping, the same while a
// trace is kept and with a pool that holds nothing, learning from a step, handing out and taking
// back a frame.
//
//   planning [sequences [tokens [layers]]]
//
// The kernel does nothing, so what is left is bookkeeping. Three budgets: all KV on the device
// without a pool and with one, and half of it. Two backends: a stream on which every copy has ended
// at once, so that nothing but the scheduling is measured, as over a device with copy engines; and
// the host backend with tiny frames, where submission to the disk and checksums are the computing
// thread's too. Prints medians; waits are left out of "own work".
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "frame_pool.hpp"
#include "pie/backend.hpp"
#include "pie/cache.hpp"

namespace {

constexpr std::uint32_t block_tokens = 64;
constexpr int steps = 50;

// Beyond so many the host backend, whose frames have 4 KiB, is left out.
constexpr double host_frames_max = 1 << 18;

double now_us() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::micro>(now).count();
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

std::string machine() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown processor";
}

class NoKernel final : public pie::LayerKernel {
 public:
  void append(const pie::Append&) override {}
  void attend(std::uint32_t, std::span<const pie::KvPiece>) override {}
};

// A stream that does everything at once, on memory that nobody touches.
class Nowhere final : public pie::Backend {
 public:
  Nowhere(pie::Bytes stride, std::uint32_t device_frames, std::uint32_t pool_frames) {
    capabilities_.device_frames = device_frames;
    capabilities_.device_frames_max = device_frames;
    capabilities_.pool_frames = pool_frames;
    capabilities_.frame_stride = stride;
    capabilities_.copy_bytes_best = pie::Bytes{1} << 20;
    capabilities_.streams = true;
    capabilities_.pool_io = "nowhere";
  }
  [[nodiscard]] pie::Capabilities capabilities() const override { return capabilities_; }
  [[nodiscard]] pie::Nanos now() const override { return 0; }
  std::uint32_t resize_device(std::uint32_t frames) override { return frames; }
  pie::PoolSize resize_pool(std::uint32_t frames) override { return {frames, false}; }
  [[nodiscard]] std::string pool_refusal() const override { return ""; }
  pie::Ticket submit(std::span<const pie::Copy> copies, std::span<const pie::Dep>) override {
    const bool load = copies.front().from.tier == pie::Tier::pool;
    pie::Completion ended;
    ended.ticket = {load ? pie::Lane::pool_to_device : pie::Lane::device_to_pool, ++tickets_};
    ended_.push_back(ended);
    return ended.ticket;
  }
  std::size_t poll(std::span<pie::Completion> out) override {
    const std::size_t count = std::min(out.size(), ended_.size());
    const auto end = ended_.begin() + static_cast<std::ptrdiff_t>(count);
    std::copy(ended_.begin(), end, out.begin());
    ended_.erase(ended_.begin(), end);
    return count;
  }
  void wait(pie::Nanos) override {}
  pie::Fence record(pie::ComputeStream, pie::Timing timing) override {
    pie::Completion passed;
    passed.fence = {++fences_};
    if (timing == pie::Timing::wanted) ended_.push_back(passed);
    return passed.fence;
  }
  void depend(pie::ComputeStream, const pie::Dep&) override {}
  void duplicate(pie::ComputeStream, std::span<const pie::Duplicate>) override {}
  [[nodiscard]] std::byte* address(pie::FrameIndex) const override { return nullptr; }
  [[nodiscard]] pie::Health health() const override { return {}; }

 private:
  pie::Capabilities capabilities_;
  std::uint64_t tickets_ = 0;
  std::uint64_t fences_ = 0;
  std::vector<pie::Completion> ended_;
};

struct Costs {
  double begin_us = 0;
  double layers_us = 0;
  double finish_us = 0;
  double own_us = 0;  // of all three
};

Costs one_step(pie::Cache& cache, const std::vector<pie::StepEntry>& batch) {
  NoKernel kernel;
  Costs costs;
  const std::uint32_t layers = cache.geometry().layers;
  const pie::Nanos stalled = cache.stats().stall_ns;
  const double began = now_us();
  cache.begin(batch, pie::Reader::kernel);
  const double planned = now_us();
  for (std::uint32_t layer = 0; layer < layers; ++layer) cache.run(layer, kernel);
  const double ran = now_us();
  cache.finish();
  costs.begin_us = planned - began;
  costs.layers_us = ran - planned;
  const double finished = now_us();
  costs.finish_us = finished - ran;
  costs.own_us = finished - began - static_cast<double>(cache.stats().stall_ns - stalled) / 1e3;
  return costs;
}

std::unique_ptr<pie::Cache> make_cache(bool host, const pie::Geometry& geometry, double frames,
                                       double share) {
  const pie::Bytes stride = geometry.frame_bytes();
  const std::string policy = share < 1 || share > 2 ? "adaptive" : "off";  // no pool is read
  if (!host) {
    const auto device = static_cast<std::uint32_t>(frames * share);
    const auto pool = static_cast<std::uint32_t>(2 * frames);
    return std::make_unique<pie::Cache>(geometry, policy,
                                        std::make_unique<Nowhere>(stride, device, pool));
  }
  pie::CacheOptions options;
  options.geometry = geometry;
  options.policy = policy;
  options.device_bytes = static_cast<pie::Bytes>(frames * share) * stride;
  options.pool_bytes = static_cast<pie::Bytes>(2 * frames) * stride;
  return std::make_unique<pie::Cache>(options);
}

void measure_steps(bool host, std::uint32_t sequences, std::uint32_t tokens, std::uint32_t layers,
                   double share) {
  const std::uint64_t blocks = (tokens + steps) / block_tokens + 2;
  const std::unique_ptr<pie::Cache> made =
      make_cache(host, {layers, 1, 16, block_tokens, pie::DType::bf16},
                 static_cast<double>(sequences * blocks * layers), share);
  pie::Cache& cache = *made;
  std::vector<pie::StepEntry> batch;
  for (std::uint32_t i = 0; i < sequences; ++i) {
    const pie::SequenceId id = cache.add();
    one_step(cache, {{id, tokens}});
    batch.push_back({id, 1});
  }
  for (int i = 0; i < 5; ++i) one_step(cache, batch);
  const pie::Bytes before = cache.stats().streamed_bytes;
  std::vector<double> begin;
  std::vector<double> run;
  std::vector<double> finish;
  std::vector<double> own;
  std::vector<double> traced;
  for (int i = 0; i < steps; ++i) {
    const Costs costs = one_step(cache, batch);
    begin.push_back(costs.begin_us);
    run.push_back(costs.layers_us);
    finish.push_back(costs.finish_us);
    own.push_back(costs.own_us);
    if (i % 5 > 0) continue;  // the step after each fifth again, with a trace
    cache.start_trace(10'000);
    traced.push_back(one_step(cache, batch).own_us);
    static_cast<void>(cache.take_trace());
  }
  const pie::Stats stats = cache.stats();
  const auto counted = static_cast<pie::Bytes>(steps) * 6 / 5;
  std::printf("%s, %3.0f %% of the KV on the device%s, %llu KiB streamed a step\n",
              host ? "host" : "a stream", 100 * std::min(share, 1.0),
              share > 2 ? ", a pool that holds none" : "",
              static_cast<unsigned long long>((stats.streamed_bytes - before) / 1024 / counted));
  std::printf("  planning (begin)             %8.1f us\n", median(begin));
  std::printf("  %u layers%s %8.1f us\n", layers,
              share < 1 ? ", waits included  " : ", reading nothing ", median(run));
  std::printf("  finish                       %8.1f us\n", median(finish));
  std::printf("  own work, without the waits  %8.1f us\n", median(own));
  std::printf("  the same while traced        %8.1f us\n", median(traced));
}

// Learning from a step of some gigabytes and deciding by it, as after each decode step.
void measure_learning() {
  constexpr int rounds = 20000;
  const pie::Demand demand{20'000, 200'000, 24'000, 48};
  for (const auto aim : {pie::Aim::transparent, pie::Aim::throughput}) {
    pie::State state;
    const double began = now_us();
    for (int i = 0; i < rounds; ++i) {
      pie::StepReport report;
      report.kv_frames = 20'000 + static_cast<std::uint64_t>(i % 100);
      report.loaded_frames = static_cast<std::uint64_t>(i % 100);
      report.step_ns = 20'000'000 + 1000 * (i % 100);
      report.loads = {report.loaded_frames, 2600 * (i % 100), report.loaded_frames,
                      2600 * (i % 100)};
      state = pie::observe(state, report);
      state.budget = pie::decide(demand, state, {aim, 0.05, 0});
    }
    std::printf("observing a step and deciding for %s: %.2f us\n",
                aim == pie::Aim::transparent ? "transparency" : "throughput",
                (now_us() - began) / rounds);
  }
}

// Frames are taken and released in a pool that is nearly full and in pieces.
void measure_frames() {
  constexpr std::uint32_t frames = 100000;
  constexpr std::uint32_t rounds = 2000000;
  pie::FramePool pool(frames, frames);
  std::vector<pie::FrameIndex> held;
  for (std::uint32_t i = 0; i < frames - 100; ++i) held.push_back(pool.acquire());
  const double began = now_us();
  std::uint64_t at = 1;
  for (std::uint32_t i = 0; i < rounds; ++i) {
    at = at * 6364136223846793005ULL + 1442695040888963407ULL;
    pie::FrameIndex& frame = held[(at >> 33) % held.size()];
    pool.release(frame);
    frame = pool.acquire();
  }
  const double each_ns = (now_us() - began) * 1e3 / rounds;
  std::printf("a frame taken and released, any of %u:  %.1f ns\n", frames, each_ns);
}

}  // namespace

int main(int count, char** arguments) {
  const auto argument = [&](int i, std::uint32_t otherwise) {
    return count > i ? static_cast<std::uint32_t>(std::atoi(arguments[i])) : otherwise;
  };
  const std::uint32_t sequences = argument(1, 64);
  const std::uint32_t tokens = argument(2, 2048);
  const std::uint32_t layers = argument(3, 30);
  try {
    std::printf("%s\n%u sequences of %u tokens, %u layers, blocks of %u tokens, %d decode steps\n",
                machine().c_str(), sequences, tokens, layers, block_tokens, steps);
    for (const bool host : {false, true}) {
      const double frames = 1.0 * sequences * tokens / block_tokens * layers;
      if (host && frames > host_frames_max) continue;
      measure_steps(host, sequences, tokens, layers, 1.5);
      measure_steps(host, sequences, tokens, layers, 2.5);
      measure_steps(host, sequences, tokens, layers, 0.5);
    }
    measure_learning();
    measure_frames();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "planning: %s\n", error.what());
    return 1;
  }
  return 0;
}
