"""The cache in a process that forks, is limited, forbidden things, or interrupted."""

import ctypes  # noqa: F401 - the programs below begin with these lines
import os
import random
import resource  # noqa: F401
import signal
import struct  # noqa: F401
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

import pie
from pie import _core

LAYERS, HEADS, HEAD_DIM = 3, 2, 32


def make(device_bytes: str = "256KiB", **options: object) -> pie.TieredKVCache:
    options = {"pool_bytes": "64MiB", "block_tokens": 16, **options}
    return pie.TieredKVCache(LAYERS, HEADS, HEAD_DIM, "f32", device_bytes=device_bytes, **options)


def run_step(cache: pie.TieredKVCache, entries: list[tuple[int, int]]) -> None:
    rows = torch.randn(3, sum(tokens for _, tokens in entries), HEADS, HEAD_DIM)
    with cache.step(entries) as step:
        for layer in range(LAYERS):
            step.attend(layer, *rows)


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that begins with what is above, in a process of its own."""
    head = Path(__file__).read_text().partition("\ndef run(")[0]
    text = f"{head}\n{program}"
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", text, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


# ---- forked children -----------------------------------------------------------------------------

FORKS = """
cache = make()
sequence = cache.add()
run_step(cache, [(sequence, 200)])
open_step = cache.step([(sequence, 1)])
open_step.__enter__()
frames = cache.frames
if (child := os.fork()) == 0:
    for call in (
        cache.add,
        cache.close,
        cache.stats,
        cache.check,
        lambda: cache.length(sequence),
        lambda: cache.attend(0, *torch.randn(3, 1, HEADS, HEAD_DIM)),
        lambda: run_step(cache, [(sequence, 1)]),
        lambda: open_step.__exit__(None, None, None),
    ):
        try:
            call()
        except pie.LogicError as error:
            assert "forked child" in str(error), error
        else:
            raise AssertionError(f"{call} went through")
    cache.abort()
    del frames, open_step, cache
    with make() as mine:  # a new one works
        run_step(mine, [(mine.add(), 200)])
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
open_step.__exit__(ValueError, ValueError(), None)
run_step(cache, [(sequence, 3)])
assert cache.length(sequence) == 203
cache.check()
cache.close()
"""


@pytest.mark.parametrize("way", ["auto", "threads"])
def test_a_forked_child_is_told_and_ends_well(way: str) -> None:
    limit = "" if way == "auto" else "forbid_io_uring()\n"
    done = run(FORBID + limit + FORKS)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- limits and prohibitions ---------------------------------------------------------------------

# A filter for system calls, as containers have one: io_uring_setup is not permitted.
FORBID = """
def forbid_io_uring():
    libc = ctypes.CDLL(None, use_errno=True)
    load, equal, ret = 0x20, 0x15, 0x06
    code = [(load, 0, 0, 0), (equal, 0, 1, 425), (ret, 0, 0, 0x00050001), (ret, 0, 0, 0x7FFF0000)]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(packed))
    assert libc.prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
    assert libc.prctl(22, 2, ctypes.c_char_p(program), 0, 0) == 0, "PR_SET_SECCOMP"
"""


def test_says_why_io_uring_is_not_used() -> None:
    done = run(
        FORBID
        + "forbid_io_uring()\ncache = make()\nrun_step(cache, [(cache.add(), 200)])\n"
        + "print(cache.stats().pool_io)\ncache.close()"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "direct-threads"
    for words in ("direct-threads", "not permitted", "seccomp", "allow io_uring_setup"):
        assert words in done.stderr


LIMITED = """
memory = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")
resource.setrlimit(resource.RLIMIT_AS, (memory + (1 << 30), memory + (1 << 30)))
cache = make("64MiB")
run_step(cache, [(cache.add(), 200)])
cache.resize(device_bytes="32MiB")
cache.resize(device_bytes="64MiB")
for size in ("65MiB", "4GiB"):
    try:
        cache.resize(device_bytes=size)
    except pie.CapacityError as error:
        assert "can have 64.0 MiB" in str(error), error
        assert "ulimit -v" in str(error), error
        assert "Make a new cache" in str(error), error
    else:
        raise AssertionError("more than was reserved")
