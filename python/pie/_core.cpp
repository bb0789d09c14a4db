// Python bindings of the C++ facade: numbers and pointers in, arrays and exceptions out. No logic.
//
// Tensors come in as addresses and strides, so torch is never included. Every call gives up the
// interpreter lock.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "_layers.hpp"
#include "_pages.hpp"
#include "pie/attention.hpp"
#include "pie/backends.hpp"
#include "pie/cache.hpp"
#include "pie/error.hpp"
#include "pie/parallel.hpp"
#include "pie/policy.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Batch = std::vector<std::pair<std::uint64_t, std::uint32_t>>;

pie::DType dtype_from(const std::string& name) {
  if (name == "f32") return pie::DType::f32;
  if (name == "bf16") return pie::DType::bf16;
  if (name == "f16") return pie::DType::f16;
  throw pie::ConfigError("dtype '" + name + "' is unknown: use f32, bf16 or f16.");
}

nb::dlpack::dtype dlpack_dtype(pie::DType dtype) {
  const auto code =
      dtype == pie::DType::bf16 ? nb::dlpack::dtype_code::Bfloat : nb::dlpack::dtype_code::Float;
  return {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(8 * pie::dtype_bytes(dtype)),
          1};
}

// Torch says where a tensor lies as a number.
void* pointer_to(std::uintptr_t address) {
  return reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr)
}

pie::Rows rows_at(std::uintptr_t data, std::int64_t row_stride, std::int64_t head_stride) {
  return {pointer_to(data), row_stride, head_stride};
}

nb::dict to_dict(const pie::Stats& stats) {
  nb::dict dict;
  dict["device_bytes"] = stats.device_bytes;
  dict["device_bytes_used"] = stats.device_bytes_used;
  dict["device_bytes_peak"] = stats.device_bytes_peak;
  dict["pool_bytes"] = stats.pool_bytes;
  dict["pool_bytes_used"] = stats.pool_bytes_used;
  dict["pool_bytes_peak"] = stats.pool_bytes_peak;
  dict["kv_bytes"] = stats.kv_bytes;
  dict["streamed_bytes"] = stats.streamed_bytes;
  dict["written_bytes"] = stats.written_bytes;
  dict["in_place_bytes"] = stats.in_place_bytes;
  dict["steps"] = stats.steps;
  dict["decode_steps"] = stats.decode_steps;
  dict["decode_tokens"] = stats.decode_tokens;
  dict["decode_ns"] = stats.decode_ns;
  dict["decode_stall_ns"] = stats.decode_stall_ns;
  dict["stall_ns"] = stats.stall_ns;
  dict["stall_fraction"] = stats.stall_fraction;
  dict["decode_tokens_per_s"] = stats.decode_tokens_per_s;
  dict["retries"] = stats.retries;
  dict["failed_writes"] = stats.failed_writes;
  dict["sequences"] = stats.sequences;
  dict["block_tokens"] = stats.block_tokens;
  dict["resident_frames"] = stats.resident_frames;
  dict["ring_frames"] = stats.ring_frames;
  dict["budget_bytes"] = stats.budget_bytes;
  dict["budget_reason"] = stats.budget_reason;
  dict["budget_moves"] = stats.budget_moves;
  dict["link_bytes_per_s"] = stats.link_bytes_per_s;
  dict["interference_ns_per_byte"] = stats.interference_ns_per_byte;
  dict["slowdown"] = stats.slowdown;
  dict["policy"] = stats.policy;
  dict["pool_io"] = stats.pool_io;
  dict["pool_io_reason"] = stats.pool_io_reason;
  dict["attention_isa"] = stats.attention_isa;
  return dict;
}

// Keeps `owner` until the last array over its memory goes.
nb::capsule owner_of(std::shared_ptr<const void> owner) {
  auto held = std::make_unique<std::shared_ptr<const void>>(std::move(owner));
  return {held.release(),
          [](void* last) noexcept { delete static_cast<std::shared_ptr<const void>*>(last); }};
}

