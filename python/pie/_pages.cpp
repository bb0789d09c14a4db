// Bindings of append and attention over frames that a table names, for pie.ops: functions of their
// arrays alone. Shapes and dtypes were checked there; what is checked here is what the numbers say.
#include "_pages.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pie/attention.hpp"
#include "pie/error.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Array = nb::ndarray<nb::device::cpu>;

// Rows of attention state that are held at once.
constexpr std::uint32_t rows_per_wave = 512;

// One sequence of a packed batch.
struct Member {
  std::uint32_t first_row = 0;
  std::uint32_t rows = 0;
  std::uint32_t position = 0;           // of its first row
  const std::int32_t* table = nullptr;  // its row

  [[nodiscard]] std::uint32_t end() const { return position + rows; }
};

std::uint32_t u32(std::size_t value) { return static_cast<std::uint32_t>(value); }

pie::Rows rows_of(const Array& array, std::uint32_t row, pie::DType dtype) {
  const auto bytes = static_cast<std::int64_t>(pie::dtype_bytes(dtype)) * array.stride(0) * row;
  return {static_cast<const std::byte*>(array.data()) + bytes, array.stride(0), array.stride(1)};
}

pie::AttentionShape shape_of(const Array& frames, std::size_t query_heads) {
  pie::AttentionShape shape;
  shape.query_heads = u32(query_heads);
  shape.kv_heads = u32(frames.shape(2));
  shape.head_dim = u32(frames.shape(4));
  shape.block_tokens = u32(frames.shape(3));
  shape.scale = 1;
  if (frames.itemsize() == 4) {
    shape.dtype = pie::DType::f32;
  } else {
    const auto bfloat = static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat);
    shape.dtype = frames.dtype().code == bfloat ? pie::DType::bf16 : pie::DType::f16;
  }
  return shape;
}

pie::Bytes stride_of(const Array& frames) {
  return static_cast<pie::Bytes>(frames.stride(0)) * frames.itemsize();
}

// Refuses a row of the table that names no frame for one of blocks [first, last).
void check_row(const Array& frames, const std::int32_t* table, std::uint32_t first,
               std::uint32_t last, std::size_t sequence) {
  for (std::uint32_t block = first; block < last; ++block) {
    if (table[block] >= 0 && static_cast<std::size_t>(table[block]) < frames.shape(0)) continue;
    throw pie::LogicError("The table names frame " + std::to_string(table[block]) + " for block " +
                          std::to_string(block) + " of sequence " + std::to_string(sequence) +
                          ", where there are " + std::to_string(frames.shape(0)) + " frames.");
  }
}

// The batch, with the frames that its rows write (`window` 1) or see.
std::vector<Member> members(const Array& frames, const Array& table, const Array& starts,
                            const Array& positions, std::size_t rows, std::uint32_t window) {
  const auto* start = static_cast<const std::int32_t*>(starts.data());
  const auto* position = static_cast<const std::int32_t*>(positions.data());
  const std::size_t batch = table.shape(0);
  if (start[0] != 0 || static_cast<std::size_t>(start[batch]) != rows) {
    throw pie::LogicError("starts must run from 0 to the " + std::to_string(rows) + " rows.");
  }
  std::vector<Member> all;
  for (std::size_t i = 0; i < batch; ++i) {
    const std::int64_t size = std::int64_t{start[i + 1]} - start[i];
    const std::int64_t end = position[i] + size;
    const auto block = static_cast<std::int64_t>(frames.shape(3));
    if (size < 0 || position[i] < 0 || end > static_cast<std::int64_t>(table.shape(1)) * block) {
      throw pie::LogicError("Sequence " + std::to_string(i) + " has rows for tokens " +
                            std::to_string(position[i]) + " to " + std::to_string(end) +
                            ", which its " + std::to_string(table.shape(1)) +
                            " blocks of the table do not hold.");
    }
    if (size == 0) continue;
    const auto* row = static_cast<const std::int32_t*>(table.data()) + i * table.shape(1);
    const Member member{u32(start[i]), u32(size), u32(position[i]), row};
    const std::uint32_t seen = pie::Geometry::first_seen(member.position, window);
    check_row(frames, row, seen / u32(block), u32((end + block - 1) / block), i);
    all.push_back(member);
  }
  return all;
}

