// Events: taken and given back, since making one costs more than recording it, and what they say
// in the host's time.
#pragma once

#include <array>
#include <vector>

#include "driver.hpp"
#include "pie/types.hpp"

namespace pie::cuda {

struct Event {
  CUevent handle = nullptr;
  bool timed = false;
};

class Events {
 public:
  explicit Events(const Driver& driver) : driver_(driver) {}
  Events(const Events&) = delete;
  Events& operator=(const Events&) = delete;
  ~Events() {
    for (const std::vector<CUevent>& spare : spare_) {
      for (CUevent event : spare) driver_.event_destroy(event);
    }
  }

  // One that was never recorded, or has passed; no handle where the driver gives none.
  [[nodiscard]] CUresult take(bool timed, Event& event) {
    std::vector<CUevent>& spare = spare_[timed ? 1 : 0];
    event.timed = timed;
    if (spare.empty()) {
      made_[timed ? 1 : 0] += 1;
      spare_[timed ? 1 : 0].reserve(made_[timed ? 1 : 0]);  // giving back asks for nothing
      return driver_.event_create(&event.handle,
                                  timed ? CU_EVENT_DEFAULT : CU_EVENT_DISABLE_TIMING);
    }
    event.handle = spare.back();
    spare.pop_back();
    return CUDA_SUCCESS;
  }

  void give_back(Event& event) {
    if (event.handle != nullptr) spare_[event.timed ? 1 : 0].push_back(event.handle);
    event.handle = nullptr;
  }

 private:
  const Driver& driver_;
  std::array<std::vector<CUevent>, 2> spare_;  // untimed, timed
  std::array<std::size_t, 2> made_{};
};

}  // namespace pie::cuda
