// The simulated backend: what happens next is the earliest of a list of events, chance is a seed.
//
// A ticket is held until what it waits for has passed; then its copies queue for their lane. Each
// copy starts when one of the lane's `copies_at_once` is free, arrives at the link when its latency
// is over, and ends when the link has moved its bytes. Streams are queues of work, of tickets to
// wait for and of fences. After every event everything that it has set free goes on, so between two
// events nothing is left that could.
#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <queue>
#include <random>
#include <utility>
#include <vector>

#include "ledger.hpp"
#include "pie/backends.hpp"
#include "pie/error.hpp"
#include "sim_frames.hpp"

namespace pie {

namespace {

// What becomes of a ticket.
struct Fate {
  std::uint32_t left = 0;  // copies that have not ended
  bool begun = false;
  bool silent = false;
};
using Tickets = Ledger<Fate>;

// A copy that is under way, or queues for its lane.
struct Flight {
  Ticket ticket;
  Copy copy;
  bool moved = false;  // its bytes have been taken and put already
};

struct LaneState {
  SimLink link;
  std::deque<Flight> queue;
  std::uint32_t flying = 0;   // copies that have started and not ended
  Nanos busy_until = 0;       // of the link
  Bytes flattering_left = 0;  // bytes that will go faster than the link's rate
  SimCounts counts;
};

// What a stream has been given and has not done: a piece of work, something to wait for, or a fence
// to let pass.
struct Task {
  enum class Kind : std::uint8_t { work, wait, fence };
  Kind kind = Kind::work;
  Nanos duration_ns = 0;
  std::function<void()> body;
  Dep dep;  // to wait for, or the fence
};

struct StreamState {
  std::deque<Task> tasks;
  bool working = false;  // on the first
};

struct Event {
  enum class Kind : std::uint8_t { arrival, end, work, growth };
  Nanos at = 0;
  std::uint64_t order = 0;  // of two at once, the one that was set first comes first
  Kind kind = Kind::end;
  std::uintptr_t stream = 0;
  Flight flight;

  bool operator>(const Event& other) const {
    return at != other.at ? at > other.at : order > other.order;
  }
};

class Sim final : public SimBackend {
 public:
  explicit Sim(const SimOptions& options);

  [[nodiscard]] Capabilities capabilities() const override;
  [[nodiscard]] Nanos now() const override { return now_; }

  std::uint32_t resize_device(std::uint32_t frames) override;
  PoolSize resize_pool(std::uint32_t frames) override;
  [[nodiscard]] std::string pool_refusal() const override { return refusal_; }

  Ticket submit(std::span<const Copy> copies, std::span<const Dep> after) override;
  std::size_t poll(std::span<Completion> out) override { return tickets_.poll(out); }
  void wait(Nanos timeout_ns) override;

  Fence record(ComputeStream stream, Timing timing) override;
  void depend(ComputeStream stream, const Dep& dep) override;
  void compute(ComputeStream stream, Work work) override { launch(stream, work, nullptr); }
  void launch(ComputeStream stream, Work work, std::function<void()> body) override;
  void duplicate(ComputeStream stream, std::span<const Duplicate> frames) override;
  void synchronize(ComputeStream stream) override;

  [[nodiscard]] std::byte* address(FrameIndex device_frame) const override {
    require(device_frame < device_usable_, "address: no such device frame");
    return frames_.device(device_frame);
  }

  [[nodiscard]] Health health() const override {
    return lost_ ? Health{false, "the simulated device was lost"} : Health{};
  }

  void set_faults(const SimFaults& faults) override { faults_ = faults; }
  void lose() override { lost_ = true; }
  [[nodiscard]] SimCounts counts(Lane lane) const override { return state(lane).counts; }

 private:
  LaneState& state(Lane lane) { return lanes_[static_cast<std::size_t>(lane)]; }
  [[nodiscard]] const LaneState& state(Lane lane) const {
    return lanes_[static_cast<std::size_t>(lane)];
  }
  double draw();  // [0, 1)
  bool chance(double probability) { return probability > 0 && draw() < probability; }
  void schedule(Event event);

