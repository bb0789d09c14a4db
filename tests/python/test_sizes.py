"""Sizes as text: what parses, what is refused, and how bytes are shown."""

import pytest

from pie import ConfigError
from pie.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        (4096, 4096),
        ("1", 1),
        ("17 B", 17),
        ("512MiB", 512 << 20),
        ("512 mib", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("2K", 2048),
        ("4G", 4 << 30),
        ("1TiB", 1 << 40),
        ("2PiB", 2 << 50),
        ("1EB", 10**18),
        ("3KB", 3000),
        ("0.5GB", 500_000_000),
    ],
)
def test_parses(text: int | str, size: int) -> None:
    assert parse_size(text, "device_bytes") == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "12 parsecs", "-5MiB", "1e9", "1,5GB", "5 5MB", "0x10", "nan"]
)
def test_refuses_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^device_bytes is .* not a size: give .*'512MiB'"):
        parse_size(text, "device_bytes")


@pytest.mark.parametrize("size", [0, -1, "0", "0.2B", "0GiB", 2**63, "9999999999TiB", "100EiB"])
def test_refuses_what_is_out_of_range(size: int | str) -> None:
    with pytest.raises(ConfigError, match=r"^pool_bytes is .* at least 1 byte"):
        parse_size(size, "pool_bytes")


@pytest.mark.parametrize("size", [1.5, None, True, b"1MiB"])
def test_refuses_other_types(size: object) -> None:
    with pytest.raises(ConfigError, match="of type"):
        parse_size(size, "device_bytes")  # type: ignore[arg-type]


def test_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size("much", "device_bytes")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 19, "1.5 MiB"),
        (5 << 30, "5.0 GiB"),
        (7 << 50, "7168.0 TiB"),
    ],
)
def test_formats(size: int, text: str) -> None:
    assert format_size(size) == text
