"""Importing pie costs nothing: no torch, no thread, no open file, no mapping of a device."""

import subprocess
import sys

import pytest

import pie

STATE = """
import os, sys
def state():
    files = sorted(os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                   if os.path.exists(f"/proc/self/fd/{n}"))
    return len(os.listdir("/proc/self/task")), files
before = state()
import pie
assert state() == before, (before, state())
heavy = {"torch", "numpy", "transformers", "asyncio", "subprocess"} & set(sys.modules)
assert not heavy, heavy
maps = open("/proc/self/maps").read()
assert "/dev/nvidia" not in maps and "libcuda" not in maps and "libgomp" not in maps
"""


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_is_light() -> None:
    run(STATE)


def test_names_come_when_they_are_asked_for() -> None:
    run(STATE + "assert pie.TieredKVCache.__name__ == 'TieredKVCache' and 'torch' in sys.modules")


def test_construction_starts_no_thread_without_a_pool() -> None:
    run(
        "import os, torch, pie\n"
        "threads = len(os.listdir('/proc/self/task'))\n"
        "cache = pie.TieredKVCache(2, 2, 64, 'f32', device_bytes='1MiB', pool_bytes=None)\n"
        "assert len(os.listdir('/proc/self/task')) == threads\n"
    )


def test_public_names_exist() -> None:
    for name in pie.__all__:
        assert getattr(pie, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pie.nothing


@pytest.mark.parametrize(
    ("error", "base"),
    [
        (pie.LogicError, RuntimeError),
        (pie.ConfigError, ValueError),
        (pie.CapacityError, MemoryError),
        (pie.IoError, OSError),
    ],
)
def test_errors_are_those_of_python(error: type, base: type) -> None:
    assert issubclass(error, base)