  [[nodiscard]] bool refuses_growth();
  void draw_fate(Tickets::Entry& entry);

  void begin(Tickets::Entry& entry);
  void start_copies(Lane lane);
  void arrive(Flight flight);
  void land(const Flight& flight);
  void end(Tickets::Entry& entry);
  bool run(std::uintptr_t handle, StreamState& stream);
  void settle();
  void happen();
  void advance(Nanos until);

  const SimOptions options_;
  SimFaults faults_;
  std::mt19937_64 random_;
  SimFrames frames_;
  std::uint32_t device_usable_;
  std::uint32_t pool_usable_ = 0;
  std::uint32_t pool_coming_ = 0;  // frames that the pool will have once its growth is over
  bool pool_grew_ = false;         // since somebody asked
  std::string refusal_;
  Tickets tickets_;
  std::array<LaneState, lane_count> lanes_;
  std::vector<Tickets::Entry*> held_;  // in order of submission
  std::size_t held_seen_ = 0;          // of those, how many were looked at last
  std::uint64_t passed_seen_ = 0;      // and how much had passed by then
  std::map<std::uintptr_t, StreamState> streams_;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
  std::uint64_t events_set_ = 0;
  std::uint64_t growths_ = 0;
  std::uint64_t submitted_ = 0;
  Nanos now_ = 0;
  bool lost_ = false;
};

std::uint32_t most(std::uint32_t frames, std::uint32_t frames_max) {
  return frames_max == 0 ? frames : frames_max;
}

Sim::Sim(const SimOptions& options)
    : options_(options),
      faults_(options.faults),
      random_(options.seed),
      frames_(
          std::max(options.device_frames, most(options.device_frames, options.device_frames_max)),
          most(options.pool_frames, options.pool_frames_max), options.frame_bytes,
          options.carry_bytes),
      device_usable_(options.device_frames) {
  state(Lane::pool_to_device).link = options.load;
  state(Lane::device_to_pool).link = options.write;
  for (LaneState& lane : lanes_) {
    if (chance(faults_.lying)) lane.flattering_left = faults_.lying_bytes;
  }
}

Capabilities Sim::capabilities() const {
  const double eight_overheads =
      8e-9 * static_cast<double>(options_.load.overhead_ns) * options_.load.bytes_per_s;
  Capabilities result;
  result.device_frames = options_.device_frames;
  result.device_frames_max = most(options_.device_frames, options_.device_frames_max);
  result.pool_frames = options_.pool_frames;
  result.frame_stride = options_.frame_bytes;
  result.copy_bytes_best =
      options_.copy_bytes_best > 0
          ? options_.copy_bytes_best
          : std::max(options_.frame_bytes, static_cast<Bytes>(eight_overheads));
  result.streams = options_.streams;
  result.pool_io = "sim";
  return result;
}

// ---- chance -------------------------------------------------------------------------------------

double Sim::draw() { return static_cast<double>(random_() >> 11U) * 0x1p-53; }

// What will become of a ticket is known when it is submitted.
void Sim::draw_fate(Tickets::Entry& entry) {
  ++submitted_;
  Completion& completion = entry.completion;
  const bool named = faults_.failed_ticket > 0 && submitted_ >= faults_.failed_ticket &&
                     submitted_ < faults_.failed_ticket + faults_.failed_tickets;
  if (lost_ || named || chance(faults_.failed)) {
    completion.status = Status::failed;
  } else if (completion.ticket.lane == Lane::pool_to_device && chance(faults_.corrupt)) {
    completion.status = Status::corrupt;
  }
  if (completion.status != Status::ok) completion.error = EIO;
  entry.work.silent = chance(faults_.silent);
  entry.work.left = static_cast<std::uint32_t>(entry.copies.size());
}

bool Sim::refuses_growth() {
  return ++growths_ == faults_.refused_growth || chance(faults_.refused);
}

// ---- both tiers ---------------------------------------------------------------------------------

std::uint32_t Sim::resize_device(std::uint32_t frames) {
  if (frames > device_usable_ && refuses_growth()) return device_usable_;
  const std::uint32_t usable =
      std::min(frames, most(options_.device_frames, options_.device_frames_max));
  if (usable < device_usable_) {
    // As where memory is unmapped: not before what was given to the streams is done with it.
    for (auto& [handle, stream] : streams_) synchronize({handle});
    require(!tickets_.reaches(Tier::device, usable),
            "resize_device: a copy uses a frame that would go.");
    frames_.spoil(Tier::device, usable, device_usable_ - usable);
  }
  device_usable_ = usable;
  return usable;
}

PoolSize Sim::resize_pool(std::uint32_t frames) {
  refusal_.clear();
  pool_grew_ = false;
  const std::uint32_t limit = most(options_.pool_frames, options_.pool_frames_max);
  if (pool_coming_ > pool_usable_ && frames > pool_usable_) return {pool_usable_, true};
  if (frames > pool_usable_ && refuses_growth()) {
    refusal_ = "the simulated pool gives no more this time";
    return {pool_usable_, false};
  }
  const std::uint32_t usable = std::min(frames, limit);
  if (usable < frames) {
    refusal_ = "the simulated pool has " + std::to_string(limit) + " frames in all";
  }
  pool_coming_ = usable;
  if (usable > pool_usable_ && options_.pool_growth_ns > 0) {
    schedule({now_ + options_.pool_growth_ns, 0, Event::Kind::growth, 0, {}});
    return {pool_usable_, true};
  }
  if (usable < pool_usable_) {
    require(!tickets_.reaches(Tier::pool, usable),
            "resize_pool: a copy uses a frame that would go.");
    frames_.spoil(Tier::pool, usable, pool_usable_ - usable);
  }
  pool_usable_ = usable;
  return {usable, false};
}

// ---- tickets ------------------------------------------------------------------------------------

Ticket Sim::submit(std::span<const Copy> copies, std::span<const Dep> after) {
  require_in_range(copies, device_usable_, pool_usable_);
  const Ticket ticket = tickets_.open(copies, after);
  Tickets::Entry& entry = tickets_.at(ticket);
  draw_fate(entry);
  ++state(ticket.lane).counts.tickets;
  held_.push_back(&entry);
  settle();
  return ticket;
}

void Sim::wait(Nanos timeout_ns) {
  const Nanos forever = std::numeric_limits<Nanos>::max();
  const Nanos until = timeout_ns > forever - now_ ? forever : now_ + std::max<Nanos>(0, timeout_ns);
  const auto is_under_way = [&] { return !tickets_.is_idle() || pool_coming_ > pool_usable_; };
  while (!tickets_.has_completions() && !pool_grew_ && is_under_way()) {
    require(!events_.empty(), "wait: what is in flight can never end.");
    if (events_.top().at > until) {
      now_ = until;
      return;
    }
    happen();
  }
}

// Its copies queue for their lane, before those of tickets that were submitted later; a ticket
// without any has ended.
void Sim::begin(Tickets::Entry& entry) {
  const Ticket ticket = entry.completion.ticket;
  entry.completion.began = now_;
  for (const Copy& copy : entry.copies) frames_.claim(copy);
  if (entry.copies.empty()) {
    end(entry);
    return;
  }
  std::deque<Flight>& queue = state(ticket.lane).queue;
  const auto later = [&](const Flight& flight) { return flight.ticket.id > ticket.id; };
  auto place = std::ranges::find_if(queue, later);
  for (const Copy& copy : entry.copies) place = queue.insert(place, {ticket, copy, false}) + 1;
  start_copies(ticket.lane);
}

void Sim::start_copies(Lane lane) {
  LaneState& from = state(lane);
  while (from.flying < from.link.copies_at_once && !from.queue.empty()) {
    Flight flight = from.queue.front();
    from.queue.pop_front();
    ++from.flying;
    Tickets::Entry& entry = tickets_.at(flight.ticket);
    if (!std::exchange(entry.work.begun, true)) entry.completion.began = now_;
    if (options_.carry_bytes && draw() < 0.5) {
      frames_.move(flight.copy);
      flight.moved = true;
    } else {
      frames_.spoil(flight.copy.to.tier, flight.copy.to.first, flight.copy.count);
    }
    const double jitter = from.link.jitter_ns > 0 ? draw() : 0;
    const double slow = chance(faults_.slow) ? faults_.slow_factor : 1;
    const double latency = static_cast<double>(from.link.latency_ns) +
                           jitter * static_cast<double>(from.link.jitter_ns);
    schedule({now_ + std::llround(latency * slow), 0, Event::Kind::arrival, 0, flight});
  }
}

// The copy has the link for itself as soon as those that arrived before it are through.
void Sim::arrive(Flight flight) {
  LaneState& lane = state(flight.ticket.lane);
  const Bytes bytes = flight.copy.count * options_.frame_bytes;
  double rate = lane.link.bytes_per_s;
  if (lane.flattering_left > 0) rate *= faults_.lying_factor;
  lane.flattering_left -= std::min(lane.flattering_left, bytes);
  const double slow = chance(faults_.slow) ? faults_.slow_factor : 1;
  const double own =
      static_cast<double>(lane.link.overhead_ns) + 1e9 * static_cast<double>(bytes) / rate;
  lane.busy_until = std::max(now_, lane.busy_until) + std::llround(own * slow);
  schedule({lane.busy_until, 0, Event::Kind::end, 0, flight});
}

// The copy's last byte has come: its targets hold what its fate says.
void Sim::land(const Flight& flight) {
  const Lane lane = flight.ticket.lane;
  LaneState& from = state(lane);
  Tickets::Entry& entry = tickets_.at(flight.ticket);
  Completion& completion = entry.completion;
  if (lane != Lane::pool_to_device) {
    frames_.set_rotten(flight.copy, chance(faults_.rotten));
  } else if (completion.status == Status::ok && frames_.is_rotten(flight.copy)) {
    completion.status = Status::corrupt;
    completion.error = EIO;
  }
  if (completion.status == Status::ok && !flight.moved) frames_.move(flight.copy);
  if (entry.work.silent || completion.status == Status::corrupt) {
    frames_.spoil(flight.copy.to.tier, flight.copy.to.first, flight.copy.count);
  }
  frames_.yield(flight.copy);
  ++from.counts.copies;
  from.counts.frames += flight.copy.count;
  --from.flying;
  if (--entry.work.left == 0) end(entry);
  start_copies(lane);
}

void Sim::end(Tickets::Entry& entry) {
  entry.completion.ended = now_;
  if (entry.completion.status != Status::ok) ++state(entry.completion.ticket.lane).counts.failed;
  tickets_.end(entry.completion.ticket);
}

// ---- streams ------------------------------------------------------------------------------------

Fence Sim::record(ComputeStream stream, Timing timing) {
  const auto found = streams_.find(stream.handle);
  const bool passed = found == streams_.end() || found->second.tasks.empty();
  if (passed && timing == Timing::unwanted) return {};
  const Fence fence = tickets_.record(timing);
  if (passed) {
    tickets_.pass(fence, now_);
  } else {
    found->second.tasks.push_back({Task::Kind::fence, 0, {}, {fence, {}}});
  }
  return fence;
}

void Sim::depend(ComputeStream stream, const Dep& dep) {
  tickets_.require_issued(dep, "depend: waits for a fence or ticket that was never submitted");
  if (!options_.streams) {
    require(tickets_.has_passed(dep),
            "depend: here the calling thread computes; wait for the ticket first");
    return;
  }
  streams_[stream.handle].tasks.push_back({Task::Kind::wait, 0, {}, dep});
  settle();
}

void Sim::launch(ComputeStream stream, Work work, std::function<void()> body) {
  if (!options_.streams) {
    advance(now_ + work.duration_ns);
    if (body) body();
    return;
  }
  streams_[stream.handle].tasks.push_back(
      {Task::Kind::work, work.duration_ns, std::move(body), {}});
  settle();
}

// Takes no time of its own: what matters is when it happens.
void Sim::duplicate(ComputeStream stream, std::span<const Duplicate> frames) {
  for (const auto& [from, to] : frames) {
    require(from < device_usable_ && to < device_usable_, "duplicate: no such device frame");
  }
  std::vector<Duplicate> pairs(frames.begin(), frames.end());
  launch(stream, {}, [this, pairs = std::move(pairs)] {
    for (const auto& [from, to] : pairs) frames_.duplicate(from, to);
  });
}

void Sim::synchronize(ComputeStream stream) {
  const auto found = streams_.find(stream.handle);
  while (found != streams_.end() && !found->second.tasks.empty()) happen();
}

// Goes on with a stream's tasks up to one that takes time. Whether any was done.
bool Sim::run(std::uintptr_t handle, StreamState& stream) {
  bool any = false;
  while (!stream.tasks.empty() && !stream.working) {
    const Task& task = stream.tasks.front();
    if (task.kind == Task::Kind::work) {
      stream.working = true;
      schedule({now_ + task.duration_ns, 0, Event::Kind::work, handle, {}});
      break;
    }
    if (task.kind == Task::Kind::wait && !tickets_.has_passed(task.dep)) break;
    if (task.kind == Task::Kind::fence) tickets_.pass(task.dep.fence, now_);
    stream.tasks.pop_front();
    any = true;
  }
  return any;
}

// ---- time ---------------------------------------------------------------------------------------

void Sim::schedule(Event event) {
  event.order = ++events_set_;
  events_.push(event);
}

// Has everything go on that can at this moment. Of held tickets only new ones are looked at where
// nothing has passed since.
void Sim::settle() {
  for (bool any = true; std::exchange(any, false);) {
    for (auto& [handle, stream] : streams_) any = run(handle, stream) || any;
    std::size_t i = passed_seen_ == tickets_.passed() ? held_seen_ : 0;
    passed_seen_ = tickets_.passed();
    while (i < held_.size()) {
      Tickets::Entry& entry = *held_[i];
      if (tickets_.is_held(entry)) {
        ++i;
        continue;
      }
      held_.erase(held_.begin() + static_cast<std::ptrdiff_t>(i));
      begin(entry);
      any = true;
    }
    held_seen_ = held_.size();
  }
}

// The next event, and what follows from it at once.
void Sim::happen() {
  const Event event = events_.top();
  events_.pop();
  now_ = event.at;
  if (event.kind == Event::Kind::arrival) {
    arrive(event.flight);
    return;
  }
  if (event.kind == Event::Kind::end) {
    land(event.flight);
  } else if (event.kind == Event::Kind::growth) {
    pool_usable_ = pool_coming_;
    pool_grew_ = true;
  } else {
    StreamState& stream = streams_.at(event.stream);
    const Task task = std::move(stream.tasks.front());
    stream.tasks.pop_front();
    stream.working = false;
    if (task.body) task.body();
  }
  settle();
}

void Sim::advance(Nanos until) {
  while (!events_.empty() && events_.top().at <= until) happen();
  now_ = until;
}

void require_possible(const SimLink& link) {
  if (link.bytes_per_s > 0 && link.copies_at_once > 0 && link.latency_ns >= 0 &&
      link.jitter_ns >= 0 && link.overhead_ns >= 0) {
    return;
  }
  throw ConfigError("sim: a link needs a rate and copies_at_once above 0, and no negative time.");
}

}  // namespace

std::unique_ptr<SimBackend> open_sim(const SimOptions& options) {
  if (options.frame_bytes == 0 || options.device_frames == 0) {
    throw ConfigError("sim: a machine has at least one device frame, of at least one byte.");
  }
  if (most(options.device_frames, options.device_frames_max) < options.device_frames) {
    throw ConfigError("sim: device_frames is " + std::to_string(options.device_frames) +
                      ", more than the device_frames_max of " +
                      std::to_string(options.device_frames_max) + ".");
  }
  require_possible(options.load);
  require_possible(options.write);
  return std::make_unique<Sim>(options);
}

}  // namespace pie
