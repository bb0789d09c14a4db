// Which process this is: a forked child inherits objects whose memory, threads and files stayed
// with its parent.
#pragma once

#include <pthread.h>

namespace pie {

// The process in which this was made. Counts forks instead of asking for ids: that costs no system
// call.
class Process {
 public:
  [[nodiscard]] bool is_this() const { return forks_ == forks(); }

 private:
  static unsigned forks() noexcept {
    static const int registered = ::pthread_atfork(nullptr, nullptr, [] { ++count_; });
    static_cast<void>(registered);
    return count_;
  }

  static inline unsigned count_ = 0;
  unsigned forks_ = forks();
};

}  // namespace pie
