// How fast CPU attention over frames is: decode as GB/s of KV beside a plain read of the same bytes
// by the same threads, prefill as GFLOP/s.
//
// Frames are walked in rotation over more memory than any cache holds, in shuffled order, as a
// running cache would leave them. Usage: bench_attention [threads] [GiB of frames]
#include "pie/attention.hpp"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "pie/parallel.hpp"

namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown CPU";
}

// Random elements between 0.5 and 2 in either sign: each a bf16, and each two an f32. `bytes` is a
// multiple of 8.
void fill(std::byte* to, std::size_t bytes) {
  std::mt19937_64 random(2);
  for (std::size_t i = 0; i < bytes; i += 8) {
    const std::uint64_t four = 0x3f003f003f003f00 | (random() & 0x80ff80ff80ff80ff);
    std::memcpy(to + i, &four, 8);
  }
}

// Frames of one geometry, filled with small values, in shuffled order.
class Frames {
 public:
  Frames(const pie::AttentionShape& shape, std::size_t bytes)
      : frame_bytes_(2ULL * shape.kv_heads * shape.block_tokens * shape.head_dim *
                     pie::dtype_bytes(shape.dtype)),
        count_(bytes / frame_bytes_),
        memory_(static_cast<std::byte*>(std::aligned_alloc(
            1 << 21, count_ * frame_bytes_ / (1 << 21) * (1 << 21) + (1 << 21)))) {
    // As the arena of a backend: on huge pages.
    ::madvise(memory_.get(), count_ * frame_bytes_, MADV_HUGEPAGE);
    fill(memory_.get(), count_ * frame_bytes_);
    for (std::size_t i = 0; i < count_; ++i) table_.push_back(static_cast<std::int32_t>(i));
    std::shuffle(table_.begin(), table_.end(), std::mt19937(1));
  }

  [[nodiscard]] pie::BlockFrames all() const {
    return {memory_.get(), frame_bytes_, table_.data()};
  }
  [[nodiscard]] std::size_t count() const { return count_; }
  [[nodiscard]] std::size_t frame_bytes() const { return frame_bytes_; }

  // `count` frames starting anywhere; successive calls walk over all of them.
  pie::BlockFrames take(std::size_t count) {
    if (next_ + count > count_) next_ = 0;
    const std::int32_t* first = table_.data() + next_;
    next_ += count;
    return {memory_.get(), frame_bytes_, first};
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::size_t frame_bytes_;
  std::size_t count_;
  std::unique_ptr<std::byte, Free> memory_;
  std::vector<std::int32_t> table_;
  std::size_t next_ = 0;
};

struct Problem {
  pie::AttentionShape shape;
  std::uint32_t sequences;
  std::uint32_t rows;
  std::uint32_t position;
};

// Seconds of one call. A machine with other work on it shows in the distance of the two.
struct Seconds {
  double median;
  double best;
};

// Measures for about `budget_s` seconds.
Seconds measure(double budget_s, const std::function<void()>& call) {
  call();
  std::vector<double> times;
  for (const double until = seconds() + budget_s; seconds() < until || times.size() < 5;) {
    const double begin = seconds();
    call();
    times.push_back(seconds() - begin);
  }
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front()};
}

Seconds fold_seconds(const Problem& problem, Frames& frames, double budget_s) {
  const pie::AttentionShape& shape = problem.shape;
  const std::size_t row = std::size_t{shape.query_heads} * shape.head_dim;
  const std::size_t state_floats = pie::attention_state_floats(shape) * problem.rows;
  const std::size_t q_bytes = problem.rows * row * pie::dtype_bytes(shape.dtype);
  std::vector<std::byte> q(problem.sequences * q_bytes);
  fill(q.data(), q.size());
  std::vector<float> state(problem.sequences * state_floats);
  std::vector<std::byte> out(q.size());
  const std::uint32_t tokens = problem.position + problem.rows;
  const std::size_t blocks = (tokens + shape.block_tokens - 1) / shape.block_tokens;
  const auto stride = static_cast<std::int64_t>(row);
  return measure(budget_s, [&] {
    std::vector<pie::AttentionWork> work;
    for (std::uint32_t s = 0; s < problem.sequences; ++s) {
      work.push_back({.q = {q.data() + s * q_bytes, stride, shape.head_dim},
                      .rows = problem.rows,
                      .position = problem.position,
                      .kv_begin = 0,
                      .kv_end = tokens,
                      .frames = frames.take(blocks),
                      .state = state.data() + s * state_floats});
    }
    const std::uint32_t rows = problem.sequences * problem.rows;
    pie::attention_reset(shape, state.data(), rows);
    pie::attention_fold(shape, work);
    pie::attention_finish(shape, state.data(), rows, {out.data(), stride, shape.head_dim}, nullptr);
  });
}

