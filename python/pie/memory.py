"""How much RAM this process may take: the machine's, and the limits of its control groups."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_GROUPS_OF_SELF = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")

# Of each version of control groups: where the memory ones are, the files that hold the limit and
# what is used, and what of memory.stat is page cache, which the system takes back on demand.
_VERSIONS = (
    ("", "memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


def total_memory() -> int:
    """Bytes of RAM that the machine has."""
    return _fields(_MEMINFO, ":").get("MemTotal", 0) * 1024


def available_memory() -> int:
    """Bytes of RAM that this process may still take, its control groups' limits considered."""
    available = _fields(_MEMINFO, ":").get("MemAvailable", 0) * 1024
    rooms = [limit - used for limit, used in _limits()]
    return max(0, min([available, *rooms]))


def cgroup_limit() -> int | None:
    """Bytes of RAM that this process's control groups allow; None where they set no limit."""
    return min((limit for limit, _ in _limits()), default=None)


def _limits() -> list[tuple[int, int]]:
    """(limit, bytes used that cannot be taken back) of each group that has a limit: the process's,
    and all that it is nested in.
    """
    found = []
    for controller, limit_file, used_file, cached in _VERSIONS:
        mount = _GROUPS / controller
        group = mount / _group(controller).lstrip("/")
        for place in (group, *group.parents):
            limit = _number(place / limit_file)
            if limit is not None and limit < total_memory():
                stat = _fields(place / "memory.stat", " ")
                cache = sum(stat.get(key, 0) for key in cached)
                found.append((limit, max(0, (_number(place / used_file) or 0) - cache)))
            if place == mount:
                break
    return found


def _group(controller: str) -> str:
    """The path of this process's group; in a container it may be that of the host, or "/"."""
    for line in _lines(_GROUPS_OF_SELF):
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _fields(path: Path, separator: str) -> dict[str, int]:
    """The whole numbers of a file of lines "key<separator> number [unit]"."""
    pairs = (line.partition(separator) for line in _lines(path))
    return {key: int(rest.split()[0]) for key, _, rest in pairs if rest.split()[:1]}


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None
