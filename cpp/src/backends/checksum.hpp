// A 64-bit checksum of a frame, for what a disk and the way to it may garble.
//
// FNV-1a (Fowler, Noll and Vo) over words of 64 bits instead of bytes, in eight lanes that do not
// wait for each other, each word rotated so that its high bits reach the low ones too. Every step
// is a bijection of the lane, so a change within one word is always seen, any other with all but
// 2^-64 of chance. It is no defence against somebody who means to deceive.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "pie/types.hpp"

namespace pie {

// `bytes` is a multiple of 64. Never 0.
[[nodiscard]] inline std::uint64_t checksum_of(const std::byte* data, Bytes bytes) {
  constexpr std::uint64_t prime = 0x100000001b3;
  constexpr std::uint64_t odd = 0x9e3779b97f4a7c15;  // the golden ratio: tells the lanes apart
  std::array<std::uint64_t, 8> lanes{};
  for (std::size_t i = 0; i < lanes.size(); ++i) lanes[i] = odd * (i + 1);
  const auto take = [prime](std::uint64_t lane, std::uint64_t word) {
    return std::rotl((lane ^ word) * prime, 31);
  };
  for (Bytes at = 0; at < bytes; at += sizeof lanes) {
    std::array<std::uint64_t, 8> words;
    std::memcpy(words.data(), data + at, sizeof words);
    for (std::size_t i = 0; i < lanes.size(); ++i) lanes[i] = take(lanes[i], words[i]);
  }
  std::uint64_t sum = bytes;
  for (const std::uint64_t lane : lanes) sum = take(sum, lane) * odd;
  return sum == 0 ? 1 : sum;
}

}  // namespace pie
