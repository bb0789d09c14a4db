// CPU attention over frames, for every instruction set of this machine: close to a plain float64
// reference, and the same bits whatever the pieces, chunks, blocks and threads.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attention/kernels.hpp"
#include "pie/attention.hpp"
#include "pie/error.hpp"
#include "pie/parallel.hpp"

namespace pie {
namespace {

using Bits = std::vector<std::byte>;

// The compiler's own 16-bit float; g++ 12 has the standard's name for it on x86-64 only.
#if defined(__aarch64__)
using Half = __fp16;
#else
using Half = _Float16;
#endif

const float infinity = std::numeric_limits<float>::infinity();

// --- Elements

void encode(float x, DType dtype, std::byte* to) {
  if (dtype == DType::f32) {
    std::memcpy(to, &x, 4);
  } else if (dtype == DType::f16) {
    const auto half = static_cast<Half>(x);
    std::memcpy(to, &half, 2);
  } else {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    auto half = static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    if (std::isnan(x)) half = static_cast<std::uint16_t>(bits >> 16 | 0x40);
    std::memcpy(to, &half, 2);
  }
}

float decode(const std::byte* from, DType dtype) {
  if (dtype == DType::f32) {
    float x = 0;
    std::memcpy(&x, from, 4);
    return x;
  }
  std::uint16_t half = 0;
  std::memcpy(&half, from, 2);
  if (dtype == DType::f16) return static_cast<float>(std::bit_cast<Half>(half));
  return std::bit_cast<float>(std::uint32_t{half} << 16);
}

// A row-major matrix of elements, as a caller's tensor.
struct Matrix {
  DType dtype = DType::f32;
  std::int64_t heads = 0;
  std::int64_t dim = 0;
  Bits bytes;

  Matrix(DType type, std::size_t rows, std::uint32_t head_count, std::uint32_t head_dim)
      : dtype(type),
        heads(head_count),
        dim(head_dim),
        bytes(rows * head_count * head_dim * dtype_bytes(type)) {}

  [[nodiscard]] std::size_t offset(std::size_t row, std::size_t head, std::size_t d) const {
    return ((row * static_cast<std::size_t>(heads) + head) * static_cast<std::size_t>(dim) + d) *
           dtype_bytes(dtype);
  }
  [[nodiscard]] float at(std::size_t row, std::size_t head, std::size_t d) const {
    return decode(bytes.data() + offset(row, head, d), dtype);
  }
  [[nodiscard]] std::vector<double> values() const {
    std::vector<double> x;
    for (std::size_t i = 0; i < bytes.size(); i += dtype_bytes(dtype)) {
      x.push_back(double{decode(bytes.data() + i, dtype)});
    }
    return x;
  }
  void set(std::size_t row, std::size_t head, std::size_t d, float x) {
    encode(x, dtype, bytes.data() + offset(row, head, d));
  }
  void randomise(std::mt19937& random, float spread) {
    std::normal_distribution<float> normal(0, spread);
    for (std::size_t i = 0; i < bytes.size(); i += dtype_bytes(dtype)) {
      encode(normal(random), dtype, bytes.data() + i);
    }
  }
  [[nodiscard]] Rows rows(std::size_t first) const {
    return {bytes.data() + offset(first, 0, 0), heads * dim, dim};
  }
};

// --- A sequence, and ways to compute its attention

// The last `rows` tokens of a sequence of `tokens` tokens attend to all that came before them.
struct Sequence {
  AttentionShape shape;
  std::uint32_t tokens;
  std::uint32_t rows;
  Matrix q, k, v;

