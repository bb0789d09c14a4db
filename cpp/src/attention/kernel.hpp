// The attention kernel itself: exact softmax over passes of at most 64 tokens, written once for
// every vector width and compiled once per instruction set.
//
// A line is a (row, query head); all lines of a task share one KV head. Per pass, K is unpacked to
// f32 and transposed ([dim][64]) and V unpacked ([64][padded_dim]), then tiles of up to six lines
// are taken through scores, weights and weighted values, each a small matrix product held in
// registers. For one line and one token or element the operations and their order never depend on
// the tile, the pass or the task: scores add up over the dimension, the accumulator is rescaled at
// the start of each granule and then takes its visible tokens in order. Tokens a line cannot see
// are not multiplied by zero but left out, so nothing that lies there can reach it.
#pragma once

#include "attention/kernels.hpp"
#include "attention/simd.hpp"

namespace pie::attention {
namespace {

constexpr float log2_e = 1.44269504F;
constexpr float ln_2 = 0.693147181F;
constexpr int tile_lines = 6;
constexpr float infinity = __builtin_inff();
constexpr std::size_t granules_most = pass_tokens / granule_tokens;
constexpr int granule_vectors = int{granule_tokens} / lanes;

// What a line sees of a pass: tokens [first, end), counted from where the pass begins.
struct Seen {
  std::uint32_t first = 0;
  std::uint32_t end = 0;
};

// A partial seen as its parts.
struct Partial {
  float* values;
  float* sums;
  float* max;
};

PIE_INLINE Partial parts(float* partial, std::size_t padded) {
  return {partial, partial + padded, partial + padded + 16};
}

// The scratch of one task. Lines are numbered from the task's first row.
struct Pass {
  float* keys;      // [dim][pass_tokens]
  float* values;    // [pass_tokens][padded]
  float* weights;   // [lines][pass_tokens]: scores, then weights
  float* queries;   // [lines][padded], times scale and log2(e)
  float** partial;  // [lines]
  std::size_t dim;
  std::size_t padded;
  float cap;  // of the scores, in units of log2; 0: none
};

template <DType dtype>
constexpr std::size_t element_bytes = dtype == DType::f32 ? 4 : 2;

// Transposes 16 tokens of K into columns of `keys`. 16-bit elements travel in pairs, as words.
template <DType dtype>
PIE_INLINE void unpack_keys(const std::byte* rows, std::size_t dim, float* keys) {
  const std::size_t row_bytes = dim * element_bytes<dtype>;
  for (std::size_t byte = 0; byte < row_bytes; byte += 16) {
    float* column = keys + byte / element_bytes<dtype> * pass_tokens;
    for (int part = 0; part < granule_vectors; ++part, column += lanes) {
      V v[4];
      const std::byte* from = rows + std::size_t(part) * lanes * row_bytes + byte;
#pragma GCC unroll 4
      for (std::size_t i = 0; i < 4; ++i) v[i] = join_lanes(from + i * row_bytes, 4 * row_bytes);
      transpose_lanes(v);
#pragma GCC unroll 4
      for (std::size_t i = 0; i < 4; ++i) {
        if constexpr (dtype == DType::f32) {
          store(column + i * pass_tokens, v[i]);
        } else {
          const U words = reinterpret_cast<U>(v[i]);
          store(column + 2 * i * pass_tokens, widen<dtype>(words & 0xffff));
          store(column + (2 * i + 1) * pass_tokens, widen<dtype>(words >> 16));
        }
      }
    }
  }
}

template <DType dtype>
PIE_INLINE void unpack_values(const std::byte* rows, std::size_t dim, std::size_t padded,
                              float* values) {
  for (std::uint32_t t = 0; t < granule_tokens; ++t) {
    const std::byte* row = rows + t * dim * element_bytes<dtype>;
    for (std::size_t d = 0; d < dim; d += lanes) {
      store(values + t * padded + d, load_row<dtype>(row, d, dim));
    }
  }
}

// Where the K rows of the granule at token `t` lie; its V rows are `values_offset` further.
template <DType dtype>
PIE_INLINE const std::byte* granule_keys(const FoldTask& task, const Pass& pass, std::uint32_t t) {
  const AttentionShape& shape = *task.shape;
  const std::uint32_t block = t / shape.block_tokens - task.work->kv_begin / shape.block_tokens;
  const std::size_t row = std::size_t{task.kv_head} * shape.block_tokens + t % shape.block_tokens;
  return task.work->frames[block] + row * pass.dim * element_bytes<dtype>;
}

PIE_INLINE void prefetch(const std::byte* from, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// Unpacks the granules that hold tokens [begin, end), and asks for those of the pass after it.
template <DType dtype>
void unpack(const FoldTask& task, const Pass& pass, std::uint32_t begin, std::uint32_t end) {
  const AttentionShape& shape = *task.shape;
  const std::size_t granule_bytes = granule_tokens * pass.dim * element_bytes<dtype>;
  const std::size_t values_offset =
      std::size_t{shape.kv_heads} * shape.block_tokens * pass.dim * element_bytes<dtype>;
  for (std::uint32_t t = begin; t < end; t += granule_tokens) {
    if (t + pass_tokens < task.token_end) {
      const std::byte* next = granule_keys<dtype>(task, pass, t + pass_tokens);
      prefetch(next, granule_bytes);
      prefetch(next + values_offset, granule_bytes);
    }
    const std::byte* keys = granule_keys<dtype>(task, pass, t);
    unpack_keys<dtype>(keys, pass.dim, pass.keys + (t - begin));
    unpack_values<dtype>(keys + values_offset, pass.dim, pass.padded,
                         pass.values + (t - begin) * pass.padded);
  }
}

// Scores of `line_count` lines against `columns` vectors of tokens.
template <int line_count, int columns>
void score(const Pass& pass, const float* queries, const float* keys, float* scores) {
  V sum[line_count][columns] = {};
  for (std::size_t d = 0; d < pass.dim; ++d) {
    V key[columns];
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) key[c] = load(keys + d * pass_tokens + c * lanes);
#pragma GCC unroll 6
    for (std::size_t r = 0; r < line_count; ++r) {
      const V query = splat(queries[r * pass.padded + d]);
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) sum[r][c] = fma(query, key[c], sum[r][c]);
    }
  }
#pragma GCC unroll 6
  for (std::size_t r = 0; r < line_count; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) store(scores + r * pass_tokens + c * lanes, sum[r][c]);
  }
}

