// A backend in plain memory whose copies end when, and in the order, a seed says.
//
// Adversarial on purpose: a copy's bytes move either when it is submitted or when it ends, chosen
// by the seed, so that a frame reused too early is read or written at the wrong moment; the target
// of a copy that has not moved yet is filled with a poison pattern. Failures are injected by number
// or by probability. Time is virtual and passes in wait() only.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "pie/backend.hpp"
#include "pie/error.hpp"

namespace pie::testing {

struct MemoryOptions {
  std::uint32_t device_frames = 16;
  std::uint32_t pool_frames = 64;
  Bytes frame_bytes = 4096;
  std::uint32_t copy_frames_best = 4;
  std::uint64_t seed = 1;
  double failure_probability = 0;              // of a ticket
  std::uint64_t fail_ticket = 0;               // the one with this number, counted from 1; 0: none
  std::uint32_t growable_frames = 0xffffffff;  // resize_pool refuses beyond this
};

class MemoryBackend final : public Backend {
 public:
  explicit MemoryBackend(const MemoryOptions& options)
      : options_(options),
        random_(options.seed),
        usable_(options.device_frames),
        device_(options.device_frames * options.frame_bytes, poison),
        pool_(options.pool_frames * options.frame_bytes, poison) {}

  [[nodiscard]] Capabilities capabilities() const override {
    Capabilities result;
    result.device_frames = options_.device_frames;
    result.device_frames_max = options_.device_frames;
    result.pool_frames = options_.pool_frames;
    result.frame_stride = options_.frame_bytes;
    result.copy_bytes_best = options_.copy_frames_best * options_.frame_bytes;
    result.pool_io = "memory";
    return result;
  }

  [[nodiscard]] Nanos now() const override { return now_; }

  std::uint32_t resize_device(std::uint32_t frames) override {
    usable_ = std::min(frames, options_.device_frames);
    return usable_;
  }

  std::uint32_t resize_pool(std::uint32_t frames) override {
    grown_ = std::min(frames, std::min(options_.growable_frames, options_.pool_frames));
    return grown_;
  }

  [[nodiscard]] std::string pool_refusal() const override {
    return grown_ == options_.growable_frames ? "the test allows no more" : "";
  }

  Ticket submit(Lane lane, std::span<const Copy> copies, std::span<const Dep> after) override {
    for (const Dep& dep : after) {
      require(dep.ticket.id < next_id_, "submit: waits for a ticket that was never issued.");
    }
    Pending pending;
    pending.copies.assign(copies.begin(), copies.end());
    pending.completion.ticket = {lane, next_id_++};
    pending.completion.began = now_;
    check_frames(pending);
    ++submitted_;
    if (broken_ || submitted_ == options_.fail_ticket || chance(options_.failure_probability)) {
      pending.completion.status = Status::failed;
      pending.completion.error = EIO;
    } else if (chance(0.5)) {
      move(pending);
    }
    if (!pending.moved && lane == Lane::pool_to_device) poison_target(pending);
    pending_.push_back(std::move(pending));
    return pending_.back().completion.ticket;
  }

  std::size_t poll(std::span<Completion> out) override {
    std::size_t count = 0;
    while (count < out.size() && !pending_.empty() && (must_end_ || chance(0.5))) {
      out[count++] = end(random_() % pending_.size());
      must_end_ = false;
    }
    return count;
  }

  void wait(Nanos) override {
    now_ += 1000;
    must_end_ = true;
  }

  Fence record(ComputeStream) override { return {}; }
  void depend(ComputeStream, Ticket) override {}
  void compute(ComputeStream, Work) override {}

  [[nodiscard]] std::byte* address(FrameIndex frame) const override {
    return const_cast<std::byte*>(device_.data()) + frame * options_.frame_bytes;
  }

  [[nodiscard]] Health health() const override { return {}; }

  [[nodiscard]] std::uint64_t submitted() const { return submitted_; }

  // From now on every copy that is submitted fails, or none does.
  void set_broken(bool broken) { broken_ = broken; }

 private:
  static constexpr std::byte poison{0x7f};

  struct Pending {
    std::vector<Copy> copies;
    Completion completion;
    bool moved = false;
  };

  bool chance(double probability) {
    return std::uniform_real_distribution<double>(0, 1)(random_) < probability;
  }

  // No frame is the target of one copy while another reads or writes it.
  void check_frames(const Pending& fresh) const {
    for (const Copy& copy : fresh.copies) {
      require(copy.device_first + copy.count <= usable_, "submit: device range.");
      require(copy.pool_first + copy.count <= grown_, "submit: a pool frame that was not grown.");
      for (const Pending& other : pending_) {
        for (const Copy& theirs : other.copies) {
          require(copy.device_first >= theirs.device_first + theirs.count ||
                      theirs.device_first >= copy.device_first + copy.count,
                  "submit: a device frame is in two copies at once.");
          require(copy.pool_first >= theirs.pool_first + theirs.count ||
                      theirs.pool_first >= copy.pool_first + copy.count,
                  "submit: a pool frame is in two copies at once.");
        }
      }
    }
  }

  void move(Pending& pending) {
    for (const Copy& copy : pending.copies) {
      std::byte* device = device_.data() + copy.device_first * options_.frame_bytes;
      std::byte* pool = pool_.data() + copy.pool_first * options_.frame_bytes;
      const bool load = pending.completion.ticket.lane == Lane::pool_to_device;
      std::memcpy(load ? device : pool, load ? pool : device, copy.count * options_.frame_bytes);
    }
    pending.moved = true;
  }

  void poison_target(const Pending& pending) {
    for (const Copy& copy : pending.copies) {
      std::fill_n(
          device_.begin() + static_cast<std::ptrdiff_t>(copy.device_first * options_.frame_bytes),
          copy.count * options_.frame_bytes, poison);
    }
  }

  Completion end(std::size_t index) {
    Pending pending = std::move(pending_[index]);
    pending_.erase(pending_.begin() + static_cast<std::ptrdiff_t>(index));
    if (pending.completion.status == Status::ok && !pending.moved) move(pending);
    pending.completion.ended = now_;
    return pending.completion;
  }

  MemoryOptions options_;
  std::mt19937_64 random_;
  std::uint32_t usable_;  // device frames
  std::vector<std::byte> device_;
  std::vector<std::byte> pool_;
  std::vector<Pending> pending_;
  std::uint32_t grown_ = 0;
  std::uint64_t next_id_ = 1;
  std::uint64_t submitted_ = 0;
  Nanos now_ = 0;
  bool must_end_ = false;
  bool broken_ = false;
};

}  // namespace pie::testing
