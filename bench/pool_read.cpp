// How much of the disk's rate streaming through the backend keeps.
//
//   pool_read [pool_dir [frame_bytes [run_frames [file_mib]]]]
//
// Two ways of reading the same bytes of the same file, alternating, so that a disk that changes its
// rate meanwhile changes both: (a) plain direct reads, at the best of a few sizes and numbers in
// flight; (b) the backend, one ticket per run of frames, each frame checked on arrival. Both go
// round and round the same ring of device frames: a few MiB of it would stay in the processor's
// caches, and make a virtual disk look a third faster than it is. Prints medians and their ratio.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "pie/backends.hpp"
#include "pie/error.hpp"

namespace {

using pie::Bytes;
using pie::Nanos;

constexpr Bytes mib = Bytes{1} << 20;
constexpr Bytes ring_bytes = 128 * mib;
constexpr int pairs = 9;

struct Settings {
  std::string pool_dir;
  Bytes frame_bytes = 49152;      // 64 tokens of a model with 3 KV heads of 64, bf16
  std::uint32_t run_frames = 32;  // adjacent frames in one ticket
  Bytes file_bytes = 768 * mib;
};

Settings settings_from(int count, char** arguments) {
  Settings settings;
  if (count > 1) settings.pool_dir = arguments[1];
  if (count > 2) settings.frame_bytes = std::stoull(arguments[2]);
  if (count > 3) settings.run_frames = static_cast<std::uint32_t>(std::stoul(arguments[3]));
  if (count > 4) settings.file_bytes = std::stoull(arguments[4]) * mib;
  if (settings.run_frames == 0) throw pie::ConfigError("run_frames is 0; a run has a frame.");
  return settings;
}

double megabytes_per_second(Bytes bytes, Nanos took) {
  return static_cast<double>(bytes) * 1e3 / static_cast<double>(took);
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

// The first word of a frame says which pool frame it is.
void stamp(pie::Backend& backend, pie::FrameIndex device, std::uint64_t value) {
  std::memcpy(backend.address(device), &value, sizeof value);
}

void check(const pie::Backend& backend, const pie::Copy& copy) {
  for (std::uint32_t i = 0; i < copy.count; ++i) {
    std::uint64_t value = 0;
    std::memcpy(&value, backend.address(copy.device_first + i), sizeof value);
    if (value != copy.pool_first + i) throw std::runtime_error("a frame came back wrong");
  }
}

// Copies every frame of the pool in runs through the ring of all device frames, as far ahead as it
// allows, and returns how long that took. `before` sees a copy before it is submitted, `behind`
// after it has ended.
template <class Before, class Behind>
Nanos stream(pie::Backend& backend, pie::Lane lane, std::uint32_t frames, std::uint32_t run,
             Before before, Behind behind) {
  const std::uint32_t slots = backend.capabilities().device_frames / run;
  std::vector<pie::Copy> of_slot(slots);
  std::vector<pie::Ticket> ticket_of_slot(slots);
  std::deque<std::uint32_t> free_slots;
  for (std::uint32_t slot = 0; slot < slots; ++slot) free_slots.push_back(slot);

  const Nanos began = backend.now();
  std::uint32_t next = 0;
  while (next < frames || free_slots.size() < slots) {
    while (next < frames && !free_slots.empty()) {
      const std::uint32_t slot = free_slots.front();
      free_slots.pop_front();
      of_slot[slot] = {slot * run, next, std::min(run, frames - next)};
      before(of_slot[slot]);
      ticket_of_slot[slot] = backend.submit(lane, {&of_slot[slot], 1}, {});
      next += run;
    }
    backend.wait(Nanos{10'000'000'000});
    std::array<pie::Completion, 16> ended;
    const std::size_t count = backend.poll(ended);
    for (std::size_t i = 0; i < count; ++i) {
      if (ended[i].status != pie::Status::ok) throw std::runtime_error("a copy failed");
      const auto at = std::ranges::find(ticket_of_slot, ended[i].ticket) - ticket_of_slot.begin();
      const auto slot = static_cast<std::uint32_t>(at);
      behind(of_slot[slot]);
      ticket_of_slot[slot] = {};
      free_slots.push_back(slot);
    }
  }
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

// Plain reads of [0, bytes), `plain.threads` at a time, in pieces of `plain.size` that go round the
// ring of device frames. Returns how long that took.
Nanos read_plainly(const pie::Backend& backend, int file, Bytes bytes, Plain plain) {
  const pie::Capabilities has = backend.capabilities();
  const Bytes ring = has.device_frames * has.frame_stride / plain.size * plain.size;
  std::byte* memory = backend.address(0);
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
  const auto backend = pie::open_host({.frame_bytes = settings.frame_bytes,
                                       .device_bytes = ring_bytes,
                                       .pool_bytes = settings.file_bytes,
                                       .pool_dir = settings.pool_dir,
                                       .pool_io = "auto"});
  const pie::Capabilities has = backend->capabilities();
  const std::uint32_t frames = backend->grow_pool(has.pool_frames);
  if (frames < has.pool_frames) throw std::runtime_error(backend->pool_refusal());
  const Bytes bytes = frames * has.frame_stride;
  std::printf("%s, %u threads\n", machine().c_str(), std::thread::hardware_concurrency());
  std::printf(
      "pool_io %s, %u frames of %llu bytes, %.0f MiB, runs of %u frames (%.2f MiB)\n",
      has.pool_io.c_str(), frames, static_cast<unsigned long long>(has.frame_stride),
      static_cast<double>(bytes) / static_cast<double>(mib), settings.run_frames,
      static_cast<double>(settings.run_frames * has.frame_stride) / static_cast<double>(mib));

  const auto nothing = [](const pie::Copy&) {};
  stream(
      *backend, pie::Lane::device_to_pool, frames, settings.run_frames,
      [&](const pie::Copy& copy) {
        for (std::uint32_t i = 0; i < copy.count; ++i) {
          stamp(*backend, copy.device_first + i, copy.pool_first + i);
        }
      },
      nothing);
  const int file = open_pool_file(bytes);
  if (file < 0) throw std::runtime_error("the pool file cannot be opened for plain direct reads");
  const Plain plain = best_plain(*backend, file, bytes / 3 / (4 * mib) * (4 * mib));

  std::vector<double> plain_rates;
  std::vector<double> backend_rates;
  std::vector<double> ratios;
  for (int i = 0; i < pairs; ++i) {
    const Nanos plain_took = read_plainly(*backend, file, bytes, plain);
    const Nanos backend_took =
        stream(*backend, pie::Lane::pool_to_device, frames, settings.run_frames, nothing,
               [&](const pie::Copy& copy) { check(*backend, copy); });
    plain_rates.push_back(megabytes_per_second(bytes, plain_took));
    backend_rates.push_back(megabytes_per_second(bytes, backend_took));
    ratios.push_back(backend_rates.back() / plain_rates.back());
  }
  ::close(file);
  std::printf("(a) plain reads, best: %6.0f MB/s (median of %d)\n", median(plain_rates), pairs);
  std::printf("(b) backend:           %6.0f MB/s\n", median(backend_rates));
  std::printf("(b)/(a):               %6.3f (median of pairs)\n", median(ratios));
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
