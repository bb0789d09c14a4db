// Vectors of floats of the width this translation unit is compiled for.
//
// GCC's vector extensions carry the arithmetic; intrinsics appear only where they have no word for
// it: fused multiply-add, and joining and interleaving four-float lanes. Everything lies in an
// unnamed namespace, since each including file is compiled with other instruction flags and must
// not share one copy of a function with the rest of the library; for the same reason nothing here
// or in kernel.hpp calls a template of the standard library. Contraction is off (-ffp-contract=off)
// and every fused multiply-add is written out, so the same operations happen whatever the tile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "pie/types.hpp"

namespace pie::attention {
namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16;
constexpr int tile_columns = 4;
#elif defined(__AVX2__)
constexpr int lanes = 8;
constexpr int tile_columns = 2;
#elif defined(__aarch64__)
constexpr int lanes = 4;
constexpr int tile_columns = 4;
#else
constexpr int lanes = 4;
constexpr int tile_columns = 2;
#endif

using V = float __attribute__((vector_size(lanes * 4)));
// A lane, and also one value for each granule of a pass.
using F4 = float __attribute__((vector_size(16)));
using U = std::uint32_t __attribute__((vector_size(lanes * 4)));
using I = std::int32_t __attribute__((vector_size(lanes * 4)));
using H = std::uint16_t __attribute__((vector_size(lanes * 2)));

#define PIE_INLINE [[gnu::always_inline]] inline

PIE_INLINE V splat(float x) { return x - V{}; }

PIE_INLINE V load(const float* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

PIE_INLINE void store(float* to, V v) { std::memcpy(to, &v, sizeof v); }

PIE_INLINE V fma(V a, V b, V c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// NaN in `b` stays NaN.
PIE_INLINE V larger(V a, V b) { return a > b ? a : b; }
PIE_INLINE V smaller(V a, V b) { return a < b ? a : b; }

// 2^x for x <= 0, within 2e-7 of the true value; exactly 1 at 0, and 0 below -126. The polynomial
// is the minimax one of degree 5 on [-1/2, 1/2] whose constant term is 1.
PIE_INLINE V exp2(V x) {
  const V shift = splat(0x1.8p23F);
  const V shifted = x + shift;
  const V fraction = x - (shifted - shift);
  V p = fma(splat(0x1.5bba14p-10F), fraction, splat(0x1.3cea88p-7F));
  p = fma(p, fraction, splat(0x1.c6b752p-5F));
  p = fma(p, fraction, splat(0x1.ebf9bcp-3F));
  p = fma(p, fraction, splat(0x1.62e42ap-1F));
  p = fma(p, fraction, splat(1.0F));
  const V scaled =
      reinterpret_cast<V>(reinterpret_cast<U>(p) + (reinterpret_cast<U>(shifted) << 23));
  return x < splat(-126.0F) ? V{} : scaled;
}

// tanh(x), within 3e-7 of its size: its series near 0, (1 - e) / (1 + e) with e = exp(-2 |x|)
// beyond.
PIE_INLINE V tanh(V x) {
  const V size = x < V{} ? -x : x;
  const V e = exp2(size * splat(-2.88539008F));
  const V far = (splat(1.0F) - e) / (splat(1.0F) + e);
  const V square = x * x;
  V p = fma(splat(0x1.664f48p-6F), square, splat(-0x1.ba1ba2p-5F));
  p = fma(p, square, splat(0x1.111112p-3F));
  p = fma(p, square, splat(-0x1.555556p-2F));
  const V near = fma(p * square, x, x);
  return size < splat(0.25F) ? near : (x < V{} ? -far : far);
}

// Four-float lanes at `from`, `from` + stride, ... joined to one vector. Stride in bytes.
PIE_INLINE V join_lanes(const std::byte* from, std::size_t stride) {
  const auto* f = reinterpret_cast<const float*>(from);
  const auto at = [&](std::size_t lane) {
    return reinterpret_cast<const float*>(from + lane * stride);
  };
#if defined(__AVX512F__)
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(f));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(at(1)), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(at(2)), 2);
  return _mm512_insertf32x4(v, _mm_loadu_ps(at(3)), 3);
#elif defined(__AVX2__)
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(f)), _mm_loadu_ps(at(1)), 1);
#else
  static_cast<void>(at);
  return load(f);
#endif
}

