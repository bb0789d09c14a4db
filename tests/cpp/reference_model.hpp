// The reference a cache is compared with: a sequence is a list of salts, one a token, and all that
// the cache holds is a function of what names it, so a block that ends up in the wrong place, or
// stale, cannot go unseen.
//
// The model makes the calls, knows what may come of them, and throws Mismatch where anything else
// does. It reads a step in each way there is: a kernel of its own that stamps every token (cheap:
// for long runs), attention against float64, gathering, tables of frames.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "pie/backends.hpp"
#include "pie/cache.hpp"
#include "pie/error.hpp"
#include "proxy_backend.hpp"

namespace pie::testing {

inline constexpr std::uint32_t kv_heads = 2;
inline constexpr std::uint32_t query_heads = 4;
inline constexpr std::uint32_t head_dim = 8;
inline constexpr std::uint32_t block_tokens = 16;

inline Geometry small_geometry(std::uint32_t layers) {
  return {layers, kv_heads, head_dim, block_tokens, DType::f32};
}

// A machine whose copies end in any order that their dependencies allow.
inline SimOptions small_machine(const Geometry& geometry, std::uint32_t device_frames,
                                std::uint32_t pool_frames) {
  SimOptions options;
  options.device_frames = device_frames;
  options.pool_frames = pool_frames;
  options.frame_bytes = geometry.frame_bytes();
  options.copy_bytes_best = 4 * options.frame_bytes;
  options.load = {.bytes_per_s = 1e9,
                  .latency_ns = 1'000,
                  .jitter_ns = 100'000,
                  .overhead_ns = 100,
                  .copies_at_once = 64};
  options.write = options.load;
  return options;
}

// The caller's, where the machine has streams: not the one that a cache begins with.
inline constexpr ComputeStream compute_stream{7};

// What the cache did and should not have done.
struct Mismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The parts of what is said are put together only where it is.
template <typename... Parts>
void expect(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream what;
  (what << ... << parts);
  throw Mismatch(what.str());
}

// The value of a K (or V) element. `salt` makes appends after a truncation differ.
inline float value(std::uint64_t salt, std::uint32_t layer, std::uint32_t token, std::uint32_t head,
                   std::uint32_t d, bool v) {
  std::uint64_t x =
      salt * 1000003 + layer * 7919 + token * 104729 + head * 31 + d * 2 + (v ? 1 : 0);
  x ^= x >> 31;
  x *= 0x9e3779b97f4a7c15ULL;
  x ^= x >> 29;
  return static_cast<float>(x % 4096) / 2048.0F - 1.0F;
}

// What a token is stamped with in one layer.
inline std::uint64_t stamp(std::uint32_t salt, std::uint32_t layer, std::uint32_t token) {
  return (std::uint64_t{salt} << 32U | token) * 0x9e3779b97f4a7c15ULL + layer;
}

using Salts = std::vector<std::uint32_t>;  // per token, the step that wrote it

// One sequence of the step that runs.
struct Entry {
  SequenceId id = 0;
  const Salts* salts = nullptr;  // of the tokens before the step
  std::uint32_t new_tokens = 0;
  std::uint32_t first_row = 0;
  std::uint32_t salt = 0;  // of the new tokens

  [[nodiscard]] std::uint32_t position() const { return static_cast<std::uint32_t>(salts->size()); }
  [[nodiscard]] std::uint32_t end() const { return position() + new_tokens; }
  [[nodiscard]] std::uint32_t at(std::uint32_t token) const {
    return token < salts->size() ? (*salts)[token] : salt;
  }
  // The first token of the first block that the entry's rows see through a window.
  [[nodiscard]] std::uint32_t begin(std::uint32_t window) const {
    return Geometry::first_seen(position(), window) / block_tokens * block_tokens;
  }
};

// What is asked of the machine under a cache whose compute is on streams.
class Machine {
 public:
  Machine() = default;
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;
  virtual ~Machine() = default;

  // Work on a stream that reads or writes `bytes` of a device frame, where `body` finds them.
  using Body = std::function<void(std::byte*)>;
  enum class Access : std::uint8_t { read, write };
  virtual void launch(ComputeStream stream, Nanos duration_ns, std::byte* at, Bytes bytes,
                      Access access, Body body) = 0;

  // Returns when the stream has done what it was given, and something more that takes as long.
  virtual void run(ComputeStream stream, Nanos duration_ns) = 0;

