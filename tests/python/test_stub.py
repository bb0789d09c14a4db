"""The committed stub is the one that the bindings generate, and both versions agree."""

import difflib
import importlib.metadata
import re
from pathlib import Path

from pie import _core


def test_stub_is_current(root: Path) -> None:
    # The build generates a stub and installs it beside the extension.
    generated = Path(_core.__file__).with_name("_core.pyi").read_text().splitlines()
    committed = (root / "python/pie/_core.pyi").read_text().splitlines()
    difference = "\n".join(
        difflib.unified_diff(committed, generated, "committed", "generated", lineterm="")
    )
    assert not difference, f"run `make stubs` and commit the result:\n{difference}"


def test_marker_of_typed_package_is_installed() -> None:
    assert Path(_core.__file__).with_name("py.typed").exists()


def test_versions_agree(root: Path) -> None:
    cmake = re.search(r"project\(pie VERSION (\S+)", (root / "CMakeLists.txt").read_text())
    assert cmake is not None
    assert importlib.metadata.version("pie-core") == cmake[1]