// Adds the weighted values of the tokens seen to `columns` vectors of the accumulators, which are
// multiplied by rescale[line][granule] at the start of each granule.
template <int line_count, int columns>
void accumulate(const Pass& pass, float* const* partial, std::size_t first_element,
                const float* weights, const float* rescale, Seen seen) {
  V sum[line_count][columns];
  const float* values = pass.values + first_element;
#pragma GCC unroll 6
  for (int r = 0; r < line_count; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) sum[r][c] = load(partial[r] + first_element + c * lanes);
  }
  for (std::uint32_t t = 0; t < seen.end;) {
#pragma GCC unroll 6
    for (std::size_t r = 0; r < line_count; ++r) {
      const V factor = splat(rescale[r * granules_most + t / granule_tokens]);
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) sum[r][c] *= factor;
    }
    const std::uint32_t next = t + granule_tokens;
    const std::uint32_t end = next < seen.end ? next : seen.end;
    for (t = t > seen.first ? t : seen.first; t < end; ++t) {
      V value[columns];
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) value[c] = load(values + t * pass.padded + c * lanes);
#pragma GCC unroll 6
      for (std::size_t r = 0; r < line_count; ++r) {
        const V weight = splat(weights[r * pass_tokens + t]);
#pragma GCC unroll 4
        for (int c = 0; c < columns; ++c) sum[r][c] = fma(weight, value[c], sum[r][c]);
      }
    }
    t = next;
  }
#pragma GCC unroll 6
  for (int r = 0; r < line_count; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) store(partial[r] + first_element + c * lanes, sum[r][c]);
  }
}

// Turns the scores s of one line, in units of log2, into cap * tanh(s / cap).
PIE_INLINE void cap_line(float* scores, std::uint32_t end, float cap) {
  for (std::uint32_t t = 0; t < end; t += lanes) {
    store(scores + t, splat(cap) * tanh(load(scores + t) * splat(1 / cap)));
  }
}