  // Moves on where the host waits.
  [[nodiscard]] virtual Nanos host_time() const = 0;
  [[nodiscard]] virtual std::uint64_t failed_copies() const = 0;
};

class SimMachine final : public Machine {
 public:
  explicit SimMachine(SimBackend& sim) : sim_(sim) {}

  void launch(ComputeStream stream, Nanos duration_ns, std::byte* at, Bytes /*bytes*/,
              Access /*access*/, Body body) override {
    sim_.launch(stream, {duration_ns}, [at, body = std::move(body)] { body(at); });
  }
  void run(ComputeStream stream, Nanos duration_ns) override {
    if (duration_ns > 0) sim_.compute(stream, {duration_ns});
    sim_.synchronize(stream);
  }
  [[nodiscard]] Nanos host_time() const override { return sim_.now(); }
  [[nodiscard]] std::uint64_t failed_copies() const override {
    return sim_.counts(Lane::pool_to_device).failed + sim_.counts(Lane::device_to_pool).failed;
  }

 private:
  SimBackend& sim_;
};

// Computes nothing.
class IdleKernel final : public LayerKernel {
 public:
  void append(const Append& /*rows*/) override {}
  void attend(std::uint32_t /*layer*/, std::span<const KvPiece> /*pieces*/) override {}
};

// Stamps what it stores and compares the stamps of what it reads, at once or, where compute runs on
// a stream, when the stream gets there. What a step that was aborted read does not matter.
class StampKernel final : public LayerKernel {
 public:
  StampKernel(Geometry geometry, Machine* streams)
      : geometry_(std::move(geometry)), machine_(streams) {}

  void begin_step(const std::vector<Entry>& entries) {
    entries_ = &entries;
    aborted_ = std::make_shared<bool>(false);
  }
  void begin_layer(std::uint32_t layer) {
    layer_ = layer;
    stored_ = 0;
    read_.clear();
    for (const Entry& entry : *entries_) read_.push_back(entry.begin(geometry_.window(layer)));
  }
  void end_layer() const {
    for (std::size_t i = 0; i < read_.size(); ++i) {
      expect(read_[i] == (*entries_)[i].end(), "a layer ended with blocks not read");
    }
  }
  void abort() { *aborted_ = true; }
  void set_stream(ComputeStream stream) { stream_ = stream; }

  // What a stream found; empty where all was well.
  [[nodiscard]] const std::string& failure() const { return *failure_; }

  void append(const Append& rows) override {
    expect(rows.layer == layer_, "rows are appended in another layer than the one that runs");
    expect(rows.first_row == stored_, "rows are not appended in order");
    stored_ += static_cast<std::uint32_t>(rows.slots.size());
    rows.each_run([&](std::byte* frame, std::uint32_t token, std::uint32_t count,
                      std::uint32_t row) { store(frame, token, count, row); });
  }

  void store(std::byte* frame, std::uint32_t token, std::uint32_t rows, std::uint32_t row) {
    const Entry& entry = entry_of(row);
    const std::uint32_t position = entry.position() + row - entry.first_row;
    expect(position % block_tokens == token && row + rows <= entry.first_row + entry.new_tokens,
           "rows are stored where they do not belong");
    const auto body = [=, salt = entry.salt, layer = layer_](std::byte* at) {
      for (std::uint32_t i = 0; i < rows; ++i) {
        const std::uint64_t mark = stamp(salt, layer, position + i);
        std::memcpy(at + i * sizeof mark, &mark, sizeof mark);
      }
    };
    std::byte* at = frame + token * sizeof(std::uint64_t);
    if (machine_ == nullptr) return body(at);
    machine_->launch(stream_, store_ns, at, rows * sizeof(std::uint64_t), Machine::Access::write,
                     body);
  }

  void attend(std::uint32_t layer, std::span<const KvPiece> pieces) override {
    expect(layer == layer_, "another layer is read than the one that runs");
    for (const KvPiece& piece : pieces) {
      check_place(piece);
      const Entry& entry = (*entries_)[piece.entry];
      const std::uint32_t blocks =
          (piece.kv_end - piece.kv_begin + block_tokens - 1) / block_tokens;
      for (std::uint32_t b = 0; b < blocks; ++b) {
        const std::uint32_t token = piece.kv_begin + b * block_tokens;
        check_block(entry, piece.frames[b], token, std::min(block_tokens, piece.kv_end - token));
      }
    }
  }

