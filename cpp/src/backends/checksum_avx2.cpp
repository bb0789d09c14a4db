// XXH3 compiled with AVX2: 2.4 times as fast from cache, a quarter faster from memory. Nothing else
// is in here: whatever the compiler makes of this file, a processor without AVX2 never runs.
#include "checksum.hpp"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace pie {

std::uint64_t xxh3_avx2(const std::byte* data, Bytes bytes) { return XXH3_64bits(data, bytes); }

}  // namespace pie