// What a TieredKVCache holds. Arrays given out share ownership of the memory they lie in, not of
// the cache: closing it gives everything else back.
class Cache {
 public:
  explicit Cache(const pie::CacheOptions& options)
      : device_(options.device == "cpu" ? nb::device::cpu::value : nb::device::cuda::value),
        device_id_(options.device.starts_with("cuda:") ? std::stoi(options.device.substr(5)) : 0),
        dtype_(options.geometry.dtype),
        kv_heads_(options.geometry.kv_heads),
        head_dim_(options.geometry.head_dim),
        cache_(std::make_unique<pie::Cache>(options)) {}
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;
  ~Cache() {
    const nb::gil_scoped_release unlocked;  // it waits for transfers
    cache_.reset();
  }

  // Calls `call` with the C++ cache, without the interpreter lock.
  template <typename Call>
  auto enter(Call&& call) {
    const nb::gil_scoped_release unlocked;
    return std::forward<Call>(call)(*cache_);
  }

  // The C++ cache itself, for what needs the interpreter lock or gives it up by itself.
  [[nodiscard]] pie::Cache& tiered() { return *cache_; }

  nb::tuple gather(std::uint32_t layer, const pie::LayerInputs& inputs) {
    std::shared_ptr<const void> memory;
    const pie::Gathered got = enter([&](auto& cache) {
      memory = cache.arena().owner;
      return cache.gather(layer, inputs);
    });
    const nb::capsule owner = owner_of(std::move(memory));
    const std::size_t shape[] = {got.batch, kv_heads_, got.longest, head_dim_};
    const auto view = [&](void* data) {
      return nb::cast(nb::ndarray<>(data, 4, shape, owner, nullptr, dlpack_dtype(dtype_),
                                    nb::device::cpu::value));
    };
    return nb::make_tuple(view(got.k), view(got.v));
  }

  nb::object frames() {
    const Frames at = describe();
    return nb::cast(nb::ndarray<>(at.arena.start, 5, at.shape.data(), owner_of(at.arena.owner),
                                  at.strides.data(), dlpack_dtype(dtype_), device_, device_id_));
  }

  // Where the device tier is, for who cannot take it as an array.
  nb::tuple arena() {
    const Frames at = describe();
    return nb::make_tuple(reinterpret_cast<std::uintptr_t>(at.arena.start),
                          std::vector(at.shape.begin(), at.shape.end()),
                          std::vector(at.strides.begin(), at.strides.end()),
                          reinterpret_cast<std::uintptr_t>(at.arena.pool));
  }

  // The table is the array's own: a later one does not change it.
  nb::object pages(std::uint32_t layer, const pie::LayerInputs& inputs) {
    auto table = std::make_shared<std::vector<std::int32_t>>();
    const std::size_t batch = enter([&](auto& cache) {
      const pie::FrameTable found = cache.pages(layer, inputs);
      table->assign(found.frames.begin(), found.frames.end());
      return found.batch;
    });
    const std::size_t shape[] = {batch, table->size() / batch};
    std::int32_t* data = table->data();
    return nb::cast(nb::ndarray<>(data, 2, shape, owner_of(std::move(table)), nullptr,
                                  nb::dtype<std::int32_t>(), nb::device::cpu::value));
  }

 private:
  // `[frames, 2, kv_heads, block_tokens, head_dim]`, strides in elements.
  struct Frames {
    pie::Arena arena;
    std::array<std::size_t, 5> shape;
    std::array<std::int64_t, 5> strides;
  };
  Frames describe() {
    const auto [arena, tokens] = enter([](auto& cache) {
      return std::pair(cache.arena(), std::size_t{cache.geometry().block_tokens});
    });
    const auto head = static_cast<std::int64_t>(tokens * head_dim_);
    return {arena,
            {arena.frames, 2, kv_heads_, tokens, head_dim_},
            {static_cast<std::int64_t>(arena.stride_bytes / pie::dtype_bytes(dtype_)),
             head * static_cast<std::int64_t>(kv_heads_), head,
             static_cast<std::int64_t>(head_dim_), 1}};
  }

  int device_;
  int device_id_;
  pie::DType dtype_;
  std::size_t kv_heads_;
  std::size_t head_dim_;
  std::unique_ptr<pie::Cache> cache_;
};

