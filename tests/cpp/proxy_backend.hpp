// A backend in front of another, for tests to change one thing: what is not overridden goes on to
// the one behind. By itself it ends what would otherwise never end.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "pie/backends.hpp"

namespace pie::testing {

class ProxyBackend : public Backend {
 public:
  explicit ProxyBackend(std::unique_ptr<SimBackend> inner) : inner_(std::move(inner)) {}

  [[nodiscard]] SimBackend& inner() { return *inner_; }

  // Calls that move something on since the last `rest`; a call of the cache's takes far fewer.
  void rest() { moves_ = 0; }

  [[nodiscard]] Capabilities capabilities() const override { return inner_->capabilities(); }
  [[nodiscard]] Nanos now() const override { return inner_->now(); }
  std::uint32_t resize_device(std::uint32_t frames) override {
    return inner_->resize_device(frames);
  }
  PoolSize resize_pool(std::uint32_t frames) override { return inner_->resize_pool(frames); }
  [[nodiscard]] std::string pool_refusal() const override { return inner_->pool_refusal(); }
  Ticket submit(std::span<const Copy> copies, std::span<const Dep> after) override {
    move();
    return inner_->submit(copies, after);
  }
  std::size_t poll(std::span<Completion> out) override { return inner_->poll(out); }
  void wait(Nanos timeout_ns) override {
    move();
    inner_->wait(timeout_ns);
  }
  Fence record(ComputeStream stream, Timing timing) override {
    return inner_->record(stream, timing);
  }
  void depend(ComputeStream stream, const Dep& dep) override { inner_->depend(stream, dep); }
  void duplicate(ComputeStream stream, std::span<const Duplicate> frames) override {
    inner_->duplicate(stream, frames);
  }
  [[nodiscard]] std::byte* address(FrameIndex frame) const override {
    return inner_->address(frame);
  }
  [[nodiscard]] std::shared_ptr<const void> memory() const override { return inner_->memory(); }
  [[nodiscard]] Health health() const override { return inner_->health(); }

 private:
  static constexpr std::uint32_t moves_max = 20'000;

  void move() {
    if (++moves_ == moves_max) throw std::runtime_error("a call goes round in circles");
  }

  std::unique_ptr<SimBackend> inner_;
  std::uint32_t moves_ = 0;
};

}  // namespace pie::testing