  Sequence(const AttentionShape& s, std::uint32_t token_count, std::uint32_t row_count,
           std::uint32_t seed, float spread = 1)
      : shape(s),
        tokens(token_count),
        rows(row_count),
        q(s.dtype, row_count, s.query_heads, s.head_dim),
        k(s.dtype, token_count, s.kv_heads, s.head_dim),
        v(s.dtype, token_count, s.kv_heads, s.head_dim) {
    std::mt19937 random(seed);
    q.randomise(random, spread);
    k.randomise(random, spread);
    v.randomise(random, 1);
  }
  [[nodiscard]] std::uint32_t position() const { return tokens - rows; }
};

struct Result {
  Bits out;
  std::vector<float> lse;
  friend bool operator==(const Result& a, const Result& b) {
    return a.out == b.out && a.lse.size() == b.lse.size() &&
           std::memcmp(a.lse.data(), b.lse.data(), a.lse.size() * sizeof(float)) == 0;
  }
};

// How a result is computed. Rows and tokens are cut at random where a seed is given.
struct Plan {
  std::uint32_t block_tokens = 64;
  std::uint32_t seed = 0;
  std::uint32_t rows_most = 0xffffffff;
  std::uint32_t granules_most = 0;  // of a piece; 0: one piece
  bool skip_unseen = false;         // leave out pieces that lie wholly before a chunk's window
};

// Frames of one sequence, with what no row may see filled by NaN.
class Frames {
 public:
  Frames(const Sequence& sequence, const AttentionShape& shape) {
    const std::uint32_t blocks = (sequence.tokens + shape.block_tokens - 1) / shape.block_tokens;
    const std::size_t bytes =
        2 * shape.kv_heads * shape.block_tokens * shape.head_dim * dtype_bytes(shape.dtype);
    bytes_ = bytes;
    memory_.assign(blocks * bytes, std::byte{0xff});
    // In the reverse order, so that a table read wrongly shows.
    for (std::uint32_t b = 0; b < blocks; ++b)
      table_.push_back(static_cast<std::int32_t>(blocks - 1 - b));
    for (std::uint32_t t = 0, step = 1; t < sequence.tokens; t += step, ++step) {
      const std::uint32_t token = t % shape.block_tokens;
      step = std::min({step, shape.block_tokens - token, sequence.tokens - t});
      const std::size_t frame = blocks - 1 - t / shape.block_tokens;
      frame_append(shape, memory_.data() + frame * bytes, token, step, sequence.k.rows(t),
                   sequence.v.rows(t));
    }
  }
  [[nodiscard]] BlockFrames from(std::uint32_t block) const {
    return {memory_.data(), bytes_, table_.data() + block};
  }