// A step as a context manager, here so that no signal handler of Python's can run between its begin
// and the body, or between the body and its end.
struct Step {
  nb::object owner;  // the TieredKVCache, which `with` gives
  Cache* cache = nullptr;
  std::vector<pie::StepEntry> batch;
  pie::Reader reader = pie::Reader::attend;
};

void construct(Cache* self, const std::string& device, std::uint32_t layers, std::uint32_t kv_heads,
               std::uint32_t head_dim, std::uint32_t block_tokens, const std::string& dtype,
               std::uint64_t device_bytes, std::uint64_t pool_bytes, const std::string& pool_dir,
               const std::string& policy, const std::vector<std::uint32_t>& windows,
               const std::string& driver, const std::string& pool_io, double in_place_share,
               const std::string& objective, double slack, double max_tpot_ms) {
  pie::CacheOptions options;
  options.device = device;
  if (!driver.empty()) options.driver = driver;
  options.geometry = {layers, kv_heads, head_dim, block_tokens, dtype_from(dtype), windows};
  options.device_bytes = device_bytes;
  options.pool_bytes = pool_bytes;
  options.pool_dir = pool_dir;
  options.policy = policy;
  options.pool_io = pool_io;
  options.in_place_share = in_place_share;
  options.objective = objective;
  options.slack = slack;
  options.max_tpot_ms = max_tpot_ms;
  new (self) Cache(options);
}

pie::Reader reader_from(const std::string& name) {
  if (name == "attend") return pie::Reader::attend;
  if (name == "gather") return pie::Reader::gather;
  if (name == "pages") return pie::Reader::pages;
  if (name == "kernel") return pie::Reader::kernel;
  if (name == "pool_kernel") return pie::Reader::pool_kernel;
  throw pie::ConfigError("reader is '" + name +
                         "': use 'attend', 'gather', 'pages', 'kernel' or 'pool_kernel'.");
}

Step make_step(const nb::object& owner, Cache& cache, const Batch& batch,
               const std::string& reader_name) {
  Step step{owner, &cache, {}, reader_from(reader_name)};
  for (const auto& [sequence, new_tokens] : batch) step.batch.push_back({sequence, new_tokens});
  return step;
}

nb::object begin(const Step& step) {
  step.cache->enter([&](auto& cache) { cache.begin(step.batch, step.reader); });
  return step.owner;
}

void bind_exceptions(nb::module_& module) {
  nb::exception<pie::LogicError>(module, "LogicError", PyExc_RuntimeError);
  nb::exception<pie::ConfigError>(module, "ConfigError", PyExc_ValueError);
  nb::exception<pie::CapacityError>(module, "CapacityError", PyExc_MemoryError);
  // Translators are asked newest first: this one adds the sequence that the failure touched.
  static PyObject* io_error = nb::exception<pie::IoError>(module, "IoError", PyExc_OSError).ptr();
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const pie::IoError& error) {
      nb::object raised = nb::handle(io_error)(error.what());
      raised.attr("sequence") = error.sequence();
      PyErr_SetObject(io_error, raised.ptr());
    }
  });
}

void bind_functions(nb::module_& module) {
  module.def("default_pool_dir", &pie::default_pool_dir,
             "Directory in which the pool's file is made when none is named.");
  module.def("free_disk_bytes", &pie::free_disk_bytes, "directory"_a,
             "Free bytes in the file system of a directory.");
  module.def(
      "try_pool",
      [](const std::string& directory) {
        const pie::PoolWay way = pie::try_pool(directory);
        return std::pair(way.io, way.reason);
      },
      "directory"_a, "How a pool there is reached, and why not by a faster way.");
  module.def("attention_isa", &pie::attention_isa, "Instruction set that attention was built for.");
  module.def(
      "check_policy", [](const std::string& name) { (void)pie::make_policy(name); }, "name"_a,
      "Raises ConfigError where there is no such policy.");
  module.def(
      "check_objective",
      [](const std::string& objective, double slack, double max_tpot_ms) {
        (void)pie::make_objective(objective, slack, max_tpot_ms);
      },
      "objective"_a, "slack"_a, "max_tpot_ms"_a,
      "Raises ConfigError where there is no such objective.");
  module.def(
      "use_openmp", &pie::use_openmp, "library"_a, "threads"_a,
      "Runs this thread's loops on the OpenMP team of a library that this process has loaded.");
  module.def("parallel_threads", &pie::parallel_threads,
             "How many threads this one's loops run on.");
}