struct Read {
  pie::BlockFrames frames;
  std::size_t count;
  std::size_t frame_bytes;
  std::size_t shares;
  std::vector<std::uint64_t> sums;
};

void read_share(void* context, std::size_t share) {
  auto* read = static_cast<Read*>(context);
  std::uint64_t sum[8] = {};
  for (std::size_t f = share; f < read->count; f += read->shares) {
    const std::byte* frame = read->frames[f];
    for (std::size_t i = 0; i + 64 <= read->frame_bytes; i += 64) {
      std::uint64_t words[8];
      std::memcpy(words, frame + i, 64);
      for (int w = 0; w < 8; ++w) sum[w] += words[w];
    }
  }
  read->sums[share] = std::accumulate(std::begin(sum), std::end(sum), std::uint64_t{0});
}

// The same threads read the same frames, all of them.
Seconds read_seconds(const Frames& frames, unsigned threads) {
  Read read{frames.all(), frames.count(), frames.frame_bytes(), threads,
            std::vector<std::uint64_t>(threads)};
  return measure(1, [&] { pie::parallel_for(threads, read_share, &read); });
}

void decode(const char* name, const Problem& problem, std::size_t bytes, unsigned threads) {
  Frames frames(problem.shape, bytes);
  const auto all = static_cast<double>(frames.count() * frames.frame_bytes());
  const Seconds read = read_seconds(frames, threads);
  const Seconds fold = fold_seconds(problem, frames, 1.5);
  const pie::AttentionShape& shape = problem.shape;
  const double kv = 2.0 * problem.sequences * (problem.position + 1) * shape.kv_heads *
                    shape.head_dim * static_cast<double>(pie::dtype_bytes(shape.dtype));
  std::printf(
      "decode   %-34s %8.3f ms  %6.2f GB/s (best %6.2f)   plain read %6.2f GB/s (best %6.2f)\n",
      name, fold.median * 1e3, kv / fold.median / 1e9, kv / fold.best / 1e9,
      all / read.median / 1e9, all / read.best / 1e9);
}

void prefill(const char* name, const Problem& problem, std::size_t bytes) {
  Frames frames(problem.shape, bytes);
  const Seconds fold = fold_seconds(problem, frames, 1.5);
  const double seen = problem.rows * (problem.position + (problem.rows + 1) / 2.0);
  const double flop =
      4.0 * problem.sequences * seen * problem.shape.query_heads * problem.shape.head_dim;
  std::printf("prefill  %-34s %8.3f ms  %6.1f GFLOP/s (best %6.1f)\n", name, fold.median * 1e3,
              flop / fold.median / 1e9, flop / fold.best / 1e9);
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned threads = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 2;
  const double gib = argc > 2 ? std::atof(argv[2]) : 0.5;
  const auto bytes = static_cast<std::size_t>(gib * (1 << 30));
  const char* openmp = "libgomp.so.1";
  if (::dlopen(openmp, RTLD_NOW) == nullptr || !pie::use_openmp(openmp, threads)) {
    std::printf("%s is not there: one thread.\n", openmp);
  }
  std::printf("%s, %u threads, %s, %.2f GiB of frames\n", cpu_name().c_str(),
              pie::parallel_threads(), pie::attention_isa(), gib);
  using pie::DType;
  const auto shape = [](std::uint32_t q, std::uint32_t kv, std::uint32_t d, DType dtype) {
    return pie::AttentionShape{.query_heads = q,
                               .kv_heads = kv,
                               .head_dim = d,
                               .block_tokens = 64,
                               .dtype = dtype,
                               .scale = 0.125F};
  };
  const unsigned t = pie::parallel_threads();
  decode("bf16 8 x 4096, 14/2 heads of 64", {shape(14, 2, 64, DType::bf16), 8, 1, 4095}, bytes, t);
  decode("bf16 1 x 16384, 9/3 heads of 64", {shape(9, 3, 64, DType::bf16), 1, 1, 16383}, bytes, t);
  decode("bf16 8 x 4096, 32/8 heads of 128", {shape(32, 8, 128, DType::bf16), 8, 1, 4095}, bytes,
         t);
  decode("bf16 4 x 2048, 16/16 heads of 64", {shape(16, 16, 64, DType::bf16), 4, 1, 2047}, bytes,
         t);
  decode("f32  8 x 4096, 14/2 heads of 64", {shape(14, 2, 64, DType::f32), 8, 1, 4095}, bytes, t);
  prefill("bf16 256 at 2048, 9/3 heads of 64", {shape(9, 3, 64, DType::bf16), 1, 256, 2048}, bytes);
  prefill("bf16 256 at 2048, 32/8 heads of 128", {shape(32, 8, 128, DType::bf16), 1, 256, 2048},
          bytes);
  prefill("f32  256 at 2048, 9/3 heads of 64", {shape(9, 3, 64, DType::f32), 1, 256, 2048}, bytes);
  return 0;
}
