// The public attention calls: choice of instruction set, checks, and the cutting of work into
// tasks.
//
// PIE_ISA=avx512|avx2|portable in the environment forces an instruction set that this CPU has; an
// unknown name, or one this CPU lacks, is refused at the first call.
//
// Tasks are (item, KV head, rows, tokens). Cutting never changes bits: lines are independent of
// each other, and tokens are only cut where the kernel itself starts a new segment.
#include "pie/attention.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "attention/kernels.hpp"
#include "pie/error.hpp"
#include "pie/parallel.hpp"

namespace pie {
namespace attention {
namespace {

// Lines of a task. Many, so that unpacking a pass of KV is shared by many; fewer where threads
// would otherwise be left without a task.
constexpr std::uint32_t lines_most = 96;
constexpr std::uint32_t lines_few = 24;

// With fewer tasks per thread than this, the last ones to run leave threads idle for long.
constexpr std::size_t tasks_per_thread = 4;

bool supported(const Kernels& kernels) {
#if defined(__x86_64__)
  if (&kernels == &avx2_kernels) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
  if (&kernels == &avx512_kernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return &kernels == &portable_kernels;
}

const Kernels*& chosen() {
  static const Kernels* kernels = [] {
    const char* name = std::getenv("PIE_ISA");
    return &find_kernels(name == nullptr ? "" : name);
  }();
  return kernels;
}

void check(const AttentionShape& shape) {
  require(shape.kv_heads > 0 && shape.query_heads > 0 && shape.query_heads % shape.kv_heads == 0,
          "attention: query_heads must be a positive multiple of kv_heads.");
  require(shape.head_dim > 0 && shape.head_dim <= 256 && shape.head_dim % 8 == 0,
          "attention: head_dim must be a multiple of 8 from 8 to 256.");
  require(shape.block_tokens > 0 && shape.block_tokens % granule_tokens == 0,
          "attention: block_tokens must be a positive multiple of 16.");
  require(std::isfinite(shape.scale), "attention: scale must be a finite number.");
  require(std::isfinite(shape.soft_cap) && shape.soft_cap >= 0,
          "attention: soft_cap must be a finite number, positive, or 0 for none.");
}

void check(const AttentionWork& work) {
  require(work.kv_begin % granule_tokens == 0 && work.kv_begin <= work.kv_end,
          "attention_fold: kv_begin must be a multiple of 16 and not beyond kv_end.");
  require(work.rows == 0 || work.kv_begin == work.kv_end ||
              (work.q.data != nullptr && work.frames.table != nullptr && work.state != nullptr),
          "attention_fold: q, frames and state must be given.");
}

// Cuts the rows of an item into tasks of about `lines` lines, the longest first.
void add_tasks(const AttentionShape& shape, const AttentionWork& work, std::uint32_t lines,
               std::vector<FoldTask>& tasks) {
  const std::uint32_t rows = std::max(1U, lines / (shape.query_heads / shape.kv_heads));
  for (std::uint32_t end = work.rows; end > 0; end = end > rows ? end - rows : 0) {
    FoldTask task{.shape = &shape, .work = &work};
    task.row_begin = end > rows ? end - rows : 0;
    task.row_end = end;
    // Passes that no row of the task sees are left out.
    const std::uint32_t seen = first_seen(shape, work.position + task.row_begin);
    task.token_begin = std::max(work.kv_begin, seen / pass_tokens * pass_tokens);
    task.token_end = std::min(work.kv_end, work.position + end);
    if (task.token_end <= task.token_begin) continue;
    for (task.kv_head = 0; task.kv_head < shape.kv_heads; ++task.kv_head) tasks.push_back(task);
  }
}

std::vector<FoldTask> cut_rows(const AttentionShape& shape, std::span<const AttentionWork> work,
                               std::size_t wanted) {
  std::vector<FoldTask> tasks;
  for (const std::uint32_t lines : {lines_most, lines_few}) {
    tasks.clear();
    for (const AttentionWork& item : work) add_tasks(shape, item, lines, tasks);
    if (tasks.size() >= wanted) break;
  }
  return tasks;
}

std::size_t lines_of(const FoldTask& task) {
  const std::size_t group = task.shape->query_heads / task.shape->kv_heads;
  return (task.row_end - task.row_begin) * group;
}

// Floats of partials that the segments of `task` after its first need.
std::size_t partials_of(const FoldTask& task) {
  const std::size_t segments =
      (task.token_end - 1) / segment_tokens - task.token_begin / segment_tokens;
  return segments * lines_of(task) * partial_floats(task.shape->head_dim);
}

// The first segment goes on in the state; each later one becomes a task with partials of its own.
std::vector<FoldTask> cut_segments(const std::vector<FoldTask>& tasks, float* partials) {
  std::vector<FoldTask> cut;
  for (const FoldTask& whole : tasks) {
    FoldTask task = whole;
    for (std::uint32_t t = whole.token_begin; t < whole.token_end; t = task.token_end) {
      const std::uint32_t next = (t / segment_tokens + 1) * segment_tokens;
      task.token_begin = t;
      task.token_end = std::min(next, whole.token_end);
      if (t != whole.token_begin) {
        task.partials = partials;
        partials += lines_of(task) * partial_floats(task.shape->head_dim);
      }
      cut.push_back(task);
    }
  }
  return cut;
}

// Appends a segment's partials to the states of the rows that see it.
void join(const Kernels& kernels, const FoldTask& task) {
  const AttentionShape& shape = *task.shape;
  const std::uint32_t group = shape.query_heads / shape.kv_heads;
  const float* partial = task.partials;
  for (std::uint32_t row = task.row_begin; row < task.row_end; ++row) {
    for (std::uint32_t h = task.kv_head * group; h < (task.kv_head + 1) * group; ++h) {
      if (task.work->position + row >= task.token_begin) {
        float* state = task.work->state + row * attention_state_floats(shape);
        kernels.advance(shape.head_dim, state + h * head_state_floats(shape.head_dim), partial);
      }
      partial += partial_floats(shape.head_dim);
    }
  }
}

// Scratch of every worker of the calling thread's loops, kept from call to call: fresh pages cost
// more than the smallest folds.
float* scratch_of(std::size_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<float, Free> memory;
  static thread_local std::size_t size = 0;
  if (floats > size) {
    size = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float))));
    if (memory == nullptr) {
      throw CapacityError("attention_fold: no memory for " +
                          std::to_string(floats * sizeof(float)) + " bytes of scratch.");
    }
    size = floats;
  }
  return memory.get();
}