// The three matrices are (address, row stride, head stride), strides in elements.
void bind_step(nb::class_<Cache>& cache) {
  cache
      .def(
          "attend",
          [](Cache& self, std::uint32_t layer, std::uintptr_t k, std::int64_t k_row,
             std::int64_t k_head, std::uintptr_t v, std::int64_t v_row, std::int64_t v_head,
             std::uintptr_t q, std::int64_t q_row, std::int64_t q_head, std::uintptr_t out,
             std::int64_t out_row, std::int64_t out_head, std::uint32_t query_heads, float scale,
             float soft_cap, std::uintptr_t sinks, std::uintptr_t lse) {
            const pie::AttendOptions options{scale, soft_cap,
                                             static_cast<const float*>(pointer_to(sinks))};
            self.enter([&](auto& tiered) {
              tiered.attend(layer, {rows_at(k, k_row, k_head), rows_at(v, v_row, v_head)},
                            rows_at(q, q_row, q_head), {pointer_to(out), out_row, out_head},
                            query_heads, options, static_cast<float*>(pointer_to(lse)));
            });
          },
          "layer"_a, "k"_a, "k_row"_a, "k_head"_a, "v"_a, "v_row"_a, "v_head"_a, "q"_a, "q_row"_a,
          "q_head"_a, "out"_a, "out_row"_a, "out_head"_a, "query_heads"_a, "scale"_a, "soft_cap"_a,
          "sinks"_a, "lse"_a,
          "Appends one layer's K and V and attends; addresses and strides in elements.")
      .def(
          "gather",
          [](Cache& self, std::uint32_t layer, std::uintptr_t k, std::int64_t k_row,
             std::int64_t k_head, std::uintptr_t v, std::int64_t v_row, std::int64_t v_head) {
            return self.gather(layer, {rows_at(k, k_row, k_head), rows_at(v, v_row, v_head)});
          },
          "layer"_a, "k"_a, "k_row"_a, "k_head"_a, "v"_a, "v_row"_a, "v_head"_a,
          nb::sig("def gather(self, layer: int, k: int, k_row: int, k_head: int, v: int, v_row: "
                  "int, v_head: int) -> tuple[typing.Any, typing.Any]"),
          "Appends one layer's K and V and returns all of them, as arrays that DLPack can take.")
      .def(
          "pages",
          [](Cache& self, std::uint32_t layer, std::uintptr_t k, std::int64_t k_row,
             std::int64_t k_head, std::uintptr_t v, std::int64_t v_row, std::int64_t v_head) {
            return self.pages(layer, {rows_at(k, k_row, k_head), rows_at(v, v_row, v_head)});
          },
          "layer"_a, "k"_a, "k_row"_a, "k_head"_a, "v"_a, "v_row"_a, "v_head"_a,
          nb::sig("def pages(self, layer: int, k: int, k_row: int, k_head: int, v: int, v_row: "
                  "int, v_head: int) -> typing.Any"),
          "Appends one layer's K and V and returns the table of frames, an array for DLPack.")
      .def(
          "finish", [](Cache& self) { self.enter([](auto& tiered) { tiered.finish(); }); },
          "Ends the step: lengths advance.")
      .def(
          "abort", [](Cache& self) { self.enter([](auto& tiered) { tiered.abort(); }); },
          "Takes the step's appends back, at the next call at the latest.")
      .def(
          "open_step",
          [](Cache& self) {
            const auto open = self.enter([](auto& tiered) { return tiered.open_step(); });
            return std::pair(open.rows, open.next_layer);
          },
          "(rows, layer that comes next) of the open step; no rows: none is.");
}

