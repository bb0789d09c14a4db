// What an embedder does first: opens the host backend from the installed package, sends one frame
// to the pool and back into another device frame, and compares the bytes.
#include <array>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <span>

#include "pie/backend.hpp"
#include "pie/backends.hpp"

namespace {

constexpr pie::Bytes frame_bytes = 48 * 1024;
constexpr pie::Nanos second_ns = 1'000'000'000;

// Waits for one completion; false where the transfer failed.
bool completed(pie::Backend& backend, const char* what) {
  pie::Completion completion;
  while (backend.poll(std::span(&completion, 1)) == 0) backend.wait(second_ns);
  if (completion.status == pie::Status::ok) return true;
  std::fprintf(stderr, "%s: %s\n", what, std::strerror(completion.error));
  return false;
}

bool round_trip() {
  pie::HostOptions options;
  options.frame_bytes = frame_bytes;
  options.device_bytes = 8 << 20;
  options.pool_bytes = 8 << 20;
  const std::unique_ptr<pie::Backend> backend = pie::open_host(options);
  if (backend->resize_pool(1) < 1) {
    std::fprintf(stderr, "no pool: %s\n", backend->pool_refusal().c_str());
    return false;
  }
  for (std::size_t i = 0; i < frame_bytes; ++i) {
    backend->address(0)[i] = static_cast<std::byte>(i * 7 + i / 251);
  }
  const std::array out = {pie::Copy{0, 0, 1}};
  const std::array back = {pie::Copy{1, 0, 1}};
  backend->submit(pie::Lane::device_to_pool, out, {});
  if (!completed(*backend, "device to pool")) return false;
  backend->submit(pie::Lane::pool_to_device, back, {});
  if (!completed(*backend, "pool to device")) return false;
  if (std::memcmp(backend->address(0), backend->address(1), frame_bytes) != 0) {
    std::fprintf(stderr, "the bytes that came back differ from those sent\n");
    return false;
  }
  std::printf("embed: one frame out and back through %s, equal\n",
              backend->capabilities().pool_io.c_str());
  return true;
}

}  // namespace

int main() {
  try {
    return round_trip() ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "embed: %s\n", error.what());
    return 1;
  }
}