run_step(cache, [(cache.add(), 200)])
cache.close()
try:
    make("2GiB")
except pie.CapacityError as error:
    assert "ulimit -v" in str(error), error
else:
    raise AssertionError("more than the limit")
"""


def test_address_space_that_is_limited() -> None:
    done = run(LIMITED)
    assert done.returncode == 0, done.stderr


@contextmanager
def without_rights(directory: Path) -> Iterator[None]:
    """As a user who may not write to `directory`, and whom access(2) does not tell."""
    directory.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    for parent in [tmp_path, *tmp_path.parents][:3]:
        parent.chmod(0o755)
    refusal = pytest.raises(pie.ConfigError, match=r"denied .*Make it writable for this user")
    with without_rights(tmp_path), refusal:
        make(pool_dir=tmp_path)


# ---- threads -------------------------------------------------------------------------------------


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_native_loops_follow_torchs_threads() -> None:
    with make() as cache:
        sequence = cache.add()
        for count in (2, 1, 3, 1):
            with torch_threads(count):
                run_step(cache, [(sequence, 1)])
                assert _core.parallel_threads() == count


def test_each_thread_has_its_own_team() -> None:
    found = {}

    def compute() -> None:
        with make() as cache:
            run_step(cache, [(cache.add(), 1)])
            found["other"] = _core.parallel_threads()

    with torch_threads(2), make() as cache:
        sequence = cache.add()
        with cache.step([(sequence, 1)]) as step:
            rows = torch.randn(3, 1, HEADS, HEAD_DIM)
            step.attend(0, *rows)
            torch.set_num_threads(1)
            other = threading.Thread(target=compute)
            other.start()
            other.join()
            assert _core.parallel_threads() == 2, "another thread changed the team of this one"
            for layer in (1, 2):
                step.attend(layer, *rows)
    assert set(found) == {"other"}


class OwnError(Exception):
    pass


def test_an_exception_survives_a_second_thread_inside() -> None:
    many = torch.randn(6000, HEADS, HEAD_DIM)
    with make("64MiB") as cache:
        sequence = cache.add()

        def call_until_refused() -> None:
            while True:
                cache.stats()

        def fail_while_another_is_inside() -> None:
            with cache.step([(sequence, 6000)]):
                other.start()
                with pytest.raises(pie.LogicError, match="second thread"):
                    call_until_refused()
                raise OwnError

        def attend() -> None:
            with suppress(pie.LogicError):  # it was told to go on while the step was taken back
                for layer in range(LAYERS):
                    cache.attend(layer, many, many, many)

        other = threading.Thread(target=attend)
        with pytest.raises(OwnError):
            fail_while_another_is_inside()
        other.join()
        assert cache.open_step() == (0, 0)
        assert cache.length(sequence) == 0
        run_step(cache, [(sequence, 5)])
        cache.check()


# ---- Ctrl-C --------------------------------------------------------------------------------------


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raises KeyboardInterrupt somewhere inside, as Ctrl-C does, unless that is over before."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture
def alarm_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("alarm_interrupts")
def test_no_interrupt_leaves_a_step_open() -> None:
    choose = random.Random(0)
    interrupts = 0
    with make() as cache:
        sequence = cache.add()
        run_step(cache, [(sequence, 100)])
        for _ in range(600):
            try:
                with interrupted_after(choose.uniform(1e-5, 1.2e-3)):
                    for _ in range(3):
                        run_step(cache, [(sequence, 1)])
            except KeyboardInterrupt:
                interrupts += 1
            assert cache.open_step() == (0, 0)
        run_step(cache, [(sequence, 1)])
        cache.check()
    assert interrupts > 50