// Layers that a Python object runs, on a device that the calling thread does not compute on.
void bind_layers(nb::class_<Cache>& cache) {
  cache
      .def(
          "run",
          [](Cache& self, std::uint32_t layer, const nb::object& target) {
            PythonKernel kernel(self.tiered(), target);
            self.enter([&](auto& tiered) { tiered.run(layer, kernel); });
          },
          "layer"_a, "target"_a, nb::sig("def run(self, layer: int, target: typing.Any) -> None"),
          "Has `target` append the layer's K and V and read all of each sequence.")
      .def(
          "set_stream",
          [](Cache& self, std::uintptr_t stream) {
            self.enter([&](auto& tiered) { tiered.set_stream({stream}); });
          },
          "stream"_a, "The stream that the caller's compute runs on.")
      .def(
          "arena", [](Cache& self) { return self.arena(); },
          nb::sig("def arena(self) -> tuple[int, list[int], list[int], int]"),
          "The device tier: address, shape as `frames`, strides in elements; and the address of "
          "the pool's frames, which lie alike, where steps read some in place, else 0.")
      .def(
          "step_rows", [](Cache& self) { return step_rows(self.tiered()); },
          "Of each packed row of the step: its row of the tables, and its position.")
      .def(
          "block_tables", [](Cache& self) { return block_tables(self.tiered()); },
          nb::sig("def block_tables(self) -> tuple[bytes, int, int, int]"),
          "The tables of frames, and how many layers, rows and blocks they have.")
      .def(
          "table_edits", [](Cache& self) { return table_edits(self.tiered()); },
          nb::sig("def table_edits(self) -> list[bytes] | None"),
          "What changed in the tables since this was asked last; None: all may have.");
}

void bind_steps(nb::module_& module) {
  nb::class_<Step>(module, "Step", "A step: finished on leaving, taken back on an exception.")
      .def("__enter__", &begin, nb::sig("def __enter__(self) -> typing.Any"))
      .def(
          "__exit__",
          [](Step& step, const nb::object& kind, const nb::object& /*error*/,
             const nb::object& /*trace*/) {
            const bool failed = !kind.is_none();
            step.cache->enter([&](auto& tiered) { failed ? tiered.abort() : tiered.finish(); });
          },
          "kind"_a.none(), "error"_a.none(), "trace"_a.none());
  module.def("step", &make_step, "owner"_a, "cache"_a, "batch"_a, "reader"_a,
             nb::keep_alive<0, 2>(),
             nb::sig("def step(owner: typing.Any, cache: Cache, batch: "
                     "collections.abc.Sequence[tuple[int, int]], reader: str) -> Step"),
             "A step over (sequence, new tokens) of a cache, which `with` opens.");
}

nb::tuple to_tuple(const pie::Event& event, std::uint64_t frame_bytes) {
  return nb::make_tuple(std::string(name_of(event.kind)), event.step, event.layer, event.began_ns,
                        event.ended_ns, event.frames * frame_bytes, event.streamed * frame_bytes);
}

nb::tuple to_tuple(const pie::StepEvent& step, std::uint64_t frame_bytes) {
  return nb::make_tuple(
      step.step, step.decode, step.rows, step.began_ns, step.ended_ns, step.stall_ns,
      step.loads.frames * frame_bytes, step.loads.busy_ns, step.writes.frames * frame_bytes,
      step.writes.busy_ns, step.kv_frames * frame_bytes, step.resident_frames * frame_bytes,
      step.ring_frames * frame_bytes, step.budget.frames * frame_bytes,
      std::string(name_of(step.budget.reason)),
      step.load_ns > 0 ? static_cast<double>(frame_bytes) * 1e9 / step.load_ns : 0, step.slowdown);
}

nb::tuple take_trace(Cache& self) {
  const pie::Trace trace = self.enter([](auto& tiered) { return tiered.take_trace(); });
  nb::list steps;
  nb::list events;
  for (const pie::StepEvent& step : trace.steps) steps.append(to_tuple(step, trace.frame_bytes));
  for (const pie::Event& event : trace.events) events.append(to_tuple(event, trace.frame_bytes));
  return nb::make_tuple(steps, events, trace.dropped);
}

