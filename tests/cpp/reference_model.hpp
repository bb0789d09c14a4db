// The reference a cache is compared with: every K and V element is a function of what names it, so
// a block that ends up in the wrong place, or stale, cannot go unseen.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "memory_backend.hpp"
#include "pie/cache.hpp"
#include "pie/error.hpp"

namespace pie::testing {

inline constexpr std::uint32_t kv_heads = 2;
inline constexpr std::uint32_t query_heads = 4;
inline constexpr std::uint32_t head_dim = 8;

inline Geometry small_geometry(std::uint32_t layers) {
  return {layers, kv_heads, head_dim, 16, DType::f32};
}

// The value a K (or V) element has: a function of everything that names it, so a block that ends up
// in the wrong place cannot go unseen. `salt` makes appends after a truncation differ.
inline float value(std::uint64_t salt, std::uint32_t layer, std::uint32_t token, std::uint32_t head,
                   std::uint32_t d, bool v) {
  std::uint64_t x =
      salt * 1000003 + layer * 7919 + token * 104729 + head * 31 + d * 2 + (v ? 1 : 0);
  x ^= x >> 31;
  x *= 0x9e3779b97f4a7c15ULL;
  x ^= x >> 29;
  return static_cast<float>(x % 4096) / 2048.0F - 1.0F;
}

// One cache under test and what it should hold.
class Model {
 public:
  Model(std::uint32_t layers, const std::string& policy, std::unique_ptr<Backend> backend)
      : layers_(layers),
        backend_(dynamic_cast<MemoryBackend*>(backend.get())),
        cache_(std::make_unique<TieredCache>(small_geometry(layers), policy, std::move(backend))) {}

  Model(std::uint32_t layers, const std::string& policy, const MemoryOptions& options)
      : Model(layers, policy, std::make_unique<MemoryBackend>(options)) {}

  SequenceId add() {
    const SequenceId id = cache_->add();
    salts_[id] = {};
    return id;
  }

  void free(SequenceId id) {
    cache_->free(id);
    salts_.erase(id);
  }

  void truncate(SequenceId id, std::uint32_t tokens) {
    try {
      cache_->truncate(id, tokens);
    } catch (...) {
      // What was to go may be gone; what was to stay is there.
      ASSERT_GE(cache_->length(id), tokens);
      salts_[id].resize(cache_->length(id));
      throw;
    }
    salts_[id].resize(tokens);
  }

  // Runs a step and compares each layer with the reference; `layers_run` below `layers_` aborts.
  void step(const std::vector<StepEntry>& batch, Reader reader, std::uint32_t layers_run) {
    cache_->begin(batch, reader);
    const std::uint64_t salt = ++step_;
    std::map<SequenceId, std::vector<std::uint64_t>> after = salts_;
    for (const StepEntry& entry : batch) {
      after[entry.sequence].resize(after[entry.sequence].size() + entry.new_tokens, salt);
    }
    for (std::uint32_t layer = 0; layer < layers_run; ++layer)
      run_layer(batch, after, layer, reader);
    if (layers_run < layers_) {
      cache_->abort();
      return;
    }
    cache_->finish();
    salts_ = std::move(after);
  }

  void check() {
    cache_->check();
    for (const auto& [id, salts] : salts_) ASSERT_EQ(cache_->length(id), salts.size());
  }

  TieredCache& cache() { return *cache_; }
  MemoryBackend& backend() { return *backend_; }
  [[nodiscard]] const std::map<SequenceId, std::vector<std::uint64_t>>& salts() const {
    return salts_;
  }
  [[nodiscard]] std::uint32_t layers() const { return layers_; }

 private:
  using Salts = std::map<SequenceId, std::vector<std::uint64_t>>;

  void run_layer(const std::vector<StepEntry>& batch, const Salts& after, std::uint32_t layer,
                 Reader reader) {
    std::vector<float> k;
    std::vector<float> v;
    for (const StepEntry& entry : batch) {
      const auto& salts = after.at(entry.sequence);
      for (std::size_t t = salts.size() - entry.new_tokens; t < salts.size(); ++t) {
        for (std::uint32_t i = 0; i < kv_heads * head_dim; ++i) {
          const auto token = static_cast<std::uint32_t>(t);
          k.push_back(value(salts[t], layer, token, i / head_dim, i % head_dim, false));
          v.push_back(value(salts[t], layer, token, i / head_dim, i % head_dim, true));
        }
      }
    }
    const LayerInputs inputs{{k.data(), kv_heads * head_dim, head_dim},
                             {v.data(), kv_heads * head_dim, head_dim}};
    if (reader == Reader::gather) {
      compare_gathered(batch, after, layer, cache_->gather(layer, inputs));
    } else {
      attend_and_compare(batch, after, layer, inputs);
    }
  }

