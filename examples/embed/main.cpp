// A decoder loop in C++ over pie: a small transformer with random weights generates tokens for
// three prompts, with room on the device for a part of their K and V; the rest streams from a file.
//
// It runs four times: with all K and V on the device, with a small budget, with that budget in
// memory of its own, and with an attention kernel of its own. All must give the same tokens.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "pie/backends.hpp"
#include "pie/cache.hpp"

namespace {

constexpr std::uint32_t layers = 4;
constexpr std::uint32_t query_heads = 4;
constexpr std::uint32_t kv_heads = 2;
constexpr std::uint32_t head_dim = 32;
constexpr std::uint32_t block_tokens = 16;
constexpr std::uint32_t width = query_heads * head_dim;
constexpr std::uint32_t kv_width = kv_heads * head_dim;
constexpr std::uint32_t vocabulary = 101;
constexpr std::uint32_t new_tokens = 40;

using Matrix = std::vector<float>;  // row-major

// rows x `from` times from x `to`.
Matrix multiply(const Matrix& x, const Matrix& weights, std::size_t from, std::size_t to) {
  Matrix result(x.size() / from * to);
  for (std::size_t row = 0; row < x.size() / from; ++row) {
    for (std::size_t i = 0; i < from; ++i) {
      for (std::size_t j = 0; j < to; ++j) {
        result[row * to + j] += x[row * from + i] * weights[i * to + j];
      }
    }
  }
  return result;
}

struct Layer {
  Matrix q, k, v, out;
};

struct Model {
  Matrix embedding;  // [vocabulary, width]
  Matrix head;       // [vocabulary, width]
  std::vector<Layer> layers;
};

Matrix random_matrix(std::mt19937& random, std::size_t rows, std::size_t columns) {
  Matrix matrix(rows * columns);
  for (float& x : matrix) {
    const float uniform = static_cast<float>(random()) / static_cast<float>(std::mt19937::max());
    x = (4 * uniform - 2) / std::sqrt(static_cast<float>(rows));
  }
  return matrix;
}

Model random_model() {
  std::mt19937 random(7);
  Model model;
  model.embedding = random_matrix(random, vocabulary, width);
  model.head = random_matrix(random, vocabulary, width);
  for (std::uint32_t i = 0; i < layers; ++i) {
    Layer& layer = model.layers.emplace_back();
    layer.q = random_matrix(random, width, width);
    layer.k = random_matrix(random, width, kv_width);
    layer.v = random_matrix(random, width, kv_width);
    layer.out = random_matrix(random, width, width);
  }
  return model;
}

// Attention of one's own, the plain way: scores, weights and values of a row kept between pieces.
class PlainAttention final : public pie::LayerKernel {
 public:
  PlainAttention(const Matrix& q, const Matrix& k, const Matrix& v, Matrix& out)
      : q_(q), k_(k), v_(v), out_(out), sum_(q.size() / head_dim), max_(sum_.size(), -HUGE_VALF) {}

  // A frame holds K, then V, each `[kv_heads, block_tokens, head_dim]`.
  void append(const pie::Append& rows) override {
    rows.each_run([&](std::byte* frame, std::uint32_t token, std::uint32_t count,
                      std::uint32_t row) { store(frame, token, count, row); });
  }

  void attend(std::uint32_t /*layer*/, std::span<const pie::KvPiece> pieces) override {
    for (const pie::KvPiece& piece : pieces) {
      for (std::uint32_t line = 0; line < piece.rows * query_heads; ++line) fold(piece, line);
    }
  }

 private:
  void store(std::byte* frame, std::uint32_t token, std::uint32_t rows, std::uint32_t row) const {
    auto* to = reinterpret_cast<float*>(frame);
    for (const Matrix* from : {&k_, &v_}) {
      for (std::uint32_t head = 0; head < kv_heads; ++head, to += block_tokens * head_dim) {
        for (std::uint32_t i = 0; i < rows; ++i) {
          const float* source = from->data() + (row + i) * kv_width + head * head_dim;
          std::copy_n(source, head_dim, to + (token + i) * head_dim);
        }
      }
    }
  }

