// A server on a simulated machine: requests come and go, steps take what a model of the machine
// says they take, and admission goes by what the cache says of its headroom, or by a number.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "pie/backends.hpp"
#include "pie/cache.hpp"
#include "proxy_backend.hpp"

namespace pie::testing {

// A machine and a model on it, by what a decode step takes.
struct Serving {
  std::string name;
  Geometry geometry;
  Bytes device_bytes = 0;  // for KV
  Bytes pool_bytes = 0;
  double weights_ns = 0;          // a step takes, whatever it reads
  double memory_bytes_per_s = 0;  // at which KV is read on the device
  double link_bytes_per_s = 0;
  double interference = 0;  // of a byte on the link, in bytes of memory
  double prefill_ns_per_token = 0;
};

// OPT-13B in f16 on 96 GB with NVLink-C2C.
[[nodiscard]] inline Serving gh200_opt_13b() {
  return {"GH200, OPT-13B",
          {40, 40, 128, 64, DType::f16},
          64'000'000'000,
          200'000'000'000,
          6.5e6,
          4.0e12,
          400e9,
          1.0,
          20e3};
}

// Llama-8B in bf16 on 80 GB behind PCIe 5.
[[nodiscard]] inline Serving h100_llama_8b() {
  return {"H100 PCIe, 8B",
          {32, 8, 128, 256, DType::bf16},
          60'000'000'000,
          200'000'000'000,
          8e6,
          2.0e12,
          55e9,
          1.0,
          12e3};
}

// 34B in bf16 on the same: most of a step is its weights, and little memory is left for KV.
[[nodiscard]] inline Serving gh200_34b() {
  return {"GH200, 34B",
          {48, 8, 128, 256, DType::bf16},
          20'000'000'000,
          200'000'000'000,
          17e6,
          4.0e12,
          400e9,
          1.0,
          40e3};
}

// 27B in 4 bits on 24 GB behind PCIe 4: most of a step is its weights.
[[nodiscard]] inline Serving rtx4090_27b() {
  return {"RTX 4090, 27B",
          {46, 16, 128, 64, DType::f16},
          6'000'000'000,
          60'000'000'000,
          15e6,
          1.0e12,
          25e9,
          1.0,
          60e3};
}

// A small model on a CPU of two cores, in front of a disk that costs the computation much.
[[nodiscard]] inline Serving cpu_small() {
  return {"2 cores, 135M",
          {30, 3, 64, 64, DType::bf16},
          480'000'000,
          1'000'000'000,
          30e6,
          10e9,
          1.5e9,
          4.0,
          200e3};
}

// A GPU as of a GH200 with most of a step its weights, small enough to be simulated at once.
[[nodiscard]] inline Serving small_machine() {
  Serving serving = gh200_34b();
  serving.geometry.layers = 12;
  serving.geometry.block_tokens = 64;
  serving.device_bytes = 4'800'000'000;
  serving.pool_bytes = 24'000'000'000;
  serving.weights_ns = 4e6;
  serving.prefill_ns_per_token = 2e3;
  return serving;
}

// KV of a token, over all layers.
[[nodiscard]] inline double token_bytes(const Serving& serving) {
  return static_cast<double>(serving.geometry.frame_bytes()) * serving.geometry.layers /
         serving.geometry.block_tokens;
}

// Tokens of KV that a step of the machine can read and be within `slack` of what it would take with
// all of it on the device, by arithmetic: what is streamed arrives in time, and costs the
// computation beside it no more than the slack. As in `room`, two and a half of its layers lie in
// the ring.
[[nodiscard]] inline double tokens_allowed(const Serving& serving, double device_bytes,
                                           double link_bytes_per_s, double slack) {
  const double kept = 1 - 2.5 / serving.geometry.layers;
  const double byte_ns = 1e9 / serving.memory_bytes_per_s;
  const double full_ns = serving.weights_ns + device_bytes * byte_ns;
  // What a byte streamed takes beyond what it earns by being read.
  const double beside_ns = (serving.interference - slack * kept) * byte_ns;
  const double link_ns = 1e9 / link_bytes_per_s - (1 + slack) * kept * byte_ns;
  double streamed = static_cast<double>(serving.pool_bytes);
  if (beside_ns > 0) streamed = std::min(streamed, slack * full_ns / beside_ns);
  if (link_ns > 0) streamed = std::min(streamed, (1 + slack) * full_ns / link_ns);
  return (device_bytes + kept * streamed) / token_bytes(serving);
}

struct Request {
  std::uint32_t prompt = 1024;
  std::uint32_t answer = 256;
};

// Counts what is asked of the link.
class CountingBackend final : public ProxyBackend {
 public:
  using ProxyBackend::ProxyBackend;

  [[nodiscard]] std::uint64_t loads() const { return loads_; }

