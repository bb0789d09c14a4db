// parallel_for: every index once, on the threads of the caller's runner or of an OpenMP runtime
// that is already loaded; nested and tiny loops stay on the calling thread.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <atomic>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "pie/parallel.hpp"

namespace pie {
namespace {

int runner_calls = 0;

void run_on_two_threads(std::size_t count, void (*body)(void*, std::size_t), void* context) {
  ++runner_calls;
  std::thread other([=] {
    for (std::size_t i = 1; i < count; i += 2) body(context, i);
  });
  for (std::size_t i = 0; i < count; i += 2) body(context, i);
  other.join();
}

class ParallelTest : public testing::Test {
 protected:
  void SetUp() override { runner_calls = 0; }
  void TearDown() override { set_parallel_runner(nullptr); }
};

void count_index(void* context, std::size_t i) {
  (*static_cast<std::vector<std::atomic<int>>*>(context))[i].fetch_add(1);
}

void expect_each_index_once(std::size_t count) {
  std::vector<std::atomic<int>> seen(count);
  parallel_for(count, count_index, &seen);
  for (std::size_t i = 0; i < count; ++i) EXPECT_EQ(seen[i].load(), 1) << i << " of " << count;
}

TEST_F(ParallelTest, IsSerialUntilToldOtherwise) {
  EXPECT_EQ(parallel_threads(), 1U);
  std::set<std::thread::id> ids;
  parallel_for(
      50,
      [](void* context, std::size_t) {
        static_cast<std::set<std::thread::id>*>(context)->insert(std::this_thread::get_id());
      },
      &ids);
  EXPECT_EQ(ids, std::set<std::thread::id>{std::this_thread::get_id()});
  expect_each_index_once(50);
}

TEST_F(ParallelTest, RunsOnTheRunner) {
  set_parallel_runner(run_on_two_threads);
  EXPECT_GE(parallel_threads(), 2U);
  for (const std::size_t count : {2, 3, 100}) expect_each_index_once(count);
  EXPECT_EQ(runner_calls, 3);
}

TEST_F(ParallelTest, KeepsTinyLoopsOnTheCallingThread) {
  set_parallel_runner(run_on_two_threads);
  expect_each_index_once(0);
  expect_each_index_once(1);
  EXPECT_EQ(runner_calls, 0);
}

void count_inner(void* context, std::size_t) {
  static_cast<std::atomic<int>*>(context)->fetch_add(1);
}

TEST_F(ParallelTest, KeepsNestedLoopsOnTheirThread) {
  set_parallel_runner(run_on_two_threads);
  std::atomic<int> inner = 0;
  parallel_for(
      6, [](void* context, std::size_t) { parallel_for(7, count_inner, context); }, &inner);
  EXPECT_EQ(inner.load(), 42);
  EXPECT_EQ(runner_calls, 1);
  expect_each_index_once(4);
  EXPECT_EQ(runner_calls, 2) << "the calling thread still counts as inside a loop";
}

TEST_F(ParallelTest, RefusesAnOpenMpThatIsNotLoaded) {
  EXPECT_FALSE(use_openmp("/nowhere/libgomp.so.1", 2));
  EXPECT_FALSE(use_openmp(nullptr, 2));
  EXPECT_FALSE(use_openmp("libdl.so.2", 2)) << "a library without the entry point";
  EXPECT_FALSE(use_openmp("libgomp.so.1", 0));
  EXPECT_EQ(parallel_threads(), 1U);
}

// Each thread that computes has its own team: what one asks for never changes another's.
TEST_F(ParallelTest, LendsOpenMpToTheCallingThreadOnly) {
  if (::dlopen("libgomp.so.1", RTLD_NOW) == nullptr) GTEST_SKIP() << "there is no libgomp.so.1";
  ASSERT_TRUE(use_openmp("libgomp.so.1", 3));
  std::thread([] {
    EXPECT_EQ(parallel_threads(), 1U);
    EXPECT_TRUE(use_openmp("libgomp.so.1", 2));
    EXPECT_EQ(parallel_threads(), 2U);
  }).join();
  EXPECT_EQ(parallel_threads(), 3U);
  ASSERT_TRUE(use_openmp("libgomp.so.1", 1));
  EXPECT_EQ(parallel_threads(), 1U);
  expect_each_index_once(50);
}

TEST_F(ParallelTest, RunsOnALoadedOpenMp) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "libgomp synchronises by futexes of its own, which ThreadSanitizer cannot see.";
#endif
  void* library = ::dlopen("libgomp.so.1", RTLD_NOW);
  if (library == nullptr) GTEST_SKIP() << "libgomp.so.1 is not installed.";
  ASSERT_TRUE(use_openmp("libgomp.so.1", 3));
  EXPECT_EQ(parallel_threads(), 3U);
  for (const std::size_t count : {0, 1, 2, 3, 100}) expect_each_index_once(count);
  std::atomic<int> inner = 0;
  parallel_for(
      6, [](void* context, std::size_t) { parallel_for(7, count_inner, context); }, &inner);
  EXPECT_EQ(inner.load(), 42);
}

}  // namespace
}  // namespace pie