  void fold(const pie::KvPiece& piece, std::uint32_t line) {
    const std::uint32_t row = line / query_heads;
    const std::uint32_t kv_head = line % query_heads / (query_heads / kv_heads);
    const std::size_t at = std::size_t{piece.first_row} * query_heads + line;
    float* out = out_.data() + at * head_dim;
    if (piece.first) std::fill_n(out, head_dim, 0.0F);
    const std::uint32_t end = std::min(piece.kv_end, piece.position + row + 1);
    for (std::uint32_t t = piece.kv_begin; t < end; ++t) {
      const auto* frame =
          reinterpret_cast<const float*>(piece.frames[(t - piece.kv_begin) / block_tokens]);
      const float* k = frame + (kv_head * block_tokens + t % block_tokens) * head_dim;
      add(at, k, k + kv_heads * block_tokens * head_dim, out);
    }
    if (!piece.last) return;
    for (std::uint32_t d = 0; d < head_dim; ++d) out[d] /= sum_[at];
  }

  // One token more: what was summed up is scaled down where its score is the largest so far.
  void add(std::size_t at, const float* k, const float* v, float* out) {
    float score = 0;
    for (std::uint32_t d = 0; d < head_dim; ++d) score += q_[at * head_dim + d] * k[d];
    score /= std::sqrt(static_cast<float>(head_dim));
    const float max = std::max(max_[at], score);
    const float before = std::exp(max_[at] - max);
    const float weight = std::exp(score - max);
    for (std::uint32_t d = 0; d < head_dim; ++d) out[d] = out[d] * before + weight * v[d];
    sum_[at] = sum_[at] * before + weight;
    max_[at] = max;
  }

  const Matrix& q_;
  const Matrix& k_;
  const Matrix& v_;
  Matrix& out_;
  std::vector<float> sum_;  // by row and query head
  std::vector<float> max_;
};

struct Run {
  pie::Cache& cache;
  const Model& model;
  bool own_attention;

  // One step: `tokens` are the new ones of all sequences of the batch, one after the other. Returns
  // the likeliest token after each.
  std::vector<std::uint32_t> forward(const std::vector<pie::StepEntry>& batch,
                                     const std::vector<std::uint32_t>& tokens) {
    Matrix hidden;
    for (const std::uint32_t token : tokens) {
      const auto row = model.embedding.begin() + token * width;
      hidden.insert(hidden.end(), row, row + width);
    }
    cache.begin(batch, own_attention ? pie::Reader::kernel : pie::Reader::attend);
    for (std::uint32_t layer = 0; layer < layers; ++layer) run_layer(layer, hidden);
    cache.finish();
    return choose(hidden);
  }

  void run_layer(std::uint32_t index, Matrix& hidden) {
    const Layer& layer = model.layers[index];
    const Matrix q = multiply(hidden, layer.q, width, width);
    const Matrix k = multiply(hidden, layer.k, width, kv_width);
    const Matrix v = multiply(hidden, layer.v, width, kv_width);
    Matrix out(q.size());
    if (own_attention) {
      PlainAttention attention(q, k, v, out);
      cache.run(index, attention);
    } else {
      const pie::AttendOptions options{.scale = 1 / std::sqrt(static_cast<float>(head_dim))};
      cache.attend(index, {{k.data(), kv_width, head_dim}, {v.data(), kv_width, head_dim}},
                   {q.data(), width, head_dim}, {out.data(), width, head_dim}, query_heads, options,
                   nullptr);
    }
    const Matrix added = multiply(out, layer.out, width, width);
    for (std::size_t i = 0; i < hidden.size(); ++i) hidden[i] += std::tanh(added[i]);
  }

