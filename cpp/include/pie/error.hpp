// What this library throws. Every message is a sentence: what was asked, what is there, what to
// change.
//
// Programmer errors throw LogicError and never abort: the library lives in a user's process.
// Nothing is thrown across a worker thread or out of a backend's poll(): there, failures are
// values.
#pragma once

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace pie {

// The call itself is wrong: a closed cache, a step inside a step, a freed sequence.
struct LogicError : std::logic_error {
  using std::logic_error::logic_error;
};

// A value that can never work: refused at construction, or at the door of a call.
struct ConfigError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// A tier cannot hold what was asked. Becomes MemoryError in Python. Nothing was changed.
class CapacityError : public std::bad_alloc {
 public:
  explicit CapacityError(std::string message) : message_(std::move(message)) {}
  [[nodiscard]] const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

// A transfer failed after its retries. Becomes OSError in Python. The pool copies stay valid.
class IoError : public std::runtime_error {
 public:
  explicit IoError(const std::string& message, std::uint64_t sequence = 0)
      : std::runtime_error(message), sequence_(sequence) {}

  // The one it touched, without which the others of the batch can go on; 0: all of them.
  [[nodiscard]] std::uint64_t sequence() const { return sequence_; }

 private:
  std::uint64_t sequence_;
};

// Bytes as a message says them: "1.5 MiB (1572864 bytes)", rounded up.
[[nodiscard]] inline std::string sized(std::uint64_t bytes) {
  const unsigned shift = bytes < (10ULL << 20) ? 10 : 20;
  const std::uint64_t tenths = (bytes * 10 + (1ULL << shift) - 1) >> shift;
  return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) +
         (shift == 10 ? " KiB (" : " MiB (") + std::to_string(bytes) + " bytes)";
}

// Always on. `call` names the public call in the message.
inline void require(bool condition, const char* message) {
  if (!condition) throw LogicError(message);
}

}  // namespace pie
