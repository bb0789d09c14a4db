// XXH3 for whatever this is compiled for, and the choice of a better one when the program runs.
#include "checksum.hpp"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace pie {

namespace {

std::uint64_t xxh3(const std::byte* data, Bytes bytes) { return XXH3_64bits(data, bytes); }

auto* best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return xxh3_avx2;
#endif
  return xxh3;
}

}  // namespace

std::uint64_t checksum_of(const std::byte* data, Bytes bytes) {
  static auto* const chosen = best();
  const std::uint64_t sum = chosen(data, bytes);
  return sum == 0 ? 1 : sum;
}

}  // namespace pie
