// What the core costs by itself: planning one step, all of a step's bookkeeping, handing out and
// taking back a frame.
//
//   planning [sequences [tokens [layers]]]
//
// The cache runs over the real backend with tiny frames and a kernel that does nothing, so nearly
// all that is left is bookkeeping. Two budgets: all KV on the device, and half of it. Prints
// medians; the waits for the disk are left out of "own work", submission and checksums are in it.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <string>
#include <vector>

#include "frame_pool.hpp"
#include "pie/backends.hpp"
#include "pie/cache.hpp"

namespace {

constexpr std::uint32_t block_tokens = 64;
constexpr int steps = 100;

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

void measure_steps(std::uint32_t sequences, std::uint32_t tokens, std::uint32_t layers,
                   double share) {
  pie::CacheOptions options;
  options.geometry = {layers, 1, 8, block_tokens, pie::DType::bf16};
  const std::uint64_t blocks = (tokens + steps) / block_tokens + 2;
  const auto bytes =
      static_cast<double>(options.geometry.frame_bytes() * layers * sequences * blocks);
  options.device_bytes = static_cast<pie::Bytes>(bytes * share);
  options.pool_bytes = static_cast<pie::Bytes>(2 * bytes);
  pie::Cache cache(options);
  std::vector<pie::StepEntry> batch;
  for (std::uint32_t i = 0; i < sequences; ++i) {
    const pie::SequenceId id = cache.add();
    one_step(cache, {{id, tokens}});
    batch.push_back({id, 1});
  }
  std::vector<double> begin;
  std::vector<double> run;
  std::vector<double> finish;
  std::vector<double> own;
  for (int i = 0; i < steps; ++i) {
    const Costs costs = one_step(cache, batch);
    begin.push_back(costs.begin_us);
    run.push_back(costs.layers_us);
    finish.push_back(costs.finish_us);
    own.push_back(costs.own_us);
  }
  const pie::Stats stats = cache.stats();
  std::printf("%3.0f %% of the KV on the device, %llu KiB streamed a step\n",
              100 * std::min(share, 1.0),
              static_cast<unsigned long long>(stats.streamed_bytes / 1024 / steps));
  std::printf("  planning (begin)             %8.1f us\n", median(begin));
  std::printf("  %u layers%s %8.1f us\n", layers,
              share < 1 ? ", waits included  " : ", reading nothing ", median(run));
  std::printf("  finish                       %8.1f us\n", median(finish));
  std::printf("  own work, without the waits  %8.1f us\n", median(own));
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
    measure_steps(sequences, tokens, layers, 1.5);
    measure_steps(sequences, tokens, layers, 0.5);
    measure_frames();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "planning: %s\n", error.what());
    return 1;
  }
  return 0;
}