 private:
  Bits memory_;
  Bytes bytes_ = 0;
  std::vector<std::int32_t> table_;
};

// Random cuts of [0, end): ascending, ending with `end`.
std::vector<std::uint32_t> cuts(std::mt19937& random, std::uint32_t end, std::uint32_t unit,
                                std::uint32_t units_most) {
  std::vector<std::uint32_t> at{0};
  while (at.back() < end) {
    const std::uint64_t units = units_most == 0 ? end : 1 + random() % units_most;
    at.push_back(
        static_cast<std::uint32_t>(std::min<std::uint64_t>(end, at.back() + units * unit)));
  }
  return at;
}

Result attend(const std::vector<Sequence>& sequences, const Plan& plan) {
  std::mt19937 random(plan.seed);
  AttentionShape shape = sequences.front().shape;
  shape.block_tokens = plan.block_tokens;
  const std::size_t row_floats = attention_state_floats(shape);
  std::size_t rows = 0;
  std::uint32_t tokens = 0;
  for (const Sequence& s : sequences) {
    rows += s.rows;
    tokens = std::max(tokens, s.tokens);
  }
  std::vector<float> state(rows * row_floats, std::numeric_limits<float>::quiet_NaN());
  attention_reset(shape, state.data(), static_cast<std::uint32_t>(rows));
  std::vector<Frames> frames;
  std::vector<std::vector<std::uint32_t>> chunks;
  for (const Sequence& s : sequences) {
    frames.emplace_back(s, shape);
    chunks.push_back(cuts(random, s.rows, 1, plan.rows_most == 0xffffffff ? 0 : plan.rows_most));
  }
  const std::vector<std::uint32_t> pieces =
      cuts(random, tokens, granule_tokens, plan.granules_most);
  for (std::size_t piece = 0; piece + 1 < pieces.size(); ++piece) {
    std::vector<AttentionWork> work;
    float* first = state.data();
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      const Sequence& s = sequences[i];
      const std::uint32_t end = std::min(pieces[piece + 1], s.tokens);
      for (std::size_t c = 0; c + 1 < chunks[i].size() && pieces[piece] < end; ++c) {
        const std::uint32_t row = chunks[i][c];
        const std::uint32_t seen = attention::first_seen(shape, s.position() + row);
        if (plan.skip_unseen && end <= seen) continue;
        work.push_back({.q = s.q.rows(row),
                        .rows = chunks[i][c + 1] - row,
                        .position = s.position() + row,
                        .kv_begin = pieces[piece],
                        .kv_end = end,
                        .frames = frames[i].from(pieces[piece] / shape.block_tokens),
                        .state = first + row * row_floats});
      }
      first += s.rows * row_floats;
    }
    attention_fold(shape, work);
  }
  Matrix out(shape.dtype, rows, shape.query_heads, shape.head_dim);
  Result result;
  result.lse.resize(rows * shape.query_heads);
  attention_finish(shape, state.data(), static_cast<std::uint32_t>(rows),
                   {out.bytes.data(), out.heads * out.dim, out.dim}, result.lse.data());
  result.out = out.bytes;
  return result;
}

Result attend(const Sequence& sequence, const Plan& plan) {
  return attend(std::vector<Sequence>{sequence}, plan);
}

// --- The reference

struct Error {
  double out = 0;  // relative L2
  double lse = 0;  // largest absolute
};

// Softmax attention of one row and head over the tokens it sees: weights in place of `x`, the
// scaled scores, and of `sink`; returns the log-sum-exp.
double softmax(std::vector<double>& x, double sink) {
  const double max = std::max(sink, *std::max_element(x.begin(), x.end()));
  double sum = std::exp(sink - max);
  for (double& score : x) {
    score = std::exp(score - max);
    sum += score;
  }
  for (double& weight : x) weight /= sum;
  return max + std::log(sum);
}

Error error_of(const Sequence& s, const Result& result) {
  const std::vector<double> q = s.q.values();
  const std::vector<double> k = s.k.values();
  const std::vector<double> v = s.v.values();
  const std::size_t dim = s.shape.head_dim;
  double square = 0;
  double total = 0;
  Error error;
  for (std::size_t line = 0; line < s.rows * std::size_t{s.shape.query_heads}; ++line) {
    const std::size_t row = line / s.shape.query_heads;
    const std::size_t head = line % s.shape.query_heads;
    const std::size_t kv_head = head / (s.shape.query_heads / s.shape.kv_heads);
    const std::uint32_t position = s.position() + static_cast<std::uint32_t>(row);
    const std::uint32_t first = attention::first_seen(s.shape, position);
    std::vector<double> x(position + 1 - first, 0);
    const auto kv_at = [&](std::size_t i) {
      return ((first + i) * s.shape.kv_heads + kv_head) * dim;
    };
    for (std::size_t t = 0; t < x.size(); ++t) {
      for (std::size_t d = 0; d < dim; ++d) x[t] += q[line * dim + d] * k[kv_at(t) + d];
      x[t] *= double{s.shape.scale};
      const double cap{s.shape.soft_cap};
      if (cap > 0) x[t] = cap * std::tanh(x[t] / cap);
    }
    const double sink = s.shape.sinks == nullptr ? -HUGE_VAL : double{s.shape.sinks[head]};
    error.lse = std::max(error.lse, std::abs(double{result.lse[line]} - softmax(x, sink)));
    for (std::size_t d = 0; d < dim; ++d) {
      double value = 0;
      for (std::size_t t = 0; t < x.size(); ++t) value += x[t] * v[kv_at(t) + d];
      const std::byte* out = result.out.data() + s.q.offset(row, head, d);
      const double got = double{decode(out, s.shape.dtype)};
      square += (got - value) * (got - value);
      total += value * value;
    }
  }
  error.out = std::sqrt(square / total);
  return error;
}

// --- Threads and instruction sets

// Three threads, each taking every third index: as unlike the serial order as can be.
void run_on_threads(std::size_t count, void (*body)(void*, std::size_t), void* context) {
  std::vector<std::thread> threads;
  for (std::size_t first = 0; first < 3; ++first) {
    threads.emplace_back([=] {
      for (std::size_t i = first; i < count; i += 3) body(context, count - 1 - i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

struct WithThreads {
  WithThreads() { set_parallel_runner(run_on_threads); }
  ~WithThreads() { set_parallel_runner(nullptr); }
  WithThreads(const WithThreads&) = delete;
  WithThreads& operator=(const WithThreads&) = delete;
};

// Every test runs with every instruction set.
class AttentionTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    try {
      attention::use_kernels(attention::find_kernels(GetParam()));
    } catch (const ConfigError& error) {
      GTEST_SKIP() << error.what();
    }
  }
  void TearDown() override { attention::use_kernels(attention::find_kernels("")); }
};

AttentionShape shape_of(std::uint32_t kv_heads, std::uint32_t group, std::uint32_t head_dim,
                        DType dtype) {
  return {.query_heads = kv_heads * group,
          .kv_heads = kv_heads,
          .head_dim = head_dim,
          .block_tokens = 64,
          .dtype = dtype,
          .scale = 1 / std::sqrt(static_cast<float>(head_dim))};
}

const char* name_of(DType dtype) {
  return dtype == DType::f32 ? "f32" : dtype == DType::bf16 ? "bf16" : "f16";
}

struct Case {
  std::uint32_t kv_heads, group, head_dim, tokens, rows;
};

constexpr Case cases[] = {
    {1, 1, 8, 1, 1},     {1, 1, 8, 70, 70},    {2, 3, 16, 33, 33},    {1, 9, 24, 100, 7},
    {2, 7, 64, 531, 1},  {3, 3, 64, 600, 40},  {2, 4, 40, 129, 129},  {1, 8, 80, 257, 3},
    {2, 5, 96, 48, 48},  {1, 6, 112, 513, 2},  {2, 2, 120, 65, 64},   {1, 4, 128, 1100, 17},
    {1, 2, 136, 90, 31}, {1, 1, 192, 1030, 1}, {2, 1, 256, 150, 100}, {1, 9, 248, 67, 5},
};

// What models ask of their attention beside the plain kind.
struct Variant {
  const char* name;
  std::uint32_t window = 0;
  float soft_cap = 0;
  bool sinks = false;
};

constexpr Variant variants[] = {{.name = "plain"},
                                {.name = "window 1", .window = 1},
                                {.name = "window 37", .window = 37},
                                {.name = "window 500", .window = 500},
                                {.name = "soft cap 2", .soft_cap = 2},
                                {.name = "soft cap 50", .soft_cap = 50},
                                {.name = "sinks", .sinks = true},
                                {.name = "all", .window = 100, .soft_cap = 5, .sinks = true}};

AttentionShape with(AttentionShape shape, const Variant& variant) {
  static const std::vector<float> sinks = [] {
    std::vector<float> some;
    for (int i = 0; i < 64; ++i) some.push_back(static_cast<float>(i % 7) - 3.5F);
    return some;
  }();
  shape.window = variant.window;
  shape.soft_cap = variant.soft_cap;
  if (variant.sinks) shape.sinks = sinks.data();
  return shape;
}

TEST_P(AttentionTest, VariantsAreCloseToFloat64) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    const double limit = dtype == DType::f32 ? 1e-5 : dtype == DType::bf16 ? 2e-2 : 3e-3;
    for (const Variant& variant : variants) {
      Error worst;
      for (const Case& c : cases) {
        const AttentionShape shape =
            with(shape_of(c.kv_heads, c.group, c.head_dim, dtype), variant);
        const Sequence s(shape, c.tokens, c.rows, c.tokens);
        const Error error = error_of(s, attend(s, {}));
        EXPECT_LT(error.out, limit) << name_of(dtype) << " " << variant.name << " head_dim "
                                    << c.head_dim << " tokens " << c.tokens;
        EXPECT_LT(error.lse, 2e-5) << name_of(dtype) << " " << variant.name;
        worst = {std::max(worst.out, error.out), std::max(worst.lse, error.lse)};
      }
      std::printf("%-12s %-4s  %-12s  relative L2 error %.2e, of log-sum-exp %.2e\n",
                  GetParam().c_str(), name_of(dtype), variant.name, worst.out, worst.lse);
    }
  }
}

TEST_P(AttentionTest, BitsOfVariantsDoNotDependOnTheWayThere) {
  for (const Variant& variant : variants) {
    for (const Case& c : cases) {
      const DType dtype = c.tokens % 2 == 0 ? DType::f32 : DType::bf16;
      const Sequence s(with(shape_of(c.kv_heads, c.group, c.head_dim, dtype), variant), c.tokens,
                       c.rows, c.rows, 2);
      const Result whole = attend(s, {});
      const Plan plans[] = {
          {.block_tokens = 16, .seed = 1, .rows_most = 5, .granules_most = 2, .skip_unseen = true},
          {.block_tokens = 64, .seed = 2, .rows_most = 1, .granules_most = 9, .skip_unseen = true},
          {.block_tokens = 48, .seed = 3, .rows_most = 9, .granules_most = 1},
          {.block_tokens = 32, .seed = 4, .granules_most = 33, .skip_unseen = true},
      };
      for (const Plan& plan : plans) {
        EXPECT_EQ(attend(s, plan), whole) << variant.name << " head_dim " << c.head_dim
                                          << " tokens " << c.tokens << " plan " << plan.seed;
      }
      const WithThreads threads;
      EXPECT_EQ(attend(s, plans[3]), whole) << variant.name << " on threads";
    }
  }
}

// Frames before the window may be gone: nothing there is looked at.
TEST_P(AttentionTest, WhatLiesBeforeTheWindowCannotBeFelt) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    AttentionShape shape = shape_of(1, 2, 24, dtype);
    shape.window = 20;
    Sequence s(shape, 90, 60, 8);
    const Result clean = attend(s, {});
    for (std::size_t d = 0; d < shape.head_dim; ++d) {
      s.k.set(40, 0, d, std::numeric_limits<float>::quiet_NaN());
      s.v.set(40, 0, d, infinity);
    }
    const Result dirty = attend(s, {});
    const std::size_t after = s.q.offset(40 + 20 - s.position(), 0, 0);
    EXPECT_EQ(
        std::memcmp(clean.out.data() + after, dirty.out.data() + after, clean.out.size() - after),
        0);
    EXPECT_FALSE(clean == dirty);
  }
}

