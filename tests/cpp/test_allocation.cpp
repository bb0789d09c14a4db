// The i-th allocation that the library makes fails, for every i: the call says so by bad_alloc, has
// changed nothing or is taken back, and the same call again does what it should.
#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "reference_model.hpp"

namespace {

// Allocations until one fails, 0: none will; counted while the library alone is at work.
std::size_t left = 0;
bool counting = false;

}  // namespace

// Inlined, one of the pair alone looks to the compiler as if it were mismatched.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
#endif
void* operator new(std::size_t bytes) {
  if (counting && left > 0) {
    --left;
    if (left == 0) throw std::bad_alloc();
  }
  if (void* memory = std::malloc(bytes == 0 ? 1 : bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace pie::testing {
namespace {

class Counting {
 public:
  explicit Counting(bool on) : before_(std::exchange(counting, on)) {}
  Counting(const Counting&) = delete;
  Counting& operator=(const Counting&) = delete;
  ~Counting() { counting = before_; }

 private:
  bool before_;
};

template <typename Body>
void uncounted(const Body& body) {
  const Counting off(false);
  body();
}

// What a backend allocates is its own concern.
class Uncounted final : public ProxyBackend {
 public:
  using ProxyBackend::ProxyBackend;
  std::uint32_t resize_device(std::uint32_t frames) override {
    const Counting off(false);
    return ProxyBackend::resize_device(frames);
  }
  PoolSize resize_pool(std::uint32_t frames) override {
    const Counting off(false);
    return ProxyBackend::resize_pool(frames);
  }
  Ticket submit(std::span<const Copy> copies, std::span<const Dep> after) override {
    const Counting off(false);
    return ProxyBackend::submit(copies, after);
  }
  std::size_t poll(std::span<Completion> out) override {
    const Counting off(false);
    return ProxyBackend::poll(out);
  }
  void wait(Nanos timeout_ns) override {
    const Counting off(false);
    ProxyBackend::wait(timeout_ns);
  }
  Fence record(ComputeStream stream, Timing timing) override {
    const Counting off(false);
    return ProxyBackend::record(stream, timing);
  }
  void depend(ComputeStream stream, const Dep& dep) override {
    const Counting off(false);
    ProxyBackend::depend(stream, dep);
  }
  void duplicate(ComputeStream stream, std::span<const Duplicate> frames) override {
    const Counting off(false);
    ProxyBackend::duplicate(stream, frames);
  }
};

class UncountedKernel final : public LayerKernel {
 public:
  explicit UncountedKernel(StampKernel& inner) : inner_(inner) {}
  void append(const Append& rows) override {
    const Counting off(false);
    inner_.append(rows);
  }
  void attend(std::uint32_t layer, std::span<const KvPiece> pieces) override {
    const Counting off(false);
    inner_.attend(layer, pieces);
  }

 private:
  StampKernel& inner_;
};

// A history whose calls are made again where they fail for want of memory.
class History {
 public:
  History(const Geometry& geometry, const std::string& policy, std::unique_ptr<SimBackend> sim)
      : geometry_(geometry),
        machine_(*sim),
        stamps_(geometry, sim->capabilities().streams ? &machine_ : nullptr),
        kernel_(stamps_),
        cache_(geometry, policy, std::make_unique<Uncounted>(std::move(sim))) {
    cache_.set_stream(compute_stream);
  }

  void run(int decode_steps) {
    const SequenceId a = add();
    step({{a, 70}});
    const SequenceId b = add();
    step({{b, 40}});
    for (int i = 0; i < decode_steps; ++i) step({{a, 1}, {b, 1}});
    const SequenceId c = fork(a);
    for (int i = 0; i < 3; ++i) step({{a, 1}, {b, 1}, {c, 1}});
    truncate(a, geometry_.windows.empty() ? 30 : 86);
    for (int i = 0; i < 2; ++i) step({{a, 5}, {c, 1}});
    resize(40, 300);
    step({{a, 1}, {b, 20}, {c, 1}});
    resize(30, 100);
    step({{a, 1}, {b, 1}, {c, 1}});
    free(b);
    step({{a, 1}, {c, 1}});
    free(c);
    free(a);
  }

 private:
  // Until it does not fail any more, which is the second time.
  void call(const std::function<void()>& body) {
    check();
    try {
      const Counting on(true);
      body();
    } catch (const CapacityError&) {
      throw;
    } catch (const std::bad_alloc&) {
      check();
      body();
    }
    cache_.check();
  }

  void check() {
    cache_.check();
    expect(stamps_.failure().empty(), stamps_.failure());
    for (const auto& [id, salts] : salts_) {
      expect(cache_.length(id) == salts.size(), "a sequence has another length than it should");
    }
  }

  SequenceId add() {
    SequenceId id = 0;
    call([&] { id = cache_.add(); });
    salts_[id] = {};
    return id;
  }
  SequenceId fork(SequenceId from) {
    SequenceId id = 0;
    call([&] { id = cache_.fork(from); });
    salts_[id] = salts_[from];
    return id;
  }
  void truncate(SequenceId id, std::uint32_t tokens) {
    call([&] { cache_.truncate(id, tokens); });
    salts_[id].resize(tokens);
  }
  void resize(std::uint32_t device_frames, std::uint32_t pool_frames) {
    const Bytes stride = geometry_.frame_bytes();
    call([&] { cache_.resize(device_frames * stride, pool_frames * stride); });
  }
  void free(SequenceId id) {
    call([&] { cache_.free(id); });
    salts_.erase(id);
  }

  void step(const std::vector<StepEntry>& batch) {
    std::vector<Entry> entries;
    std::uint32_t row = 0;
    ++step_;
    for (const StepEntry& entry : batch) {
      entries.push_back({entry.sequence, &salts_[entry.sequence], entry.new_tokens, row, step_});
      row += entry.new_tokens;
    }
    bool finished = false;
    call([&] {
      if (finished) return;  // it was the step after this one that had no memory to be prepared
      cache_.begin(batch, Reader::kernel);
      uncounted([&] { stamps_.begin_step(entries); });
      for (std::uint32_t layer = 0; layer < geometry_.layers; ++layer) {
        uncounted([&] { stamps_.begin_layer(layer); });
        cache_.run(layer, kernel_);
        uncounted([&] { stamps_.end_layer(); });
      }
      cache_.finish();
    });
    for (const Entry& entry : entries) {
      salts_[entry.id].insert(salts_[entry.id].end(), entry.new_tokens, entry.salt);
    }
  }

  Geometry geometry_;
  SimMachine machine_;
  StampKernel stamps_;
  UncountedKernel kernel_;
  Cache cache_;
  std::map<SequenceId, Salts> salts_;
  std::uint32_t step_ = 0;
};

// Runs the history once for each allocation that it makes, until none is left to fail.
void fail_each(const Geometry& geometry, const std::string& policy, bool streams) {
  SimOptions options = small_machine(geometry, 26, 200);
  options.device_frames_max = 40;
  options.streams = streams;
  std::size_t i = 1;
  for (;; ++i) {
    SCOPED_TRACE("allocation " + std::to_string(i));
    left = i;
    try {
      History(geometry, policy, open_sim(options)).run(streams ? 2 : 20);
    } catch (const std::exception& error) {
      const bool failed = std::exchange(left, 0) == 0;
      ADD_FAILURE() << error.what();
      if (failed) continue;
      return;
    }
    if (left > 0) break;
  }
  left = 0;
  EXPECT_GT(i, 300) << "hardly any allocation was seen, so hardly any has failed";
}

TEST(Allocation, AnyMayFail) { fail_each(small_geometry(3), "fit", false); }

TEST(Allocation, AnyMayFailWhereHalfIsStreamed) {
  fail_each(small_geometry(3), "fixed:0.5", false);
}

TEST(Allocation, AnyMayFailWhereWindowsDiffer) {
  Geometry geometry = small_geometry(3);
  geometry.windows = {0, 20, 0};
  fail_each(geometry, "fit", false);
}

// Of fewer steps: the simulated stream takes its time.
TEST(Allocation, AnyMayFailOnAStream) { fail_each(small_geometry(3), "fit", true); }

}  // namespace
}  // namespace pie::testing
