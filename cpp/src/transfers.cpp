// Submission, completion and retry of copies between the tiers.
#include "transfers.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "pie/error.hpp"

namespace pie {

namespace {

// Copies may be under way at once: the time of each counts from when the one before it ended.
void count(const Completion& completion, std::uint32_t frames, Traffic& traffic) {
  if (completion.status != Status::ok) return;
  const Nanos from = std::max(completion.began, traffic.ended_ns);
  const Nanos took = std::max<Nanos>(0, completion.ended - from);
  const bool known = traffic.exact || completion.began >= traffic.ended_ns;
  traffic.frames += frames;
  traffic.busy_ns += took;
  if (known && completion.exact) {
    traffic.timed_frames += frames;
    traffic.timed_ns += took;
  }
  if (completion.ended < traffic.ended_ns) return;
  traffic.ended_ns = completion.ended;
  traffic.exact = completion.exact;
}

constexpr Nanos wait_ns_max = 1'000'000'000;
constexpr std::size_t halts_max = 1024;
constexpr Bytes held_bytes_most = Bytes{16} << 20;  // of writes that may end together

std::uint64_t key_of(Ticket ticket) {
  return ticket.id * lane_count + static_cast<std::uint64_t>(ticket.lane);
}

void add_copies(const std::vector<Block>& blocks, std::uint32_t first, std::uint32_t count,
                Lane lane, std::vector<Copy>& copies) {
  for (std::uint32_t i = first; i < first + count; ++i) {
    Place from{Tier::pool, blocks[i].pool};
    Place to{Tier::device, blocks[i].device};
    if (lane == Lane::device_to_pool) std::swap(from, to);
    add_copy({from, to, 1}, copies);
  }
}

}  // namespace

void add_copy(const Copy& copy, std::vector<Copy>& copies) {
  if (!copies.empty()) {
    Copy& last = copies.back();
    if (last.from.first + last.count == copy.from.first &&
        last.to.first + last.count == copy.to.first) {
      last.count += copy.count;
      return;
    }
  }
  copies.push_back(copy);
}

Transfers::Transfers(Backend& backend, BlockMap& map)
    : backend_(backend),
      map_(map),
      streams_(backend.capabilities().streams),
      held_frames_most_(held_bytes_most / std::max<Bytes>(1, backend.capabilities().frame_stride)),
      guards_(map.device().capacity()) {
  halts_.reserve(halts_max);
}

// ---- guards -------------------------------------------------------------------------------------

void Transfers::add_pool_guards(FrameIndex pool, std::vector<Dep>& after) const {
  const auto [first, last] = pool_guards_.equal_range(pool);
  for (auto guard = first; guard != last; ++guard) add(guard->second, after);
}

void Transfers::guard_pool(FrameIndex pool, Ticket ticket) {
  const auto [first, last] = pool_guards_.equal_range(pool);
  const auto same = [&](const auto& guard) { return guard.second == ticket; };
  if (std::find_if(first, last, same) == last) pool_guards_.emplace(pool, ticket);
}

// Those of copies that have ended, now and then.
void Transfers::prune_guards() {
  constexpr std::size_t guards_max = 4096;
  if (!any()) return pool_guards_.clear();
  if (pool_guards_.size() < guards_max) return;
  std::erase_if(pool_guards_, [&](const auto& guard) { return !under_way(guard.second); });
}

bool Transfers::under_way(Ticket ticket) const {
  if (ticket.id == 0) return false;
  return in_flight_.contains(key_of(ticket)) ||
         std::ranges::find(fetching_, ticket, &Fetch::ticket) != fetching_.end();
}

void Transfers::add(Ticket ticket, std::vector<Dep>& deps) const {
  if (!under_way(ticket)) return;
  const auto same = [&](const Dep& dep) { return dep.ticket == ticket; };
  if (std::ranges::none_of(deps, same)) deps.push_back({{}, ticket});
}

void Transfers::add_guards(FrameIndex device, std::vector<Dep>& after) const {
  add(guards_[device].arrival, after);
  add(guards_[device].departure, after);
}

// What must have passed before a copy: the copies before it that use any of the frames.
void Transfers::add_deps(const Transfer& transfer, std::vector<Dep>& deps) const {
  const std::vector<Block>& blocks = transfer.branch->layers[transfer.layer].blocks;
  for (std::uint32_t i = 0; i < transfer.count; ++i) {
    const Block& block = blocks[transfer.first_block + i];
    if (streams_) add_guards(block.device, deps);
    add_pool_guards(block.pool, deps);
  }
}

void Transfers::note_guards(const Transfer& transfer, Ticket ticket) {
  const std::vector<Block>& blocks = transfer.branch->layers[transfer.layer].blocks;
  for (std::uint32_t i = 0; i < transfer.count; ++i) {
    const Block& block = blocks[transfer.first_block + i];
    Guard& guard = guards_[block.device];
    if (transfer.lane == Lane::pool_to_device) {
      guard = {ticket, {}};
    } else {
      guard.departure = ticket;
    }
  }
}

// Has the stream wait for a copy that is under way, once.
void Transfers::order(Ticket& ticket) {
  const auto found = in_flight_.find(key_of(ticket));
  const bool first =
      found != in_flight_.end() ? !std::exchange(found->second.ordered, true) : under_way(ticket);
  if (first) depend(ticket);
  ticket = {};
}

// Behind a fence, so that what it takes is known: from when that passes until the ticket ends. But
// not where nobody has looked for long which have.
void Transfers::depend(Ticket ticket) {
  if (halts_.size() < halts_max) {
    halts_.push_back({backend_.record(stream_, Timing::wanted), ticket});
  }
  backend_.depend(stream_, {{}, ticket});
}

Fence Transfers::mark() {
  marks_.reserve(marks_.size() + 1);
  marks_.push_back({backend_.record(stream_, Timing::wanted), {}});
  return marks_.back().fence;
}

std::optional<Nanos> Transfers::take_mark(Fence fence) {
  const auto found = std::ranges::find(marks_, fence, &Mark::fence);
  if (found == marks_.end() || !found->passed_ns) return {};
  const std::optional<Nanos> passed = found->passed_ns;
  marks_.erase(found);
  return passed;
}

void Transfers::drop_mark(Fence fence) {
  std::erase_if(marks_, [&](const Mark& mark) { return mark.fence == fence; });
}

// A fence has passed, or a ticket ended, that a halt may have been told by.
void Transfers::pass(const Completion& completion) {
  const bool fence = completion.ticket.id == 0;
  const auto mark = std::ranges::find(marks_, completion.fence, &Mark::fence);
  if (fence && mark != marks_.end()) mark->passed_ns = completion.ended;
  std::erase_if(halts_, [&](Halt& halt) {
    if (fence ? halt.before != completion.fence : halt.ticket != completion.ticket) return false;
    (fence ? halt.began_ns : halt.ended_ns) = completion.ended;
    if (!halt.began_ns || !halt.ended_ns) return false;
    const Nanos stall_ns = std::max<Nanos>(0, *halt.ended_ns - *halt.began_ns);
    stall_ns_ += stall_ns;
    if (log_.on() && stall_ns > 0) {
      log_.add({EventKind::stall, log_.step(), 0, *halt.began_ns, *halt.ended_ns});
    }
    return true;
  });
}

void Transfers::before_read(FrameIndex device) {
  if (guards_[device].arrival.id != 0) order(guards_[device].arrival);
}

void Transfers::before_write(FrameIndex device) {
  before_read(device);
  if (guards_[device].departure.id != 0) order(guards_[device].departure);
}

// Copies out of these frames may go on. Where nothing is being written there is none to wait for.
void Transfers::before_read_pool(FrameRun pool) {
  for (FrameIndex frame = pool.first; !in_flight_.empty() && frame < pool.end(); ++frame) {
    const auto [first, last] = pool_guards_.equal_range(frame);
    for (auto guard = first; guard != last; ++guard) {
      Ticket ticket = guard->second;
      if (ticket.lane == Lane::device_to_pool) order(ticket);
    }
  }
}

// ---- copies -------------------------------------------------------------------------------------

// One ticket, after whoever reads its targets or fills its sources. Several transfers only on a
// stream, where nobody asks what a ticket moved once it is submitted.
void Transfers::submit(std::span<const Transfer> group) {
  std::vector<Copy> copies;
  std::vector<Dep> deps;
  decltype(pool_guards_) guards;
  for (const Transfer& transfer : group) {
    const std::vector<Block>& blocks = transfer.branch->layers[transfer.layer].blocks;
    add_copies(blocks, transfer.first_block, transfer.count, transfer.lane, copies);
    add_deps(transfer, deps);
    for (std::uint32_t i = 0; streams_ && i < transfer.count; ++i) {
      guards.emplace(blocks[transfer.first_block + i].pool, Ticket{});
    }
  }
  deps.push_back({fence(), {}});
  // Made first: what was submitted must not be forgotten.
  const Transfer& first = group.front();
  decltype(in_flight_) one;
  auto node = one.extract(one.emplace(0, first).first);
  node.mapped().frames = 0;
  for (const Transfer& transfer : group) node.mapped().frames += transfer.count;
  in_flight_.reserve(in_flight_.size() + 1);
  pool_guards_.reserve(pool_guards_.size() + guards.size());
  const Ticket ticket = backend_.submit(copies, deps);
  node.key() = key_of(ticket);
  in_flight_.insert(std::move(node));
  loads_in_flight_ += first.lane == Lane::pool_to_device ? 1 : 0;
  if (!streams_) return;
  for (auto& [pool, guard] : guards) guard = ticket;
  pool_guards_.merge(guards);
  for (const Transfer& transfer : group) note_guards(transfer, ticket);
}

// Where nothing is being written, no copy in the pool is one to wait for.
Ticket Transfers::fetch(std::span<const Copy> copies, std::vector<Dep>& after,
                        std::uint32_t layer) {
  for (std::size_t i = 0; streams_ && !in_flight_.empty() && i < copies.size(); ++i) {
    for (std::uint32_t j = 0; j < copies[i].count; ++j) {
      add_pool_guards(copies[i].from.first + j, after);
    }
  }
  std::uint32_t frames = 0;
  for (const Copy& copy : copies) frames += copy.count;
  fetching_.reserve(fetching_.size() + 1);
  const Ticket ticket = backend_.submit(copies, after);
  fetching_.push_back({ticket, frames, layer});
  if (streams_) loaded_frames_ += frames;
  return ticket;
}

void Transfers::load(Branch& branch, std::uint32_t layer, std::uint32_t first_block,
                     FrameRun device) {
  for (std::uint32_t i = 0; i < device.count; ++i) {
    map_.begin_load({&branch, layer, first_block + i}, device.first + i);
  }
  start({{Lane::pool_to_device, &branch, layer, first_block, device.count}});
}

void Transfers::write(Branch& branch, std::uint32_t layer, std::uint32_t first_block,
                      const std::vector<FrameIndex>& pool_frames, bool optional) {
  const auto count = static_cast<std::uint32_t>(pool_frames.size());
  std::vector<PoolRun>& runs = branch.layers[layer].runs;
  try {
    runs.reserve(runs.size() + count);
  } catch (...) {
    for (const FrameIndex frame : pool_frames) map_.pool().release(frame);
    throw;
  }
  for (std::uint32_t i = 0; i < count; ++i) {
    map_.begin_write({&branch, layer, first_block + i}, pool_frames[i]);
  }
  ++started_writes_;
  const Transfer transfer{{Lane::device_to_pool, &branch, layer, first_block, count}, optional};
  if (!holding_) return start(transfer);
  try {
    held_.push_back(transfer);
  } catch (...) {
    put_back(transfer);
    throw;
  }
  held_frames_ += count;
  if (held_frames_ >= held_frames_most_) submit_held();
}

void Transfers::submit_writes() {
  holding_ = false;
  submit_held();
}

void Transfers::submit_held() {
  if (held_.empty()) return;
  try {
    landing_.reserve(landing_.size() + held_.size());
    submit(held_);
  } catch (...) {
    drop_writes();
    throw;
  }
  for (const Transfer& transfer : held_) commit(transfer);
  held_.clear();
  held_frames_ = 0;
}

void Transfers::drop_writes() {
  holding_ = false;
  for (const Transfer& transfer : held_) put_back(transfer);
  held_.clear();
  held_frames_ = 0;
}

// Where the backend throws, the blocks are as they were.
void Transfers::start(const Transfer& transfer) {
  try {
    landing_.reserve(landing_.size() + 1);
    submit({&transfer, 1});
  } catch (...) {
    put_back(transfer);
    throw;
  }
  if (streams_) {
    commit(transfer);
  } else {
    ++transfer.branch->in_flight;
  }
}

void Transfers::commit(const Transfer& transfer) {
  const bool load = transfer.lane == Lane::pool_to_device;
  for (std::uint32_t i = 0; i < transfer.count; ++i) {
    const BlockKey key{transfer.branch, transfer.layer, transfer.first_block + i};
    load ? map_.commit_load(key) : map_.commit_write(key);
  }
  (load ? loaded_frames_ : written_frames_) += transfer.count;
  landing_.push_back(transfer);  // for which there is room
}

void Transfers::put_back(const Transfer& transfer) {
  const bool load = transfer.lane == Lane::pool_to_device;
  for (std::uint32_t i = 0; i < transfer.count; ++i) {
    const BlockKey key{transfer.branch, transfer.layer, transfer.first_block + i};
    load ? map_.fail_load(key) : map_.fail_write(key);
  }
  LayerBlocks& layer = transfer.branch->layers[transfer.layer];
  if (!load) layer.written = std::min(layer.written, transfer.first_block);
}

void Transfers::give_up(const Transfer& transfer, const Completion& completion) {
  ++given_up_;
  put_back(transfer);
  if (transfer.optional) {
    ++failed_writes_;
  } else {
    fail(*transfer.branch, transfer, completion);
  }
}

void Transfers::fail(Branch& branch, const Landed& copy, const Completion& completion) {
  const bool load = copy.lane == Lane::pool_to_device;
  if (!branch.error.empty()) return;
  ++troubled_;
  const std::uint32_t block = branch.first + copy.first_block;
  branch.error = std::string(load ? "Reading" : "Writing") + " its KV (layer " +
                 std::to_string(copy.layer) + ", " + std::to_string(copy.count) +
                 " blocks from block " + std::to_string(block) + ") " + (load ? "from" : "to") +
                 " the pool failed " + std::to_string(tries_max) + " times: " +
                 (completion.status == Status::corrupt ? "the data read are not the data written"
                                                       : std::strerror(completion.error)) +
                 ". Its committed KV is unchanged; try the step again, or free the sequence.";
}

std::string Transfers::take_error(Branch& branch) {
  if (!branch.error.empty()) --troubled_;
  return std::exchange(branch.error, std::string());
}

void Transfers::record(const Completion& completion, std::uint32_t frames, std::uint32_t layer) {
  if (!log_.on() || completion.status != Status::ok) return;
  const bool load = completion.ticket.lane == Lane::pool_to_device;
  log_.add({load ? EventKind::load : EventKind::write, log_.step(), layer, completion.began,
            completion.ended, frames});
}

void Transfers::end(const Completion& completion) {
  if (!halts_.empty() || !marks_.empty()) pass(completion);
  if (completion.ticket.id == 0) return;
  if (streams_ && completion.status != Status::ok && lost_.empty()) {
    const bool load = completion.ticket.lane == Lane::pool_to_device;
    lost_ = std::string("a copy ") + (load ? "from" : "to") +
            " the pool failed behind the stream: " + std::strerror(completion.error);
  }
  const auto fetch = std::ranges::find(fetching_, completion.ticket, &Fetch::ticket);
  if (fetch != fetching_.end()) {
    count(completion, fetch->frames, loads_);
    record(completion, fetch->frames, fetch->layer);
    if (!streams_ && completion.status == Status::ok) loaded_frames_ += fetch->frames;
    fetching_.erase(fetch);
    fetched_.push_back(completion);
    return;
  }
  const auto it = in_flight_.find(key_of(completion.ticket));
  require(it != in_flight_.end(), "Transfers::land: a ticket ended that was never submitted.");
  Transfer transfer = it->second;
  in_flight_.erase(it);
  const bool load = transfer.lane == Lane::pool_to_device;
  loads_in_flight_ -= load ? 1 : 0;
  count(completion, transfer.frames, load ? loads_ : writes_);
  record(completion, transfer.frames, transfer.layer);
  if (streams_) return;
  --transfer.branch->in_flight;
  if (completion.status != Status::ok && transfer.tries < tries_max) {
    ++transfer.tries;
    ++retries_;
    start(transfer);
    return;
  }
  if (completion.status == Status::ok) {
    commit(transfer);
  } else {
    give_up(transfer, completion);
  }
}

const std::vector<Landed>& Transfers::land() {
  const bool expected = any() || !halts_.empty() || !marks_.empty();
  for (std::size_t count = ended_.size(); count == ended_.size() && expected;) {
    landing_.reserve(landing_.size() + ended_.size());
    fetched_.reserve(fetched_.size() + ended_.size());
    count = backend_.poll(ended_);
    for (std::size_t i = 0; i < count; ++i) end(ended_[i]);
  }
  if (!pool_guards_.empty()) prune_guards();
  landed_.clear();
  landed_.swap(landing_);
  return landed_;
}

void Transfers::wait() { backend_.wait(wait_ns_max); }

void Transfers::check() const {
  if (streams_) {
    require(map_.count(BlockState::writing) + map_.count(BlockState::loading) == 0,
            "check: a block waits for a copy, and on a stream nothing does.");
    return;
  }
  std::vector<bool> device(map_.device().capacity());
  std::vector<bool> pool(map_.pool().capacity());
  std::uint32_t claimed = 0;
  for (const auto& [ticket, transfer] : in_flight_) {
    for (std::uint32_t i = 0; i < transfer.count; ++i) {
      const Block& block =
          BlockMap::at({transfer.branch, transfer.layer, transfer.first_block + i});
      require(block.in_flight(), "check: a ticket in flight moves a block that is at rest.");
      require(!device[block.device] && !pool[block.pool],
              "check: a frame is used by two copies at once.");
      device[block.device] = true;
      pool[block.pool] = true;
      ++claimed;
    }
  }
  require(claimed == map_.count(BlockState::writing) + map_.count(BlockState::loading),
          "check: a block waits for a copy that nobody makes.");
}

}  // namespace pie
