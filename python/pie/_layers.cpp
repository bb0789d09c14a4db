// Packs what kernels are told into bytes, which cross to Python and on to a device in one piece.
#include "_layers.hpp"

#include <nanobind/nanobind.h>

#include <vector>

namespace nb = nanobind;

namespace {

constexpr std::int32_t is_first = 1;
constexpr std::int32_t is_last = 2;

std::int32_t i32(std::uint64_t value) { return static_cast<std::int32_t>(value); }

nb::bytes bytes_of(const std::vector<std::int32_t>& numbers) {
  return nb::bytes(numbers.data(), numbers.size() * sizeof(std::int32_t));
}

}  // namespace

void PythonKernel::append(const pie::Append& rows) {
  const nb::gil_scoped_acquire locked;
  target_.attr("append")(rows.first_row, rows.slots.size());
}

// Of each piece: row of the tables, entry of the batch, first packed row, rows, position, begin and
// end of what is read, whether it is the first and the last of its rows.
void PythonKernel::attend(std::uint32_t /*layer*/, std::span<const pie::KvPiece> pieces) {
  const pie::StepTables tables = cache_.tables();
  std::vector<std::int32_t> numbers;
  numbers.reserve(8 * pieces.size());
  for (const pie::KvPiece& piece : pieces) {
    const std::int32_t flags = (piece.first ? is_first : 0) | (piece.last ? is_last : 0);
    numbers.insert(numbers.end(), {tables.rows[piece.entry], i32(piece.entry), i32(piece.first_row),
                                   i32(piece.rows), i32(piece.position), i32(piece.kv_begin),
                                   i32(piece.kv_end), flags});
  }
  const nb::gil_scoped_acquire locked;
  target_.attr("attend")(bytes_of(numbers));
}

nb::bytes step_rows(const pie::Cache& cache) {
  const pie::StepTables tables = cache.tables();
  std::vector<std::int32_t> numbers;
  for (std::size_t i = 0; i < tables.rows.size(); ++i) {
    const std::int32_t gain = tables.cu_seqlens[i + 1] - tables.cu_seqlens[i];
    for (std::int32_t row = 0; row < gain; ++row) {
      numbers.push_back(tables.rows[i]);
      numbers.push_back(tables.seq_lens[i] - gain + row);
    }
  }
  return bytes_of(numbers);
}

nb::tuple block_tables(const pie::Cache& cache) {
  const pie::StepTables tables = cache.tables();
  const std::size_t entries = std::size_t{tables.layers} * tables.sequences * tables.blocks;
  return nb::make_tuple(nb::bytes(tables.block_tables, entries * sizeof(std::int32_t)),
                        tables.layers, tables.sequences, tables.blocks);
}

nb::object table_edits(pie::Cache& cache) {
  static_assert(sizeof(pie::TableEdit) == 5 * sizeof(std::int32_t));
  const pie::TableEdits& taken = cache.take_table_edits();
  if (taken.all) return nb::none();
  nb::list batches;
  std::uint32_t begin = 0;
  for (const std::uint32_t end : taken.batch_ends) {
    batches.append(nb::bytes(taken.edits.data() + begin, (end - begin) * sizeof(pie::TableEdit)));
    begin = end;
  }
  return batches;
}
