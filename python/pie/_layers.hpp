// Layers of a step run by an object of Python's, and what it is told, as numbers in bytes.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "pie/cache.hpp"
#include "pie/layer_kernel.hpp"

// Calls `append(first_row, rows)` and `attend(pieces)` of a Python object, with the interpreter
// lock, which the caller must not hold.
class PythonKernel final : public pie::LayerKernel {
 public:
  PythonKernel(const pie::Cache& cache, nanobind::handle target) : cache_(cache), target_(target) {}

  void append(const pie::Append& rows) override;
  void attend(std::uint32_t layer, std::span<const pie::KvPiece> pieces) override;

 private:
  const pie::Cache& cache_;
  nanobind::handle target_;
};

// `[rows, 2]` int32 of the open step: each packed row's row of the tables, and its position.
nanobind::bytes step_rows(const pie::Cache& cache);

// `[layers, rows, blocks]` int32 and that shape.
nanobind::tuple block_tables(const pie::Cache& cache);

// Batches of `[edits, 5]` int32: layer, row, block, count, frame; no two of a batch say anything of
// one entry. None where all of the tables may have changed.
nanobind::object table_edits(pie::Cache& cache);
