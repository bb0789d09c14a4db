// A 64-bit checksum of a frame, for what a disk and the way to it may garble: XXH3, of the xxHash
// library, as fast as this processor has it. It is no defence against somebody who means to
// deceive. Its values stay in this process, which is why seed and length are nobody's concern.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pie/types.hpp"

namespace pie {

// Never 0.
[[nodiscard]] std::uint64_t checksum_of(const std::byte* data, Bytes bytes);

// XXH3, compiled for AVX2; where that was not compiled, checksum_of knows.
[[nodiscard]] std::uint64_t xxh3_avx2(const std::byte* data, Bytes bytes);

}  // namespace pie
