"""The one object that answers for the device: where tensors lie, streams, memory, launches.

Everything else asks it, so that a test can put a double in its place.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch.utils.dlpack import from_dlpack

from pie import _core
from pie._core import ConfigError
from pie.gpu.launch import Launch

# A range that a kernel uses: its address, its bytes, and whether it is written.
Use = tuple[int, int, bool]
Uses = Callable[[], Iterable[Use]]


_LAUNCHED_MOST = 4096
_STAGED = 1 << 20  # numbers in each half of what is on its way to the device


class Runtime:
    """A GPU, by torch and Triton."""

    is_gpu = True  # false where kernels are interpreted
    driver = ""  # the library that the native side calls; empty: the system's

    def __init__(self, device: torch.device) -> None:
        if torch.version.cuda is None or not torch.cuda.is_available():
            why = "is a build without CUDA" if torch.version.cuda is None else "finds no GPU"
            raise ConfigError(
                f"device is {str(device)!r}: torch {torch.__version__} {why}; install torch for "
                "CUDA on a machine with an NVIDIA GPU, or use device='cpu'."
            )
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                f"device is {str(device)!r}: Pie's kernels need Triton, which comes with torch for "
                "CUDA: install triton, or use device='cpu'."
            )
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)  # where tensors of it are
        self.name = str(self.device)
        self._staging: Staging | None = None
        self._launched: dict[tuple[Any, ...], Launch | None] = {}
        self._entry: Any = ctypes.CDLL("libcuda.so.1").cuLaunchKernel
        self.processors: int = torch.cuda.get_device_properties(index).multi_processor_count

    def stream(self) -> int:
        """The compute stream of the caller."""
        stream: int = torch._C._cuda_getCurrentRawStream(self.device.index)  # what Triton asks
        return stream

    def is_here(self, tensor: torch.Tensor) -> bool:
        """Whether kernels on this device may use the tensor."""
        return tensor.device == self.device

    def frames(self, core: _core.Cache, dtype: torch.dtype) -> torch.Tensor:
        """The device tier, as a tensor of that dtype, which it has."""
        with torch.inference_mode(False):
            return from_dlpack(core.frames())

    def stage(self, data: bytes) -> torch.Tensor:
        """int32 that a kernel, which is launched next, reads once: in pinned CPU memory, or where
        it is much, on the device by a copy.
        """
        if len(data) > 4 * _STAGED:
            with torch.inference_mode(False):
                whole = torch.frombuffer(bytearray(data), dtype=torch.int32).pin_memory()
                return whole.to(self.device, non_blocking=True)
        if self._staging is None:
            with torch.inference_mode(False):
                memory = torch.empty(2 * _STAGED, dtype=torch.int32, pin_memory=True)
            self._staging = Staging(memory, lambda: torch.cuda.current_stream().record_event())
        return self._staging.take(data)

    def active(self) -> AbstractContextManager[Any]:
        """Makes this the device that kernels are launched on."""
        if torch.cuda.current_device() == self.device.index:
            return nullcontext()
        return torch.cuda.device(self.device)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A new tensor on the device, of any content."""
        return torch.empty(shape, dtype=dtype, device=self.device)

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
        """Launches a Triton kernel on the caller's stream.

        Triton takes longer to find what it has compiled than most kernels take to run. So what was
        launched with the same numbers before is launched again without asking it; that is right
        where all tensors begin on 16 bytes (`aligned`), which Triton then took for granted.
        """
        key = (id(kernel), numbers, constants, tensors[0].dtype)
        known = self._launched.get(key) if aligned else None
        if known is not None and known(stream, grid, [one.data_ptr() for one in tensors]) == 0:
            return
        # Where the driver would not, this makes a context current, or raises what is wrong.
        options = {"num_warps": warps, "num_stages": stages}
        compiled = kernel[grid](*tensors, *numbers, *constants, **options)
        if aligned and key not in self._launched:
            self._keep(key, compiled, len(tensors), numbers)

    def _keep(
        self, key: tuple[Any, ...], compiled: Any, tensors: int, numbers: tuple[float, ...]
    ) -> None:
        """Remembers how it is launched; None where only Triton knows."""
        if len(self._launched) >= _LAUNCHED_MOST:
            self._launched.clear()
        try:
            self._launched[key] = Launch(compiled, tensors, numbers, self._entry)
        except NotImplementedError:
            self._launched[key] = None


class Mark(Protocol):
    """A place in what the compute stream has been given."""

    def synchronize(self) -> None:
        """Returns when all before it has been done."""


class Staging:
    """CPU memory (int32) that kernels read, taken in turn: half of it is used again once all that
    was started before the other half was begun has been done. `mark` marks where the stream is.
    """

    def __init__(self, memory: torch.Tensor, mark: Callable[[], Mark]) -> None:
        self._tensor = memory
        self._memory = memoryview(memory.numpy().data).cast("B")
        self._mark = mark
        self._most = memory.numel() // 2  # of a half
        self._half = 0
        self._used = 0  # of the half
        self._left: list[Mark | None] = [None, None]  # by half: when it was left

    def take(self, data: bytes) -> torch.Tensor:
        """Data, at most half the memory, for a kernel that is launched before the next call."""
        count = -(-len(data) // 16) * 4  # so that each begins on 16 bytes
        if self._used + count > self._most:
            self._left[self._half] = self._mark()
            self._half, self._used = 1 - self._half, 0
            left = self._left[self._half]
            if left is not None:
                left.synchronize()
        begin = self._half * self._most + self._used
        self._used += count
        self._memory[4 * begin : 4 * begin + len(data)] = data
        return self._tensor[begin : begin + len(data) // 4]


def runtime_for(device: torch.device | str) -> Runtime | None:
    """The runtime of a device; None for the CPU. ConfigError for one that Pie does not know."""
    kind, _, index = str(device).partition(":")
    if kind == "cuda" and (index == "" or index.isdigit()):
        return make(torch.device(str(device)))
    if kind != "cpu":
        raise ConfigError(f"device is {str(device)!r}: use 'cpu', 'cuda' or 'cuda:N'.")
    return None


def tensor_device(device: torch.device | str) -> torch.device:
    """Where tensors of a device are. ConfigError for one that Pie does not know, or cannot use."""
    runtime = runtime_for(device)
    return torch.device("cpu") if runtime is None else runtime.device


make: Callable[[torch.device], Runtime] = Runtime  # a test puts a double here