TEST_P(AttentionTest, RefusesNumbersThatMeanNothing) {
  const AttentionShape good = shape_of(1, 1, 8, DType::f32);
  std::vector<float> state(attention_state_floats(good));
  for (const float bad : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()}) {
    AttentionShape shape = good;
    shape.scale = bad;
    EXPECT_THROW(attention_reset(shape, state.data(), 1), LogicError);
    shape = good;
    shape.soft_cap = bad;
    EXPECT_THROW(attention_reset(shape, state.data(), 1), LogicError);
  }
  AttentionShape shape = good;
  shape.soft_cap = -1;
  EXPECT_THROW(attention_reset(shape, state.data(), 1), LogicError);
}

TEST_P(AttentionTest, TakesAnyScaleAndSharpScores) {
  for (const float scale : {0.0F, -0.5F, 3.0F}) {
    AttentionShape shape = shape_of(1, 3, 64, DType::f32);
    shape.scale = scale;
    const Sequence s(shape, 300, 20, 5);
    EXPECT_LT(error_of(s, attend(s, {})).out, 1e-5) << "scale " << scale;
  }
}

TEST_P(AttentionTest, BitsDoNotDependOnTheWayThere) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const Case& c : cases) {
      const Sequence s(shape_of(c.kv_heads, c.group, c.head_dim, dtype), c.tokens, c.rows, c.rows,
                       2);
      const Result whole = attend(s, {});
      const Plan plans[] = {
          {.block_tokens = 16},
          {.block_tokens = 48, .seed = 1, .granules_most = 1},
          {.block_tokens = 64, .seed = 2, .rows_most = 1},
          {.block_tokens = 32, .seed = 3, .rows_most = 5, .granules_most = 3},
          {.block_tokens = 128, .seed = 4, .rows_most = 40, .granules_most = 40},
          {.block_tokens = 1024, .seed = 5, .rows_most = 90, .granules_most = 9},
      };
      for (const Plan& plan : plans) {
        EXPECT_EQ(attend(s, plan), whole) << name_of(dtype) << " head_dim " << c.head_dim
                                          << " tokens " << c.tokens << " plan " << plan.seed;
        // Cutting into tasks knows no element type; and threads are started anew for every loop
        // here.
        if (dtype != DType::bf16 || (plan.granules_most > 0 && plan.granules_most < 9)) continue;
        const WithThreads threads;
        EXPECT_EQ(attend(s, plan), whole)
            << name_of(dtype) << " head_dim " << c.head_dim << " tokens " << c.tokens << " plan "
            << plan.seed << " on threads";
      }
    }
  }
}

