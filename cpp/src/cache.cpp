// Wires backend, scheduler and attention together, and keeps the protocol of a step.
#include "pie/cache.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <exception>
#include <map>
#include <thread>
#include <utility>
#include <vector>

#include "built_in_kernels.hpp"
#include "pie/error.hpp"
#include "process.hpp"
#include "resolve.hpp"
#include "scheduler.hpp"

namespace pie {

namespace {

// A step's attention state takes at most this share of the arena, and is at most this many rows.
constexpr std::uint32_t staging_share = 16;
constexpr std::uint32_t wave_rows_max = 2048;

// Where the share is less than this, the state is scratch in ordinary memory, like that of the
// attention kernels: this much, or one row where a row is larger.
constexpr Bytes scratch_bytes = Bytes{64} << 10;

// Counts of tokens are 32 bits wide; no sum of them in one step comes near that.
constexpr std::uint64_t tokens_max = 1ULL << 31;

void refuse_twice(std::span<const StepEntry> batch) {
  std::vector<SequenceId> ids;
  for (const StepEntry& entry : batch) ids.push_back(entry.sequence);
  std::sort(ids.begin(), ids.end());
  const auto twice = std::adjacent_find(ids.begin(), ids.end());
  if (twice == ids.end()) return;
  throw LogicError("step: sequence " + std::to_string(*twice) + " is in the batch twice.");
}

}  // namespace

// Who is inside: one thread of the process that made the cache. Outlives what `close` gives back.
struct Cache::Door {
  Process process;
  std::atomic<std::thread::id> inside;
  std::atomic<bool> abort_owed = false;  // to a step that could not be taken back when it ended
};

class Cache::Impl {
 public:
  Impl(const Geometry& geometry, std::unique_ptr<Policy> policy, std::unique_ptr<Backend> backend)
      : geometry_((check_geometry(geometry), geometry)),
        backend_(std::move(backend)),
        capabilities_(backend_->capabilities()),
        scheduler_(*backend_, geometry, std::move(policy)),
        query_heads_(geometry.kv_heads) {
    if (capabilities_.device_frames < least_frames(geometry)) {
      throw ConfigError("The backend has " + std::to_string(capabilities_.device_frames) +
                        " device frames; one step of one sequence takes " +
                        std::to_string(least_frames(geometry)) + ".");
    }
  }