// Clamps the scores of one line, hides those it does not see, and takes the running maximum through
// the granules: maxima[g] after granule g, fall[g] the (negative) change that granule made.
PIE_INLINE void maxima_of_line(float* scores, Seen visible, float* running, float* maxima,
                               float* fall) {
  V highest[granules_most];
#pragma GCC unroll 4
  for (std::uint32_t g = 0; g < granules_most; ++g) {
    highest[g] = splat(lowest_max);
    if (visible.end <= g * granule_tokens) continue;
    const auto seen = static_cast<std::int32_t>(visible.end - g * granule_tokens);
    const auto hidden = static_cast<std::int32_t>(visible.first - g * granule_tokens);
#pragma GCC unroll 4
    for (int i = 0; i < granule_vectors; ++i) {
      float* at = scores + g * granule_tokens + i * lanes;
      V s = smaller(splat(-lowest_max), load(at));
      if (seen < int{granule_tokens}) s = first_tokens(seen - i * lanes) ? s : splat(-infinity);
      if (hidden > 0) s = first_tokens(hidden - i * lanes) ? splat(-infinity) : s;
      store(at, s);
      highest[g] = larger(highest[g], s);
    }
  }
  const F4 max = running_largest(*running, largest_of(highest));
  const F4 before = __builtin_shufflevector(max, *running - F4{}, 4, 0, 1, 2);
  const F4 change = before - max;
  std::memcpy(maxima, &max, sizeof max);
  std::memcpy(fall, &change, sizeof change);
  *running = max[granules_most - 1];
}