TEST_P(AttentionTest, BitsDoNotDependOnRowsOrSequencesBeside) {
  const AttentionShape shape = shape_of(2, 3, 64, DType::bf16);
  const Sequence s(shape, 700, 200, 3);
  const Result whole = attend(s, {});
  const std::size_t row_bytes = whole.out.size() / s.rows;
  for (std::uint32_t row = 0; row < s.rows; row += 13) {
    Sequence alone(shape, s.position() + row + 1, 1, 0);
    alone.k = s.k;
    alone.v = s.v;
    std::memcpy(alone.q.bytes.data(), s.q.bytes.data() + row * row_bytes, row_bytes);
    const Result one = attend(alone, {.block_tokens = 16, .seed = row, .granules_most = 7});
    EXPECT_EQ(std::memcmp(one.out.data(), whole.out.data() + row * row_bytes, row_bytes), 0) << row;
  }
  const Sequence other(shape, 1100, 30, 4);
  const Sequence third(shape, 90, 90, 6);
  const WithThreads threads;
  const Result together = attend({other, s, third}, {.seed = 9, .granules_most = 30});
  EXPECT_EQ(
      std::memcmp(together.out.data() + other.rows * row_bytes, whole.out.data(), whole.out.size()),
      0);
}

TEST_P(AttentionTest, WhatIsNotSeenCannotBeFelt) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    const AttentionShape shape = shape_of(1, 2, 24, dtype);
    Sequence s(shape, 90, 60, 8);
    const Result clean = attend(s, {});
    const float bad = std::numeric_limits<float>::quiet_NaN();
    for (std::size_t d = 0; d < shape.head_dim; ++d) {
      s.k.set(75, 0, d, bad);
      s.v.set(75, 0, d, bad);
    }
    const Result dirty = attend(s, {});
    const std::size_t before = s.q.offset(75 - s.position(), 0, 0);
    EXPECT_EQ(std::memcmp(clean.out.data(), dirty.out.data(), before), 0);
    EXPECT_TRUE(std::isnan(decode(dirty.out.data() + before, dtype)));
  }
}

