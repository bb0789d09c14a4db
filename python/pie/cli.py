"""The command `pie`: generate text with a KV cache over two tiers, or say what this machine offers.

Text goes to stdout, everything else to stderr. What cannot work is one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pie import _core, info, memory, report
from pie._core import ConfigError, LogicError
from pie.sizes import format_size, parse_size
from pie.trace import Trace

_EPILOG = """\
Sizes are numbers of bytes, or text such as 512MiB, 1.5GB or 4G. The prompt is taken as it is:
no chat template is put around it.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pie: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "info":
            print(info.describe(options.pool_dir, options.model))
            return 0
        return _generate(options)
    except KeyboardInterrupt:
        return 130
    except (ConfigError, LogicError, MemoryError, OSError, ImportError) as error:
        return _refuse(error)


def _refuse(error: BaseException) -> int:
    print(f"pie: {error}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pie", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = commands.add_parser("info", help="what this machine offers")
    about.add_argument("--pool-dir", metavar="DIR", help="directory whose disk is tried")
    about.add_argument(
        "--model", metavar="PATH", help="say what a pool would gain for it: .gguf, or a folder"
    )
    make = commands.add_parser("generate", help="continue a prompt", epilog=_EPILOG)
    make.add_argument("--model", required=True, help="folder of safetensors, .gguf file, or hub id")
    prompt = make.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="FILE")
    make.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    make.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; default %(default)s")
    make.add_argument("--dtype", default="bf16", help="f32, bf16 or f16; default %(default)s")
    make.add_argument(
        "--kv-device",
        metavar="SIZE",
        help="memory for KV on the device; without it everything fits and nothing is pooled",
    )
    make.add_argument(
        "--kv-pool",
        default="auto",
        metavar="SIZE",
        help="the most that the pool may take on disk, or in CPU memory behind a GPU; 0 for no "
        "pool; auto (the default) is half of what is free",
    )
    make.add_argument("--pool-dir", metavar="DIR", help="where the pool's file is made")
    make.add_argument(
        "--policy",
        metavar="P",
        help="adaptive: stream what does not fit, and learn what more would cost (the default); "
        "fit: the same; fixed:F: stream the share F; off",
    )
    make.add_argument(
        "--objective",
        default="transparent",
        metavar="O",
        help="what the headroom told keeps to: transparent (the default) or throughput",
    )
    make.add_argument(
        "--slack",
        type=float,
        default=0.05,
        metavar="S",
        help="share that a step may take longer where transparent; default %(default)s",
    )
    make.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    make.add_argument("--top-p", type=float, default=1.0)
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--trace", metavar="FILE", help="write what happened when, for Perfetto")
    make.add_argument("--report", metavar="FILE", help="draw the same as a page of HTML")
    make.add_argument("--json", action="store_true", help="print one JSON object at the end")
    return parser


def _generate(options: argparse.Namespace) -> int:
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {options.max_new_tokens}: give at least 1.")
    if options.kv_device is not None:
        options.kv_device = parse_size(options.kv_device, "--kv-device")
    if options.kv_pool != "auto":
        pool = options.kv_pool
        options.kv_pool = None if pool == "0" else parse_size(pool, "--kv-pool")
    if options.policy is not None:
        _core.check_policy(options.policy)
    _core.check_objective(options.objective, options.slack, 0.0)
    if options.pool_dir is not None:
        _core.try_pool(options.pool_dir)
    prompt = _prompt(options)
    _try_outputs(options)
    os.environ.setdefault("TQDM_DISABLE", "1")  # the loaders' bars; must be set before the import
    try:
        from pie.cache import dtype_name
        from pie.hf import generation, load
    except ImportError as error:
        raise ImportError(
            f"{error}: install it with `pip install '.[hf]'` in Pie's checkout (pie-core on the "
            "public package index is another project)."
        ) from error
    sampling = generation.Sampling(options.temperature, options.top_p, options.seed)
    dtype = dtype_name(options.dtype)
    _note(options, f"loading {options.model}")
    model, tokenizer = load(options.model, dtype, device=options.device)
    tokens = tokenizer(prompt).input_ids
    _check_context(model.config, len(tokens), options.max_new_tokens)
    with _open_cache(model, options, len(tokens) + options.max_new_tokens) as cache:
        run = _Run(options, tokenizer, cache, len(tokens))
        stream = generation.stream(
            model, tokens, cache, options.max_new_tokens, sampling, run.on_prompt
        )
        if options.trace or options.report:
            cache.kv.start_trace()
        code = run.consume(stream)
        if options.trace or options.report:
            _write_trace(options, cache.kv.take_trace())
        return code


def _try_outputs(options: argparse.Namespace) -> None:
    """Refuses, before anything takes long, files that cannot be written at the end."""
    for name in ("trace", "report"):
        if getattr(options, name) is None:
            continue
        path = Path(getattr(options, name))
        existed = path.exists()
        try:
            path.open("a").close()
            if not existed:
                path.unlink()  # a command that is refused leaves nothing
        except OSError as error:
            raise ConfigError(
                f"--{name} {path} cannot be written: {error.strerror or error}."
            ) from error
    if options.report is not None:
        report.require_matplotlib()


def _write_trace(options: argparse.Namespace, trace: Trace) -> None:
    if options.trace is not None:
        trace.save(options.trace)
    if options.report is not None and trace.steps:
        report.write(trace, options.report, f"{Path(options.model).name}, {options.device}")