// Scores to weights, for the granules that hold `visible` tokens; adds them up into `sums`.
PIE_INLINE void weigh_line(float* scores, std::uint32_t visible, const float* maxima,
                           const float* rescale, float* sums) {
  V sum[granule_vectors];
#pragma GCC unroll 4
  for (int i = 0; i < granule_vectors; ++i) sum[i] = load(sums + i * lanes);
  for (std::uint32_t g = 0; g * granule_tokens < visible; ++g) {
    const V max = splat(maxima[g]);
    const V factor = splat(rescale[g]);
#pragma GCC unroll 4
    for (int i = 0; i < granule_vectors; ++i) {
      float* at = scores + g * granule_tokens + i * lanes;
      const V weight = exp2(load(at) - max);
      sum[i] = fma(sum[i], factor, weight);
      store(at, weight);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < granule_vectors; ++i) store(sums + i * lanes, sum[i]);
}

// Takes `line_count` lines, all of which see the same of the pass, through it.
template <int line_count>
void fold_tile(const Pass& pass, std::size_t first_line, Seen visible) {
  const float* queries = pass.queries + first_line * pass.padded;
  float* weights = pass.weights + first_line * pass_tokens;
  float* const* partial = pass.partial + first_line;
  const std::uint32_t granules = (visible.end + granule_tokens - 1) / granule_tokens;
  const int token_vectors = static_cast<int>(granules) * granule_vectors;
  int c = 0;
  for (; c + tile_columns <= token_vectors; c += tile_columns) {
    score<line_count, tile_columns>(pass, queries, pass.keys + c * lanes, weights + c * lanes);
  }
  for (; c < token_vectors; ++c) {
    score<line_count, 1>(pass, queries, pass.keys + c * lanes, weights + c * lanes);
  }

  alignas(64) float maxima[line_count * granules_most];
  constexpr std::size_t factors = (line_count * granules_most + lanes - 1) / lanes * lanes;
  alignas(64) float rescale[factors] = {};
  for (std::size_t r = 0; pass.cap > 0 && r < line_count; ++r) {
    cap_line(weights + r * pass_tokens, granules * granule_tokens, pass.cap);
  }
  for (std::size_t r = 0; r < line_count; ++r) {
    maxima_of_line(weights + r * pass_tokens, visible, parts(partial[r], pass.padded).max,
                   maxima + r * granules_most, rescale + r * granules_most);
  }
  for (std::size_t i = 0; i < factors; i += lanes) store(rescale + i, exp2(load(rescale + i)));
  for (std::size_t r = 0; r < line_count; ++r) {
    weigh_line(weights + r * pass_tokens, visible.end, maxima + r * granules_most,
               rescale + r * granules_most, parts(partial[r], pass.padded).sums);
  }

  std::size_t d = 0;
  for (; d + tile_columns * lanes <= pass.padded; d += tile_columns * lanes) {
    accumulate<line_count, tile_columns>(pass, partial, d, weights, rescale, visible);
  }
  for (; d < pass.dim; d += lanes) {
    accumulate<line_count, 1>(pass, partial, d, weights, rescale, visible);
  }
}

// Cuts lines into tiles of nearly equal size.
void fold_lines(const Pass& pass, std::size_t first, std::size_t end, Seen visible) {
  constexpr void (*fold[tile_lines])(const Pass&, std::size_t, Seen) = {
      fold_tile<1>, fold_tile<2>, fold_tile<3>, fold_tile<4>, fold_tile<5>, fold_tile<6>};
  for (std::size_t tiles = (end - first + tile_lines - 1) / tile_lines; tiles > 0; --tiles) {
    const std::size_t count = (end - first + tiles - 1) / tiles;
    fold[count - 1](pass, first, visible);
    first += count;
  }
}

PIE_INLINE void clear(float* partial, std::size_t padded) {
  for (std::size_t i = 0; i < padded + 16; i += lanes) store(partial + i, V{});
  *parts(partial, padded).max = lowest_max;
}

// earlier = earlier and later together.
void merge(float* earlier, const float* later, std::size_t padded) {
  const Partial into = parts(earlier, padded);
  const float later_max = later[padded + 16];
  const float max = *into.max > later_max ? *into.max : later_max;
  const V earlier_factor = exp2(splat(*into.max - max));
  const V later_factor = exp2(splat(later_max - max));
  for (std::size_t i = 0; i < padded + 16; i += lanes) {
    store(earlier + i, fma(load(earlier + i), earlier_factor, load(later + i) * later_factor));
  }
  *into.max = max;
}

// The open segment has ended: it joins those before it, and an empty one is opened.
void close_segment(float* state, std::size_t padded) {
  merge(state + padded + 32, state, padded);
  clear(state, padded);
}

// Queries in f32, and where each line's partial lies.
template <DType dtype>
void load_lines(const FoldTask& task, const Pass& pass) {
  const AttentionShape& shape = *task.shape;
  const std::uint32_t group = shape.query_heads / shape.kv_heads;
  const std::size_t state_floats = 2 * (pass.padded + 32);
  const V scale = splat(shape.scale * log2_e);
  std::size_t line = 0;
  for (std::uint32_t row = task.row_begin; row < task.row_end; ++row) {
    for (std::uint32_t h = task.kv_head * group; h < (task.kv_head + 1) * group; ++h, ++line) {
      const std::int64_t at = row * task.work->q.row_stride + h * task.work->q.head_stride;
      const auto* from = static_cast<const std::byte*>(task.work->q.data) +
                         at * static_cast<std::int64_t>(element_bytes<dtype>);
      float* to = pass.queries + line * pass.padded;
      for (std::size_t d = 0; d < pass.dim; d += lanes) {
        store(to + d, load_row<dtype>(from, d, pass.dim) * scale);
      }
      if (task.partials != nullptr) {
        pass.partial[line] = task.partials + line * (pass.padded + 32);
        clear(pass.partial[line], pass.padded);
      } else {
        pass.partial[line] =
            task.work->state + (std::size_t{row} * shape.query_heads + h) * state_floats;
      }
    }
  }
}

Pass lay_out(const FoldTask& task, float* scratch, std::size_t lines) {
  Pass pass{};
  pass.dim = task.shape->head_dim;
  pass.padded = padded_dim(task.shape->head_dim);
  pass.cap = task.shape->soft_cap * log2_e;
  pass.keys = scratch;
  pass.values = pass.keys + pass_tokens * pass.dim;
  pass.weights = pass.values + pass_tokens * pass.padded;
  pass.queries = pass.weights + lines * pass_tokens;
  pass.partial = reinterpret_cast<float**>(pass.queries + lines * pass.padded);
  for (std::size_t i = 0; i < pass_tokens * pass.padded; i += lanes) store(pass.values + i, V{});
  return pass;
}

// What the row at `position` sees of the tokens [begin, end); empty where its end is 0.
PIE_INLINE Seen seen_by(const AttentionShape& shape, std::uint32_t position, std::uint32_t begin,
                        std::uint32_t end) {
  const std::uint32_t first = first_seen(shape, position);
  if (position < begin || first >= end) return {};
  const std::uint32_t seen_end = position + 1 < end ? position + 1 : end;
  return {first > begin ? first - begin : 0, seen_end - begin};
}

// One pass: rows next to each other that see the same of it go together.
template <DType dtype>
void fold_pass(const FoldTask& task, const Pass& pass, std::uint32_t begin, std::uint32_t end) {
  const AttentionShape& shape = *task.shape;
  const std::size_t group = shape.query_heads / shape.kv_heads;
  const std::uint32_t position = task.work->position;
  unpack<dtype>(task, pass, begin, end);
  for (std::uint32_t row = task.row_begin; row < task.row_end;) {
    const Seen seen = seen_by(shape, position + row, begin, end);
    std::uint32_t next = row + 1;
    for (; next < task.row_end; ++next) {
      const Seen other = seen_by(shape, position + next, begin, end);
      if (other.first != seen.first || other.end != seen.end) break;
    }
    if (seen.end > 0) {
      fold_lines(pass, (row - task.row_begin) * group, (next - task.row_begin) * group, seen);
    }
    row = next;
  }
}

template <DType dtype>
void fold_as(const FoldTask& task, float* scratch) {
  const std::uint32_t group = task.shape->query_heads / task.shape->kv_heads;
  const std::size_t lines = std::size_t{task.row_end - task.row_begin} * group;
  const Pass pass = lay_out(task, scratch, lines);
  load_lines<dtype>(task, pass);
  for (std::uint32_t t = task.token_begin; t < task.token_end;) {
    if (t % segment_tokens == 0 && t > 0 && task.partials == nullptr) {
      std::uint32_t row = task.row_begin;
      if (task.work->position + row < t) row = t - task.work->position;
      for (std::size_t line = std::size_t{row - task.row_begin} * group; line < lines; ++line) {
        close_segment(pass.partial[line], pass.padded);
      }
    }
    const std::uint32_t next = (t / pass_tokens + 1) * pass_tokens;
    const std::uint32_t end = next < task.token_end ? next : task.token_end;
    fold_pass<dtype>(task, pass, t, end);
    t = end;
  }
}

void fold(const FoldTask& task, float* scratch) {
  switch (task.shape->dtype) {
    case DType::f32:
      return fold_as<DType::f32>(task, scratch);
    case DType::bf16:
      return fold_as<DType::bf16>(task, scratch);
    case DType::f16:
      return fold_as<DType::f16>(task, scratch);
  }
}

void advance(std::uint32_t head_dim, float* state, const float* partial) {
  const std::size_t padded = padded_dim(head_dim);
  close_segment(state, padded);
  std::memcpy(state, partial, (padded + 17) * sizeof(float));
}

template <DType dtype>
void write_row(const float* values, V factor, std::size_t dim, std::byte* out) {
  for (std::size_t d = 0; d < dim; d += lanes) {
    store_row<dtype>(out, load(values + d) * factor, d, dim);
  }
}

// A sink is one score more in the sum, without a value.
void add_sink(float* whole, std::size_t padded, float sink) {
  const Partial at = parts(whole, padded);
  const float score = sink * log2_e;
  const float max = *at.max > score ? *at.max : score;
  const V factor = exp2(splat(*at.max - max));
  for (std::size_t i = 0; i < padded + 16; i += lanes) store(whole + i, load(whole + i) * factor);
  at.sums[0] += exp2(splat(score - max))[0];
  *at.max = max;
}

float finish(const AttentionShape& shape, std::uint32_t head, const float* state, std::byte* out) {
  const std::size_t padded = padded_dim(shape.head_dim);
  float whole[256 + 32];
  std::memcpy(whole, state + padded + 32, (padded + 17) * sizeof(float));
  merge(whole, state, padded);
  if (shape.sinks != nullptr) add_sink(whole, padded, shape.sinks[head]);
  const Partial at = parts(whole, padded);
  float sum = 0;
  for (int i = 0; i < 16; ++i) sum += at.sums[i];
  const bool empty = sum == 0;
  const V factor = splat(empty ? 0.0F : 1.0F / sum);
  switch (shape.dtype) {
    case DType::f32:
      write_row<DType::f32>(whole, factor, shape.head_dim, out);
      break;
    case DType::bf16:
      write_row<DType::bf16>(whole, factor, shape.head_dim, out);
      break;
    case DType::f16:
      write_row<DType::f16>(whole, factor, shape.head_dim, out);
      break;
  }
  return empty ? -infinity : ln_2 * (*at.max + __builtin_log2f(sum));
}

}  // namespace
}  // namespace pie::attention