 private:
  static constexpr Nanos store_ns = 500;
  static constexpr Nanos read_ns = 3'000;  // a block

  [[nodiscard]] const Entry& entry_of(std::uint32_t row) const {
    const auto after = [](std::uint32_t r, const Entry& entry) { return r < entry.first_row; };
    return *(std::upper_bound(entries_->begin(), entries_->end(), row, after) - 1);
  }

  void check_place(const KvPiece& piece) {
    expect(piece.entry < entries_->size(), "a piece is of no sequence of the batch");
    const Entry& entry = (*entries_)[piece.entry];
    expect(piece.sequence == entry.id && piece.first_row == entry.first_row &&
               piece.rows == entry.new_tokens && piece.position == entry.position(),
           "a piece's rows are not those of the batch");
    std::uint32_t& next = read_[piece.entry];
    expect(piece.kv_begin == next && piece.kv_begin < piece.kv_end && piece.kv_end <= entry.end(),
           "pieces leave a gap, or repeat");
    expect(piece.first == (next == entry.begin(geometry_.window(layer_))) &&
               piece.last == (piece.kv_end == entry.end()),
           "a piece's ends are marked wrongly");
    next = piece.kv_end;
  }

  void check_block(const Entry& entry, const std::byte* frame, std::uint32_t token,
                   std::uint32_t count) {
    std::array<std::uint64_t, block_tokens> want;
    for (std::uint32_t i = 0; i < count; ++i) {
      want[i] = stamp(entry.at(token + i), layer_, token + i);
    }
    if (machine_ == nullptr) {
      if (!same(frame, want, count)) throw Mismatch(told(entry.id, layer_, token));
      return;
    }
    const auto body = [=, id = entry.id, layer = layer_, aborted = aborted_,
                       failure = failure_](const std::byte* at) {
      if (!*aborted && failure->empty() && !same(at, want, count)) {
        *failure = told(id, layer, token);
      }
    };
    machine_->launch(stream_, read_ns, const_cast<std::byte*>(frame), count * sizeof want[0],
                     Machine::Access::read, body);
  }

  static bool same(const std::byte* frame, const std::array<std::uint64_t, block_tokens>& want,
                   std::uint32_t count) {
    return std::memcmp(frame, want.data(), count * sizeof want[0]) == 0;
  }

  static std::string told(SequenceId id, std::uint32_t layer, std::uint32_t token) {
    return "sequence " + std::to_string(id) + ", layer " + std::to_string(layer) +
           ": the block of token " + std::to_string(token) + " does not hold what was stored";
  }

  Geometry geometry_;
  Machine* machine_;  // null where the caller computes
  ComputeStream stream_ = compute_stream;
  const std::vector<Entry>* entries_ = nullptr;
  std::uint32_t layer_ = 0;
  std::uint32_t stored_ = 0;         // rows of the layer that runs
  std::vector<std::uint32_t> read_;  // by entry: tokens up to here were read in this layer
  std::shared_ptr<bool> aborted_;
  std::shared_ptr<std::string> failure_ = std::make_shared<std::string>();
};

// At every step another share of what could be streamed.
class Fuzzed final : public Policy {
 public:
  [[nodiscard]] Plan plan(const Snapshot& snapshot) const override {
    const double share = static_cast<double>(random_() % 5) / 4;
    return make_policy("fixed:" + std::to_string(share))->plan(snapshot);
  }
  [[nodiscard]] std::string name() const override { return "fuzz"; }

 private:
  mutable std::mt19937 random_{7};
};

[[nodiscard]] inline std::unique_ptr<Policy> policy_named(const std::string& name) {
  if (name == "fuzz") return std::make_unique<Fuzzed>();
  return make_policy(name);
}

// One cache under test and what it should hold.
class Model {
 public:
  // Where compute is on streams, `machine` is what the backend is of; null: the simulated one.
  Model(const Geometry& geometry, const std::string& policy, std::unique_ptr<Backend> backend,
        std::unique_ptr<Machine> machine = nullptr)
      : geometry_(geometry),
        proxy_(dynamic_cast<ProxyBackend*>(backend.get())),
        streams_(backend->capabilities().streams),
        machine_(machine != nullptr || proxy_ == nullptr ? std::move(machine)
                                                         : std::make_unique<SimMachine>(sim())),
        kernel_(geometry, streams_ ? machine_.get() : nullptr),
        random_(geometry.layers),
        cache_(std::make_unique<Cache>(geometry, policy_named(policy), std::move(backend))) {
    if (streams_ && proxy_ != nullptr) cache_->set_stream(compute_stream);
  }