TEST_P(AttentionTest, ARowThatSeesNothingIsZero) {
  AttentionShape shape = shape_of(2, 2, 40, DType::f32);
  const Sequence s(shape, 96, 1, 1);
  const Frames frames(s, shape);
  std::vector<float> state(attention_state_floats(shape) * 2);
  attention_reset(shape, state.data(), 2);
  // Row 0 lies before the piece, and an empty piece shows nothing to anyone.
  const AttentionWork before{.q = s.q.rows(0),
                             .rows = 1,
                             .position = 10,
                             .kv_begin = 64,
                             .kv_end = 96,
                             .frames = frames.from(1),
                             .state = state.data()};
  const AttentionWork empty{.q = s.q.rows(0),
                            .rows = 1,
                            .position = 95,
                            .kv_begin = 0,
                            .kv_end = 0,
                            .frames = nullptr,
                            .state = state.data() + attention_state_floats(shape)};
  attention_fold(shape, std::vector{before, empty});
  attention_fold(shape, {});
  Matrix out(DType::f32, 2, shape.query_heads, shape.head_dim);
  std::fill(out.bytes.begin(), out.bytes.end(), std::byte{0xff});
  std::vector<float> lse(2 * shape.query_heads);
  attention_finish(shape, state.data(), 2, {out.bytes.data(), out.heads * out.dim, out.dim},
                   lse.data());
  EXPECT_EQ(out.bytes, Bits(out.bytes.size()));
  for (const float x : lse) EXPECT_EQ(x, -infinity);
}

