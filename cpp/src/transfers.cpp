// Submission, completion and retry of copies between the tiers.
#include "transfers.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <utility>

#include "pie/error.hpp"

namespace pie {

namespace {

constexpr std::uint32_t tries_max = 3;
constexpr Nanos wait_ns_max = 1'000'000'000;

std::uint64_t key_of(Ticket ticket) {
  return ticket.id * lane_count + static_cast<std::uint64_t>(ticket.lane);
}

// Merges blocks whose frames are adjacent in both tiers into one copy.
std::vector<Copy> copies_of(const std::vector<Block>& blocks, std::uint32_t first,
                            std::uint32_t count, Lane lane) {
  std::vector<Copy> copies;
  for (std::uint32_t i = first; i < first + count; ++i) {
    Place from{Tier::pool, blocks[i].pool};
    Place to{Tier::device, blocks[i].device};
    if (lane == Lane::device_to_pool) std::swap(from, to);
    if (!copies.empty()) {
      Copy& last = copies.back();
      if (last.from.first + last.count == from.first && last.to.first + last.count == to.first) {
        ++last.count;
        continue;
      }
    }
    copies.push_back({from, to, 1});
  }
  return copies;
}

}  // namespace

Transfers::Transfers(Backend& backend, BlockMap& map)
    : backend_(backend),
      map_(map),
      streams_(backend.capabilities().streams),
      guards_(map.device().capacity()) {}

// ---- guards -------------------------------------------------------------------------------------

Ticket& Transfers::pool_guard(FrameIndex pool) {
  if (pool >= pool_guards_.size()) pool_guards_.resize(pool + std::size_t{1});
  return pool_guards_[pool];
}

// What must have passed before a copy: of a load, whoever reads its targets; of a write, whatever
// fills its sources; on a stream, the copies before it that use any of the frames.
std::vector<Dep> Transfers::deps_of(const Transfer& transfer) {
  const std::vector<Block>& blocks = transfer.branch->layers[transfer.layer].blocks;
  const bool load = transfer.lane == Lane::pool_to_device;
  Fence fence;
  std::vector<Dep> deps;
  const auto add = [&](Ticket ticket) {
    const auto same = [&](const Dep& dep) { return dep.ticket == ticket; };
    if (ticket.id != 0 && in_flight_.contains(key_of(ticket)) && std::ranges::none_of(deps, same)) {
      deps.push_back({{}, ticket});
    }
  };
  for (std::uint32_t i = 0; i < transfer.count; ++i) {
    const Block& block = blocks[transfer.first_block + i];
    const Guard& guard = guards_[block.device];
    fence.id = std::max(fence.id, guard.readers.id);
    if (!streams_) continue;
    add(guard.arrival);
    add(guard.departure);
    add(pool_guard(block.pool));
  }
  if (!load) fence = backend_.record(stream_, Timing::unwanted);
  deps.push_back({fence, {}});
  return deps;
}

void Transfers::note_guards(const Transfer& transfer, Ticket ticket) {
  const std::vector<Block>& blocks = transfer.branch->layers[transfer.layer].blocks;
  for (std::uint32_t i = 0; i < transfer.count; ++i) {
    const Block& block = blocks[transfer.first_block + i];
    Guard& guard = guards_[block.device];
    if (transfer.lane == Lane::pool_to_device) {
      guard = {{}, ticket, {}};
    } else {
      guard.departure = ticket;
    }
    pool_guard(block.pool) = ticket;
  }
}

// Has the stream wait for a copy that is under way, once.
void Transfers::order(Ticket& ticket) {
  const auto found = in_flight_.find(key_of(ticket));
  if (found != in_flight_.end() && !std::exchange(found->second.ordered, true)) {
    backend_.depend(stream_, {{}, ticket});
  }
  ticket = {};
}

void Transfers::before_read(FrameIndex device) {
  if (guards_[device].arrival.id != 0) order(guards_[device].arrival);
}

void Transfers::before_write(FrameIndex device) {
  before_read(device);
  if (guards_[device].departure.id != 0) order(guards_[device].departure);
}

// ---- copies -------------------------------------------------------------------------------------

void Transfers::submit(const Transfer& transfer) {
  const std::vector<Block>& blocks = transfer.branch->layers[transfer.layer].blocks;
  const std::vector<Copy> copies =
      copies_of(blocks, transfer.first_block, transfer.count, transfer.lane);
  const Ticket ticket = backend_.submit(copies, deps_of(transfer));
  in_flight_.emplace(key_of(ticket), transfer);
  if (streams_) note_guards(transfer, ticket);
}

void Transfers::load(Branch& branch, std::uint32_t layer, std::uint32_t first_block,
                     FrameRun device, bool ring) {
  for (std::uint32_t i = 0; i < device.count; ++i) {
    map_.begin_load({&branch, layer, first_block + i}, device.first + i, ring);
  }
  start({{Lane::pool_to_device, &branch, layer, first_block, device.count}});
}

void Transfers::write(Branch& branch, std::uint32_t layer, std::uint32_t first_block,
                      const std::vector<FrameIndex>& pool_frames, bool optional) {
  const auto count = static_cast<std::uint32_t>(pool_frames.size());
  for (std::uint32_t i = 0; i < count; ++i) {
    map_.begin_write({&branch, layer, first_block + i}, pool_frames[i]);
  }
  ++started_writes_;
  start({{Lane::device_to_pool, &branch, layer, first_block, count}, optional});
}

// Where the backend throws, the blocks are as they were.
void Transfers::start(const Transfer& transfer) {
  try {
    submit(transfer);
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
  landing_.push_back(transfer);
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
    return;
  }
  const bool load = transfer.lane == Lane::pool_to_device;
  std::string& error = transfer.branch->error;
  if (!error.empty()) return;
  ++troubled_;
  const std::uint32_t block = transfer.branch->first + transfer.first_block;
  error = std::string(load ? "Reading" : "Writing") + " its KV (layer " +
          std::to_string(transfer.layer) + ", " + std::to_string(transfer.count) +
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

void Transfers::end(const Completion& completion) {
  const auto it = in_flight_.find(key_of(completion.ticket));
  require(it != in_flight_.end(), "Transfers::land: a ticket ended that was never submitted.");
  Transfer transfer = it->second;
  in_flight_.erase(it);
  if (streams_) {
    if (completion.status != Status::ok && lost_.empty()) {
      lost_ = std::string("a copy ") + (transfer.lane == Lane::pool_to_device ? "from" : "to") +
              " the pool failed behind the stream: " + std::strerror(completion.error);
    }
    return;
  }
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
  std::array<Completion, 64> ended;
  for (std::size_t count = ended.size(); count == ended.size() && any();) {
    count = backend_.poll(ended);
    for (std::size_t i = 0; i < count; ++i) end(ended[i]);
  }
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
