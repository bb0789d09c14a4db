// Events: taken and given back, since making one costs more than recording it, and what they say
// in the host's time.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "driver.hpp"
#include "pie/types.hpp"

namespace pie::cuda {

class Events {
 public:
  explicit Events(const Driver& driver) : driver_(driver) {}
  Events(const Events&) = delete;
  Events& operator=(const Events&) = delete;
  ~Events() {
    for (CUevent event : spare_) driver_.event_destroy(event);
  }

  // One that was never recorded, or has passed; null where the driver gives none.
  [[nodiscard]] CUresult take(CUevent& event) {
    if (spare_.empty()) {
      spare_.reserve(++made_);  // giving back asks for nothing
      return driver_.event_create(&event, CU_EVENT_DEFAULT);
    }
    event = spare_.back();
    spare_.pop_back();
    return CUDA_SUCCESS;
  }

  void give_back(CUevent& event) {
    if (event != nullptr) spare_.push_back(event);
    event = nullptr;
  }

 private:
  const Driver& driver_;
  std::vector<CUevent> spare_;
  std::size_t made_ = 0;
};

// When the last few things of a kind passed, by their number, which grows.
class Log {
 public:
  void add(std::uint64_t id, Nanos passed_ns) {
    Entry& oldest = entries_[next_++ % entries_.size()];
    oldest = {id, passed_ns};
  }

  // 0: nothing is known of it.
  [[nodiscard]] Nanos at(std::uint64_t id) const {
    for (const Entry& entry : entries_) {
      if (id != 0 && entry.id == id) return entry.passed_ns;
    }
    return 0;
  }

  // Of the newest.
  [[nodiscard]] Nanos last() const {
    return next_ == 0 ? 0 : entries_[(next_ - 1) % entries_.size()].passed_ns;
  }

 private:
  struct Entry {
    std::uint64_t id = 0;
    Nanos passed_ns = 0;
  };

  std::array<Entry, 32> entries_{};
  std::size_t next_ = 0;
};

}  // namespace pie::cuda
