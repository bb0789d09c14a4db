// FramePool: singles and runs against a plain model, the limit, and what it refuses.
#include <gtest/gtest.h>

#include <random>
#include <set>
#include <vector>

#include "frame_pool.hpp"
#include "pie/error.hpp"

namespace pie {
namespace {

TEST(FramePool, SinglesComeFromTheBottomAndRunsFromTheTop) {
  FramePool pool(200, 200);
  EXPECT_EQ(pool.acquire(), 0U);
  EXPECT_EQ(pool.acquire(), 1U);
  EXPECT_EQ(pool.acquire_run(10), (FrameRun{190, 10}));
  EXPECT_EQ(pool.acquire_run(5), (FrameRun{185, 5}));
  pool.release(FrameIndex{0});
  EXPECT_EQ(pool.acquire(), 0U);
  EXPECT_EQ(pool.used(), 17U);
  pool.check();
}

TEST(FramePool, ARunIsTheLongestThereIsWhereNoneIsLongEnough) {
  FramePool pool(64, 64);
  while (pool.free() > 0) static_cast<void>(pool.acquire());
  for (const FrameIndex frame : {3U, 10U, 11U, 12U, 40U, 41U}) pool.release(frame);
  EXPECT_EQ(pool.acquire_run(9), (FrameRun{10, 3}));
  EXPECT_EQ(pool.acquire_run(9), (FrameRun{40, 2}));
  EXPECT_EQ(pool.acquire_run(9), (FrameRun{3, 1}));
  EXPECT_EQ(pool.acquire_run(9).count, 0U);
  EXPECT_EQ(pool.acquire(), no_frame);
}

TEST(FramePool, ARunKeepsAboveItsFloorWhileAnythingIsFreeThere) {
  FramePool pool(100, 100);
  EXPECT_EQ(pool.acquire_run(20, 90), (FrameRun{90, 10}));
  EXPECT_EQ(pool.acquire_run(20, 90), (FrameRun{70, 20}));
  pool.release(FrameRun{93, 2});
  EXPECT_EQ(pool.acquire_run(20, 90), (FrameRun{93, 2}));
}

TEST(FramePool, ARingReleasedInOrderStaysInPieces) {
  FramePool pool(100, 100);
  std::vector<FrameRun> ring;
  for (int i = 0; i < 5; ++i) ring.push_back(pool.acquire_run(16));
  for (int round = 0; round < 50; ++round) {
    pool.release(ring.front());
    ring.erase(ring.begin());
    ring.push_back(pool.acquire_run(16));
    EXPECT_EQ(ring.back().count, 16U);
  }
}

TEST(FramePool, MatchesAModelUnderRandomUse) {
  std::minstd_rand random(7);
  FramePool pool(300, 250);
  std::set<FrameIndex> used;
  for (int i = 0; i < 20000; ++i) {
    switch (random() % 4) {
      case 0: {
        const FrameIndex frame = pool.acquire();
        ASSERT_EQ(frame == no_frame, used.size() == pool.limit());
        if (frame != no_frame) {
          ASSERT_TRUE(used.insert(frame).second);
        }
        break;
      }
      case 1: {
        const FrameRun run = pool.acquire_run(static_cast<std::uint32_t>(1 + random() % 40),
                                              static_cast<FrameIndex>(random() % 300));
        for (FrameIndex f = run.first; f < run.end() && run.count > 0; ++f) {
          ASSERT_TRUE(used.insert(f).second);
        }
        break;
      }
      case 2:
        for (int n = 0; n < 20 && !used.empty(); ++n) {
          const auto it = used.lower_bound(static_cast<FrameIndex>(random() % 300));
          if (it == used.end()) continue;
          pool.release(*it);
          used.erase(it);
        }
        break;
      default: {
        const auto limit = static_cast<std::uint32_t>(200 + random() % 101);
        if (used.lower_bound(limit) == used.end()) pool.set_limit(limit);
      }
    }
    ASSERT_EQ(pool.used(), used.size());
    ASSERT_EQ(pool.free() + pool.used() + pool.reserved(), pool.capacity());
    if (i % 100 == 0) pool.check();
  }
}

TEST(FramePool, RefusesWhatCannotBe) {
  FramePool pool(10, 8);
  EXPECT_THROW(pool.release(FrameIndex{3}), LogicError);
  EXPECT_THROW(pool.release(FrameIndex{9}), LogicError);
  const FrameRun top = pool.acquire_run(2);
  EXPECT_THROW(pool.set_limit(7), LogicError);
  EXPECT_EQ(pool.limit(), 8U);
  pool.release(top);
  pool.set_limit(0);
  EXPECT_EQ(pool.acquire(), no_frame);
  EXPECT_THROW(pool.set_limit(11), LogicError);
  EXPECT_THROW(FramePool(4, 5), LogicError);
}

}  // namespace
}  // namespace pie