struct Workers {
  const Kernels* kernels;
  const std::vector<FoldTask>* tasks;
  float* scratch;
  std::size_t scratch_each;
  std::atomic<std::size_t> next = 0;
};

void run_worker(void* context, std::size_t worker) {
  auto* workers = static_cast<Workers*>(context);
  float* scratch = workers->scratch + worker * workers->scratch_each;
  for (;;) {
    const std::size_t i = workers->next.fetch_add(1, std::memory_order_relaxed);
    if (i >= workers->tasks->size()) return;
    workers->kernels->fold((*workers->tasks)[i], scratch);
  }
}

void run(const Kernels& kernels, const std::vector<FoldTask>& tasks) {
  std::size_t lines = 0;
  for (const FoldTask& task : tasks) lines = std::max(lines, lines_of(task));
  const std::size_t count = std::min<std::size_t>(tasks.size(), parallel_threads());
  const std::size_t each = (scratch_floats(tasks.front().shape->head_dim, lines) + 15) / 16 * 16;
  Workers workers{&kernels, &tasks, scratch_of(count * each), each};
  parallel_for(count, run_worker, &workers);
}

struct FinishLoop {
  const Kernels* kernels;
  const AttentionShape* shape;
  const float* state;
  const MutableRows* out;
  float* lse;
};

void finish_row(void* context, std::size_t row) {
  const auto* loop = static_cast<const FinishLoop*>(context);
  const AttentionShape& shape = *loop->shape;
  const float* state = loop->state + row * attention_state_floats(shape);
  for (std::uint32_t h = 0; h < shape.query_heads; ++h) {
    const std::int64_t at = static_cast<std::int64_t>(row) * loop->out->row_stride +
                            std::int64_t{h} * loop->out->head_stride;
    std::byte* out = static_cast<std::byte*>(loop->out->data) +
                     at * static_cast<std::int64_t>(dtype_bytes(shape.dtype));
    const float lse =
        loop->kernels->finish(shape, h, state + h * head_state_floats(shape.head_dim), out);
    if (loop->lse != nullptr) loop->lse[row * shape.query_heads + h] = lse;
  }
}

}  // namespace

