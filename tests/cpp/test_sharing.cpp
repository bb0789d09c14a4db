// Sequences that share blocks, windows that give frames back, budgets that move, tables of frames.
// Every token of every layer carries a stamp, which is checked whenever it is read.
#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "pie/backends.hpp"
#include "pie/cache.hpp"
#include "pie/error.hpp"

namespace pie {
namespace {

constexpr std::uint32_t size = 16;  // tokens of a block
constexpr std::uint32_t layers = 3;

using Stamps = std::vector<std::uint64_t>;

// K rows are 16 bytes: the stamp and 8 bytes of nothing. V is not looked at.
Geometry geometry_with(std::vector<std::uint32_t> windows = {}) {
  return {layers, 1, 8, size, DType::bf16, std::move(windows)};
}

std::uint64_t stamp_in(const std::byte* frame, std::uint32_t token) {
  std::uint64_t stamp = 0;
  std::memcpy(&stamp, frame + token % size * 16, sizeof stamp);
  return stamp;
}

// Stores stamps and compares what it is given with what the sequences should hold.
class Checker final : public LayerKernel {
 public:
  Checker(const std::map<SequenceId, Stamps>& held, std::uint32_t layer, Stamps rows)
      : held_(held), layer_(layer), rows_(std::move(rows)) {}

  void append(const Append& rows) override {
    rows.each_run(
        [&](std::byte* frame, std::uint32_t token, std::uint32_t count, std::uint32_t row) {
          for (std::uint32_t i = 0; i < count; ++i) {
            const std::uint64_t stamp = rows_[row + i] * layers + layer_;
            std::memcpy(frame + std::size_t{token + i} * 16, &stamp, sizeof stamp);
          }
        });
  }

  void attend(std::uint32_t layer, std::span<const KvPiece> pieces) override {
    for (const KvPiece& piece : pieces) {
      const Stamps& stamps = held_.at(piece.sequence);
      for (std::uint32_t t = piece.kv_begin; t < piece.kv_end; ++t) {
        const std::byte* frame = piece.frames[(t - piece.kv_begin) / size];
        ASSERT_EQ(stamp_in(frame, t), stamps[t] * layers + layer) << "token " << t;
      }
      if (piece.first) first_[piece.sequence] = piece.kv_begin;
    }
  }

  [[nodiscard]] std::uint32_t first(SequenceId sequence) const { return first_.at(sequence); }

 private:
  const std::map<SequenceId, Stamps>& held_;
  std::uint32_t layer_;
  Stamps rows_;
  std::map<SequenceId, std::uint32_t> first_;
};

class Sharing : public ::testing::Test {
 protected:
  void open(std::uint32_t device_frames, std::uint32_t pool_frames, const char* policy = "fit",
            std::vector<std::uint32_t> windows = {}) {
    const Geometry geometry = geometry_with(std::move(windows));
    SimOptions options;
    options.device_frames = device_frames;
    options.pool_frames = pool_frames;
    options.pool_frames_max = 10000;
    options.frame_bytes = geometry.frame_bytes();
    std::unique_ptr<SimBackend> backend = open_sim(options);
    machine_ = backend.get();
    cache_ = std::make_unique<Cache>(geometry, policy, std::move(backend));
    stride_ = geometry.frame_bytes();
  }

  SequenceId add() {
    const SequenceId id = cache_->add();
    held_[id] = {};
    return id;
  }

  SequenceId fork(SequenceId sequence) {
    const SequenceId id = cache_->fork(sequence);
    held_[id] = held_[sequence];
    return id;
  }

  void truncate(SequenceId sequence, std::uint32_t tokens) {
    cache_->truncate(sequence, tokens);
    held_[sequence].resize(tokens);
  }

  void free(SequenceId sequence) {
    cache_->free(sequence);
    held_.erase(sequence);
  }

  // Appends and checks all that the batch holds; `layers_run` below `layers` aborts.
  void step(const std::vector<StepEntry>& batch, std::uint32_t layers_run = layers) {
    cache_->begin(batch, Reader::kernel);
    std::map<SequenceId, Stamps> after = held_;
    Stamps rows;
    for (const StepEntry& entry : batch) {
      for (std::uint32_t i = 0; i < entry.new_tokens; ++i) {
        after[entry.sequence].push_back(++last_stamp_);
        rows.push_back(last_stamp_);
      }
    }
    for (std::uint32_t layer = 0; layer < layers_run; ++layer) {
      Checker checker(after, layer, rows);
      cache_->run(layer, checker);
      machine_->compute({}, {1'000'000});  // long enough for all that was asked for to arrive
      first_seen_ = checker.first(batch.front().sequence);
      cache_->check();
    }
    if (layers_run < layers) {
      cache_->abort();
    } else {
      cache_->finish();
      held_ = std::move(after);
    }
    cache_->check();
  }

