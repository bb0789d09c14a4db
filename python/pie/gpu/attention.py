"""GpuLayers: runs the layers of a step with Triton kernels, on the caller's stream.

The native side calls `append` and `attend` while it walks a layer; what they launch reads a copy of
the tables on the device, which is kept by edits in the order of the stream.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pie import _core
from pie._core import LogicError
from pie.gpu import kernels
from pie.gpu.layer import Layer, Queries
from pie.gpu.runtime import Runtime

_PIECE = 8  # numbers that tell of a piece
_WHOLE = 3  # flags of one that is the first and the last of its rows
_TILE_ROWS_LEAST = 16  # what tensor cores take
_TILE_ROWS_PROMPT = 64
_SPLIT_UNIT = 64  # splits end on multiples of it, as tiles do
_SPLIT_TOKENS_LEAST = 256
_SPLITS_MOST = 64
_PROGRAMS_A_PROCESSOR = 4


@dataclass(frozen=True)
class _Part:
    """Pieces of one launch: those with one row, or those with more."""

    items: torch.Tensor  # [items, 2]
    merged: torch.Tensor | None  # [rows, 5] to merge; None: what is found is the result
    by_item: bool
    found_rows: int
    splits: int
    split_tokens: int
    tile_rows: int  # (row, head) pairs that a program serves
    tile: int = 64  # tokens that it reads at a time
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class _Plan:
    """How a list of pieces is launched, in each layer of a step that has the same list."""

    pieces: torch.Tensor  # [pieces, 8]
    numbers: tuple[tuple[int, ...], ...]
    parts: tuple[_Part, ...]


class GpuLayers:
    """The kernels of one cache."""

    def __init__(self, runtime: Runtime, core: _core.Cache, dtype: torch.dtype) -> None:
        self._runtime = runtime
        self._core = core
        self._dtype = dtype
        self.frames: torch.Tensor | None = None  # asked for anew after a resize
        self._tables: torch.Tensor | None = None  # [layers, rows, blocks]
        self._layer_tables: tuple[torch.Tensor, ...] = ()
        self._blocks = 0  # of a row
        self._step_rows: torch.Tensor | None = None  # [rows, 2] of the open step
        self._plans: dict[bytes, _Plan] = {}  # of the step, by the list of pieces
        self._longest = 0  # tokens of the longest sequence of the step
        self._layer: Layer | None = None
        self._stream = 0  # of the step that is open
        self._rows = 0
        self._scratch: dict[str, torch.Tensor] = {}

    def open(self) -> None:
        """A step begins: the stream that computes it is the caller's of this moment."""
        self._stream = self._runtime.stream()
        self._core.set_stream(self._stream)
        self._step_rows = None
        self._plans.clear()

    def run(self, layer: Layer, rows: int) -> None:
        """Appends a layer's K and V and reads all of each sequence."""
        if self._runtime.stream() != self._stream:
            raise LogicError(
                "The current stream is not the one that the step was begun on: run all of a step "
                "on one stream."
            )
        self._layer = layer
        self._rows = rows
        try:
            self._core.run(layer.number, self)
        finally:
            self._layer = None

    def unwanted_lse(self, rows: int, heads: int) -> torch.Tensor:
        """A place for what nobody asked for."""
        return self._scratch_of("lse", (rows, heads))

    # Called by the native side, inside `run`.

    def append(self, first_row: int, rows: int) -> None:
        layer = self._given()
        tables = self._tables_now()
        if self._step_rows is None:
            told = self._core.step_rows()
            self._step_rows = self._runtime.upload(told)
            self._longest = 1 + max(memoryview(told).cast("i").tolist()[1::2])
        frames = self._frames()
        kv_heads, tokens, dim = frames.shape[2:]
        k, v = layer.k, layer.v
        self._runtime.launch(
            kernels.append,
            (rows,),
            lambda: self._appended(first_row, rows),
            (k, v, frames, tables[layer.number], self._step_rows),
            (*k.stride()[:2], *v.stride()[:2], frames.stride(0), self._blocks, first_row),
            (kv_heads, dim, tokens, _power(kv_heads), _power(dim)),
            self._stream,
            layer.aligned,
        )

    def attend(self, told: bytes) -> None:
        tables = self._tables_now()
        plan = self._plans.get(told)
        if plan is None:
            plan = self._plans[told] = self._planned(told)
        layer = self._given()
        if layer.gathered is not None:
            self._gather(plan, tables, layer.gathered)
        if layer.queries is not None:
            for part in plan.parts:
                self._attend(plan, part, tables, layer.queries)

    # How it is done.

    def _given(self) -> Layer:
        if self._layer is None:
            raise LogicError("No layer runs.")
        return self._layer

    def _frames(self) -> torch.Tensor:
        if self.frames is None:
            self.frames = self._runtime.frames(self._core, self._dtype)
        return self.frames

    def _tables_now(self) -> tuple[torch.Tensor, ...]:
        """The tables of each layer, with all that has changed since."""
        edits = self._core.table_edits()
        if edits is None or self._tables is None:
            told, layers, rows, blocks = self._core.block_tables()
            self._tables = self._runtime.upload(told).view(layers, rows, blocks)
            self._layer_tables = tuple(self._tables)
            self._blocks = blocks
            return self._layer_tables
        for batch in edits:
            told_edits = self._runtime.stage(batch)
            self._runtime.launch(
                kernels.edit,
                (told_edits.numel() // 5,),
                tuple,
                (self._tables, told_edits),
                self._tables.shape[1:],
                (64,),
                self._stream,
            )
        return self._layer_tables

    def _planned(self, told: bytes) -> _Plan:
        layer = self._given()
        flat = memoryview(told).cast("i").tolist()
        numbers = tuple(tuple(flat[i : i + _PIECE]) for i in range(0, len(flat), _PIECE))
        pieces = self._runtime.upload(told)
        if layer.queries is None:
            return _Plan(pieces, numbers, ())
        group = layer.queries.q.shape[1] // layer.k.shape[1]
        parts = (self._decode_part(numbers, group), self._prompt_part(numbers, group))
        return _Plan(pieces, numbers, tuple(part for part in parts if part is not None))

    def _decode_part(self, numbers: tuple[tuple[int, ...], ...], group: int) -> _Part | None:
        """Pieces with one row: their KV is split, so that few of them fill the device. How is said
        by the step's rows and lengths, so that no plan changes what is added to what.
        """
        mine = [(i, piece) for i, piece in enumerate(numbers) if piece[3] == 1]
        if not mine:
            return None
        kv_heads = self._given().k.shape[1]
        wanted = _PROGRAMS_A_PROCESSOR * self._runtime.processors // (self._rows * kv_heads)
        splits = max(1, min(_SPLITS_MOST, wanted, self._longest // _SPLIT_TOKENS_LEAST))
        split_tokens = -(-self._longest // (splits * _SPLIT_UNIT)) * _SPLIT_UNIT
        splits = -(-self._longest // split_tokens)
        merged = [
            (piece[2], piece[7], piece[5] // split_tokens, -(-piece[6] // split_tokens), at)
            for at, (_, piece) in enumerate(mine)
        ]
        whole = splits == 1 and all(piece[7] == _WHOLE for _, piece in mine)
        return _Part(
            self._numbers([(i, 0) for i, _ in mine]),
            None if whole else self._numbers(merged),
            True,
            len(mine),
            splits,
            split_tokens,
            _tile_rows(group, _TILE_ROWS_LEAST),
            self._tile(),
            warps=2,
            stages=3,
        )

    def _prompt_part(self, numbers: tuple[tuple[int, ...], ...], group: int) -> _Part | None:
        """Pieces with several rows, which fill the device by themselves."""
        mine = [(i, piece) for i, piece in enumerate(numbers) if piece[3] > 1]
        if not mine:
            return None
        tile_rows = _tile_rows(group, _TILE_ROWS_PROMPT)
        items = [(i, row) for i, piece in mine for row in range(0, piece[3], tile_rows // group)]
        merged = [
            (row, piece[7], 0, 1, row)
            for _, piece in mine
            for row in range(piece[2], piece[2] + piece[3])
        ]
        whole = all(piece[7] == _WHOLE for _, piece in mine)
        return _Part(
            self._numbers(items),
            None if whole else self._numbers(merged),
            False,
            self._rows,
            1,
            1 << 30,
            tile_rows,
            self._tile(),
        )

    def _tile(self) -> int:
        """Tokens of a tile: what fits beside the rows in a processor's shared memory."""
        frames = self._frames()
        return 32 if frames.shape[4] > 128 or frames.dtype is torch.float32 else 64

    def _numbers(self, tuples: Sequence[tuple[int, ...]]) -> torch.Tensor:
        return self._runtime.upload(array("i", [n for one in tuples for n in one]).tobytes())

    def _attend(
        self, plan: _Plan, part: _Part, tables: tuple[torch.Tensor, ...], queries: Queries
    ) -> None:
        layer = self._given()
        frames = self._frames()
        heads = queries.q.shape[1]
        kv_heads, tokens, dim = frames.shape[2:]
        shape = (part.splits, part.found_rows, heads)
        found, found_lse = queries.lse, queries.lse
        if part.merged is not None:
            found = self._scratch_of("found", (*shape, dim))
            found_lse = self._scratch_of("found_lse", shape)
        q, out = queries.q, queries.out
        sinks = queries.lse if queries.sinks is None else queries.sinks
        self._runtime.launch(
            kernels.attend,
            (part.items.numel() // 2, kv_heads, part.splits),
            lambda: self._read(plan),
            (
                q,
                out,
                queries.lse,
                sinks,
                frames,
                tables[layer.number],
                plan.pieces,
                part.items,
                found,
                found_lse,
            ),
            (
                *q.stride()[:2],
                *out.stride()[:2],
                frames.stride(0),
                self._blocks,
                part.found_rows,
                part.split_tokens,
                layer.window,
                queries.scale,
                queries.soft_cap,
            ),
            (
                heads,
                kv_heads,
                dim,
                tokens,
                max(16, _power(dim)),
                part.tile_rows,
                part.tile,
                part.merged is None,
                part.by_item,
                queries.sinks is not None,
                queries.soft_cap > 0,
                not self._runtime.is_gpu and frames.dtype is torch.bfloat16,
            ),
            self._stream,
            layer.aligned,
            part.warps,
            part.stages,
        )
        if part.merged is not None:
            self._merge(part, part.merged, found, found_lse, queries)

    def _merge(
        self,
        part: _Part,
        merged: torch.Tensor,
        found: torch.Tensor,
        found_lse: torch.Tensor,
        queries: Queries,
    ) -> None:
        heads, dim = queries.q.shape[1:]
        sinks = queries.lse if queries.sinks is None else queries.sinks
        state = self._scratch_of("state", (self._rows, heads, dim))
        state_lse = self._scratch_of("state_lse", (self._rows, heads))
        self._runtime.launch(
            kernels.merge,
            (merged.numel() // 5, heads),
            tuple,
            (queries.out, queries.lse, sinks, found, found_lse, state, state_lse, merged),
            (*queries.out.stride()[:2], part.found_rows),
            (heads, dim, _power(dim), queries.sinks is not None),
            self._stream,
            self._given().aligned,
        )

    def _gather(
        self, plan: _Plan, tables: tuple[torch.Tensor, ...], gathered: torch.Tensor
    ) -> None:
        layer = self._given()
        frames = self._frames()
        kv_heads, tokens, dim = frames.shape[2:]
        blocks = max(-(-piece[6] // tokens) - piece[5] // tokens for piece in plan.numbers)
        self._runtime.launch(
            kernels.gather,
            (len(plan.numbers), blocks, 2 * kv_heads),
            lambda: self._read(plan),
            (gathered, frames, tables[layer.number], plan.pieces),
            (gathered.shape[3], frames.stride(0), self._blocks, gathered.shape[1]),
            (kv_heads, dim, tokens, _power(tokens), _power(dim)),
            self._stream,
        )

    def _scratch_of(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory that one layer leaves to the next, in the order of the stream."""
        needed = 1
        for size in shape:
            needed *= size
        held = self._scratch.get(name)
        if held is None or held.numel() < needed:
            held = self._scratch[name] = self._runtime.empty((needed,), torch.float32)
        return held

    # Which frames a kernel uses; asked by a double alone.

    def _appended(self, first_row: int, rows: int) -> Iterator[tuple[torch.Tensor, bool]]:
        assert self._tables is not None
        assert self._step_rows is not None
        frames = self._frames()
        told = self._step_rows.view(-1, 2)[first_row : first_row + rows].tolist()
        for row, position in told:
            frame = self._tables[self._given().number, row, position // frames.shape[3]]
            slot = position % frames.shape[3]
            for part in frames[int(frame)].flatten(0, 1):
                yield part[slot], True

    def _read(self, plan: _Plan) -> Iterator[tuple[torch.Tensor, bool]]:
        assert self._tables is not None
        frames = self._frames()
        tokens = frames.shape[3]
        for row, _, _, _, _, begin, end, _ in plan.numbers:
            table = self._tables[self._given().number, row, begin // tokens : -(-end // tokens)]
            for frame in table.tolist():
                yield frames[frame], False


def _tile_rows(group: int, least: int) -> int:
    """(row, head) pairs that a program serves: whole groups of heads, a power of two."""
    return max(least, _power(group))


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