  Model(const Geometry& geometry, const std::string& policy, const SimOptions& options)
      : Model(geometry, policy, std::make_unique<ProxyBackend>(open_sim(options))) {}

  SequenceId add() {
    const SequenceId id = cache_->add();
    expect(!salts_.contains(id), "an id was given twice");
    salts_[id] = {};
    return id;
  }

  SequenceId fork(SequenceId id) {
    const SequenceId twin = cache_->fork(id);
    expect(!salts_.contains(twin), "an id was given twice");
    salts_[twin] = salts_.at(id);
    return twin;
  }

  void free(SequenceId id) {
    cache_->free(id);
    salts_.erase(id);
  }

  // Refused (LogicError) where a window has given back what the next token would see, and only
  // there.
  void truncate(SequenceId id, std::uint32_t tokens) {
    try {
      cache_->truncate(id, tokens);
    } catch (const LogicError&) {
      expect(!geometry_.windows.empty() && tokens < salts_.at(id).size(),
             "a truncation was refused that no window forbids");
      throw;
    }
    salts_.at(id).resize(tokens);
  }

  void resize(std::uint32_t device_frames, std::uint32_t pool_frames) {
    const Bytes stride = geometry_.frame_bytes();
    const Stats before = cache_->stats();
    try {
      cache_->resize(device_frames * stride, pool_frames * stride);
    } catch (const CapacityError& error) {
      const Stats after = cache_->stats();
      expect(after.device_bytes == before.device_bytes && after.pool_bytes == before.pool_bytes,
             "a refused resize changed a budget: ", error.what());
      throw;
    }
    const Stats after = cache_->stats();
    expect(after.device_bytes == device_frames * stride && after.pool_bytes == pool_frames * stride,
           "a resize gave other budgets than asked for");
  }

  // What the kernel is given from now on it is given there.
  void set_stream(ComputeStream stream) {
    cache_->set_stream(stream);
    kernel_.set_stream(stream);
    stream_ = stream;
  }

  // ---- a step, call by call

  void begin(const std::vector<StepEntry>& batch, Reader reader) {
    if (streams_) began_ns_ = machine_->host_time();
    cache_->begin(batch, reader);
    expect_no_wait();
    reader_ = reader;
    layer_ = 0;
    ++step_;
    entries_.clear();
    std::uint32_t row = 0;
    for (const StepEntry& entry : batch) {
      entries_.push_back(
          {entry.sequence, &salts_.at(entry.sequence), entry.new_tokens, row, step_});
      row += entry.new_tokens;
    }
    kernel_.begin_step(entries_);
  }

