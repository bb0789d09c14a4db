// How much of the disk's rate is kept when a sequence's frames are streamed in step order.
//
//   pool_read [pool_dir [tokens [block_tokens]]]
//
// Two ways of reading the same bytes of the same file, alternating, so that a disk that changes its
// rate meanwhile changes both: (a) plain direct reads, at the best of a few sizes and numbers in
// flight; (b) steps of the scheduler under policy fixed:1, 30 layers of 3 KV heads of 64 in bf16,
// where each frame is checked on arrival and nothing is computed, so that the link is all there is.
// Both go round and round as much memory: a few MiB of it would stay in the processor's caches, and
// make a virtual disk look a third faster than it is. Prints medians and their ratio.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "pie/backends.hpp"
#include "pie/policy.hpp"
#include "scheduler.hpp"

namespace {

using pie::Bytes;
using pie::Nanos;

constexpr Bytes mib = Bytes{1} << 20;
constexpr Bytes arena_bytes = 128 * mib;
constexpr int pairs = 9;

constexpr std::uint32_t layers = 30;
constexpr std::uint32_t steps = 2;  // of each measurement

struct Settings {
  std::string pool_dir;
  std::uint32_t tokens = 33000;  // of the sequence: 725 MiB
  std::uint32_t block_tokens = 64;