  Ticket submit(std::span<const Copy> copies, std::span<const Dep> after) override {
    rest();
    for (const Copy& copy : copies) loads_ += copy.from.tier == Tier::pool ? copy.count : 0;
    return ProxyBackend::submit(copies, after);
  }

 private:
  std::uint64_t loads_ = 0;  // frames
};

class Server {
 public:
  // There is to be room for `ahead` more tokens of each that runs.
  Server(const Serving& serving, const std::string& policy, const Objective& objective,
         std::uint32_t ahead = 32, const SimFaults& faults = {})
      : serving_(serving), ahead_(ahead) {
    SimOptions options;
    options.frame_bytes = serving.geometry.frame_bytes();
    options.device_frames = static_cast<std::uint32_t>(serving.device_bytes / options.frame_bytes);
    options.pool_frames = static_cast<std::uint32_t>(serving.pool_bytes / options.frame_bytes);
    options.copy_bytes_best = Bytes{2} << 20;
    options.streams = true;
    options.faults = faults;
    options.carry_bytes = false;
    options.load.overhead_ns = options.write.overhead_ns = 200;
    options.load.bytes_per_s = options.write.bytes_per_s = serving.link_bytes_per_s;
    auto owned = std::make_unique<CountingBackend>(open_sim(options));
    backend_ = owned.get();
    sim_ = &owned->inner();
    cache_ = std::make_unique<Cache>(serving.geometry, policy, std::move(owned));
    cache_->set_objective(objective);
    cache_->set_stream(stream);
  }

  [[nodiscard]] Cache& cache() { return *cache_; }
  [[nodiscard]] SimBackend& sim() { return *sim_; }
  [[nodiscard]] std::size_t running() const { return running_.size(); }
  [[nodiscard]] Nanos now() const { return sim_->now(); }
  [[nodiscard]] double streamed_share() const { return streamed_share_; }

  // From now on a copy takes so many times as long.
  void slow_link(double factor) {
    SimFaults faults;
    faults.slow = 1;
    faults.slow_factor = factor;
    sim_->set_faults(faults);
    link_factor_ = factor;
  }

  // What runs and what can be admitted beside it by the headroom, of what arithmetic allows.
  [[nodiscard]] double capacity_share(double slack) const {
    auto tokens = static_cast<double>(cache_->headroom().tokens);
    for (const Running& one : running_)
      tokens += static_cast<double>(in_blocks(cache_->length(one.sequence) + 1));
    return tokens / tokens_allowed(serving_, static_cast<double>(cache_->stats().device_bytes),
                                   serving_.link_bytes_per_s / link_factor_, slack);
  }

  // What the last decode step took, and what it would have with all its KV on the device.
  [[nodiscard]] double step_ns() const { return step_ns_; }
  [[nodiscard]] double alone_ns() const { return alone_ns_; }

  // Admits one where there is room for it and for what comes soon by the headroom.
  bool admit(const Request& request) {
    const std::uint64_t tokens = in_blocks(request.prompt + std::min(request.answer, ahead_));
    if (cache_->headroom().tokens < tokens + promised()) return false;
    start(request);
    return true;
  }

  void start(const Request& request) {
    const StepEntry entry{cache_->add(), request.prompt};
    step({&entry, 1});
    running_.push_back({entry.sequence, request.answer});
  }

  // A prompt whose answer nobody waits for.
  void prefill(const Request& request) {
    const StepEntry entry{cache_->add(), request.prompt};
    step({&entry, 1});
    cache_->free(entry.sequence);
  }

  void leave(std::size_t count) {
    for (; count > 0 && !running_.empty(); --count) {
      cache_->free(running_.back().sequence);
      running_.pop_back();
    }
  }

  // One token for each that runs; those that are done leave. Returns the number of tokens.
  std::size_t decode() {
    std::vector<StepEntry> batch;
    for (const Running& one : running_) batch.push_back({one.sequence, 1});
    if (batch.empty()) return 0;
    const Nanos began = now();
    const std::uint64_t before = loaded();
    step(batch);
    step_ns_ = static_cast<double>(now() - began);
    alone_ns_ = serving_.weights_ns + kv_bytes_ * 1e9 / serving_.memory_bytes_per_s;
    streamed_share_ = static_cast<double>(loaded() - before) *
                      static_cast<double>(serving_.geometry.frame_bytes()) / kv_bytes_;
    for (Running& one : running_) --one.left;
    for (const Running& one : running_) {
      if (one.left == 0) cache_->free(one.sequence);
    }
    std::erase_if(running_, [](const Running& one) { return one.left == 0; });
    return batch.size();
  }

 private:
  static constexpr ComputeStream stream{1};

  struct Running {
    SequenceId sequence = 0;
    std::uint32_t left = 0;  // tokens
  };