def _check_context(config: Any, prompt_tokens: int, new_tokens: int) -> None:
    from pie.hf.cache import positions

    if prompt_tokens == 0:
        raise ConfigError("The prompt is empty: give at least one token of text.")
    limit = positions(config)
    if limit is not None and prompt_tokens + new_tokens - 1 > limit:  # the last is not stored
        raise ConfigError(
            f"A prompt of {prompt_tokens} tokens and {new_tokens} new ones are more than the "
            f"{limit} positions that the model has: shorten it, or lower --max-new-tokens."
        )


def _prompt(options: argparse.Namespace) -> str:
    prompt = _read_prompt(options)
    if not prompt:
        raise ConfigError("The prompt is empty: give at least one token of text.")
    return prompt


def _read_prompt(options: argparse.Namespace) -> str:
    if options.prompt is not None:
        return str(options.prompt)
    try:
        return Path(options.prompt_file).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{options.prompt_file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{options.prompt_file} is not UTF-8 text: {error.reason}.") from error


def _open_cache(model: Any, options: argparse.Namespace, tokens: int) -> Any:
    from pie.cache import kv_bytes, roomy_bytes
    from pie.hf.cache import TieredCache, geometry

    shape = (*geometry(model.config), model.dtype)
    budget, policy = options.kv_device, options.policy or "adaptive"
    if budget is None:
        needed, available = kv_bytes(*shape, tokens), memory.available_memory()
        if needed > available and options.device == "cpu":
            raise ConfigError(
                f"The KV of {tokens} tokens takes {format_size(needed)} and this machine has "
                f"{format_size(available)} of memory left: give a budget with --kv-device."
            )
        budget, policy = roomy_bytes(*shape, [tokens]), options.policy or "off"
    return TieredCache(
        model.config,
        model.dtype,
        options.device,
        device_bytes=budget,
        pool_bytes=None if policy == "off" else options.kv_pool,
        pool_dir=options.pool_dir,
        policy=policy,
        objective=options.objective,
        slack=options.slack,
    )


def _note(options: argparse.Namespace, text: str) -> None:
    """Progress: one line that is written over on a terminal, a line each elsewhere."""
    end = "\r" if sys.stderr.isatty() else "\n"
    print(f"pie: {text}\x1b[K" if end == "\r" else f"pie: {text}", end=end, file=sys.stderr)


class _Run:
    """One generation as it comes: what is printed of it, what is counted."""

    def __init__(
        self, options: argparse.Namespace, tokenizer: Any, cache: Any, prompt_tokens: int
    ) -> None:
        self._options = options
        self._tokenizer = tokenizer
        self._cache = cache
        self._prompt_tokens = prompt_tokens
        self._tokens: list[int] = []
        self._printed = 0  # tokens whose text is out
        self._context = 0  # first token that is decoded with them, for its spaces
        self._began_s = 0.0  # when the first token was there, and decoding began
        self._stall_ns = 0  # of decode steps before that

    def on_prompt(self, done: int) -> None:
        _note(self._options, f"prompt {done}/{self._prompt_tokens} tokens")

    def consume(self, stream: Any) -> int:
        """Prints the text as it comes and the summary at the end; returns the exit code."""
        error: BaseException | None = None
        try:
            for token in stream:
                if not self._tokens:
                    self._began_s = time.perf_counter()
                    self._stall_ns = self._cache.stats().decode_stall_ns
                self._tokens.append(token)
                self._print_new()
        except BrokenPipeError:
            pass  # whoever reads the text has had enough of it
        except (MemoryError, OSError) as stopped:
            error = stopped  # what there is is still shown
        self._print_end()
        return 0 if error is None else _refuse(error)

    def _print_end(self) -> None:
        stats = self._stats()
        try:
            if self._options.json:
                text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
                print(json.dumps({"text": text, "token_ids": self._tokens, "stats": stats}))
            else:
                self._print_new(last=True)
                print()
            sys.stdout.flush()
        except BrokenPipeError:
            # Nobody reads it; and what Python flushes when it ends must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not self._options.json:
            print(_summary(stats, len(self._tokens)), file=sys.stderr)

    def _print_new(self, last: bool = False) -> None:
        """Prints what the new tokens add, once it ends in whole characters."""
        if self._options.json:
            return
        decode = self._tokenizer.decode
        old = decode(self._tokens[self._context : self._printed], skip_special_tokens=True)
        new = decode(self._tokens[self._context :], skip_special_tokens=True)
        if len(new) > len(old) and (last or not new.endswith("\ufffd")):
            print(new[len(old) :], end="", flush=True)
            self._context, self._printed = self._printed, len(self._tokens)

    def _stats(self) -> dict[str, Any]:
        """The cache's, with the two rates taken over the wall time of the decode steps."""
        stats = dict(self._cache.stats())
        steps = len(self._tokens) - 1  # the first token is the prompt's
        seconds = time.perf_counter() - self._began_s if steps > 0 else 0.0
        stall_s = (stats["decode_stall_ns"] - self._stall_ns) / 1e9
        stats["decode_tokens_per_s"] = steps / seconds if seconds else 0.0
        stats["stall_fraction"] = stall_s / seconds if seconds else 0.0
        return stats


def _summary(stats: dict[str, Any], tokens: int) -> str:
    pool = f"pool {format_size(stats['pool_bytes_peak'])} at peak ({stats['pool_io']})"
    return (
        f"pie: {tokens} tokens, {stats['decode_tokens_per_s']:.1f} tokens/s, "
        f"stalled {stats['stall_fraction']:.1%} of the time; "
        f"device {format_size(stats['device_bytes_peak'])} at peak, {pool}; "
        f"{format_size(stats['streamed_bytes'])} streamed, "
        f"{format_size(stats['written_bytes'])} written"
    )