  void compare_gathered(const std::vector<StepEntry>& batch, const Salts& after,
                        std::uint32_t layer, const Gathered& gathered) {
    for (std::size_t s = 0; s < batch.size(); ++s) {
      const auto& salts = after.at(batch[s].sequence);
      for (std::uint32_t head = 0; head < kv_heads; ++head) {
        for (std::uint32_t t = 0; t < gathered.longest; ++t) {
          const std::size_t row = (s * kv_heads + head) * gathered.longest + t;
          for (std::uint32_t d = 0; d < head_dim; ++d) {
            const bool real = t < salts.size();
            const float want_k = real ? value(salts[t], layer, t, head, d, false) : 0.0F;
            const float want_v = real ? value(salts[t], layer, t, head, d, true) : 0.0F;
            ASSERT_EQ(static_cast<float*>(gathered.k)[row * head_dim + d], want_k);
            ASSERT_EQ(static_cast<float*>(gathered.v)[row * head_dim + d], want_v);
          }
        }
      }
    }
  }

  void attend_and_compare(const std::vector<StepEntry>& batch, const Salts& after,
                          std::uint32_t layer, const LayerInputs& inputs) {
    std::uint32_t rows = 0;
    for (const StepEntry& entry : batch) rows += entry.new_tokens;
    std::vector<float> q(rows * query_heads * head_dim);
    for (std::size_t i = 0; i < q.size(); ++i) {
      q[i] = value(layer, 3, static_cast<std::uint32_t>(i), 0, 0, false);
    }
    std::vector<float> out(q.size(), NAN);
    const std::int64_t stride = query_heads * head_dim;
    cache_->attend(layer, inputs, {q.data(), stride, head_dim}, {out.data(), stride, head_dim},
                   query_heads, {.scale = 0.35F}, nullptr);
    std::uint32_t row = 0;
    for (const StepEntry& entry : batch) {
      const auto& salts = after.at(entry.sequence);
      for (std::uint32_t i = 0; i < entry.new_tokens; ++i, ++row) {
        // The reference is slow: the first and last row of a sequence, and some between.
        if (i != 0 && i + 1 != entry.new_tokens && (i + step_) % 29 != 0) continue;
        const std::size_t seen = salts.size() - entry.new_tokens + i + 1;
        compare_row(salts, seen, layer, &q[row * query_heads * head_dim],
                    &out[row * query_heads * head_dim]);
      }
    }
  }

  static void compare_row(const std::vector<std::uint64_t>& salts, std::size_t seen,
                          std::uint32_t layer, const float* q, const float* out) {
    for (std::uint32_t head = 0; head < query_heads; ++head) {
      const std::uint32_t kv = head / (query_heads / kv_heads);
      double sum = 0;
      std::vector<double> want(head_dim);
      for (std::uint32_t t = 0; t < seen; ++t) {
        double score = 0;
        for (std::uint32_t d = 0; d < head_dim; ++d) {
          score += double{q[head * head_dim + d]} * value(salts[t], layer, t, kv, d, false);
        }
        const double weight = std::exp(score * 0.35);
        sum += weight;
        for (std::uint32_t d = 0; d < head_dim; ++d) {
          want[d] += weight * value(salts[t], layer, t, kv, d, true);
        }
      }
      for (std::uint32_t d = 0; d < head_dim; ++d) {
        ASSERT_NEAR(out[head * head_dim + d], want[d] / sum, 2e-5) << "layer " << layer;
      }
    }
  }

  std::uint32_t layers_;
  std::uint64_t step_ = 0;
  MemoryBackend* backend_;  // null where the cache runs on another
  std::unique_ptr<TieredCache> cache_;
  Salts salts_;  // per token, the step that wrote it
};

}  // namespace pie::testing