  // Computes nothing, for as long as the machine would take.
  class Kernel final : public LayerKernel {
   public:
    Kernel(Server& server, double layer_ns) : server_(server), layer_ns_(layer_ns) {}
    void append(const Append& /*rows*/) override {}
    void attend(std::uint32_t layer, std::span<const KvPiece> /*pieces*/) override {
      if (layer == last_) return;  // of several pieces
      last_ = layer;
      const std::uint64_t loaded = server_.loaded();
      const auto bytes = static_cast<double>(loaded - server_.charged_) *
                         static_cast<double>(server_.serving_.geometry.frame_bytes());
      server_.charged_ = loaded;
      const double beside =
          bytes * server_.serving_.interference * 1e9 / server_.serving_.memory_bytes_per_s;
      server_.sim_->compute(stream, {static_cast<Nanos>(layer_ns_ + beside)});
    }

   private:
    Server& server_;
    double layer_ns_;
    std::uint32_t last_ = UINT32_MAX;
  };

  [[nodiscard]] std::uint64_t loaded() const { return backend_->loads(); }

  // Room for so many tokens of a sequence: it takes whole blocks.
  [[nodiscard]] std::uint64_t in_blocks(std::uint64_t tokens) const {
    const std::uint64_t block = serving_.geometry.block_tokens;
    return (tokens + block - 1) / block * block;
  }

  // Room that those that run will take soon.
  [[nodiscard]] std::uint64_t promised() const {
    std::uint64_t tokens = 0;
    for (const Running& one : running_) {
      const std::uint64_t length = cache_->length(one.sequence);
      tokens += in_blocks(length + std::min(one.left, ahead_)) - in_blocks(length + 1);
    }
    return tokens;
  }

  void step(std::span<const StepEntry> batch) {
    double tokens = 0;
    double fresh = 0;
    for (const StepEntry& entry : batch) {
      tokens += cache_->length(entry.sequence) + entry.new_tokens;
      fresh += entry.new_tokens;
    }
    const auto layers = static_cast<double>(serving_.geometry.layers);
    const auto frame = static_cast<double>(serving_.geometry.frame_bytes());
    kv_bytes_ = tokens / serving_.geometry.block_tokens * layers * frame;
    double takes = serving_.weights_ns + kv_bytes_ * 1e9 / serving_.memory_bytes_per_s;
    if (fresh > static_cast<double>(batch.size())) takes += fresh * serving_.prefill_ns_per_token;
    cache_->begin(batch, Reader::kernel);
    Kernel kernel(*this, takes / layers);
    for (std::uint32_t layer = 0; layer < serving_.geometry.layers; ++layer) {
      cache_->run(layer, kernel);
    }
    cache_->finish();
    sim_->synchronize(stream);
  }

  Serving serving_;
  std::uint32_t ahead_;
  CountingBackend* backend_ = nullptr;
  SimBackend* sim_ = nullptr;
  std::unique_ptr<Cache> cache_;
  std::vector<Running> running_;
  std::uint64_t charged_ = 0;  // frames loaded, whose interference has been
  double kv_bytes_ = 0;        // of the step
  double step_ns_ = 0;
  double alone_ns_ = 0;
  double streamed_share_ = 0;
  double link_factor_ = 1;
};

// What a while of serving came to.
struct Served {
  double tokens_per_s = 0;
  double slow_share = 0;  // of decode steps took more than 1.05 of what they would have alone
  double running = 0;     // on average
  double streamed_share = 0;
};

// Requests come and go: so many run at once, or with 0 as many as the headroom allows. A third of
// the steps go by before it is counted.
inline Served serve(Server& server, int steps, std::size_t running, std::uint32_t prompt) {
  std::mt19937 random(5);
  const auto draw = [&] {
    return Request{prompt, 64 + static_cast<std::uint32_t>(random() % 256)};
  };
  Request next = draw();
  Served served;
  Nanos began = 0;
  const int skipped = steps / 3;
  for (int i = 0; i < steps; ++i) {
    for (int more = 0; more < 4 && (running == 0 || server.running() < running); ++more) {
      if (running > 0) {
        server.start(next);
      } else if (!server.admit(next)) {
        break;
      }
      next = draw();
    }
    if (i == skipped) began = server.now();
    const auto tokens = static_cast<double>(server.decode());
    if (i < skipped) continue;
    served.tokens_per_s += tokens;
    served.slow_share += server.step_ns() > 1.05 * server.alone_ns() ? 1 : 0;
    served.streamed_share += server.streamed_share();
  }
  const double counted = steps - skipped;
  served.running = served.tokens_per_s / counted;
  served.tokens_per_s *= 1e9 / static_cast<double>(server.now() - began);
  served.slow_share /= counted;
  served.streamed_share /= counted;
  return served;
}

}  // namespace pie::testing
