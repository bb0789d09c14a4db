"""A GPU that is not there: the double of the driver, and Triton's interpreter on CPU tensors.

Before a kernel runs, the double does what comes before it on the stream and no more, and checks
that what the kernel uses is ordered after whoever used it last.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from pie import _core
from pie.gpu.runtime import Staging, Uses

ROOT = Path(__file__).resolve().parents[2]
DOUBLE = Path(os.environ.get("PIE_FAKE_DRIVER", ROOT / "build/release/libfake_driver.so"))
ORDERS = ("earliest", "latest", "random")


def library() -> Any:
    found = ctypes.CDLL(str(DOUBLE), mode=ctypes.RTLD_GLOBAL)
    found.fake_reach.restype = ctypes.c_uint64
    found.fake_reach.argtypes = [ctypes.c_uint64]
    found.fake_take_violations.restype = ctypes.c_uint64
    found.fake_set_order.argtypes = [ctypes.c_uint32, ctypes.c_uint64]
    return found


_STAGED = 64  # numbers in each half of what is on its way to the device: soon used again


@contextmanager
def active(driver: Any, context: int) -> Iterator[None]:
    """Makes this the context of the calling thread: that of GPU 0 is 1."""
    driver.cuCtxPushCurrent_v2(ctypes.c_void_p(context))
    try:
        yield
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


class Mark:
    """A place in what stream 0 of the double has been given."""

    def __init__(self, driver: Any, context: int) -> None:
        self._driver = driver
        self._event = ctypes.c_void_p()
        with active(driver, context):
            driver.cuEventCreate(ctypes.byref(self._event), 0)
            driver.cuEventRecord(self._event, None)

    def synchronize(self) -> None:
        self._driver.cuEventSynchronize(self._event)

    def __del__(self) -> None:
        self._driver.cuEventDestroy_v2(self._event)


class TellingStaging(Staging):
    """Tells the double what it writes, which nobody may still be reading."""

    def take(self, data: bytes) -> torch.Tensor:
        taken = super().take(data)
        library().fake_host_write(ctypes.c_uint64(taken.data_ptr()), ctypes.c_uint64(len(data)))
        return taken


class Double:
    """What pie.gpu.runtime.Runtime is, over the double."""

    driver = str(DOUBLE)
    is_gpu = False
    processors = 4

    def __init__(self, device: torch.device) -> None:
        assert os.environ.get("TRITON_INTERPRET") == "1"
        self.name = f"cuda:{device.index or 0}"
        self.device = torch.device("cpu")
        self._library = library()
        self._address = 0
        self._alias = 0
        self._bytes = 0
        self.launches = 0
        self._staged = torch.empty(2 * _STAGED, dtype=torch.int32)
        self._context = 1 + (device.index or 0)
        self._staging = TellingStaging(self._staged, lambda: Mark(self._library, self._context))

    def stream(self) -> int:
        return 0

    def is_here(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu"

    def frames(self, core: _core.Cache, dtype: torch.dtype) -> torch.Tensor:
        self._address, shape, strides, _ = core.arena()
        self._alias = self._library.fake_reach(self._address)
        self._bytes = shape[0] * strides[0] * dtype.itemsize
        memory = (ctypes.c_uint8 * self._bytes).from_address(self._alias)
        return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)

    def stage(self, data: bytes) -> torch.Tensor:
        if len(data) > 4 * _STAGED:
            return torch.frombuffer(bytearray(data), dtype=torch.int32)
        return self._staging.take(data)

    def _is_staged(self, tensor: torch.Tensor) -> bool:
        return 0 <= tensor.data_ptr() - self._staged.data_ptr() < self._staged.nbytes

    def active(self) -> AbstractContextManager[None]:
        return active(self._library, self._context)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        fill = float("nan") if dtype.is_floating_point else -7
        return torch.full(shape, fill, dtype=dtype)

    def _told(self, address: int) -> int:
        """The address as the driver tells it; of the pool it is the same."""
        inside = 0 <= address - self._alias < self._bytes
        return address - self._alias + self._address if inside else address

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        uses: Uses,
        tensors: tuple[torch.Tensor, ...],
        numbers: tuple[float, ...],
        constants: tuple[int, ...],
        stream: int,
        aligned: bool = True,
        warps: int = 4,
        stages: int = 2,
    ) -> None:
        ranges = [(self._told(address), nbytes, write) for address, nbytes, write in uses()]
        ranges += [(one.data_ptr(), one.nbytes, False) for one in tensors if self._is_staged(one)]
        count = len(ranges)
        words = ctypes.c_uint64 * count
        self._library.fake_run(
            ctypes.c_uint64(stream),
            words(*(one[0] for one in ranges)),
            words(*(one[1] for one in ranges)),
            (ctypes.c_uint8 * count)(*(one[2] for one in ranges)),
            ctypes.c_uint64(count),
        )
        self.launches += 1
        kernel[grid](*tensors, *numbers, *constants)
