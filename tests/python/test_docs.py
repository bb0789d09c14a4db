"""What the documentation shows is run, and what it names exists."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
# An example whose docstring has this line is run without arguments.
FAST = "Fast: the tests run it."


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deprecated" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(smollm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model as most people have theirs."""
    folder = tmp_path_factory.mktemp("smollm")
    for part in smollm:
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_a_page_runs(page: Path, tmp_path: Path, folder: Path) -> None:
    # In one process and in order, as somebody reading the page would type it, who has a model.
    program = tmp_path / "page.py"
    program.write_text("\n".join([f"model_path = {str(folder)!r}", *blocks(page, "python")]))
    said = run(str(program))
    if page.name == "README.md":
        streamed = re.search(r"^(\d+) bytes streamed", said, re.MULTILINE)
        assert streamed is not None
        assert int(streamed[1]) > 0, "what the page shows off must happen"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_and_targets_exist(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(r"\b((?:bench|examples|docs|tests|cpp|cmake|python)/[\w./-]*\w)", text))
    missing = sorted(name for name in named if not (ROOT / name).exists())
    shell = "\n".join(blocks(page, r"(?:sh|bash|console)?") + re.findall(r"`([^`\n]+)`", text))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wanted = set(re.findall(r"\bmake ([a-z][a-z-]*)", shell))
    missing += sorted(f"make {target}" for target in wanted - targets)
    assert not missing


@pytest.mark.parametrize(
    "example",
    [example for example in EXAMPLES if FAST in example.read_text()],
    ids=lambda example: example.name,
)
def test_fast_example_runs(example: Path) -> None:
    run(str(example))