TEST_P(AttentionTest, OverflowingScoresStayFinite) {
  const AttentionShape shape = shape_of(1, 1, 8, DType::f32);
  for (const float huge : {1e30F, -1e30F, infinity, -infinity}) {
    Sequence s(shape, 40, 1, 2);
    for (std::size_t d = 0; d < 8; ++d) {
      s.q.set(0, 0, d, 1e30F);
      s.k.set(20, 0, d, huge);
      for (std::size_t t = 0; t < 40; ++t) {
        if (t != 20) s.k.set(t, 0, d, 1e-31F);
      }
    }
    const Result result = attend(s, {});
    for (std::size_t d = 0; d < 8; ++d) {
      const float got = decode(result.out.data() + 4 * d, DType::f32);
      EXPECT_TRUE(std::isfinite(got)) << huge;
      if (huge > 0) {
        EXPECT_EQ(got, s.v.at(20, 0, d));
      }
    }
    EXPECT_FALSE(std::isnan(result.lse[0])) << huge;
  }
  Sequence s(shape, 600, 2, 2);
  for (std::size_t t = 0; t < 600; ++t) s.k.set(t, 0, 0, -infinity);
  s.q.set(0, 0, 0, 1);
  s.q.set(1, 0, 0, 1);
  const Result nothing = attend(s, {});
  EXPECT_EQ(nothing.lse[0], -infinity);
  EXPECT_EQ(decode(nothing.out.data(), DType::f32), 0.0F);
}

// With one token its value comes out as it went in; with two of equal score their mean does,
// rounded to nearest even.
TEST_P(AttentionTest, ElementsAreConvertedExactly) {
  for (const DType dtype : {DType::bf16, DType::f16}) {
    const AttentionShape shape = shape_of(1, 1, 256, dtype);
    for (std::uint32_t first = 0; first < 0x10000; first += 256) {
      Sequence s(shape, 2, 2, first);
      std::fill(s.k.bytes.begin(), s.k.bytes.end(), std::byte{0});
      for (std::uint32_t d = 0; d < 256; ++d) {
        const auto bits = static_cast<std::uint16_t>(first + d);
        const auto next = static_cast<std::uint16_t>(bits + d % 5);
        std::memcpy(s.v.bytes.data() + s.v.offset(0, 0, d), &bits, 2);
        std::memcpy(s.v.bytes.data() + s.v.offset(1, 0, d), &next, 2);
      }
      const Result result = attend(s, {});
      for (std::uint32_t d = 0; d < 256; ++d) {
        const float a = s.v.at(0, 0, d);
        const float b = s.v.at(1, 0, d);
        std::byte expected[4];
        encode((a + b) * 0.5F, dtype, expected);
        const float mean = decode(expected, dtype);
        const float got_a = decode(result.out.data() + s.q.offset(0, 0, d), dtype);
        const float got_mean = decode(result.out.data() + s.q.offset(1, 0, d), dtype);
        if (std::isnan(a)) {
          EXPECT_TRUE(std::isnan(got_a));
        } else {
          EXPECT_EQ(got_a, a) << name_of(dtype) << " bits " << first + d;
        }
        if (std::isnan(mean)) {
          EXPECT_TRUE(std::isnan(got_mean));
        } else if (std::isfinite(a + b)) {
          EXPECT_EQ(got_mean, mean) << name_of(dtype) << " bits " << first + d;
        }
      }
    }
  }
}

