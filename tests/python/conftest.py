"""Fixtures shared by the Python tests: the repository's root and the weights of the demo."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))  # for what tests share
os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel
WEIGHTS = ROOT / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def weights() -> Path:
    """Path of SmolLM2-135M-Instruct; skips where it was not fetched, but never in CI."""
    if not WEIGHTS.exists():
        reason = "the weights are not there: run `python examples/fetch_weights.py`"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return WEIGHTS


@pytest.fixture(scope="session")
def smollm(weights: Path) -> Any:
    """That model in float32 and its tokenizer; it takes transformers half a minute to read."""
    from pie.hf import load

    return load(weights, "f32")