  // The next layer. An exception has ended the step.
  void layer() {
    const std::uint32_t layer = layer_++;
    if (proxy_ != nullptr && !streams_) sim().compute({}, {static_cast<Nanos>(random_() % 60'000)});
    try {
      if (reader_ == Reader::kernel || reader_ == Reader::pool_kernel) {
        kernel_.begin_layer(layer);
        cache_->run(layer, kernel_);
        kernel_.end_layer();
        expect_no_wait();
      } else {
        run_with_inputs(layer);
      }
    } catch (...) {
      kernel_.abort();
      let_run();
      throw;
    }
  }

  void finish() {
    try {
      cache_->finish();
    } catch (...) {
      kernel_.abort();
      let_run();
      throw;
    }
    expect_no_wait();
    for (const Entry& entry : entries_) {
      Salts& salts = salts_.at(entry.id);
      salts.insert(salts.end(), entry.new_tokens, entry.salt);
    }
    let_run();
  }

  void abort() {
    cache_->abort();
    kernel_.abort();
    expect_no_wait();
    let_run();
  }

  // Returns when the stream has done what it was given.
  void settle() const {
    if (streams_) machine_->run(stream_, 0);
  }

  // A whole step; `layers_run` below `layers()` aborts.
  void step(const std::vector<StepEntry>& batch, Reader reader, std::uint32_t layers_run) {
    begin(batch, reader);
    for (std::uint32_t i = 0; i < layers_run; ++i) layer();
    layers_run < geometry_.layers ? abort() : finish();
  }

  void check() const {
    if (proxy_ != nullptr) proxy_->rest();
    cache_->check();
    for (const auto& [id, salts] : salts_) {
      expect(cache_->length(id) == salts.size(), "sequence ", id,
             " has another length than it should");
    }
    // On a stream, what follows a copy that failed may have been computed before anybody knew.
    expect(kernel_.failure().empty() || (streams_ && failed_copies() > 0), kernel_.failure());
  }

  [[nodiscard]] std::uint64_t failed_copies() const { return machine_->failed_copies(); }

  Cache& cache() { return *cache_; }
  [[nodiscard]] SimBackend& sim() const { return proxy_->inner(); }
  [[nodiscard]] std::uint64_t tickets() const {
    return sim().counts(Lane::pool_to_device).tickets + sim().counts(Lane::device_to_pool).tickets;
  }
  [[nodiscard]] const std::map<SequenceId, Salts>& salts() const { return salts_; }
  [[nodiscard]] std::uint32_t length(SequenceId id) const {
    return static_cast<std::uint32_t>(salts_.at(id).size());
  }
  [[nodiscard]] std::uint32_t layers() const { return geometry_.layers; }
  [[nodiscard]] std::uint32_t layer_next() const { return layer_; }
  [[nodiscard]] const std::vector<Entry>& entries() const { return entries_; }
  [[nodiscard]] const Geometry& geometry() const { return geometry_; }

 private:
  // Most often the stream comes to its end before the caller goes on; sometimes it lags behind.
  void let_run() {
    if (!streams_ || random_() % 4 == 0) return;
    machine_->run(stream_, 1 + static_cast<Nanos>(random_() % 400'000));
  }

  // Between begin and the end of finish the host waits for nothing where compute is on a stream.
  void expect_no_wait() const {
    expect(!streams_ || machine_->host_time() == began_ns_, "the host waited within a step");
  }

  void run_with_inputs(std::uint32_t layer) {
    std::vector<float> k;
    std::vector<float> v;
    for (const Entry& entry : entries_) {
      for (std::uint32_t token = entry.position(); token < entry.end(); ++token) {
        for (std::uint32_t i = 0; i < kv_heads * head_dim; ++i) {
          k.push_back(value(entry.salt, layer, token, i / head_dim, i % head_dim, false));
          v.push_back(value(entry.salt, layer, token, i / head_dim, i % head_dim, true));
        }
      }
    }
    const LayerInputs inputs{{k.data(), kv_heads * head_dim, head_dim},
                             {v.data(), kv_heads * head_dim, head_dim}};
    if (reader_ == Reader::gather) {
      compare_gathered(layer, cache_->gather(layer, inputs));
    } else if (reader_ == Reader::pages) {
      compare_pages(layer, cache_->pages(layer, inputs).frames);
    } else {
      attend_and_compare(layer, inputs);
    }
  }

  void compare_gathered(std::uint32_t layer, const Gathered& gathered) const {
    for (std::size_t s = 0; s < entries_.size(); ++s) {
      const Entry& entry = entries_[s];
      const std::uint32_t begin = entry.begin(geometry_.window(layer));
      for (std::uint32_t row = 0; row < kv_heads * gathered.longest; ++row) {
        const std::uint32_t t = row % gathered.longest;
        const bool real = t >= begin && t < entry.end();
        const std::size_t at = (s * kv_heads * gathered.longest + row) * head_dim;
        expect_row(entry, layer, t, row / gathered.longest, real,
                   static_cast<const float*>(gathered.k) + at,
                   static_cast<const float*>(gathered.v) + at);
      }
    }
  }

  // K and V of one token and head; zeros where there is no such token.
  static void expect_row(const Entry& entry, std::uint32_t layer, std::uint32_t t,
                         std::uint32_t head, bool real, const float* k, const float* v) {
    for (std::uint32_t d = 0; d < head_dim; ++d) {
      const float want_k = real ? value(entry.at(t), layer, t, head, d, false) : 0.0F;
      const float want_v = real ? value(entry.at(t), layer, t, head, d, true) : 0.0F;
      expect(k[d] == want_k && v[d] == want_v, "layer ", layer, ", token ", t, " of sequence ",
             entry.id, ": K or V are not what was appended");
    }
  }

  void compare_pages(std::uint32_t layer, std::span<const std::int32_t> table) const {
    const Arena arena = cache_->arena();
    const std::size_t columns = table.size() / entries_.size();
    for (std::size_t s = 0; s < entries_.size(); ++s) {
      const Entry& entry = entries_[s];
      for (std::uint32_t b = 0; b < columns; ++b) {
        const std::uint32_t begin = b * block_tokens;
        const std::int32_t frame = table[s * columns + b];
        const bool seen = begin >= entry.begin(geometry_.window(layer)) && begin < entry.end();
        expect(seen == (frame >= 0), "a table names a frame too many or too few");
        if (!seen) continue;
        const auto* k = reinterpret_cast<const float*>(
            arena.start + static_cast<std::uint32_t>(frame) * arena.stride_bytes);
        const float* v = k + kv_heads * block_tokens * head_dim;
        for (std::uint32_t t = begin; t < std::min(begin + block_tokens, entry.end()); ++t) {
          for (std::uint32_t head = 0; head < kv_heads; ++head) {
            const std::uint32_t at = (head * block_tokens + t - begin) * head_dim;
            expect_row(entry, layer, t, head, true, k + at, v + at);
          }
        }
      }
    }
  }

  void attend_and_compare(std::uint32_t layer, const LayerInputs& inputs) {
    constexpr std::uint32_t row_floats = query_heads * head_dim;
    std::uint32_t rows = 0;
    for (const Entry& entry : entries_) rows += entry.new_tokens;
    std::vector<float> q(std::size_t{rows} * row_floats);
    for (std::size_t i = 0; i < q.size(); ++i) {
      q[i] = value(layer, 3, static_cast<std::uint32_t>(i), 0, 0, false);
    }
    std::vector<float> out(q.size(), NAN);
    AttendOptions options;
    options.scale = 0.35F;
    cache_->attend(layer, inputs, {q.data(), row_floats, head_dim},
                   {out.data(), row_floats, head_dim}, query_heads, options, nullptr);
    for (const Entry& entry : entries_) {
      for (std::uint32_t i = 0; i < entry.new_tokens; ++i) {
        // The reference is slow: the first and last row of a sequence, and some between.
        if (i != 0 && i + 1 != entry.new_tokens && (i + step_) % 29 != 0) continue;
        const std::size_t at = (std::size_t{entry.first_row} + i) * row_floats;
        compare_row(entry, entry.position() + i, layer, &q[at], &out[at]);
      }
    }
  }

  void compare_row(const Entry& entry, std::uint32_t position, std::uint32_t layer, const float* q,
                   const float* out) const {
    const std::uint32_t first = Geometry::first_seen(position, geometry_.window(layer));
    for (std::uint32_t head = 0; head < query_heads; ++head) {
      const std::uint32_t kv = head / (query_heads / kv_heads);
      double sum = 0;
      std::vector<double> want(head_dim);
      for (std::uint32_t t = first; t <= position; ++t) {
        double score = 0;
        for (std::uint32_t d = 0; d < head_dim; ++d) {
          score += double{q[head * head_dim + d]} * value(entry.at(t), layer, t, kv, d, false);
        }
        const double weight = std::exp(score * 0.35);
        sum += weight;
        for (std::uint32_t d = 0; d < head_dim; ++d) {
          want[d] += weight * value(entry.at(t), layer, t, kv, d, true);
        }
      }
      for (std::uint32_t d = 0; d < head_dim; ++d) {
        expect(std::abs(out[head * head_dim + d] - want[d] / sum) <= 2e-5, "layer ", layer,
               ": attention is not that of the reference");
      }
    }
  }

  Geometry geometry_;
  ProxyBackend* proxy_;  // in front of the simulated one; null where the cache runs on another
  bool streams_;
  std::unique_ptr<Machine> machine_;  // null where the cache runs on neither
  Nanos began_ns_ = 0;                // the step; where compute is on a stream
  ComputeStream stream_ = compute_stream;
  StampKernel kernel_;
  std::mt19937_64 random_;
  std::map<SequenceId, Salts> salts_;
  std::uint32_t step_ = 0;
  Reader reader_ = Reader::kernel;
  std::uint32_t layer_ = 0;  // the next
  std::vector<Entry> entries_;
  std::unique_ptr<Cache> cache_;  // goes first
};

}  // namespace pie::testing