TEST_P(AttentionTest, TakesStridesOfTheCaller) {
  const AttentionShape shape = shape_of(2, 2, 16, DType::f32);
  const Sequence s(shape, 50, 5, 7);
  const Result expected = attend(s, {});
  // Heads slowest, rows padded: [head][row][dim + 3].
  const std::int64_t row_stride = 19;
  const std::int64_t head_stride = 5 * row_stride;
  std::vector<float> q(4 * 5 * 19);
  for (std::size_t row = 0; row < 5; ++row) {
    for (std::size_t head = 0; head < 4; ++head) {
      for (std::size_t d = 0; d < 16; ++d) q[(head * 5 + row) * 19 + d] = s.q.at(row, head, d);
    }
  }
  const Frames frames(s, shape);
  std::vector<float> state(5 * attention_state_floats(shape));
  attention_reset(shape, state.data(), 5);
  attention_fold(shape, std::vector{AttentionWork{.q = {q.data(), row_stride, head_stride},
                                                  .rows = 5,
                                                  .position = 45,
                                                  .kv_begin = 0,
                                                  .kv_end = 50,
                                                  .frames = frames.from(0),
                                                  .state = state.data()}});
  std::vector<float> out(q.size(), 7);
  attention_finish(shape, state.data(), 5, {out.data(), row_stride, head_stride}, nullptr);
  for (std::size_t row = 0; row < 5; ++row) {
    for (std::size_t head = 0; head < 4; ++head) {
      const float* got = out.data() + (head * 5 + row) * 19;
      for (std::size_t d = 0; d < 16; ++d) {
        EXPECT_EQ(got[d], decode(expected.out.data() + s.q.offset(row, head, d), DType::f32));
      }
      EXPECT_EQ(got[16], 7.0F) << "written past the row";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, AttentionTest, testing::Values("portable", "avx2", "avx512"),
                         [](const auto& isa) { return isa.param; });

// --- Calls that are wrong

TEST(AttentionChecks, RefusesUnknownInstructionSets) {
  try {
    static_cast<void>(attention::find_kernels("mmx"));
    FAIL() << "accepted";
  } catch (const ConfigError& error) {
    EXPECT_NE(std::string(error.what()).find("\"mmx\""), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("portable"), std::string::npos) << error.what();
  }
  EXPECT_EQ(attention_isa(), std::string(attention::find_kernels("").name));
}

TEST(AttentionChecks, RefusesShapesThatCannotBe) {
  const AttentionShape good = shape_of(2, 2, 64, DType::f32);
  std::vector<float> state(attention_state_floats(good));
  AttentionShape bad = good;
  bad.query_heads = 3;
  EXPECT_THROW(attention_reset(bad, state.data(), 1), LogicError);
  bad = good;
  bad.head_dim = 60;
  EXPECT_THROW(attention_reset(bad, state.data(), 1), LogicError);
  bad = good;
  bad.head_dim = 264;
  EXPECT_THROW(attention_fold(bad, {}), LogicError);
  bad = good;
  bad.block_tokens = 40;
  EXPECT_THROW(attention_fold(bad, {}), LogicError);
}

TEST(AttentionChecks, RefusesPiecesThatCannotBe) {
  const AttentionShape shape = shape_of(2, 2, 64, DType::f32);
  AttentionWork work;
  work.rows = 1;
  work.position = 100;
  work.kv_begin = 8;
  work.kv_end = 64;
  EXPECT_THROW(attention_fold(shape, std::vector{work}), LogicError);
  work.kv_begin = 80;
  EXPECT_THROW(attention_fold(shape, std::vector{work}), LogicError);
  work.kv_begin = 0;
  EXPECT_THROW(attention_fold(shape, std::vector{work}), LogicError) << "no frames";
}

TEST(FrameAppend, PutsAllKeysThenAllValues) {
  AttentionShape shape = shape_of(2, 1, 8, DType::bf16);
  shape.block_tokens = 16;
  const Sequence s(shape, 3, 1, 11);
  Bits frame(2 * 2 * 16 * 8 * 2, std::byte{0x5a});
  frame_append(shape, frame.data(), 12, 3, s.k.rows(0), s.v.rows(0));
  for (std::size_t head = 0; head < 2; ++head) {
    for (std::size_t row = 0; row < 3; ++row) {
      const std::size_t k = (head * 16 + 12 + row) * 16;
      EXPECT_EQ(std::memcmp(&frame[k], &s.k.bytes[s.k.offset(row, head, 0)], 16), 0);
      EXPECT_EQ(std::memcmp(&frame[k + 512], &s.v.bytes[s.v.offset(row, head, 0)], 16), 0);
    }
  }
  EXPECT_EQ(std::count(frame.begin(), frame.end(), std::byte{0x5a}) >= 1024 - 2 * 2 * 3 * 16, true);
  EXPECT_THROW(frame_append(shape, frame.data(), 14, 3, s.k.rows(0), s.v.rows(0)), LogicError);
}

}  // namespace
}  // namespace pie