  [[nodiscard]] pie::Geometry geometry() const {
    return {layers, 3, 64, block_tokens, pie::DType::bf16};
  }
};

Settings settings_from(int count, char** arguments) {
  Settings settings;
  if (count > 1) settings.pool_dir = arguments[1];
  if (count > 2) settings.tokens = static_cast<std::uint32_t>(std::stoul(arguments[2]));
  if (count > 3) settings.block_tokens = static_cast<std::uint32_t>(std::stoul(arguments[3]));
  return settings;
}

double megabytes_per_second(Bytes bytes, Nanos took) {
  return static_cast<double>(bytes) * 1e3 / static_cast<double>(took);
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

// Marks every frame with its layer and block, and checks the mark when the frame is read.
class Marker final : public pie::LayerKernel {
 public:
  Marker(std::uint32_t layer, std::uint32_t first_token, std::uint32_t block_tokens)
      : layer_(layer), first_token_(first_token), block_tokens_(block_tokens) {}

  void append(const pie::Append& rows) override {
    rows.each_run([&](std::byte* frame, std::uint32_t token, std::uint32_t, std::uint32_t row) {
      if (token != 0) return;
      const std::uint64_t mark = mark_of((first_token_ + row) / block_tokens_);
      std::memcpy(frame, &mark, sizeof mark);
    });
  }

  void attend(std::uint32_t /*layer*/, std::span<const pie::KvPiece> pieces) override {
    for (const pie::KvPiece& piece : pieces) {
      const std::uint32_t first = piece.kv_begin / block_tokens_;
      const std::uint32_t end = (piece.kv_end + block_tokens_ - 1) / block_tokens_;
      for (std::uint32_t b = first; b < end; ++b) {
        std::uint64_t mark = 0;
        std::memcpy(&mark, piece.frames[b - first], sizeof mark);
        if (mark != mark_of(b)) throw std::runtime_error("a frame came back wrong");
      }
    }
  }

 private:
  [[nodiscard]] std::uint64_t mark_of(std::uint32_t block) const {
    return (std::uint64_t{layer_} << 32) + block;
  }

  std::uint32_t layer_;
  std::uint32_t first_token_;
  std::uint32_t block_tokens_;
};

// One step that adds `tokens` to the sequence. Returns how long it took.
Nanos step(pie::Backend& backend, pie::Scheduler& scheduler, pie::Sequence& sequence,
           std::uint32_t tokens, std::uint32_t block_tokens) {
  const Nanos began = backend.now();
  const pie::Growth growth{&sequence, tokens, nullptr, nullptr};
  scheduler.begin({&growth, 1}, {});
  const std::uint32_t position = sequence.tokens;
  scheduler.set_visits({{&sequence, 0, 0, tokens, position, 0}});
  for (std::uint32_t layer = 0; layer < layers; ++layer) {
    Marker marker(layer, position, block_tokens);
    scheduler.run_layer(layer, marker);
  }
  scheduler.finish();
  scheduler.look_ahead();
  return backend.now() - began;
}

// The pool file has no name, but this process can open it once more through its descriptor.
int open_pool_file(Bytes at_least) {
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    const std::string link = std::filesystem::read_symlink(entry.path(), gone).string();
    if (gone || !link.ends_with("(deleted)")) continue;
    if (std::filesystem::file_size(entry.path(), gone) < at_least || gone) continue;
    return ::open(entry.path().c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
  }
  return -1;
}

struct Plain {
  Bytes size = 0;
  unsigned threads = 0;
};

std::byte* huge_pages(Bytes bytes) {
  auto* memory = static_cast<std::byte*>(std::aligned_alloc(2 * mib, bytes));
  if (memory == nullptr) throw std::bad_alloc();
  ::madvise(memory, bytes, MADV_HUGEPAGE);
  return memory;
}

// Plain reads of [0, bytes), `plain.threads` at a time, in pieces of `plain.size` that go round
// memory as large as the arena. Returns how long that took.
Nanos read_plainly(const pie::Backend& backend, int file, Bytes bytes, Plain plain) {
  static std::byte* const memory = huge_pages(arena_bytes);
  const Bytes ring = arena_bytes / plain.size * plain.size;
  std::atomic<Bytes> next = 0;
  std::atomic<bool> failed = false;
  const Nanos began = backend.now();
  std::vector<std::thread> readers;
  for (unsigned i = 0; i < plain.threads; ++i) {
    readers.emplace_back([&] {
      for (Bytes at = next.fetch_add(plain.size); at < bytes; at = next.fetch_add(plain.size)) {
        const Bytes count = std::min(plain.size, bytes - at);
        const auto got = ::pread(file, memory + at % ring, count, static_cast<off_t>(at));
        if (got != static_cast<ssize_t>(count)) failed = true;
      }
    });
  }
  for (std::thread& reader : readers) reader.join();
  if (failed) throw std::runtime_error("a plain read failed");
  return backend.now() - began;
}

std::string machine() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown processor";
}

Plain best_plain(const pie::Backend& backend, int file, Bytes bytes) {
  Plain best;
  double best_rate = 0;
  for (const Bytes size : {mib / 2, mib, 2 * mib, 4 * mib}) {
    for (const unsigned threads : {2U, 4U, 8U, 16U}) {
      const Nanos took = read_plainly(backend, file, bytes, {size, threads});
      const double rate = megabytes_per_second(bytes, took);
      std::printf("  plain reads of %5.1f MiB, %2u in flight: %6.0f MB/s\n",
                  static_cast<double>(size) / static_cast<double>(mib), threads, rate);
      if (rate > best_rate) {
        best_rate = rate;
        best = {size, threads};
      }
    }
  }
  return best;
}

void run(const Settings& settings) {
  const pie::Geometry geometry = settings.geometry();
  const auto backend = pie::open_host({.frame_bytes = geometry.frame_bytes(),
                                       .device_bytes = arena_bytes,
                                       .pool_bytes = Bytes{8192} * mib,
                                       .pool_dir = settings.pool_dir,
                                       .pool_io = "auto"});
  const pie::Capabilities has = backend->capabilities();
  std::printf("%s, %u threads\n", machine().c_str(), std::thread::hardware_concurrency());
  if (!has.pool_io.starts_with("direct")) {
    throw std::runtime_error("pool_io is " + has.pool_io + ": the disk does no direct I/O here");
  }
  pie::Scheduler scheduler(*backend, geometry, pie::make_policy("fixed:1"));
  pie::Sequence& sequence = scheduler.map().add();
  step(*backend, scheduler, sequence, settings.tokens, settings.block_tokens);
  scheduler.drain();
  const Bytes bytes = Bytes{settings.tokens / settings.block_tokens} * layers * has.frame_stride;
  std::printf("pool_io %s, %u tokens in frames of %llu bytes: %.0f MiB streamed a step\n",
              has.pool_io.c_str(), settings.tokens,
              static_cast<unsigned long long>(has.frame_stride),
              static_cast<double>(bytes) / static_cast<double>(mib));

  const int file = open_pool_file(bytes);
  if (file < 0) throw std::runtime_error("the pool file cannot be opened for plain direct reads");
  const Plain plain = best_plain(*backend, file, bytes / 3 / (4 * mib) * (4 * mib));
  std::vector<double> plain_rates;
  std::vector<double> step_rates;
  std::vector<double> ratios;
  for (int i = 0; i < pairs; ++i) {
    scheduler.drain();
    const Nanos plain_took = read_plainly(*backend, file, bytes, plain);
    plain_rates.push_back(megabytes_per_second(bytes, plain_took));
    // What is prefetched at the ends of a measurement is in neither or both of bytes and time.
    const std::uint64_t before = scheduler.transfers().loaded_frames();
    Nanos took = 0;
    for (std::uint32_t j = 0; j < steps; ++j) {
      took += step(*backend, scheduler, sequence, 1, settings.block_tokens);
    }
    const Bytes moved = (scheduler.transfers().loaded_frames() - before) * has.frame_stride;
    step_rates.push_back(megabytes_per_second(moved, took));
    ratios.push_back(step_rates.back() / plain_rates.back());
  }
  ::close(file);
  std::printf("(a) plain reads, best: %6.0f MB/s (median of %d)\n", median(plain_rates), pairs);
  std::printf("(b) steps:             %6.0f MB/s\n", median(step_rates));
  std::printf("(b)/(a):               %6.3f (median of pairs)\n", median(ratios));
  scheduler.free(sequence);
}

}  // namespace

int main(int count, char** arguments) {
  try {
    run(settings_from(count, arguments));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "pool_read: %s\n", error.what());
    return 1;
  }
  return 0;
}
