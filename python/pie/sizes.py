"""Sizes as people write them ("512MiB") to bytes and back."""

from __future__ import annotations

import re
from decimal import Decimal

from pie._core import ConfigError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTPE", start=1):
    _UNITS[f"{_letter}IB"] = _UNITS[_letter] = 1024**_power
    _UNITS[f"{_letter}B"] = 1000**_power

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_LARGEST = 2**63  # bytes; what offsets into a file can say


def parse_size(size: int | str, what: str) -> int:
    """Bytes of `size`, which is at least 1: an int, or text such as "512MiB", "1.5GB" or "4G".

    KiB, MiB, GiB and so on to EiB, and the bare letters, are powers of 1024; KB, MB, GB powers of
    1000.
    `what` names the value in the error.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is None or match[2].upper() not in _UNITS:
            raise ConfigError(
                f"{what} is {size!r}, which is not a size: "
                "give a number of bytes, or text such as '512MiB' or '1.5GB'."
            )
        number = int(Decimal(match[1]) * _UNITS[match[2].upper()])
    elif isinstance(size, int) and not isinstance(size, bool):
        number = size
    else:
        raise ConfigError(
            f"{what} is {size!r}, of type {type(size).__name__}: "
            "give an int of bytes, or text such as '512MiB'."
        )
    if not 0 < number < _LARGEST:
        raise ConfigError(f"{what} is {size!r}: give a size of at least 1 byte, below 8 EiB.")
    return number


def format_size(count: int) -> str:
    """`count` bytes for people: "0 B", "27.0 MiB"."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"