  [[nodiscard]] std::uint64_t frames_used() const {
    return cache_->stats().device_bytes_used / stride_;
  }
  [[nodiscard]] std::uint64_t frames_streamed() const {
    return cache_->stats().streamed_bytes / stride_;
  }

  Bytes stride_ = 0;
  SimBackend* machine_ = nullptr;
  std::unique_ptr<Cache> cache_;
  std::map<SequenceId, Stamps> held_;
  std::uint64_t last_stamp_ = 0;
  std::uint32_t first_seen_ = 0;  // token that the first of the batch was read from, last layer
};

// ---- forks --------------------------------------------------------------------------------------

TEST_F(Sharing, AForkTakesNoFrameUntilItWritesAndThenOneALayer) {
  open(100, 0, "off");
  const SequenceId first = add();
  step({{first, 40}});
  EXPECT_EQ(frames_used(), 3 * layers);
  const SequenceId second = fork(first);
  EXPECT_EQ(frames_used(), 3 * layers);
  EXPECT_EQ(cache_->length(second), 40U);
  EXPECT_EQ(cache_->stats().kv_bytes, 40U * layers * 32) << "what is shared counts once";
  step({{second, 1}});
  EXPECT_EQ(frames_used(), 4 * layers) << "the partial block was copied";
  step({{first, 1}, {second, 1}});
  EXPECT_EQ(frames_used(), 4 * layers);
  free(first);
  EXPECT_EQ(frames_used(), 3 * layers);
  step({{second, 30}});
  free(second);
  EXPECT_EQ(frames_used(), 0U);
}

TEST_F(Sharing, AForkAtTheEndOfABlockCopiesNothing) {
  open(100, 0, "off");
  const SequenceId first = add();
  step({{first, 2 * size}});
  const SequenceId second = fork(first);
  step({{first, 1}, {second, 1}});
  EXPECT_EQ(frames_used(), 4 * layers);
}

// All but the last of a batch that share a partial block get a copy; the last one keeps it.
TEST_F(Sharing, ABatchOfForksCopiesThePartialBlockOnceLess) {
  open(100, 0, "off");
  const SequenceId first = add();
  step({{first, 20}});
  const SequenceId second = fork(first);
  const SequenceId third = fork(second);
  step({{first, 1}, {second, 2}, {third, 3}});
  EXPECT_EQ(frames_used(), (1 + 3) * layers);
}

TEST_F(Sharing, AnAbortedStepOfForksLeavesThemAsTheyWere) {
  open(100, 0, "off");
  const SequenceId first = add();
  step({{first, 20}});
  const SequenceId second = fork(first);
  for (std::uint32_t layers_run = 1; layers_run < layers; ++layers_run) {
    step({{second, 30}, {first, 5}}, layers_run);
  }
  EXPECT_EQ(cache_->length(second), 20U);
  step({{first, 1}, {second, 1}});
}

TEST_F(Sharing, ASharedPrefixIsStreamedOnceForAll) {
  open(60, 2000, "fixed:1");
  const SequenceId first = add();
  step({{first, 10 * size}});
  std::vector<StepEntry> batch{{first, 1}};
  for (int i = 0; i < 7; ++i) batch.push_back({fork(first), 1});
  step(batch);
  step(batch);
  const std::uint64_t before = frames_streamed();
  constexpr std::uint64_t steps = 8;
  for (std::uint64_t i = 0; i < steps; ++i) step(batch);
  const std::uint64_t per_step = (frames_streamed() - before) / steps;
  EXPECT_GE(per_step, 10 * layers - 2);
  EXPECT_LE(per_step, 10 * layers + 2) << "eight sequences read what one would";
}

TEST_F(Sharing, BeamsReorderedForLongStayInFewPieces) {
  open(200, 2000);
  std::vector<SequenceId> beams{add()};
  step({{beams[0], 25}});
  beams.push_back(fork(beams[0]));
  beams.push_back(fork(beams[0]));
  for (std::uint32_t i = 0; i < 120; ++i) {
    step({{beams[0], 1}, {beams[1], 1}, {beams[2], 1}});
    const std::vector<SequenceId> old = beams;
    beams = {fork(old[i % 3]), fork(old[i % 3]), fork(old[(i + 1) % 3])};
    for (const SequenceId beam : old) free(beam);
  }
  const auto needed = (25 + 120 + size - 1) / size + 2U;
  EXPECT_LE(frames_used(), needed * layers);
  for (const SequenceId beam : beams) free(beam);
  EXPECT_EQ(frames_used(), 0U);
}

TEST_F(Sharing, TruncatingIntoASharedBlockLeavesTheOtherSequenceAlone) {
  for (const char* policy : {"off", "fixed:1"}) {
    open(80, 1000, policy);
    held_.clear();
    const SequenceId first = add();
    step({{first, 5 * size}});
    step({{first, 1}});
    const SequenceId second = fork(first);
    truncate(second, 2 * size + 3);
    cache_->check();
    step({{second, 7}, {first, 1}});
    truncate(first, size + 1);
    step({{first, 1}, {second, 1}});
    truncate(first, 0);
    step({{first, 40}, {second, 1}});
  }
}

// A full block that was cut through loses its pool copy when the sequence goes on, and is written
// again when it is full.
TEST_F(Sharing, ACutBlockIsWrittenAgain) {
  open(12, 1000, "fixed:1");
  const SequenceId id = add();
  step({{id, 4 * size}});
  step({{id, 1}});
  const Bytes written = cache_->stats().written_bytes;
  truncate(id, 3 * size + 5);
  EXPECT_EQ(cache_->stats().written_bytes, written);
  step({{id, size}});
  step({{id, 1}});
  EXPECT_EQ(cache_->stats().written_bytes, written + layers * stride_);
}

// ---- windows ------------------------------------------------------------------------------------

TEST_F(Sharing, WindowsGiveOldFramesBack) {
  open(200, 0, "off", {20, 0, 20});
  const SequenceId id = add();
  step({{id, 100}});
  // Tokens 81 and on are seen by the next one: blocks 5 and 6 of 7.
  EXPECT_EQ(frames_used(), 2 + 7 + 2U);
  step({{id, 1}});
  EXPECT_EQ(first_seen_, 80U);
  for (int i = 0; i < 60; ++i) step({{id, 1}});
  EXPECT_EQ(frames_used(), 3 + 11 + 3U);
  free(id);
  EXPECT_EQ(frames_used(), 0U);
}

TEST_F(Sharing, WindowedLayersStreamWhatIsSeen) {
  open(20, 1000, "fit", {40, 40, 40});
  std::vector<StepEntry> batch;
  for (int i = 0; i < 4; ++i) batch.push_back({add(), 90});
  for (const StepEntry& entry : batch) step({entry});
  for (StepEntry& entry : batch) entry.new_tokens = 1;
  for (int i = 0; i < 50; ++i) step(batch);
  EXPECT_GT(frames_streamed(), 0U);
}

TEST_F(Sharing, TruncationBehindAWindowIsRefused) {
  open(200, 0, "off", {20, 0, 20});
  const SequenceId id = add();
  step({{id, 100}});
  EXPECT_THROW(truncate(id, 90), LogicError);
  step({{id, 1}});
  truncate(id, 100);
  step({{id, 1}});
  truncate(id, 0);
  step({{id, 10}});
}

TEST_F(Sharing, WhatASlowerForkStillSeesStays) {
  open(200, 0, "off", {20, 20, 20});
  const SequenceId slow = add();
  step({{slow, 64}});
  const SequenceId fast = fork(slow);
  for (int i = 0; i < 8; ++i) step({{fast, size}});
  step({{slow, 1}, {fast, 1}});
  free(slow);
  EXPECT_EQ(frames_used(), 3 * layers) << "now nobody sees it";
}

// ---- budgets ------------------------------------------------------------------------------------

TEST_F(Sharing, BudgetsMoveBothWaysWhileKvIsHeld) {
  open(60, 400);
  const SequenceId first = add();
  const SequenceId second = add();
  step({{first, 10 * size + 5}});
  step({{second, 8 * size + 1}});
  const auto frames = [&](std::uint64_t device, std::uint64_t pool) {
    cache_->resize(device * stride_, pool * stride_);
    cache_->check();
    EXPECT_LE(frames_used(), device);
    EXPECT_LE(cache_->stats().pool_bytes_used, pool * stride_);
    step({{first, 1}, {second, 1}});
  };
  frames(20, 400);
  frames(20, 60);
  frames(60, 60);
  frames(60, 4);
  frames(12, 200);
  frames(60, 400);
}

TEST_F(Sharing, ResizesThatCannotBeAreRefusedWhole) {
  open(60, 100);
  const SequenceId id = add();
  step({{id, 15 * size}});
  const Stats before = cache_->stats();
  EXPECT_THROW(cache_->resize(layers * stride_, 100 * stride_), ConfigError);
  EXPECT_THROW(cache_->resize(10 * stride_, 10 * stride_), CapacityError);
  EXPECT_EQ(cache_->stats().device_bytes, before.device_bytes);
  EXPECT_EQ(cache_->stats().pool_bytes, before.pool_bytes);
  step({{id, 1}});
  open(60, 0, "off");
  EXPECT_THROW(cache_->resize(60 * stride_, 10 * stride_), ConfigError);
}

// ---- tables of frames ---------------------------------------------------------------------------

TEST_F(Sharing, PagesNameTheFrameOfEveryBlock) {
  open(40, 1000);
  const SequenceId first = add();
  const SequenceId second = add();
  step({{first, 9 * size + 2}});
  step({{second, 6 * size}});
  for (int i = 0; i < 5; ++i) {
    cache_->begin(std::vector<StepEntry>{{second, 1}, {first, 1}}, Reader::pages);
    for (std::uint32_t layer = 0; layer < layers; ++layer) {
      std::vector<std::uint64_t> k(4);
      k[0] = (last_stamp_ + 1) * layers + layer;
      k[2] = (last_stamp_ + 2) * layers + layer;
      const Rows rows{k.data(), 8, 8};
      const auto table = cache_->pages(layer, {rows, rows}).frames;
      const Arena arena = cache_->arena();
      const std::size_t columns = table.size() / 2;
      ASSERT_EQ(columns, 10U);
      EXPECT_EQ(table[7], -1) << "past the end of the shorter";
      for (std::uint32_t t = 0; t < 9 * size + 2; ++t) {
        const std::int32_t frame = table[columns + t / size];
        ASSERT_GE(frame, 0);
        const std::byte* at = arena.start + static_cast<Bytes>(frame) * arena.stride_bytes;
        ASSERT_EQ(stamp_in(at, t), held_[first][t] * layers + layer);
      }
      cache_->check();
    }
    cache_->finish();
    held_[second].push_back(++last_stamp_);
    held_[first].push_back(++last_stamp_);
  }
  EXPECT_GT(frames_streamed(), 0U);
}

// Asks the cache that runs it for its tables, and compares them with what it is given.
class TableReader final : public LayerKernel {
 public:
  explicit TableReader(Cache& cache) : cache_(cache) {}