// a0 b0 a1 b1 of every four-float lane, and a2 b2 a3 b3.
PIE_INLINE V interleave_low(V a, V b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}
PIE_INLINE V interleave_high(V a, V b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// Transposes the 4x4 words in each lane of v[0..3].
PIE_INLINE void transpose_lanes(V (&v)[4]) {
  const V a = interleave_low(v[0], v[2]);
  const V b = interleave_high(v[0], v[2]);
  const V c = interleave_low(v[1], v[3]);
  const V d = interleave_high(v[1], v[3]);
  v[0] = interleave_low(a, c);
  v[1] = interleave_high(a, c);
  v[2] = interleave_low(b, d);
  v[3] = interleave_high(b, d);
}

// True for the first `count` lanes.
PIE_INLINE I first_tokens(int count) {
  I index;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) index[i] = i;
  return index < count;
}

// The largest float of each of four vectors.
PIE_INLINE F4 largest_of(const V (&v)[4]) {
  const V even = larger(interleave_low(v[0], v[2]), interleave_high(v[0], v[2]));
  const V odd = larger(interleave_low(v[1], v[3]), interleave_high(v[1], v[3]));
  const V by_lane = larger(interleave_low(even, odd), interleave_high(even, odd));
  F4 lane[lanes / 4];
  std::memcpy(lane, &by_lane, sizeof by_lane);
  F4 result = lane[0];
#pragma GCC unroll 3
  for (int i = 1; i < lanes / 4; ++i) result = result > lane[i] ? result : lane[i];
  return result;
}

// The largest of x[0..i] and `before`, for every i.
PIE_INLINE F4 running_largest(float before, F4 x) {
  const F4 first = before - F4{};
  x = x > first ? x : first;
  const F4 by_one = __builtin_shufflevector(x, first, 4, 0, 1, 2);
  x = x > by_one ? x : by_one;
  const F4 by_two = __builtin_shufflevector(x, first, 4, 4, 0, 1);
  return x > by_two ? x : by_two;
}

// 16-bit values, zero-extended to words, as floats.
template <DType dtype>
PIE_INLINE V widen(U half) {
  if constexpr (dtype == DType::bf16) {
    return reinterpret_cast<V>(half << 16);
  } else {
    const U magnitude = half & 0x7fff;
    const V finite = reinterpret_cast<V>(magnitude << 13) * splat(0x1p112F);
    const U special = magnitude > 0x7bff ? U{} + 0x7f800000 : U{};
    return reinterpret_cast<V>(reinterpret_cast<U>(finite) | special | (half & 0x8000) << 16);
  }
}

// Floats rounded to nearest even, as 16-bit values in words.
template <DType dtype>
PIE_INLINE U narrow(V v) {
  const U bits = reinterpret_cast<U>(v);
  const U magnitude = bits & 0x7fffffff;
  if constexpr (dtype == DType::bf16) {
    const U rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return magnitude > 0x7f800000 ? (bits >> 16 | 0x40) : rounded;
  } else {
    const V tiny = reinterpret_cast<V>(magnitude) + splat(0.5F);
    const U normal = (magnitude - (112U << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    U result = magnitude < (113U << 23) ? reinterpret_cast<U>(tiny) - (126U << 23) : normal;
    result = magnitude >= (143U << 23) ? U{} + 0x7c00 : result;
    result = magnitude > 0x7f800000 ? U{} + 0x7e00 : result;
    return result | (bits >> 16 & 0x8000);
  }
}

// Elements [first, first + lanes) of a row of `count` (a multiple of 8) elements; 0 past its end.
template <DType dtype>
PIE_INLINE V load_row(const std::byte* row, std::size_t first, std::size_t count) {
  using Elements = std::conditional_t<dtype == DType::f32, V, H>;
  constexpr std::size_t element = sizeof(Elements) / lanes;
  Elements x{};
  if (lanes <= 8 || count - first >= lanes) {
    std::memcpy(&x, row + first * element, sizeof x);
  } else {
    std::memcpy(&x, row + first * element, sizeof x / 2);
  }
  if constexpr (dtype == DType::f32) {
    return x;
  } else {
    return widen<dtype>(__builtin_convertvector(x, U));
  }
}

// Writes v as elements [first, first + lanes) of a row of `count`, leaving out those past its end.
template <DType dtype>
PIE_INLINE void store_row(std::byte* row, V v, std::size_t first, std::size_t count) {
  using Elements = std::conditional_t<dtype == DType::f32, V, H>;
  constexpr std::size_t element = sizeof(Elements) / lanes;
  Elements x;
  if constexpr (dtype == DType::f32) {
    x = v;
  } else {
    x = __builtin_convertvector(narrow<dtype>(v), H);
  }
  if (lanes <= 8 || count - first >= lanes) {
    std::memcpy(row + first * element, &x, sizeof x);
  } else {
    std::memcpy(row + first * element, &x, sizeof x / 2);
  }
}

}  // namespace
}  // namespace pie::attention
