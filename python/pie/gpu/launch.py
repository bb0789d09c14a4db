"""Launch: a kernel that Triton has compiled, to be launched again by the driver itself.

Triton's own launcher takes 20 to 30 microseconds of a slow processor, longer than many kernels run.
Most of that finds out what the arguments are, which is known here.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Sequence
from typing import Any

_TYPES: dict[str, type[Any]] = {
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "fp32": ctypes.c_float,
}
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.([a-z])(\d+)")
_FORBIDDEN = (
    "launch_cooperative_grid",
    "launch_pdl",
    "global_scratch_size",
    "profile_scratch_size",
)
_WARP = 32  # threads


class Launch:
    """A compiled kernel and all its arguments but the tensors, which come first.

    Raises NotImplementedError where it is not told how the kernel takes its arguments: then
    Triton's launcher is the one to use.
    """

    def __init__(self, compiled: Any, tensors: int, numbers: Sequence[float], entry: Any) -> None:
        """`entry` is the driver's `cuLaunchKernel`."""
        metadata = compiled.metadata
        if metadata.num_ctas != 1 or any(getattr(metadata, name, 0) for name in _FORBIDDEN):
            raise NotImplementedError("It needs more than its arguments.")
        self._compiled = compiled  # which unloads its code when nobody has it
        fields = parameters(compiled, tensors, numbers)
        taken = type("Taken", (ctypes.Structure,), {"_fields_": [(n, t) for n, t, _ in fields]})
        self._taken = taken(*(value for _, _, value in fields))
        begin = ctypes.addressof(self._taken)
        places = [begin + getattr(taken, name).offset for name, _, _ in fields]
        self._places = (ctypes.c_void_p * len(places))(*places)
        self._pack = struct.Struct(f"{tensors}Q").pack_into
        self._stream = ctypes.c_void_p()
        self._entry = entry
        self._grid = [ctypes.c_uint32() for _ in range(3)]
        sizes = (_WARP * metadata.num_warps, 1, 1, metadata.shared)
        self._arguments = (
            ctypes.c_void_p(compiled.function),
            *self._grid,
            *(ctypes.c_uint32(size) for size in sizes),
            self._stream,
            self._places,
            ctypes.c_void_p(),
        )

    def __call__(self, stream: int, grid: tuple[int, ...], addresses: Sequence[int]) -> int:
        """Launches it with tensors that begin there; returns the driver's error, 0 for none.

        On the GPU whose context is current.
        """
        x, y, z = self._grid
        x.value, y.value, z.value = (*grid, 1, 1)[:3]
        self._pack(self._taken, 0, *addresses)
        self._stream.value = stream
        error: int = self._entry(*self._arguments)
        return error


def parameters(
    compiled: Any, tensors: int, numbers: Sequence[float]
) -> list[tuple[str, type[Any], float]]:
    """(name, type, value) of each parameter that the compiled kernel takes, tensors 0.

    What Triton made a constant is none (so is a number that is 1); what follows Triton adds, a
    pointer to memory of which nothing was asked. Checked against what was compiled.
    """
    found: list[tuple[str, type[Any], float]] = []
    types = list(compiled.src.signature.values())
    for kind, value in zip(types, [0] * tensors + list(numbers), strict=False):
        if kind == "constexpr":
            continue
        taken = ctypes.c_uint64 if kind.startswith("*") else _TYPES.get(kind)
        if taken is None:
            raise NotImplementedError(f"It takes a number as {kind}.")
        found.append((f"p{len(found)}", taken, value))
    head = compiled.asm["ptx"].split(".entry", 1)[1].split("{", 1)[0].split("\n)", 1)[0]
    told = _PARAMETER.findall(head)
    sizes = [int(bits) // 8 for _, bits in told]
    known = [ctypes.sizeof(kind) for _, kind, _ in found]
    if types[:tensors].count("constexpr") or sizes[: len(known)] != known:
        raise NotImplementedError(f"It takes {sizes} bytes where {known} were expected.")
    added = told[len(known) :]
    if any(one not in (("u", "64"), ("b", "64")) for one in added):
        raise NotImplementedError(f"It takes {added} more.")
    return found + [(f"p{len(found) + i}", ctypes.c_uint64, 0) for i in range(len(added))]