  void append(const Append& rows) override {
    ++appends;
    const StepTables tables = cache_.tables();
    const std::size_t all = static_cast<std::size_t>(tables.cu_seqlens.back());
    for (std::size_t i = 0; i < rows.slots.size(); ++i) {
      EXPECT_EQ(tables.slot_mapping[rows.layer * all + rows.first_row + i], rows.slots[i]);
    }
  }

  void attend(std::uint32_t layer, std::span<const KvPiece> pieces) override {
    const StepTables tables = cache_.tables();
    const Arena arena = cache_.arena();
    for (const KvPiece& piece : pieces) {
      const auto row = static_cast<std::size_t>(tables.rows[piece.entry]);
      const std::int32_t* blocks =
          tables.block_tables + (layer * tables.sequences + row) * tables.blocks;
      for (std::uint32_t b = piece.kv_begin / size; b * size < piece.kv_end; ++b) {
        ASSERT_GE(blocks[b], 0);
        EXPECT_EQ(arena.start + static_cast<Bytes>(blocks[b]) * arena.stride_bytes,
                  piece.frames[b - piece.kv_begin / size]);
      }
      EXPECT_EQ(tables.cu_seqlens[piece.entry], static_cast<std::int32_t>(piece.first_row));
      const auto end = static_cast<std::int32_t>(piece.kv_end);
      EXPECT_EQ(piece.last, tables.seq_lens[piece.entry] == end);
    }
  }

