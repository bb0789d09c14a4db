// parallel_for over the threads the caller brings: a runner of its own, or the OpenMP runtime that
// is already loaded in this process.
//
// OpenMP is reached through the GNU entry point GOMP_parallel, which LLVM's and Intel's runtimes
// offer too, so nothing here is compiled or linked with OpenMP. Indices are handed out one by one
// from a counter: their number is small and their costs differ.
#include "pie/parallel.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "process.hpp"

namespace pie {
namespace {

using GompParallel = void (*)(void (*body)(void* data), void* data, unsigned threads,
                              unsigned flags);

struct Team {
  GompParallel gomp = nullptr;
  unsigned threads = 1;
  Process process;
};

std::atomic<ParallelRunner> runner = nullptr;

// Of the calling thread, as OpenMP's own number of threads is; goes before the runner. A forked
// child has the calling thread alone: GNU's runtime would wait for the others for ever.
thread_local Team lent;

bool is_lent() { return lent.gomp != nullptr && lent.process.is_this(); }

// Set while this thread runs a body: a loop inside a loop stays on its thread.
thread_local bool inside = false;

struct Loop {
  std::size_t count;
  void (*body)(void* context, std::size_t i);
  void* context;
  std::atomic<std::size_t> next = 0;
};

void run_one(void* data, std::size_t i) {
  const auto* loop = static_cast<const Loop*>(data);
  inside = true;
  loop->body(loop->context, i);
  inside = false;
}

void run_share(void* data) {
  auto* loop = static_cast<Loop*>(data);
  for (;;) {
    const std::size_t i = loop->next.fetch_add(1, std::memory_order_relaxed);
    if (i >= loop->count) return;
    run_one(loop, i);
  }
}

}  // namespace

void set_parallel_runner(ParallelRunner chosen) {
  runner = chosen;
  lent = {};
}

bool use_openmp(const char* library, unsigned threads) {
  if (library == nullptr || threads == 0) return false;
  void* handle = ::dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) return false;
  void* entry = ::dlsym(handle, "GOMP_parallel");
  if (entry == nullptr) {
    ::dlclose(handle);
    return false;
  }
  // The handle is kept: it holds the library in the process for as long as loops may run on it.
  lent = {.gomp = reinterpret_cast<GompParallel>(entry), .threads = threads, .process = {}};
  return true;
}

// How many threads a runner has is not known; those of the machine is what it will be sized for.
unsigned parallel_threads() {
  if (is_lent()) return lent.threads;
  return runner == nullptr ? 1 : std::max(2U, std::thread::hardware_concurrency());
}

void parallel_for(std::size_t count, void (*body)(void* context, std::size_t i), void* context) {
  const bool ours = is_lent();
  const ParallelRunner theirs = ours ? nullptr : runner.load();
  const bool serial = ours ? lent.threads == 1 : theirs == nullptr;
  if (count <= 1 || inside || serial) {
    for (std::size_t i = 0; i < count; ++i) body(context, i);
    return;
  }
  Loop loop{.count = count, .body = body, .context = context};
  if (theirs != nullptr) {
    theirs(count, run_one, &loop);
  } else {
    lent.gomp(run_share, &loop, lent.threads, 0);
  }
}

}  // namespace pie
