// Where loops run in parallel: on threads the caller brings, else on the calling thread alone.
//
// Importing or constructing anything starts no thread. In Python the runner is the OpenMP team that
// torch already has, so that two runtimes never spin against each other on the same cores.
#pragma once

#include <cstddef>

namespace pie {

// Calls body(context, i) once for each i in [0, count), in any order, on any thread, and returns
// when all have returned. `body` never throws.
using ParallelRunner = void (*)(std::size_t count, void (*body)(void* context, std::size_t i),
                                void* context);

// Replaces the runner of this process; nullptr restores the serial one. Not while a step runs. The
// calling thread gives up what `use_openmp` gave it.
void set_parallel_runner(ParallelRunner runner);

// Loops of the calling thread run on the OpenMP runtime at `library` (a path already loaded in this
// process, such as torch's libgomp) with `threads` threads, 1 being the calling one alone. Returns
// false where it is not loaded or lacks the entry points.
bool use_openmp(const char* library, unsigned threads);

// Threads that parallel_for may use when this thread calls it; 1 where serial.
[[nodiscard]] unsigned parallel_threads();

void parallel_for(std::size_t count, void (*body)(void* context, std::size_t i), void* context);

}  // namespace pie