  [[nodiscard]] std::vector<std::uint32_t> choose(const Matrix& hidden) const {
    std::vector<std::uint32_t> chosen;
    for (std::size_t row = 0; row < hidden.size(); row += width) {
      std::vector<float> scores(vocabulary);
      for (std::size_t token = 0; token < vocabulary; ++token) {
        for (std::size_t i = 0; i < width; ++i) {
          scores[token] += hidden[row + i] * model.head[token * width + i];
        }
      }
      chosen.push_back(static_cast<std::uint32_t>(std::max_element(scores.begin(), scores.end()) -
                                                  scores.begin()));
    }
    return chosen;
  }
};

// Prefills each prompt in chunks, then decodes all of them together; returns the new tokens.
std::vector<std::uint32_t> generate(pie::Cache& cache, bool own_attention) {
  const Model model = random_model();
  Run run{cache, model, own_attention};
  std::vector<pie::StepEntry> batch;
  std::vector<std::uint32_t> last;
  for (const std::uint32_t length : {300U, 150U, 71U}) {
    const pie::SequenceId sequence = cache.add();
    for (std::uint32_t done = 0; done < length; done += 64) {
      std::vector<std::uint32_t> chunk;
      for (std::uint32_t i = done; i < std::min(length, done + 64); ++i) {
        chunk.push_back(i * 31 % vocabulary);
      }
      const auto count = static_cast<std::uint32_t>(chunk.size());
      const std::uint32_t next = run.forward({{sequence, count}}, chunk).back();
      if (done + count == length) last.push_back(next);
    }
    batch.push_back({sequence, 1});
  }
  std::vector<std::uint32_t> tokens = last;
  for (std::uint32_t i = 1; i < new_tokens; ++i) {
    // A random model repeats itself; the number of the step keeps it from that.
    for (std::uint32_t& token : last) token = (token + i) % vocabulary;
    last = run.forward(batch, last);
    tokens.insert(tokens.end(), last.begin(), last.end());
  }
  return tokens;
}

pie::CacheOptions options_with(pie::Bytes device_bytes) {
  pie::CacheOptions options;
  options.geometry = {layers, kv_heads, head_dim, block_tokens, pie::DType::f32};
  options.device_bytes = device_bytes;
  options.pool_bytes = 64 << 20;
  return options;
}

bool compare() {
  constexpr pie::Bytes small_bytes = 512 << 10;
  pie::Cache roomy(options_with(16 << 20));
  const std::vector<std::uint32_t> expected = generate(roomy, false);
  std::printf("last tokens:");
  for (std::size_t i = expected.size() - 12; i < expected.size(); ++i) {
    std::printf(" %u", expected[i]);
  }
  std::printf("\n");

  bool all_equal = true;
  const auto try_out = [&](const char* name, const pie::CacheOptions& options, bool own_attention) {
    pie::Cache cache(options);
    const bool equal = generate(cache, own_attention) == expected;
    const pie::Stats stats = cache.stats();
    std::printf("%-22s %5llu KiB of %llu KiB of KV on the device, %5llu KiB streamed: %s\n", name,
                static_cast<unsigned long long>(stats.device_bytes_peak >> 10),
                static_cast<unsigned long long>(stats.kv_bytes >> 10),
                static_cast<unsigned long long>(stats.streamed_bytes >> 10),
                equal ? "same tokens" : "OTHER TOKENS");
    all_equal = all_equal && equal && stats.streamed_bytes > 0;
  };
  try_out("a small budget", options_with(small_bytes), false);
  try_out("attention of one's own", options_with(small_bytes), true);
  const std::unique_ptr<std::byte, decltype(&std::free)> memory(
      static_cast<std::byte*>(std::aligned_alloc(4096, small_bytes)), &std::free);
  pie::CacheOptions own_memory = options_with(small_bytes);
  own_memory.device_memory = memory.get();
  try_out("memory of one's own", own_memory, false);
  return all_equal;
}

}  // namespace

int main() {
  try {
    return compare() ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "embed: %s\n", error.what());
    return 1;
  }
}
