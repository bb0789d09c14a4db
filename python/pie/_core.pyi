"""Native core of Pie."""

from collections.abc import Sequence
from typing import Any


class LogicError(RuntimeError):
    pass

class ConfigError(ValueError):
    pass

class CapacityError(MemoryError):
    pass

class IoError(OSError):
    pass

def default_pool_dir() -> str:
    """Directory in which the pool's file is made when none is named."""

def free_disk_bytes(directory: str) -> int:
    """Free bytes in the file system of a directory."""

def try_pool(directory: str) -> tuple[str, str]:
    """How a pool there is reached, and why not by a faster way."""

def attention_isa() -> str:
    """Instruction set that attention was built for."""

def check_policy(name: str) -> None:
    """Raises ConfigError where there is no such policy."""

def check_objective(objective: str, slack: float, max_tpot_ms: float) -> None:
    """Raises ConfigError where there is no such objective."""

def use_openmp(library: str, threads: int) -> bool:
    """
    Runs this thread's loops on the OpenMP team of a library that this process has loaded.
    """

def parallel_threads() -> int:
    """How many threads this one's loops run on."""

def append_pages(frames: Any, table: Any, starts: Any, positions: Any, k: Any, v: Any) -> None:
    """Writes K and V rows into the frames that the table names."""

def attend_pages(frames: Any, table: Any, starts: Any, positions: Any, q: Any, out: Any, lse: Any, scale: float, window: int, soft_cap: float, sinks: Any) -> None:
    """Attends to the K and V in the frames that the table names."""

class Cache:
    """Native side of pie.TieredKVCache."""

    def __init__(self, device: str, layers: int, kv_heads: int, head_dim: int, block_tokens: int, dtype: str, device_bytes: int, pool_bytes: int, pool_dir: str, policy: str, windows: Sequence[int], driver: str, pool_io: str, in_place_share: float, objective: str, slack: float, max_tpot_ms: float) -> None: ...

    def add(self) -> int:
        """Makes an empty sequence."""

    def fork(self, sequence: int) -> int:
        """Makes a sequence with the same tokens."""

    def resize(self, device_bytes: int, pool_bytes: int) -> None:
        """Moves both budgets."""

    def frames(self) -> Any:
        """The device tier, an array for DLPack."""

    def truncate(self, sequence: int, tokens: int) -> None:
        """Keeps the first tokens of a sequence."""

    def free(self, sequence: int) -> None:
        """Forgets a sequence."""

    def length(self, sequence: int) -> int:
        """Tokens that a sequence holds."""

    def check(self) -> None:
        """Raises LogicError naming the first invariant that does not hold."""

    def close(self) -> None:
        """Gives all memory back."""

    def set_streamed(self, bytes: int) -> None:
        """What steps are to stream at least, though it may fit."""

    def start_trace(self, events: int) -> None:
        """Records the last so many steps, and events, from now on."""

    def take_trace(self) -> tuple[list[Any], list[Any], int]:
        """What was recorded: steps, events, and how many of both were dropped."""

    def headroom(self) -> tuple[int, int, float]:
        """
        Tokens that can be admitted within the objective, at most, and at what slowdown.
        """

    def stats(self) -> dict[str, int | float | str]:
        """Counters and gauges."""

    def attend(self, layer: int, k: int, k_row: int, k_head: int, v: int, v_row: int, v_head: int, q: int, q_row: int, q_head: int, out: int, out_row: int, out_head: int, query_heads: int, scale: float, soft_cap: float, sinks: int, lse: int) -> None:
        """
        Appends one layer's K and V and attends; addresses and strides in elements.
        """

    def gather(self, layer: int, k: int, k_row: int, k_head: int, v: int, v_row: int, v_head: int) -> tuple[Any, Any]:
        """
        Appends one layer's K and V and returns all of them, as arrays that DLPack can take.
        """

    def pages(self, layer: int, k: int, k_row: int, k_head: int, v: int, v_row: int, v_head: int) -> Any:
        """
        Appends one layer's K and V and returns the table of frames, an array for DLPack.
        """

    def finish(self) -> None:
        """Ends the step: lengths advance."""

    def abort(self) -> None:
        """Takes the step's appends back, at the next call at the latest."""

    def open_step(self) -> tuple[int, int]:
        """(rows, layer that comes next) of the open step; no rows: none is."""

    def run(self, layer: int, target: Any) -> None:
        """Has `target` append the layer's K and V and read all of each sequence."""

    def set_stream(self, stream: int) -> None:
        """The stream that the caller's compute runs on."""

    def arena(self) -> tuple[int, list[int], list[int], int]:
        """
        The device tier: address, shape as `frames`, strides in elements; and the address of the pool's frames, which lie alike, where steps read some in place, else 0.
        """

    def step_rows(self) -> bytes:
        """
        Of each packed row of the step: its row of the tables, and its position.
        """

    def block_tables(self) -> tuple[bytes, int, int, int]:
        """The tables of frames, and how many layers, rows and blocks they have."""

    def table_edits(self) -> list[bytes] | None:
        """
        What changed in the tables since this was asked last; None: all may have.
        """

class Step:
    """A step: finished on leaving, taken back on an exception."""

    def __enter__(self) -> Any: ...

    def __exit__(self, kind: object | None, error: object | None, trace: object | None) -> None: ...

def step(owner: Any, cache: Cache, batch: Sequence[tuple[int, int]], reader: str) -> Step:
    """A step over (sequence, new tokens) of a cache, which `with` opens."""