// How much is streamed, and what is known of it.
void bind_seeing(nb::class_<Cache>& cache) {
  cache
      .def(
          "set_streamed",
          [](Cache& self, std::uint64_t bytes) {
            self.enter([&](auto& tiered) { tiered.set_streamed(bytes); });
          },
          "bytes"_a, "What steps are to stream at least, though it may fit.")
      .def(
          "start_trace",
          [](Cache& self, std::uint64_t events) {
            self.enter([&](auto& tiered) { tiered.start_trace(events); });
          },
          "events"_a, "Records the last so many steps, and events, from now on.")
      .def("take_trace", &take_trace,
           nb::sig("def take_trace(self) -> tuple[list[typing.Any], list[typing.Any], int]"),
           "What was recorded: steps, events, and how many of both were dropped.")
      .def(
          "headroom",
          [](Cache& self) {
            const auto found = self.enter([](auto& tiered) { return tiered.headroom(); });
            return std::tuple(found.tokens, found.tokens_most, found.slowdown_most);
          },
          "Tokens that can be admitted within the objective, at most, and at what slowdown.")
      .def(
          "stats",
          [](Cache& self) {
            return to_dict(self.enter([](auto& tiered) { return tiered.stats(); }));
          },
          nb::sig("def stats(self) -> dict[str, int | float | str]"), "Counters and gauges.");
}

void bind_cache(nb::module_& module) {
  nb::class_<Cache> cache(module, "Cache", "Native side of pie.TieredKVCache.");
  cache
      .def("__init__", &construct, "device"_a, "layers"_a, "kv_heads"_a, "head_dim"_a,
           "block_tokens"_a, "dtype"_a, "device_bytes"_a, "pool_bytes"_a, "pool_dir"_a, "policy"_a,
           "windows"_a, "driver"_a, "pool_io"_a, "in_place_share"_a, "objective"_a, "slack"_a,
           "max_tpot_ms"_a, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "add", [](Cache& self) { return self.enter([](auto& tiered) { return tiered.add(); }); },
          "Makes an empty sequence.")
      .def(
          "fork",
          [](Cache& self, std::uint64_t sequence) {
            return self.enter([&](auto& tiered) { return tiered.fork(sequence); });
          },
          "sequence"_a, "Makes a sequence with the same tokens.")
      .def(
          "resize",
          [](Cache& self, std::uint64_t device_bytes, std::uint64_t pool_bytes) {
            self.enter([&](auto& tiered) { tiered.resize(device_bytes, pool_bytes); });
          },
          "device_bytes"_a, "pool_bytes"_a, "Moves both budgets.")
      .def("frames", &Cache::frames, nb::sig("def frames(self) -> typing.Any"),
           "The device tier, an array for DLPack.")
      .def(
          "truncate",
          [](Cache& self, std::uint64_t sequence, std::uint32_t tokens) {
            self.enter([&](auto& tiered) { tiered.truncate(sequence, tokens); });
          },
          "sequence"_a, "tokens"_a, "Keeps the first tokens of a sequence.")
      .def(
          "free",
          [](Cache& self, std::uint64_t sequence) {
            self.enter([&](auto& tiered) { tiered.free(sequence); });
          },
          "sequence"_a, "Forgets a sequence.")
      .def(
          "length",
          [](Cache& self, std::uint64_t sequence) {
            return self.enter([&](auto& tiered) { return tiered.length(sequence); });
          },
          "sequence"_a, "Tokens that a sequence holds.")
      .def(
          "check", [](Cache& self) { self.enter([](auto& tiered) { tiered.check(); }); },
          "Raises LogicError naming the first invariant that does not hold.")
      .def(
          "close", [](Cache& self) { self.enter([](auto& tiered) { tiered.close(); }); },
          "Gives all memory back.");
  bind_seeing(cache);
  bind_step(cache);
  bind_layers(cache);
  bind_steps(module);
}

}  // namespace

NB_MODULE(_core, module) {
  module.doc() = "Native core of Pie.";
  bind_exceptions(module);
  bind_functions(module);
  bind_pages(module);
  bind_cache(module);
}