  std::uint32_t appends = 0;

 private:
  Cache& cache_;
};

TEST_F(Sharing, TablesSayWhatKernelsAreGiven) {
  open(40, 1000);
  const SequenceId gone = add();
  const SequenceId first = add();
  step({{gone, 20}, {first, 9 * size + 2}});
  const SequenceId second = cache_->fork(first);
  held_[second] = held_[first];
  step({{second, 6 * size}});
  cache_->free(gone);
  EXPECT_THROW(static_cast<void>(cache_->tables()), LogicError) << "no step is open";
  for (const std::uint32_t tokens : {1U, 1U, 40U, 1U}) {
    cache_->begin(std::vector<StepEntry>{{second, tokens}, {first, 1}}, Reader::kernel);
    for (std::uint32_t layer = 0; layer < layers; ++layer) {
      TableReader reader(*cache_);
      cache_->run(layer, reader);
      EXPECT_EQ(reader.appends, 1U) << "one batched append a layer";
    }
    cache_->finish();
    cache_->check();
  }
  EXPECT_GT(frames_streamed(), 0U);
}

TEST_F(Sharing, PagesOfALayerThatDoesNotFitAreRefused) {
  open(10, 1000);
  const SequenceId id = add();
  step({{id, 12 * size}});
  EXPECT_THROW(cache_->begin(std::vector<StepEntry>{{id, 1}}, Reader::pages), CapacityError);
  step({{id, 1}});
}

}  // namespace
}  // namespace pie