const Kernels& find_kernels(std::string_view name) {
#if defined(__x86_64__)
  const Kernels* const best_first[] = {&avx512_kernels, &avx2_kernels, &portable_kernels};
#else
  const Kernels* const best_first[] = {&portable_kernels};
#endif
  std::string known;
  for (const Kernels* kernels : best_first) {
    if (!supported(*kernels)) continue;
    if (name.empty() || name == kernels->name) return *kernels;
    known += std::string(known.empty() ? "" : ", ") + kernels->name;
  }
  throw ConfigError("PIE_ISA asks for the instruction set \"" + std::string(name) +
                    "\"; this CPU and build have " + known + ". Unset PIE_ISA to take the best.");
}

void use_kernels(const Kernels& kernels) { chosen() = &kernels; }

}  // namespace attention

std::size_t attention_state_floats(const AttentionShape& shape) {
  return shape.query_heads * attention::head_state_floats(shape.head_dim);
}

void attention_reset(const AttentionShape& shape, float* state, std::uint32_t rows) {
  attention::check(shape);
  const std::size_t floats = attention::partial_floats(shape.head_dim);
  const std::size_t max_at = attention::padded_dim(shape.head_dim) + 16;
  const std::size_t partials = std::size_t{2} * rows * shape.query_heads;
  std::memset(state, 0, partials * floats * sizeof(float));
  for (std::size_t i = 0; i < partials; ++i) state[i * floats + max_at] = attention::lowest_max;
}

void attention_fold(const AttentionShape& shape, std::span<const AttentionWork> work) {
  using namespace attention;
  check(shape);
  for (const AttentionWork& item : work) check(item);
  const Kernels& kernels = *chosen();
  const std::size_t threads = parallel_threads();
  const std::size_t wanted = threads == 1 ? 1 : threads * tasks_per_thread;
  const std::vector<FoldTask> tasks = cut_rows(shape, work, wanted);
  if (tasks.empty()) return;
  if (tasks.size() >= wanted) return run(kernels, tasks);

  std::size_t floats = 0;
  for (const FoldTask& task : tasks) floats += partials_of(task);
  const std::unique_ptr<float[]> partials(new float[floats]);
  const std::vector<FoldTask> cut = cut_segments(tasks, partials.get());
  run(kernels, cut);
  for (const FoldTask& task : cut) {
    if (task.partials != nullptr) join(kernels, task);
  }
}

void attention_finish(const AttentionShape& shape, const float* state, std::uint32_t rows,
                      const MutableRows& out, float* lse) {
  attention::check(shape);
  attention::FinishLoop loop{attention::chosen(), &shape, state, &out, lse};
  parallel_for(rows, attention::finish_row, &loop);
}

void frame_append(const AttentionShape& shape, std::byte* frame, std::uint32_t token,
                  std::uint32_t rows, const Rows& k, const Rows& v) {
  attention::check(shape);
  require(token <= shape.block_tokens && rows <= shape.block_tokens - token,
          "frame_append: the tokens do not fit in the block.");
  const auto element = static_cast<std::int64_t>(dtype_bytes(shape.dtype));
  const std::size_t row_bytes = shape.head_dim * static_cast<std::size_t>(element);
  std::byte* to_head = frame + token * row_bytes;
  for (const Rows* from : {&k, &v}) {
    const auto* data = static_cast<const std::byte*>(from->data);
    for (std::int64_t head = 0; head < shape.kv_heads; ++head) {
      for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t at = row * from->row_stride + head * from->head_stride;
        std::memcpy(to_head + row * static_cast<std::int64_t>(row_bytes), data + at * element,
                    row_bytes);
      }
      to_head += shape.block_tokens * row_bytes;
    }
  }
}

const char* attention_isa() { return attention::chosen()->name; }

}  // namespace pie