void append(const Array& frames, const Array& table, const Array& starts, const Array& positions,
            const Array& k, const Array& v) {
  const nb::gil_scoped_release unlocked;
  const pie::AttentionShape shape = shape_of(frames, frames.shape(2));
  auto* memory = static_cast<std::byte*>(frames.data());
  for (const Member& member : members(frames, table, starts, positions, k.shape(0), 1)) {
    for (std::uint32_t at = member.position; at < member.end();) {
      const std::uint32_t token = at % shape.block_tokens;
      const std::uint32_t rows = std::min(shape.block_tokens - token, member.end() - at);
      const std::uint32_t row = member.first_row + (at - member.position);
      const auto frame = static_cast<pie::Bytes>(member.table[at / shape.block_tokens]);
      pie::frame_append(shape, memory + frame * stride_of(frames), token, rows,
                        rows_of(k, row, shape.dtype), rows_of(v, row, shape.dtype));
      at += rows;
    }
  }
}

// Rows [row, row + rows) of one sequence, all in one piece.
pie::AttentionWork work_of(const pie::AttentionShape& shape, const Member& member,
                           const Array& frames, std::uint32_t row, std::uint32_t rows,
                           const Array& q, float* state) {
  pie::AttentionWork work;
  work.q = rows_of(q, member.first_row + row, shape.dtype);
  work.rows = rows;
  work.position = member.position + row;
  const std::uint32_t seen = pie::Geometry::first_seen(work.position, shape.window);
  work.kv_begin = seen / shape.block_tokens * shape.block_tokens;
  work.kv_end = work.position + rows;
  work.frames = {static_cast<const std::byte*>(frames.data()), stride_of(frames),
                 member.table + work.kv_begin / shape.block_tokens};
  work.state = state;
  return work;
}

// Folds and finishes what is collected, and forgets it.
void finish(const pie::AttentionShape& shape, std::vector<pie::AttentionWork>& work,
            std::vector<std::uint32_t>& first_rows, const Array& out, float* lse) {
  pie::attention_fold(shape, work);
  for (std::size_t i = 0; i < work.size(); ++i) {
    const pie::Rows at = rows_of(out, first_rows[i], shape.dtype);
    pie::attention_finish(shape, work[i].state, work[i].rows,
                          {const_cast<void*>(at.data), at.row_stride, at.head_stride},
                          lse + std::size_t{first_rows[i]} * shape.query_heads);
  }
  work.clear();
  first_rows.clear();
}

void attend(const Array& frames, const Array& table, const Array& starts, const Array& positions,
            const Array& q, const Array& out, const Array& lse, float scale, std::uint32_t window,
            float soft_cap, const std::optional<Array>& sinks) {
  const nb::gil_scoped_release unlocked;
  pie::AttentionShape shape = shape_of(frames, q.shape(1));
  shape.scale = scale;
  shape.window = window;
  shape.soft_cap = soft_cap;
  shape.sinks = sinks ? static_cast<const float*>(sinks->data()) : nullptr;
  const std::size_t floats = pie::attention_state_floats(shape);
  const std::uint32_t most = std::min(rows_per_wave, u32(q.shape(0)));
  std::vector<float> state(floats * most);
  std::vector<pie::AttentionWork> work;
  std::vector<std::uint32_t> first_rows;
  std::uint32_t held = 0;
  const auto flush = [&] {
    finish(shape, work, first_rows, out, static_cast<float*>(lse.data()));
    held = 0;
  };
  const auto batch = members(frames, table, starts, positions, q.shape(0), window);
  for (const Member& member : batch) {
    for (std::uint32_t row = 0; row < member.rows;) {
      const std::uint32_t rows = std::min(member.rows - row, most - held);
      float* at = state.data() + floats * held;
      pie::attention_reset(shape, at, rows);
      work.push_back(work_of(shape, member, frames, row, rows, q, at));
      first_rows.push_back(member.first_row + row);
      row += rows;
      held += rows;
      if (held == most) flush();
    }
  }
  flush();
}

}  // namespace

void bind_pages(nb::module_& module) {
  module.def("append_pages", &append, "frames"_a, "table"_a, "starts"_a, "positions"_a, "k"_a,
             "v"_a,
             nb::sig("def append_pages(frames: typing.Any, table: typing.Any, starts: typing.Any, "
                     "positions: typing.Any, k: typing.Any, v: typing.Any) -> None"),
             "Writes K and V rows into the frames that the table names.");
  module.def("attend_pages", &attend, "frames"_a, "table"_a, "starts"_a, "positions"_a, "q"_a,
             "out"_a, "lse"_a, "scale"_a, "window"_a, "soft_cap"_a, "sinks"_a.none(),
             nb::sig("def attend_pages(frames: typing.Any, table: typing.Any, starts: typing.Any, "
                     "positions: typing.Any, q: typing.Any, out: typing.Any, lse: typing.Any, "
                     "scale: float, window: int, soft_cap: float, sinks: typing.Any) -> None"),
             "Attends to the K and V in the frames that the table names.");
}
