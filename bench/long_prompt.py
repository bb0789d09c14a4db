"""`pie generate` on a prompt far longer than its device budget: the KV must not be in its memory.

Runs the command, watches the resident memory of its process from the first chunk of the prompt on,
and fails where that grows by more than the budget and half of the KV that the pool holds.

    python bench/long_prompt.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from pie.sizes import format_size, parse_size


class Watch(threading.Thread):
    """The most resident memory that a process had, sampled until it ends."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        super().__init__(daemon=True)
        self.process = process
        self.most = 0

    def resident(self) -> int:
        """Bytes now; 0 where the process has ended."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        return int(found[1]) * 1024 if found else 0

    def run(self) -> None:
        ended = threading.Event()
        while self.process.poll() is None:
            self.most = max(self.most, self.resident())
            ended.wait(0.02)


def run(command: list[str]) -> tuple[str, int, int]:
    """(its output, resident bytes after the first chunk of the prompt, the most after that)."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    assert process.stderr is not None
    watch, base = Watch(process), 0
    for line in process.stderr:
        print(line, end="", flush=True)
        if line.startswith("pie: prompt ") and not base:
            base = watch.resident()
            watch.start()
    output = process.stdout.read()
    if process.wait() != 0 or not base:
        raise SystemExit(f"the command failed with exit code {process.returncode}")
    watch.join()
    return output, base, watch.most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--prompt-tokens", type=int, default=6000)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--kv-device", default="32MiB")
    arguments = parser.parse_args()
    # A word of the list is a token, in this vocabulary and most others.
    words = ["stone", "river", "light", "paper", "green", "music", "table", "north"]
    text = " ".join(words[n * n % 61 % 8] for n in range(arguments.prompt_tokens))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as prompt:
        prompt.write(text)
        prompt.flush()
        command = [sys.executable, "-m", "pie", "generate", "--json", "--model", arguments.model]
        command += ["--prompt-file", prompt.name, "--kv-device", arguments.kv_device]
        output, base, most = run([*command, "--max-new-tokens", str(arguments.new_tokens)])
    stats = json.loads(output)["stats"]
    grown, pool = most - base, stats["pool_bytes_peak"]
    allowed = parse_size(arguments.kv_device, "--kv-device") + pool // 2
    print(f"KV                         {format_size(stats['kv_bytes'])}")
    print(f"  on the device, at peak   {format_size(stats['device_bytes_peak'])}")
    print(f"  in the pool, at peak     {format_size(pool)} ({stats['pool_io']})")
    print(f"resident, at first chunk   {format_size(base)}")
    print(f"resident, at peak          {format_size(most)}: {format_size(grown)} more")
    print(f"decode                     {stats['decode_tokens_per_s']:.1f} tokens/s, ", end="")
    print(f"stalled {stats['stall_fraction']:.1%}")
    ok = bool(grown <= allowed and pool > 0)
    print("the KV is not in its memory" if ok else "THE KV IS IN ITS MEMORY")
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