  // The backend waits for its own transfers when it goes; what it throws here nobody could catch.
  ~Impl() {
    try {
      scheduler_.drain();
    } catch (...) {
      broken_ = "it could not be drained.";
    }
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  [[nodiscard]] Sequence& sequence(SequenceId id, const char* call) {
    require_whole();
    Sequence* found = scheduler_.map().find(id);
    if (found == nullptr) {
      throw LogicError(std::string(call) + ": there is no sequence " + std::to_string(id) +
                       ": it was never added, or it was freed.");
    }
    return *found;
  }

  void refuse_in_step(const char* call) const {
    require_whole();
    if (in_step_) {
      throw LogicError(std::string(call) +
                       ": a step is running; finish or abort it before this call.");
    }
  }

  // Whether a call may go on; throws what is known to have gone wrong since.
  void require_whole() const {
    if (broken_.empty()) return;
    throw IoError(
        "Something failed while this cache was being changed, so what it holds is not known any "
        "more: " +
        broken_ + " Close it and make a new one.");
  }

  void begin(std::span<const StepEntry> batch, Reader reader);
  void start();
  void begin_with(std::uint32_t staging);
  void restart(std::uint32_t query_heads);
  [[nodiscard]] Bytes state_row_bytes() const;
  [[nodiscard]] float* state();
  void attend(std::uint32_t layer, const LayerInputs& inputs, const Rows& q, const MutableRows& out,
              std::uint32_t query_heads, const AttendOptions& options, float* lse);
  Gathered gather(std::uint32_t layer, const LayerInputs& inputs);
  void run(std::uint32_t layer, LayerKernel& kernel);
  FrameTable pages(std::uint32_t layer, const LayerInputs& inputs);
  void finish();
  void abort() noexcept;
  void truncate(SequenceId id, std::uint32_t tokens);
  void resize(Bytes device_bytes, Bytes pool_bytes);
  [[nodiscard]] StepTables tables() const;
  [[nodiscard]] OpenStep open_step() const {
    return in_step_ ? OpenStep{total_rows_, next_layer_} : OpenStep{};
  }
  void verify() noexcept;
  [[nodiscard]] Stats stats() const;
  void add_estimates(Stats& stats) const;
  [[nodiscard]] Bytes kv_bytes() const;
  [[nodiscard]] std::uint32_t device_frames() const { return scheduler_.map().device().capacity(); }

  [[nodiscard]] AttentionShape shape(std::uint32_t query_heads) const {
    AttentionShape shape;
    shape.query_heads = query_heads;
    shape.kv_heads = geometry_.kv_heads;
    shape.head_dim = geometry_.head_dim;
    shape.block_tokens = geometry_.block_tokens;
    shape.dtype = geometry_.dtype;
    shape.scale = 1;
    return shape;
  }

  Geometry geometry_;
  std::unique_ptr<Backend> backend_;
  Capabilities capabilities_;
  Scheduler scheduler_;

 private:
  void take_turn(std::uint32_t layer, Reader reader, const char* call);
  void run_layer(std::uint32_t layer, LayerKernel& kernel);
  [[nodiscard]] std::uint32_t staging_frames() const;
  [[nodiscard]] std::vector<Visit> plan_visits(std::uint32_t rows_per_wave);
  [[nodiscard]] std::byte* staging() const {
    return backend_->address(scheduler_.map().device().limit());
  }
  [[nodiscard]] std::uint32_t longest() const;
  void list_batch();
  void note_peaks();

  bool in_step_ = false;
  std::string broken_;       // why nothing is known any more; empty while all is
  std::exception_ptr late_;  // from after the end of a step
  Reader reader_ = Reader::attend;
  std::vector<Growth> batch_;
  std::uint32_t total_rows_ = 0;  // of the batch
  std::uint32_t next_layer_ = 0;
  std::uint32_t query_heads_;  // of the last attend: staging is sized for it
  std::uint32_t rows_per_wave_ = 0;
  std::vector<std::int32_t> table_;       // what `pages` returned
  std::vector<std::int32_t> table_rows_;  // see StepTables, as the next two
  std::vector<std::int32_t> seq_lens_;
  std::vector<std::int32_t> cu_seqlens_;
  std::vector<float> scratch_;  // of attention state, where the arena is too small for it

  bool decode_ = false;  // the step gives every sequence one token
  bool after_decode_ = false;
  Nanos began_ns_ = 0;
  Nanos ended_ns_ = 0;
  Nanos stall_before_ns_ = 0;
  Stats counters_;
};

// ---- a step -------------------------------------------------------------------------------------

void Cache::Impl::begin(std::span<const StepEntry> batch, Reader reader) {
  refuse_in_step("step");
  if (late_ != nullptr) std::rethrow_exception(std::exchange(late_, nullptr));
  if (batch.empty()) throw LogicError("step: the batch is empty; give at least one sequence.");
  std::vector<Growth> growths;
  std::uint64_t tokens = 0;
  for (const StepEntry& entry : batch) {
    Sequence& member = sequence(entry.sequence, "step");
    if (entry.new_tokens == 0) {
      throw LogicError("step: sequence " + std::to_string(entry.sequence) +
                       " gains no token; leave it out of the batch.");
    }
    growths.push_back({&member, entry.new_tokens});
    tokens += std::uint64_t{member.tokens} + entry.new_tokens;
  }
  refuse_twice(batch);
  const bool by_kernel = reader == Reader::kernel || reader == Reader::pool_kernel;
  if (capabilities_.streams && !by_kernel) {
    throw LogicError(
        "step: the library's own attention, gathering and appending run on the calling thread, and "
        "this backend's memory belongs to a compute stream: run the layers with a LayerKernel.");
  }
  if (tokens > tokens_max) {
    throw LogicError("step: the batch would hold " + std::to_string(tokens) +
                     " tokens; one step serves at most " + std::to_string(tokens_max) + ".");
  }
  batch_ = std::move(growths);
  total_rows_ = 0;
  for (const Growth& growth : batch_) total_rows_ += growth.new_tokens;
  reader_ = reader;
  start();
}

void Cache::Impl::start() {
  const std::uint32_t staging = staging_frames();
  decode_ = std::all_of(batch_.begin(), batch_.end(),
                        [](const Growth& growth) { return growth.new_tokens == 1; });
  began_ns_ = backend_->now();
  stall_before_ns_ = scheduler_.stall_ns();
  try {
    begin_with(staging);
  } catch (const CapacityError&) {
    if (staging == 0 || reader_ != Reader::attend) throw;
    begin_with(0);  // the state in scratch instead, in more waves
  }
  in_step_ = true;
  next_layer_ = 0;
  try {
    scheduler_.set_visits(plan_visits(rows_per_wave_));
    list_batch();
  } catch (...) {
    abort();
    throw;
  }
  if (decode_ && after_decode_) counters_.decode_ns += began_ns_ - ended_ns_;
  after_decode_ = false;
  note_peaks();
}

void Cache::Impl::begin_with(std::uint32_t staging) {
  rows_per_wave_ = total_rows_;
  if (reader_ == Reader::attend) {
    const Bytes row = state_row_bytes();
    const Bytes room = staging == 0 ? scratch_bytes : staging * capabilities_.frame_stride;
    rows_per_wave_ = static_cast<std::uint32_t>(std::clamp<Bytes>(room / row, 1, total_rows_));
  }
  try {
    scheduler_.begin(batch_, {staging, rows_per_wave_ < total_rows_, reader_ == Reader::pages,
                              decode_ && reader_ == Reader::pool_kernel});
  } catch (...) {
    scheduler_.abort();
    throw;
  }
}

// The first layer brings another number of query heads than the step was begun for. Nothing has
// been appended yet, so it is begun again; the old number stays where that fails.
void Cache::Impl::restart(std::uint32_t query_heads) {
  const std::uint32_t before = std::exchange(query_heads_, query_heads);
  in_step_ = false;
  try {
    start();
  } catch (...) {
    query_heads_ = before;
    throw;
  }
}

// Where a wave's attention state lies: in staging, or in scratch.
float* Cache::Impl::state() {
  if (scheduler_.staging_frames() > 0) return reinterpret_cast<float*>(staging());
  scratch_.resize(rows_per_wave_ * state_row_bytes() / sizeof(float));
  return scratch_.data();
}

Bytes Cache::Impl::state_row_bytes() const {
  return attention_state_floats(shape(query_heads_)) * sizeof(float);
}

std::uint32_t Cache::Impl::longest() const {
  std::uint32_t tokens = 0;
  for (const Growth& growth : batch_) {
    tokens = std::max(tokens, growth.sequence->tokens + growth.new_tokens);
  }
  return tokens;
}

void Cache::Impl::list_batch() {
  table_rows_.clear();
  seq_lens_.clear();
  cu_seqlens_.assign(1, 0);
  for (const Growth& growth : batch_) {
    const Sequence& member = *growth.sequence;
    table_rows_.push_back(static_cast<std::int32_t>(member.row));
    seq_lens_.push_back(static_cast<std::int32_t>(member.tokens + growth.new_tokens));
    cu_seqlens_.push_back(cu_seqlens_.back() + static_cast<std::int32_t>(growth.new_tokens));
  }
}

StepTables Cache::Impl::tables() const {
  require(in_step_, "tables: no step is running; begin one first.");
  const BlockTables& tables = scheduler_.map().tables();
  return {tables.data(), geometry_.layers,   tables.rows(), tables.blocks(),
          table_rows_,   scheduler_.slots(), seq_lens_,     cu_seqlens_};
}

// Frames at the top of the arena for contiguous K and V, or for the state of one wave's rows; 0
// where that is scratch.
std::uint32_t Cache::Impl::staging_frames() const {
  const Bytes stride = capabilities_.frame_stride;
  const auto frames = [&](Bytes bytes) { return (bytes + stride - 1) / stride; };
  if (reader_ == Reader::gather) {
    const Bytes row = Bytes{geometry_.head_dim} * dtype_bytes(geometry_.dtype);
    const Bytes bytes = 2 * row * geometry_.kv_heads * longest() * batch_.size();
    return static_cast<std::uint32_t>(std::min<Bytes>(frames(bytes), device_frames()));
  }
  if (reader_ != Reader::attend) return 0;
  const Bytes row = state_row_bytes();
  const Bytes most = device_frames() / staging_share;
  if (most * stride < std::max(scratch_bytes, row)) return 0;
  return static_cast<std::uint32_t>(
      std::min(frames(row * std::min(total_rows_, wave_rows_max)), most));
}

// Cuts the step's packed rows into waves of at most `rows_per_wave` rows.
std::vector<Visit> Cache::Impl::plan_visits(std::uint32_t rows_per_wave) {
  std::vector<Visit> visits;
  std::uint32_t row = 0;
  for (std::uint32_t entry = 0; entry < batch_.size(); ++entry) {
    const Growth& growth = batch_[entry];
    for (std::uint32_t done = 0; done < growth.new_tokens;) {
      const std::uint32_t room = rows_per_wave - row % rows_per_wave;
      const std::uint32_t rows = std::min(growth.new_tokens - done, room);
      visits.push_back(
          {growth.sequence, entry, row, rows, growth.sequence->tokens + done, row / rows_per_wave});
      row += rows;
      done += rows;
    }
  }
  return visits;
}

void Cache::Impl::take_turn(std::uint32_t layer, Reader reader, const char* call) {
  if (!in_step_) {
    throw LogicError(std::string(call) + ": no step is running; begin one first.");
  }
  if (reader != reader_) {
    throw LogicError(std::string(call) + ": the step was opened for the other reader.");
  }
  if (layer != next_layer_ || layer >= geometry_.layers) {
    throw LogicError(std::string(call) + ": layer " + std::to_string(layer) +
                     " is out of order; a step of " + std::to_string(geometry_.layers) +
                     " layers takes each once, and the next is layer " +
                     std::to_string(next_layer_) + ".");
  }
}

void Cache::Impl::run_layer(std::uint32_t layer, LayerKernel& kernel) {
  try {
    scheduler_.run_layer(layer, kernel);
  } catch (...) {
    abort();
    throw;
  }
  ++next_layer_;
  note_peaks();
}

void Cache::Impl::attend(std::uint32_t layer, const LayerInputs& inputs, const Rows& q,
                         const MutableRows& out, std::uint32_t query_heads,
                         const AttendOptions& options, float* lse) {
  take_turn(layer, Reader::attend, "attend");
  if (query_heads == 0 || query_heads % geometry_.kv_heads != 0) {
    throw LogicError("attend: " + std::to_string(query_heads) +
                     " query heads are not a multiple of " + std::to_string(geometry_.kv_heads) +
                     " KV heads.");
  }
  if (query_heads != query_heads_) {
    require(layer == 0, "attend: the number of query heads changed between layers of one step.");
    restart(query_heads);
  }
  AttentionShape whole = shape(query_heads);
  whole.scale = options.scale;
  whole.window = geometry_.window(layer);
  whole.soft_cap = options.soft_cap;
  whole.sinks = options.sinks;
  AttendKernel kernel(whole, inputs, q, out, lse, state(), rows_per_wave_);
  run_layer(layer, kernel);
}

Gathered Cache::Impl::gather(std::uint32_t layer, const LayerInputs& inputs) {
  take_turn(layer, Reader::gather, "gather");
  const Bytes row = Bytes{geometry_.head_dim} * dtype_bytes(geometry_.dtype);
  Gathered gathered;
  gathered.batch = static_cast<std::uint32_t>(batch_.size());
  gathered.longest = longest();
  gathered.k = staging();
  gathered.v = staging() + row * geometry_.kv_heads * gathered.longest * gathered.batch;
  GatherKernel kernel(shape(geometry_.kv_heads), inputs, gathered);
  run_layer(layer, kernel);
  return gathered;
}

FrameTable Cache::Impl::pages(std::uint32_t layer, const LayerInputs& inputs) {
  take_turn(layer, Reader::pages, "pages");
  const std::size_t columns = geometry_.blocks_of(longest());
  PagesKernel kernel(shape(geometry_.kv_heads), inputs);
  run_layer(layer, kernel);
  table_.assign(batch_.size() * columns, no_table_frame);
  for (std::size_t i = 0; i < batch_.size(); ++i) {
    const Sequence& member = *batch_[i].sequence;
    const std::uint32_t first = geometry_.first_block(member.tokens, geometry_.window(layer));
    const std::uint32_t end = geometry_.blocks_of(member.tokens + batch_[i].new_tokens);
    const std::int32_t* row = scheduler_.map().tables().row(layer, member.row);
    std::copy(row + first, row + end,
              table_.begin() + static_cast<std::ptrdiff_t>(i * columns + first));
  }
  return {static_cast<std::uint32_t>(batch_.size()), table_};
}

void Cache::Impl::run(std::uint32_t layer, LayerKernel& kernel) {
  take_turn(layer, reader_ == Reader::pool_kernel ? reader_ : Reader::kernel, "run");
  run_layer(layer, kernel);
}

void Cache::Impl::finish() {
  require(in_step_, "finish: no step is running.");
  if (next_layer_ != geometry_.layers) {
    const std::uint32_t done = next_layer_;
    abort();
    throw LogicError("finish: only " + std::to_string(done) + " of " +
                     std::to_string(geometry_.layers) +
                     " layers ran; the step was aborted and its tokens were not added.");
  }
  try {
    scheduler_.finish();
  } catch (...) {
    abort();
    throw;
  }
  in_step_ = false;
  try {
    scheduler_.look_ahead();
  } catch (...) {
    late_ = std::current_exception();  // the step is finished: the next one tells
    verify();
  }
  note_peaks();
  ended_ns_ = backend_->now();
  ++counters_.steps;
  if (!decode_) return;
  after_decode_ = true;
  ++counters_.decode_steps;
  counters_.decode_tokens += batch_.size();
  counters_.decode_ns += ended_ns_ - began_ns_;
  counters_.decode_stall_ns += scheduler_.stall_ns() - stall_before_ns_;
}

void Cache::Impl::abort() noexcept {
  if (!in_step_) return;
  in_step_ = false;
  after_decode_ = false;
  try {
    scheduler_.abort();
  } catch (const std::exception& error) {
    broken_ = error.what();
  } catch (...) {
    broken_ = "it threw something that is no exception.";
  }
}

// Memory ran out somewhere on the way: either what the cache holds is what it was, or nothing is
// known of it any more.
void Cache::Impl::verify() noexcept {
  try {
    scheduler_.check();
  } catch (const std::exception& error) {
    broken_ = error.what();
  }
}

// ---- seeing it ----------------------------------------------------------------------------------

void Cache::Impl::note_peaks() {
  const Bytes stride = capabilities_.frame_stride;
  const Bytes device_used = scheduler_.frames_in_use() * stride;
  const Bytes pool_used = scheduler_.map().pool().used() * stride;
  counters_.device_bytes_peak = std::max(counters_.device_bytes_peak, device_used);
  counters_.pool_bytes_peak = std::max(counters_.pool_bytes_peak, pool_used);
}

Stats Cache::Impl::stats() const {
  const BlockMap& map = scheduler_.map();
  const Bytes stride = capabilities_.frame_stride;
  Stats stats = counters_;
  stats.device_bytes = device_frames() * stride;
  stats.device_bytes_used = scheduler_.frames_in_use() * stride;
  stats.pool_bytes = map.pool().capacity() * stride;
  stats.pool_bytes_used = map.pool().used() * stride;
  stats.kv_bytes = kv_bytes();
  stats.in_place_bytes = scheduler_.in_place_frames() * stride;
  stats.streamed_bytes = scheduler_.transfers().loaded_frames() * stride;
  stats.written_bytes = scheduler_.transfers().written_frames() * stride;
  stats.retries = scheduler_.transfers().retries();
  stats.failed_writes = scheduler_.transfers().failed_writes();
  stats.stall_ns = scheduler_.stall_ns();
  if (stats.decode_ns > 0) {
    const auto decode_ns = static_cast<double>(stats.decode_ns);
    stats.stall_fraction = static_cast<double>(stats.decode_stall_ns) / decode_ns;
    stats.decode_tokens_per_s = static_cast<double>(stats.decode_tokens) * 1e9 / decode_ns;
  }
  stats.sequences = static_cast<std::uint32_t>(map.sequences().size());
  stats.block_tokens = geometry_.block_tokens;
  stats.resident_frames = map.device().used();
  stats.ring_frames = scheduler_.plan().ring_frames;
  add_estimates(stats);
  stats.policy = scheduler_.policy().name();
  stats.pool_io = capabilities_.pool_io;
  stats.pool_io_reason = capabilities_.pool_io_reason;
  stats.attention_isa = pie::attention_isa();
  return stats;
}

// What was learned from steps.
void Cache::Impl::add_estimates(Stats& stats) const {
  const State& state = scheduler_.state();
  const auto stride = static_cast<double>(capabilities_.frame_stride);
  stats.budget_bytes = state.budget.frames * capabilities_.frame_stride;
  stats.budget_reason = name_of(state.budget.reason);
  stats.budget_moves = state.moves;
  if (state.load_ns > 0) stats.link_bytes_per_s = stride * 1e9 / state.load_ns;
  stats.interference_ns_per_byte = state.decode.interference_ns() / stride;
  stats.slowdown = state.slowdown;
}

// What several sequences share counts once, what windows gave back not at all.
Bytes Cache::Impl::kv_bytes() const {
  const BlockMap& map = scheduler_.map();
  std::map<const Branch*, std::uint32_t> held;  // tokens of each branch, by the longest sequence
  for (const auto& [id, sequence] : map.sequences()) {
    for (const Branch* branch : sequence.path) {
      const std::uint32_t from = branch->first * geometry_.block_tokens;
      const std::uint32_t whole = branch->blocks() * geometry_.block_tokens;
      std::uint32_t& tokens = held[branch];
      tokens = std::max(tokens, std::min(whole, sequence.tokens - std::min(sequence.tokens, from)));
    }
  }
  std::uint64_t tokens = 0;
  for (const auto& [branch, count] : held) {
    for (const LayerBlocks& layer : branch->layers) {
      tokens += count - std::min(count, layer.gone * geometry_.block_tokens);
    }
  }
  return tokens * (geometry_.frame_bytes() / geometry_.block_tokens);
}

void Cache::Impl::truncate(SequenceId id, std::uint32_t tokens) {
  refuse_in_step("truncate");
  Sequence& member = sequence(id, "truncate");
  if (tokens > member.tokens) {
    throw LogicError("truncate: sequence " + std::to_string(id) + " has " +
                     std::to_string(member.tokens) + " tokens, fewer than the " +
                     std::to_string(tokens) + " asked for.");
  }
  scheduler_.truncate(member, tokens);
}

void Cache::Impl::resize(Bytes device_bytes, Bytes pool_bytes) {
  refuse_in_step("resize");
  const Bytes stride = capabilities_.frame_stride;
  const Bytes least = least_frames(geometry_) * stride;
  const Bytes most = Bytes{no_frame - 1} * stride;
  if (device_bytes < least || device_bytes > most || pool_bytes > most) {
    throw ConfigError(
        "resize: device_bytes is " + std::to_string(device_bytes) + " and pool_bytes " +
        std::to_string(pool_bytes) + "; the device needs at least " + std::to_string(least) +
        " bytes, one step of one sequence, and neither may exceed " + std::to_string(most) + ".");
  }
  if (pool_bytes >= stride && capabilities_.pool_frames == 0) {
    throw ConfigError(
        "resize: this cache was made without a pool (pool_bytes=0) and cannot get one: make a new "
        "cache with a pool.");
  }
  scheduler_.resize(static_cast<std::uint32_t>(device_bytes / stride),
                    static_cast<std::uint32_t>(pool_bytes / stride));
  note_peaks();
}

// ---- the facade ---------------------------------------------------------------------------------

namespace {

enum class Kind : std::uint8_t { ask, change };
constexpr Kind ask = Kind::ask;

}  // namespace

// One call's turn inside a cache. A kernel that runs inside may ask, but change nothing.
class Cache::Turn {
 public:
  Turn(const Cache& cache, Kind kind) : door_(*cache.door_), nested_(enter(door_, kind)) {
    try {
      require(cache.impl_ != nullptr, "This cache is closed: make a new one.");
      impl_ = cache.impl_.get();
      if (!nested_ && door_.abort_owed.exchange(false)) impl_->abort();
    } catch (...) {
      leave();
      throw;
    }
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  ~Turn() { leave(); }

  Impl* operator->() const { return impl_; }

 private:
  static bool enter(Door& door, Kind kind) {
    require(door.process.is_this(),
            "This cache belongs to the process that made it, and this is a forked child of that "
            "one: make a new cache here, or start the child by another way than fork.");
    std::thread::id who;
    if (door.inside.compare_exchange_strong(who, std::this_thread::get_id())) return false;
    require(who == std::this_thread::get_id(),
            "A second thread called this cache while a call of another was running: one cache "
            "serves one thread at a time, so hold a lock around it or give each thread its own "
            "cache.");
    require(kind == Kind::ask,
            "A kernel that this cache is running called it: it may ask, no more.");
    return true;
  }

  void leave() const {
    if (!nested_) door_.inside = std::thread::id();
  }

  Door& door_;
  bool nested_;
  Impl* impl_ = nullptr;
};

// What changes the cache goes through here.
template <typename Change>
auto Cache::change(const Change& what) {
  const Turn turn(*this, Kind::change);
  try {
    return what(turn);
  } catch (const CapacityError&) {
    throw;
  } catch (const std::bad_alloc&) {
    turn->verify();
    throw;
  }
}

Cache::Cache(const CacheOptions& options) : door_(std::make_unique<Door>()) {
  const Geometry geometry = resolve(options);
  std::unique_ptr<Policy> policy = make_policy(options.policy);
  const Objective objective = make_objective(options.objective, options.slack, options.max_tpot_ms);
  impl_ = std::make_unique<Impl>(geometry, std::move(policy), open_backend(options, geometry));
  impl_->scheduler_.set_objective(objective);
}

Cache::Cache(const Geometry& geometry, const std::string& policy, std::unique_ptr<Backend> backend)
    : Cache(geometry, make_policy(policy), std::move(backend)) {}

Cache::Cache(const Geometry& geometry, std::unique_ptr<Policy> policy,
             std::unique_ptr<Backend> backend)
    : door_(std::make_unique<Door>()),
      impl_(std::make_unique<Impl>(geometry, std::move(policy), std::move(backend))) {}

// What a forked child inherits is left as it is: transfers, threads and files are its parent's.
Cache::~Cache() {
  if (door_->process.is_this()) return;
  [[maybe_unused]] const Impl* left = impl_.release();
}

const Geometry& Cache::geometry() const { return Turn(*this, ask)->geometry_; }

SequenceId Cache::add() {
  return change([](const Turn& turn) {
    turn->require_whole();
    return turn->scheduler_.map().add().id;
  });
}

SequenceId Cache::fork(SequenceId id) {
  return change([&](const Turn& turn) {
    turn->refuse_in_step("fork");
    return turn->scheduler_.fork(turn->sequence(id, "fork")).id;
  });
}

void Cache::truncate(SequenceId id, std::uint32_t tokens) {
  change([&](const Turn& turn) { turn->truncate(id, tokens); });
}

void Cache::free(SequenceId id) {
  change([&](const Turn& turn) {
    turn->refuse_in_step("free");
    turn->scheduler_.free(turn->sequence(id, "free"));
  });
}

std::uint32_t Cache::length(SequenceId id) const {
  const Turn turn(*this, ask);
  return turn->sequence(id, "length").tokens;
}

void Cache::begin(std::span<const StepEntry> batch, Reader reader) {
  change([&](const Turn& turn) { turn->begin(batch, reader); });
}

void Cache::attend(std::uint32_t layer, const LayerInputs& inputs, const Rows& q,
                   const MutableRows& out, std::uint32_t query_heads, const AttendOptions& options,
                   float* lse) {
  change([&](const Turn& turn) { turn->attend(layer, inputs, q, out, query_heads, options, lse); });
}

FrameTable Cache::pages(std::uint32_t layer, const LayerInputs& inputs) {
  return change([&](const Turn& turn) { return turn->pages(layer, inputs); });
}

Arena Cache::arena() const {
  const Turn turn(*this, ask);
  const Backend& backend = *turn->backend_;
  const Capabilities& capabilities = turn->capabilities_;
  return {backend.address(0), capabilities.in_place_share > 0 ? backend.pool_address() : nullptr,
          capabilities.frame_stride, turn->device_frames(), backend.memory()};
}

void Cache::resize(Bytes device_bytes, Bytes pool_bytes) {
  change([&](const Turn& turn) { turn->resize(device_bytes, pool_bytes); });
}

Gathered Cache::gather(std::uint32_t layer, const LayerInputs& inputs) {
  return change([&](const Turn& turn) { return turn->gather(layer, inputs); });
}

void Cache::run(std::uint32_t layer, LayerKernel& kernel) {
  change([&](const Turn& turn) { turn->run(layer, kernel); });
}

void Cache::set_stream(ComputeStream stream) {
  change([&](const Turn& turn) {
    turn->refuse_in_step("set_stream");
    turn->scheduler_.set_stream(stream);
  });
}

void Cache::set_objective(const Objective& objective) {
  change([&](const Turn& turn) {
    turn->refuse_in_step("set_objective");
    turn->scheduler_.set_objective(objective);
  });
}

void Cache::set_streamed(Bytes bytes) {
  change([&](const Turn& turn) {
    turn->refuse_in_step("set_streamed");
    const Bytes frames = bytes / turn->capabilities_.frame_stride;
    turn->scheduler_.set_wanted(
        static_cast<std::uint32_t>(std::min<Bytes>(frames, turn->capabilities_.pool_frames)));
  });
}

void Cache::start_trace(std::size_t events_most) {
  if (events_most == 0 || events_most > 10'000'000) {
    throw ConfigError("A trace of " + std::to_string(events_most) +
                      " events was asked for: give from 1 to 10,000,000.");
  }
  change([&](const Turn& turn) {
    turn->refuse_in_step("start_trace");
    turn->scheduler_.start_trace(events_most);
  });
}

Trace Cache::take_trace() {
  return change([](const Turn& turn) {
    turn->refuse_in_step("take_trace");
    Trace trace = turn->scheduler_.take_trace();
    trace.frame_bytes = turn->capabilities_.frame_stride;
    return trace;
  });
}

Headroom Cache::headroom() const {
  const Turn turn(*this, ask);
  turn->refuse_in_step("headroom");
  return turn->scheduler_.headroom();
}

void Cache::finish() {
  change([](const Turn& turn) { turn->finish(); });
}

void Cache::abort() noexcept {
  door_->abort_owed = true;
  try {
    static_cast<void>(Turn(*this, Kind::change));
  } catch (const LogicError&) {
    return;  // closed, a child's, or somebody is inside: then the next call pays
  }
}

StepTables Cache::tables() const { return Turn(*this, ask)->tables(); }

// A kernel asks for it from inside.
const TableEdits& Cache::take_table_edits() {
  return Turn(*this, ask)->scheduler_.map().tables().take_edits();
}

OpenStep Cache::open_step() const { return Turn(*this, ask)->open_step(); }

Stats Cache::stats() const { return Turn(*this, ask)->stats(); }

void Cache::check() const { Turn(*this, ask)->scheduler_.check(); }

void Cache::close() {
  if (impl_ == nullptr) return;
  const Turn turn(*this, Kind::change);
  turn->abort();
  impl_.reset();
}

}  // namespace pie
