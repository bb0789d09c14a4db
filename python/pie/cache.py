"""TieredKVCache: sequences, steps and attention on torch tensors, for use inside a model.

The cache itself is native. What is here turns torch's words into numbers (checked, so that a wrong
tensor is a sentence and never a wrong token) and lends the native loops torch's own threads.
"""

from __future__ import annotations

import itertools
import os
import warnings
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch.utils.dlpack import from_dlpack

from pie import _core
from pie._core import ConfigError, LogicError
from pie.gpu.layer import Layer, Queries
from pie.gpu.runtime import Runtime, runtime_for
from pie.memory import available_memory
from pie.ops import check_sinks, library
from pie.policy import Policy, Told
from pie.sizes import parse_size
from pie.stats import Stats
from pie.threads import lend_threads
from pie.trace import Trace

if TYPE_CHECKING:
    from pie.gpu.attention import GpuLayers

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_AUTO_FREE_BYTES = 16 << 20  # on a disk with less free than this, "auto" is refused
_ROOM_TOKENS = 256  # a sequence's last block may be this much larger than what is in it
_ROOM_BYTES = 64 << 20  # for what is not KV: attention's state, staging
_ALIASES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def dtype_name(dtype: torch.dtype | str) -> str:
    """Pie's name ("f32", "bf16", "f16") of a torch dtype, or of its own or torch's name for one."""
    name = str(dtype).removeprefix("torch.")
    name = _ALIASES.get(name, name)
    if name not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not supported: use one of {', '.join(_DTYPES)}.")
    return name


def torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The torch dtype that `dtype` means."""
    return _DTYPES[dtype_name(dtype)]


def kv_bytes(
    num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype | str, tokens: int
) -> int:
    """Bytes of K and V of `tokens` tokens in all layers."""
    return 2 * num_layers * num_kv_heads * head_dim * torch_dtype(dtype).itemsize * tokens


def roomy_bytes(
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype | str,
    lengths: Sequence[int],
) -> int:
    """A device budget in which sequences of these lengths fit with room to spare.

    It costs nothing to ask for too much: device memory is taken as it is used.
    """
    tokens = sum(length + _ROOM_TOKENS for length in lengths)
    return 2 * kv_bytes(num_layers, num_kv_heads, head_dim, dtype, tokens) + _ROOM_BYTES


class Headroom(NamedTuple):
    """What can be admitted now, in tokens of sequences that will run beside those that do."""

    tokens: int  # within the objective
    tokens_most: int  # that both tiers can hold
    slowdown_most: float  # of a step when all of it is held; 0 where nothing is known yet


class TieredKVCache:
    """KV cache of many sequences over two tiers: `device_bytes` of fast memory, a pool behind it.

    num_layers, num_kv_heads, head_dim: geometry, the same in every layer.
    dtype: of q, K, V and the result; torch.float32, bfloat16 or float16, or "f32", "bf16", "f16".
    device: "cpu"; or "cuda", "cuda:1", on whose current stream steps are computed.
    device_bytes: bounds everything held on the device. An int of bytes, or text like "512MiB".
    pool_bytes: the most that the pool may take; "auto" is half of the free disk in `pool_dir`, of
        the free CPU memory behind a GPU; None or 0 is no pool. It is taken as it is needed.
    pool_dir: directory of the pool's file, which is unlinked as soon as it is made; by default the
        first of $TMPDIR, /var/tmp and /tmp that is on a disk. Memory (tmpfs) must be asked for by
        name, as in "tmpfs:/dev/shm".
    block_tokens: tokens per block, a multiple of 16; None chooses from device_bytes.
    policy: "adaptive" streams just what the budget cannot hold, and learns from the steps what more
        would cost; "fit" streams the same, "fixed:F" the share F of all frames, "off" nothing. Or
        an object that says before each step how much: see pie.Policy.
    objective: what `headroom()` keeps to. "transparent": a decode step takes at most `slack` (a
        share) more than it would with all its KV on the device. "throughput": most tokens a second.
    max_tpot_ms: milliseconds that a decode step may take by `headroom()`; None is no bound.
    windows: of each layer, how many tokens a token sees, itself included; 0 is all. Frames that no
        token will see again are given back.
    pool_io: how the pool is reached; "auto" takes the best there is. Of a file "direct-uring",
        "direct-threads" or "buffered-threads"; of CPU memory behind a GPU "pinned", "coherent"
        (on a GH200) or "pageable".
    in_place_share: of the KV that a GPU reads in a step, from 0 to 1, how much it reads where it
        lies in CPU memory instead of fetching it before; None: what pays by the device's rates,
        which is nothing over PCIe.

    One thread at a time. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype | str,
        device: torch.device | str = "cpu",
        *,
        device_bytes: int | str,
        pool_bytes: int | str | None = "auto",
        pool_dir: str | os.PathLike[str] | None = None,
        block_tokens: int | None = None,
        policy: str | Policy = "adaptive",
        objective: str = "transparent",
        slack: float = 0.05,
        max_tpot_ms: float | None = None,
        windows: Sequence[int] | None = None,
        pool_io: str = "auto",
        in_place_share: float | None = None,
    ) -> None:
        runtime = runtime_for(device)
        directory = os.fsdecode(pool_dir) if pool_dir is not None else ""
        self._told = None if isinstance(policy, str) else Told(policy)
        if not isinstance(objective, str):
            raise ConfigError(f"objective is {objective!r}: give 'transparent' or 'throughput'.")
        if not isinstance(pool_io, str):
            raise ConfigError(f"pool_io is {pool_io!r}: give 'auto' or another word, as text.")
        self.num_layers = _positive("num_layers", num_layers)
        self.num_kv_heads = _positive("num_kv_heads", num_kv_heads)
        self.head_dim = _positive("head_dim", head_dim)
        self.dtype = torch_dtype(dtype)
        self._scale = self.head_dim**-0.5
        self._windows = [_count("a window", window) for window in windows or ()]
        self._core = _core.Cache(
            device="cpu" if runtime is None else runtime.name,
            layers=self.num_layers,
            kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_tokens=0 if block_tokens is None else _positive("block_tokens", block_tokens),
            dtype=dtype_name(dtype),
            device_bytes=parse_size(device_bytes, "device_bytes"),
            pool_bytes=_pool_bytes(pool_bytes, directory, runtime),
            pool_dir=directory,
            policy=policy if isinstance(policy, str) else "fit",
            windows=self._windows,
            driver="" if runtime is None else runtime.driver,
            pool_io=pool_io,
            in_place_share=-1.0 if in_place_share is None else _share(in_place_share),
            objective=objective,
            slack=_number("slack", slack),
            max_tpot_ms=0.0 if max_tpot_ms is None else _number("max_tpot_ms", max_tpot_ms),
        )
        self._runtime = runtime
        self._gpu = None if runtime is None else _gpu_layers(runtime, self._core, self.dtype)
        self.device = torch.device("cpu") if runtime is None else runtime.device
        self._frames: torch.Tensor | None = None
        number = next(_numbers)
        _caches[number] = self
        self._handle = torch.tensor([number], device="cpu")  # what the operator knows this cache by
        if pool_io == "auto":
            self._report_fallback()

    def add(self) -> int:
        """Makes an empty sequence and returns its number, which is never used again."""
        return self._core.add()

    def fork(self, sequence: int) -> int:
        """Makes a sequence with the same tokens and returns its number.

        What the two have in common is held once; the block that is partial is copied when one of
        them grows.
        """
        return self._core.fork(_known(sequence))

    def resize(
        self, *, device_bytes: int | str | None = None, pool_bytes: int | str | None = None
    ) -> None:
        """Moves the budgets, up or down; None leaves one as it is. Not inside a step.

        What is given up goes back to the system. CapacityError, with nothing changed, where what is
        held does not fit; IoError, with nothing lost, where a transfer fails on the way.
        """
        now = self._core.stats()
        sizes = {"device_bytes": device_bytes, "pool_bytes": pool_bytes}
        moved = {
            name: int(now[name]) if size is None else _bytes_or_none(size, name)
            for name, size in sizes.items()
        }
        self._core.resize(**moved)
        self._frames = None
        if self._gpu is not None:
            self._gpu.frames = None

    def truncate(self, sequence: int, tokens: int) -> None:
        """Keeps the first `tokens` tokens of a sequence.

        LogicError where layers with a window have given back what the next token would see.
        """
        self._core.truncate(_known(sequence), _count("tokens", tokens))

    def free(self, sequence: int) -> None:
        """Forgets a sequence and gives back what it held."""
        self._core.free(_known(sequence))

    def length(self, sequence: int) -> int:
        """Tokens that a sequence holds; it grows when a step is finished."""
        return self._core.length(_known(sequence))

    def step(
        self,
        batch: Sequence[tuple[int, int]],
        *,
        reader: Literal["attend", "gather", "pages"] = "attend",
    ) -> AbstractContextManager[TieredKVCache]:
        """A forward pass over `batch`, pairs of (sequence, new tokens), as a context manager.

        Inside it, every layer from 0 to the last goes once, in order, through `attend`, or through
        `gather` or `pages` where `reader` says so. Leaving it makes the sequences longer; an
        exception takes all of the step's appends back.
        """
        entries = [(_known(sequence), _count("new tokens", tokens)) for sequence, tokens in batch]
        if not any(tokens for _, tokens in entries):
            raise LogicError("The step's batch has no new tokens: leave such a step out.")
        if self._gpu is None:
            lend_threads()
        elif reader == "pages":
            raise ConfigError(
                "On a GPU a step has no reader 'pages' yet: use 'attend' or 'gather'."
            )
        else:
            self._gpu.open()
        if self._told is not None and self.open_step() == (0, 0):
            self._told.apply(self._core, self.stats())
        self._reader = reader
        read_by: str = reader
        if self._gpu is not None:
            read_by = "pool_kernel" if reader == "attend" else "kernel"
        step: AbstractContextManager[TieredKVCache] = _core.step(self, self._core, entries, read_by)
        self._batch = entries
        return step

    def open_step(self) -> tuple[int, int]:
        """(new tokens of the step that is open, layer that comes next); (0, 0) where none is."""
        return self._core.open_step()

    def abort(self) -> None:
        """Takes the appends of an open step back, as an exception inside it does. Never raises:
        where another thread is inside the cache, the next call takes them back.
        """
        self._core.abort()

    @overload
    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None = None,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        return_lse: Literal[False] = False,
    ) -> torch.Tensor: ...

    @overload
    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None = None,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        return_lse: Literal[True],
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None = None,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Appends k and v, and attends causally to all of each sequence.

        q is `[tokens, query_heads, head_dim]`, k and v `[tokens, num_kv_heads, head_dim]`: the new
        tokens of the batch, packed in its order; any strides, the last of them 1. `scale` (default
        head_dim ** -0.5) multiplies q.k; with `soft_cap` c a score s becomes c * tanh(s / c);
        `sinks`, `[query_heads]` in float32, are scores of tokens without a value. The result has
        q's shape and lies in `out` if given; with `return_lse` the natural log-sum-exp of the
        scaled scores, `[tokens, query_heads]` in float32, comes too.
        """
        layer = self._layer(layer)
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if type(tensor) is not torch.Tensor or tensor.device != self.device:  # as it never is
                self._check_place(name, tensor)
        if out is None:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32) if return_lse else None
        if torch.compiler.is_compiling() or self._gpu is None:
            _attend_op(self._handle, q, k, v, out, lse, layer, scale, soft_cap, sinks)
        else:  # an operator costs 15 us, more than the GPU may take
            self._attend(q, k, v, out, lse, layer, scale, soft_cap, sinks)
        return out if lse is None else (out, lse)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        layer: int,
        scale: float | None = None,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """`attend`, when it runs."""
        query_heads = self._query_heads(q)
        rows, due = self._in_step("attend")
        self._check_tensor("q", q, rows, query_heads)
        self._check_tensor("k", k, rows, self.num_kv_heads)
        self._check_tensor("v", v, rows, self.num_kv_heads)
        self._check_tensor("out", out, rows, query_heads)
        if sinks is not None:
            check_sinks(sinks, query_heads, q.device)
        scale = self._scale if scale is None else scale
        layer = due if layer < 0 else layer
        if self._gpu is not None:
            if lse is None:
                lse = self._gpu.unwanted_lse(rows, query_heads)
            self._run(layer, k, v, Queries(q, out, lse, scale, soft_cap, sinks), None)
            return
        self._core.attend(
            layer,
            k.data_ptr(),
            k.stride(0),
            k.stride(1),
            v.data_ptr(),
            v.stride(0),
            v.stride(1),
            q.data_ptr(),
            q.stride(0),
            q.stride(1),
            out.data_ptr(),
            out.stride(0),
            out.stride(1),
            query_heads,
            scale,
            soft_cap,
            0 if sinks is None else sinks.data_ptr(),
            0 if lse is None else lse.data_ptr(),
        )

    def gather(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends k and v (as for `attend`) and returns all K and V of the batch, copied together.

        Each is `[batch, num_kv_heads, longest, head_dim]`, shorter sequences padded with zeros on
        the right. Both are views of one staging buffer: their contents last until the next
        `gather`, step or truncation.
        """
        rows, _ = self._in_step("gather")
        self._check_tensor("k", k, rows, self.num_kv_heads)
        self._check_tensor("v", v, rows, self.num_kv_heads)
        if self._gpu is not None:
            return self._gather_on_gpu(self._layer(layer), k, v)
        keys, values = self._core.gather(
            self._layer(layer),
            k.data_ptr(),
            k.stride(0),
            k.stride(1),
            v.data_ptr(),
            v.stride(0),
            v.stride(1),
        )
        return from_dlpack(keys), from_dlpack(values)

    def pages(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Appends k and v (as for `attend`) and returns where the layer's blocks lie on the device.

        `[batch, most blocks]`, int32: the index into `frames` of each block of each sequence, -1
        where there is none (past the end, or before the window). The blocks stay there until the
        next layer, or the end of the step. In a step with reader="pages".
        """
        rows, _ = self._in_step("pages")
        self._check_tensor("k", k, rows, self.num_kv_heads)
        self._check_tensor("v", v, rows, self.num_kv_heads)
        table = self._core.pages(
            self._layer(layer),
            k.data_ptr(),
            k.stride(0),
            k.stride(1),
            v.data_ptr(),
            v.stride(0),
            v.stride(1),
        )
        with torch.inference_mode(False):
            return from_dlpack(table)

    def _run(
        self,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        queries: Queries | None,
        gathered: torch.Tensor | None,
    ) -> None:
        assert self._gpu is not None
        if queries is not None or gathered is not None:
            reader = "attend" if gathered is None else "gather"
            if reader != self._reader:
                raise LogicError(f"{reader}: the step was opened for the other reader.")
        window = self._windows[layer] if self._windows else 0
        self._gpu.run(Layer(layer, window, k, v, queries, gathered), k.shape[0])

    def _gather_on_gpu(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = [self.length(sequence) + new for sequence, new in self._batch]
        shape = (2, len(lengths), self.num_kv_heads, max(lengths), self.head_dim)
        gathered = k.new_zeros(shape)
        self._run(layer, k, v, None, gathered)
        return gathered[0], gathered[1]

    @property
    def frames(self) -> torch.Tensor:
        """The device tier, `[frames, 2 (K, V), num_kv_heads, block_tokens, head_dim]`, not copied.

        What lies in a frame is told by `pages`. The tensor keeps the memory alive, closed or not,
        but does not follow a `resize`: ask for it again; a frame that was given up reads as zeros.
        """
        if self._frames is None and self._runtime is not None:
            self._frames = self._runtime.frames(self._core, self.dtype)
        if self._frames is None:
            with torch.inference_mode(False):
                self._frames = from_dlpack(self._core.frames())
        return self._frames

    def headroom(self) -> Headroom:
        """What can be admitted now without more slowdown than the objective allows. Not in a step.

        It goes by what decode steps have cost so far, of which it knows nothing at first: then it
        is what the device holds. What runs is never refused its growth while either tier has room.
        A sequence takes whole blocks, with its next token: what is held is counted like that, and
        what is to come should be. From the first call on, decode steps by policy "adaptive" may
        stream a little of what would fit, until it is known what that costs: 128 of them at most
        and then one in 256, within half of the slack.
        """
        return Headroom(*self._core.headroom())

    def stats(self) -> Stats:
        """Counters since construction, and gauges."""
        stats = Stats(self._core.stats())
        if self._told is not None:
            stats["policy"] = self._told.name
        return stats

    def start_trace(self, events: int = 200_000) -> None:
        """Records steps, layers, stalls and copies from now on, the last `events` of them.

        Not inside a step. It sets memory aside, up to 224 bytes for each of `events`, and costs two
        timed events a layer on a GPU.
        """
        self._core.start_trace(_count("events", events))

    def take_trace(self) -> Trace:
        """What was recorded since `start_trace`; nothing is recorded any more.

        On a GPU, what the stream has not come to yet is left out: synchronize before.
        """
        return Trace.of(*self._core.take_trace())

    def check(self) -> None:
        """Raises LogicError naming the first invariant that does not hold."""
        self._core.check()

    def close(self) -> None:
        """Gives everything back at once; but where a tensor of `frames` or `gather` still lives,
        device memory when the last of them goes.
        """
        self._frames = None
        if self._gpu is not None:
            self._gpu.close()
        self._core.close()

    def __enter__(self) -> TieredKVCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _report_fallback(self) -> None:
        stats = self._core.stats()
        pool_io = stats["pool_io"]
        if pool_io == "pageable":
            warnings.warn(
                f"The pool's CPU memory is not pinned ({stats['pool_io_reason']}), so that copies "
                "do not run beside the computation: raise the limit (ulimit -l), or expect it to "
                "be slow.",
                RuntimeWarning,
                stacklevel=3,
            )
        elif pool_io == "coherent" and stats["pool_io_reason"]:
            warnings.warn(
                f"The pool's CPU memory may be slower than it could be: {stats['pool_io_reason']}.",
                RuntimeWarning,
                stacklevel=3,
            )
        elif pool_io not in ("none", "pinned", "coherent", "direct-uring"):
            warnings.warn(
                f"The pool is reached by {pool_io} instead of direct I/O through io_uring, which "
                f"may be slower or fill the page cache: {stats['pool_io_reason']}.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _in_step(self, call: str) -> tuple[int, int]:
        rows, layer = self.open_step()
        if rows == 0:
            raise LogicError(
                f"{call}() was called outside a step: "
                "use it inside `with cache.step([(sequence, new_tokens), ...])`."
            )
        return rows, layer

    def _layer(self, layer: int) -> int:
        if type(layer) is not int or not 0 <= layer < self.num_layers:
            raise LogicError(
                f"layer is {layer!r}: this cache has layers 0 to {self.num_layers - 1}."
            )
        return layer

    def _query_heads(self, q: torch.Tensor) -> int:
        heads = q.shape[1] if q.dim() == 3 else 0
        if heads == 0 or heads % self.num_kv_heads:
            raise LogicError(
                f"q has shape {list(q.shape)}: it must be [tokens, query_heads, {self.head_dim}] "
                f"with query_heads a multiple of the {self.num_kv_heads} KV heads."
            )
        return heads

    def _check_place(self, name: str, tensor: torch.Tensor) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise LogicError(f"{name} is a {type(tensor).__name__}: give a torch.Tensor.")
        here = tensor.device.type == "cpu" if self._gpu is None else self._on_gpu(tensor)
        if not here:
            raise LogicError(
                f"{name} is on {tensor.device}, this cache computes on {self.device}: move it."
            )

    def _on_gpu(self, tensor: torch.Tensor) -> bool:
        return self._runtime is not None and self._runtime.is_here(tensor)

    def _check_tensor(self, name: str, tensor: torch.Tensor, rows: int, heads: int) -> None:
        shape = (rows, heads, self.head_dim)
        if (  # as it always is
            type(tensor) is torch.Tensor
            and tensor.shape == shape
            and tensor.dtype is self.dtype
            and tensor.device == self.device
            and tensor.stride(2) == 1
            and not tensor.requires_grad
        ):
            return
        self._check_place(name, tensor)
        if tensor.shape != shape:
            raise LogicError(
                f"{name} has shape {list(tensor.shape)} where the step needs {list(shape)}: "
                "the new tokens of the batch, packed in its order."
            )
        if tensor.dtype is not self.dtype:
            raise LogicError(f"{name} is {tensor.dtype}, this cache holds {self.dtype}.")
        if tensor.stride(2) != 1:
            raise LogicError(f"{name} is not contiguous in its last dimension: call contiguous().")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise LogicError(
                f"{name} requires grad, which this cache does not record: "
                "run under torch.no_grad(), or detach it."
            )


def _positive(name: str, value: int) -> int:
    if type(value) is not int or not 0 < value < 2**32:
        raise ConfigError(f"{name} is {value!r}: give a whole number of at least 1.")
    return value


def _share(value: float) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ConfigError(f"in_place_share is {value!r}: give a number from 0 to 1, or None.")
    return float(value)


def _number(name: str, value: float) -> float:
    if type(value) not in (int, float):
        raise ConfigError(f"{name} is {value!r}: give a number.")
    return float(value)


def _count(name: str, value: int) -> int:
    if type(value) is not int or not 0 <= value < 2**32:
        raise LogicError(f"{name} is {value!r}: give a whole number that is not negative.")
    return value


def _known(sequence: int) -> int:
    if type(sequence) is not int or not 0 <= sequence < 2**64:
        raise LogicError(f"{sequence!r} is not a sequence: use what add() returned.")
    return sequence


def _bytes_or_none(size: int | str, name: str) -> int:
    """Bytes of a size that may be 0."""
    return 0 if size in (0, "0") else parse_size(size, name)


def _pool_bytes(pool_bytes: int | str | None, directory: str, runtime: Runtime | None) -> int:
    if pool_bytes is None:
        return 0
    if runtime is not None:
        return _pinned_bytes(pool_bytes)
    if pool_bytes == "auto":
        place = directory.removeprefix("tmpfs:") or _core.default_pool_dir()
        free = _core.free_disk_bytes(place)
        if free < _AUTO_FREE_BYTES:
            raise ConfigError(
                f"pool_bytes is 'auto', half of what is free on the disk of {place}, and only "
                f"{free} bytes are: free some, name another pool_dir, or give 0 for no pool."
            )
        return free // 2
    return _bytes_or_none(pool_bytes, "pool_bytes")


def _pinned_bytes(pool_bytes: int | str) -> int:
    """Bytes of a pool in CPU memory, of which no other use can be made while it is pinned."""
    free = available_memory()
    if pool_bytes == "auto":
        return free // 2
    wanted = _bytes_or_none(pool_bytes, "pool_bytes")
    if wanted > free:
        raise ConfigError(
            f"pool_bytes is {wanted}, and of this machine's CPU memory, the limits of its control "
            f"groups considered, {free} bytes are free to pin: give less, or 'auto' for half of it."
        )
    return wanted


def _gpu_layers(runtime: Runtime, core: _core.Cache, dtype: torch.dtype) -> GpuLayers:
    from pie.gpu.attention import GpuLayers  # brings Triton, which not everybody has

    return GpuLayers(runtime, core, dtype)


# The operator under TieredKVCache.attend, so that eager and compiled models go one way. It finds
# the cache by the number in `handle`. That tensor and `out` are declared as written, as what they
# stand for is: so a compiler neither drops a call nor moves one past another. A negative `layer` is
# the one that is due.
library.define(
    "attend_tiered(Tensor(a!) handle, Tensor q, Tensor k, Tensor v, Tensor(b!) out, "
    "Tensor(c!)? lse, int layer, float? scale=None, float soft_cap=0., Tensor? sinks=None) -> ()"
)
_caches: weakref.WeakValueDictionary[int, TieredKVCache] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def _attend_tiered(handle: torch.Tensor, *arguments: Any) -> None:
    cache = _caches.get(int(handle))
    if cache is None:
        raise LogicError("attend_tiered: the cache of this handle is gone; keep it while in use.")
    cache._attend(*arguments)


library.impl("attend_tiered", _attend_tiered, "CPU")
library.impl("attend_tiered", _attend_tiered, "CUDA")
torch.library.register_fake("pie::attend_tiered", lambda *_: None, lib=library)
_attend_op = torch.ops.pie.attend_tiered.default
