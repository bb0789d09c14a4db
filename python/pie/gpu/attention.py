"""GpuLayers: runs the layers of a step with Triton kernels, on the caller's stream.

The native side calls `append` and `attend` while it walks a layer; what they launch reads a copy of
the tables on the device, which is kept by edits in the order of the stream.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from pie import _core
from pie._core import LogicError
from pie.gpu import kernels
from pie.gpu.layer import Layer, Queries
from pie.gpu.runtime import Runtime, Use

_PIECE = 8  # numbers that tell of a piece
_WHOLE = 3  # flags of one that is the first and the last of its rows
_TILE_ROWS_LEAST = 16  # what tensor cores take
_TILE_ROWS_PROMPT = 64
_SPLIT_UNIT = 64  # splits end on multiples of it, as tiles do
_SPLIT_TOKENS_LEAST = 256
_SPLITS_MOST = 64
_PROGRAMS_A_PROCESSOR = 4
_IN_POOL = 1 << 30  # set in what tables say of frames of the pool
_BROUGHT = 1024  # numbers that a program brings to the device


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
    told: array[int]  # the same here
    parts: tuple[_Part, ...]

    def each(self) -> Iterator[tuple[int, ...]]:
        """Of each piece its numbers."""
        return (tuple(self.told[i : i + _PIECE]) for i in range(0, len(self.told), _PIECE))


class GpuLayers:
    """The kernels of one cache."""

    def __init__(self, runtime: Runtime, core: _core.Cache, dtype: torch.dtype) -> None:
        self._runtime = runtime
        self._core = core
        self._dtype = dtype
        self.frames: torch.Tensor | None = None  # asked for anew after a resize
        self._pool_offset = 0  # elements from there to the pool's frames; 0: none is read in place
        self._tables: torch.Tensor | None = None  # [layers, rows, blocks]
        self._layer_tables: tuple[torch.Tensor, ...] = ()
        self._blocks = 0  # of a row
        self._step_rows: torch.Tensor | None = None  # [rows, 2] of the open step
        self._plans: dict[bytes, _Plan] = {}  # of the step, by the list of pieces
        self._longest = 0  # tokens of the longest sequence of the step
        self._layer: Layer | None = None
        self._firsts: torch.Tensor | None = None  # items (0, 0), (1, 0), ...
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
            with self._runtime.active():
                self._core.run(layer.number, self)
        finally:
            self._layer = None

    def close(self) -> None:
        """Lets go of all that lies on the device."""
        self.frames = self._tables = self._step_rows = self._firsts = None
        self._layer_tables = ()
        self._plans.clear()
        self._scratch.clear()

    def unwanted_lse(self, rows: int, heads: int) -> torch.Tensor:
        """A place for what nobody asked for."""
        return self._scratch_of("lse", (rows, heads))

    # Called by the native side, inside `run`.

    def append(self, first_row: int, rows: int) -> None:
        layer = self._given()
        tables = self._tables_now()
        if self._step_rows is None:
            told = self._core.step_rows()
            self._step_rows = self._upload(told)
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
            pool = self._core.arena()[3]
            offset = pool - self.frames.data_ptr() if pool else 0
            self._pool_offset = offset // self._dtype.itemsize
        return self.frames

    def _tables_now(self) -> tuple[torch.Tensor, ...]:
        """The tables of each layer, with all that has changed since."""
        edits = self._core.table_edits()
        if edits is None or self._tables is None:
            told, layers, rows, blocks = self._core.block_tables()
            self._tables = self._upload(told).view(layers, rows, blocks)
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

    def _upload(self, data: bytes) -> torch.Tensor:
        """int32 on the device. A kernel fetches it: a copy would queue for the engine that streamed
        blocks come by, and the computation with it.
        """
        staged = self._runtime.stage(data)
        count = staged.numel()
        to = self._runtime.empty((count,), torch.int32)
        grid = (-(-count // _BROUGHT),)
        numbers, constants = (count,), (_BROUGHT,)
        self._runtime.launch(
            kernels.bring, grid, tuple, (to, staged), numbers, constants, self._stream
        )
        return to

    def _planned(self, told: bytes) -> _Plan:
        layer = self._given()
        pieces = array("i", told)
        on_device = self._upload(told)
        if layer.queries is None:
            return _Plan(on_device, pieces, ())
        group = layer.queries.q.shape[1] // layer.k.shape[1]
        rows = pieces[3::_PIECE]
        decode = [i for i, count in enumerate(rows) if count == 1]
        prompt = [i for i, count in enumerate(rows) if count > 1]
        parts = []
        if decode:
            parts.append(self._decode_part(pieces, decode, group))
        if prompt:
            parts.append(self._prompt_part(pieces, prompt, group))
        return _Plan(on_device, pieces, tuple(parts))

    def _decode_part(self, pieces: array[int], mine: list[int], group: int) -> _Part:
        """Pieces with one row: their KV is split, so that few of them fill the device. How is said
        by the step's rows and lengths, so that no plan changes what is added to what.
        """
        wanted = _PROGRAMS_A_PROCESSOR * self._runtime.processors
        wanted //= self._rows * self._given().k.shape[1]
        splits = max(1, min(_SPLITS_MOST, wanted, self._longest // _SPLIT_TOKENS_LEAST))
        split_tokens = -(-self._longest // (splits * _SPLIT_UNIT)) * _SPLIT_UNIT
        splits = -(-self._longest // split_tokens)
        merged = None
        if splits > 1 or not _are_whole(pieces, mine):
            rows, flags = pieces[2::_PIECE], pieces[7::_PIECE]
            begins, ends = pieces[5::_PIECE], pieces[6::_PIECE]
            merged = self._numbers(
                (rows[i], flags[i], begins[i] // split_tokens, -(-ends[i] // split_tokens), at)
                for at, i in enumerate(mine)
            )
        return _Part(
            self._single_rows(mine),
            merged,
            True,
            len(mine),
            splits,
            split_tokens,
            _tile_rows(group, _TILE_ROWS_LEAST),
            self._tile(),
            warps=2,
            stages=3,
        )

    def _single_rows(self, mine: list[int]) -> torch.Tensor:
        """Items of pieces with one row, which are mostly the first so many."""
        count = len(mine)
        if mine[-1] != count - 1:
            return self._numbers((i, 0) for i in mine)
        if self._firsts is None or self._firsts.numel() < 2 * count:
            self._firsts = self._numbers((i, 0) for i in range(2 * count))
        return self._firsts[: 2 * count]

    def _prompt_part(self, pieces: array[int], mine: list[int], group: int) -> _Part:
        """Pieces with several rows, which fill the device by themselves."""
        firsts, rows, flags = pieces[2::_PIECE], pieces[3::_PIECE], pieces[7::_PIECE]
        tile_rows = _tile_rows(group, _TILE_ROWS_PROMPT)
        merged = None
        if not _are_whole(pieces, mine):
            merged = self._numbers(
                (row, flags[i], 0, 1, row)
                for i in mine
                for row in range(firsts[i], firsts[i] + rows[i])
            )
        return _Part(
            self._numbers((i, row) for i in mine for row in range(0, rows[i], tile_rows // group)),
            merged,
            False,
            self._rows,
            1,
            1 << 30,
            tile_rows,
            self._tile(),
        )

    def _numbers(self, tuples: Iterable[tuple[int, ...]]) -> torch.Tensor:
        return self._upload(array("i", [n for one in tuples for n in one]).tobytes())

    def _tile(self) -> int:
        """Tokens of a tile: what fits beside the rows in a processor's shared memory."""
        frames = self._frames()
        return 32 if frames.shape[4] > 128 or frames.dtype is torch.float32 else 64

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
                self._pool_offset,
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
                self._pool_offset != 0,
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
        pieces = list(plan.each())
        blocks = max(-(-piece[6] // tokens) - piece[5] // tokens for piece in pieces)
        self._runtime.launch(
            kernels.gather,
            (len(pieces), blocks, 2 * kv_heads),
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

    # Which bytes a kernel uses of frames; asked by a double alone.

    def _appended(self, first_row: int, rows: int) -> Iterator[Use]:
        assert self._tables is not None
        assert self._step_rows is not None
        frames = self._frames()
        told = self._step_rows.view(-1, 2)[first_row : first_row + rows].tolist()
        for row, position in told:
            frame = self._tables[self._given().number, row, position // frames.shape[3]]
            slot = position % frames.shape[3]
            for part in frames[int(frame)].flatten(0, 1):
                yield part[slot].data_ptr(), part[slot].nbytes, True

    def _read(self, plan: _Plan) -> Iterator[Use]:
        assert self._tables is not None
        frames = self._frames()
        tokens = frames.shape[3]
        for row, _, _, _, _, begin, end, _ in plan.each():
            table = self._tables[self._given().number, row, begin // tokens : -(-end // tokens)]
            for frame in table.tolist():
                start = frame % _IN_POOL * frames.stride(0)
                start += self._pool_offset if frame >= _IN_POOL else 0
                yield frames.data_ptr() + start * frames.itemsize, frames[0].nbytes, False


def _are_whole(pieces: array[int], mine: list[int]) -> bool:
    """Whether each piece is all that its rows read."""
    flags = pieces[7::_PIECE]
    return all(flags[i] == _WHOLE for i in mine)


def _tile_rows(group: int, least: int) -> int:
    """(row, head) pairs that a program serves: whole groups of heads, a power of two."""
    return max(least, _power(group))


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
