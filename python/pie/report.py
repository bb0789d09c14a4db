"""Draws a trace as one self-contained page: overlap, steps, the controller's path, residency.

Needs matplotlib, which the extra [report] brings. Pages and pictures follow the reader's light or
dark scheme and load nothing from elsewhere.
"""

from __future__ import annotations

import functools
import html
import importlib
import io
import itertools
import os
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pie.trace import Event, Step, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#0f1e2d"  # in a figure stands for the colour of the page's text
_COLOURS = {
    "compute": "#7fa8d9",
    "attention": "#2f6db5",
    "stall": "#d64545",
    "load": "#e39b2d",
    "write": "#4fa36a",
}
_REASONS = {
    "starting": "#9aa3ad",
    "exploring": "#b48ad6",
    "link": "#e39b2d",
    "interference": "#d64545",
    "latency": "#c25b9c",
    "best": "#4fa36a",
    "pool": "#2f6db5",
}
_STYLE = """\
:root { --ink: #1c2733; --paper: #ffffff; --edge: #d5dbe1; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe6ee; --paper: #14181d; --edge: #3a424c; } }
"""
_PAGE_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2rem 0 0; } p { margin: .3rem 0; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; } td { padding: .15rem 1rem .15rem 0; }
tr { border-bottom: 1px solid var(--edge); } td + td { text-align: right; }
"""
_ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 5}  # of legends
_MS, _MIB = 1e6, float(1 << 20)


def write(trace: Trace, path: str | os.PathLike[str], title: str = "Pie") -> None:
    """Writes the page; raises as `page` does, and OSError where the file cannot be written."""
    Path(path).write_text(page(trace, title), encoding="utf-8")


def page(trace: Trace, title: str = "Pie") -> str:
    """The page as text. ValueError where no step was traced, ImportError without matplotlib."""
    if not trace.steps:
        raise ValueError("No step was traced: start the trace before steps are made.")
    parts = [
        ("Compute and copies of two steps", _OVERLAP, _draw_overlap),
        ("Steps", _STEPS, _draw_steps),
        ("How much may be streamed", _BUDGET, _draw_budget),
        ("Where each layer's KV is", _RESIDENCY, _draw_residency),
    ]
    sections = "".join(
        f"<h2>{heading}</h2><p>{text}</p>{svg(height, functools.partial(draw, trace=trace))}"
        for (heading, text, draw), height in zip(parts, (2.6, 5.2, 2.8, 3.0), strict=True)
    )
    name = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="color-scheme" content="light dark"><style>{_STYLE}{_PAGE_STYLE}</style>'
        f"</head><body><h1>{name}</h1>{_summary(trace)}{sections}</body></html>\n"
    )


def require_matplotlib() -> None:
    """Raises ImportError, which says what to install, where there is none."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError(
            f"{error}: install it with `pip install '.[report]'` in Pie's checkout (pie-core on "
            "the public package index is another project)."
        ) from error


def svg(height: float, draw: Callable[[Figure], None], standalone: bool = False) -> str:
    """A figure 9 inches wide and `height` high as SVG, which takes its ink from the page around it,
    or where it is `standalone` from the reader's scheme.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = dict.fromkeys(inks, _INK)
    settings |= {"svg.fonttype": "none", "svg.hashsalt": "pie"}
    settings |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    settings |= {"legend.frameon": False, "legend.fontsize": 8, "figure.facecolor": "none"}
    settings |= {"axes.facecolor": "none", "savefig.facecolor": "none"}
    drawn = io.StringIO()
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9, height), layout="constrained")
        draw(figure)
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue().replace(_INK, "var(--ink)")
    text = text[text.index("<svg") :]
    if not standalone:
        return text
    head, rest = text.split(">", 1)
    return f"{head}><style>{_STYLE}</style>{rest}"


def _summary(trace: Trace) -> str:
    decode = [step for step in trace.steps if step.decode]
    times = [step.ended_ns - step.began_ns for step in decode]
    rows = [("steps traced", f"{len(trace.steps)}, of them {len(decode)} of decode")]
    if decode:
        loaded = sum(step.loaded_bytes for step in decode)
        rate = decode[-1].link_bytes_per_s
        rows += [
            ("decode step, median", f"{statistics.median(times) / _MS:.2f} ms"),
            ("stalled", f"{sum(step.stall_ns for step in decode) / sum(times):.1%} of the time"),
            ("slowdown, estimated", f"{statistics.median(s.slowdown for s in decode):.1%}"),
            ("KV of a step, at the end", f"{decode[-1].kv_bytes / _MIB:.1f} MiB"),
            ("streamed a step", f"{loaded / len(decode) / _MIB:.1f} MiB"),
            ("link, as learned", f"{rate / 1e9:.2f} GB/s or more" if rate else "not used"),
        ]
    if trace.dropped:
        rows.append(("older records left out", f"{trace.dropped}"))
    cells = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


# ---- overlap ------------------------------------------------------------------------------------

_OVERLAP = (
    "Copies run while layers compute; red is what the computation waited for them. Dark is "
    "attention, light what lies between one layer's attention and the next one's."
)
_ROWS = {
    "to the pool": ("write",),
    "to the device": ("load",),
    "compute": ("layer", "attention", "stall"),
}


def _draw_overlap(figure: Figure, trace: Trace) -> None:
    shown = _typical(trace)
    began, ended = shown[0].began_ns, shown[-1].ended_ns
    axes = figure.subplots()
    for height, kinds in enumerate(_ROWS.values()):
        for kind in kinds:
            bars = [
                ((e.began_ns - began) / _MS, max(e.ended_ns - e.began_ns, 1) / _MS)
                for e in trace.events
                if e.kind == kind and e.ended_ns > began and e.began_ns < ended
            ]
            colour = _COLOURS["compute" if kind == "layer" else kind]
            edges: dict[str, Any] = {"edgecolor": "none"}
            if kind == "layer":
                edges = {"edgecolor": _INK, "linewidth": 0.2}
            axes.broken_barh(bars, (height - 0.35, 0.7), facecolor=colour, **edges)
    for step in shown[1:]:
        axes.axvline((step.began_ns - began) / _MS, color=_INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(_ROWS)), list(_ROWS))
    axes.set_xlim(0, (ended - began) / _MS)
    axes.set_xlabel("ms")
    _add_legend(axes, (("between", "compute"), ("attention", "attention"), ("stall", "stall")))


def _add_legend(axes: Axes, names: Iterable[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=_COLOURS[colour], label=name) for name, colour in names]
    axes.legend(handles=handles, **_ABOVE)


def _typical(trace: Trace) -> list[Step]:
    """Two decode steps after each other that take about as long as most; else the last two."""
    covered = min((event.step for event in trace.events), default=0)
    steps = [step for step in trace.steps if step.step > covered] or trace.steps
    pairs = [[a, b] for a, b in itertools.pairwise(steps) if a.decode and b.decode]
    if not pairs:
        return steps[-2:]
    median = statistics.median(b.ended_ns - a.began_ns for a, b in pairs)
    return min(reversed(pairs), key=lambda p: abs(p[1].ended_ns - p[0].began_ns - median))


# ---- over time ----------------------------------------------------------------------------------

_STEPS = (
    "Time of each decode step, of that waiting for copies; by how much it is slower than with all "
    "its KV on the device, as estimated; and what went over the link."
)


def _draw_steps(figure: Figure, trace: Trace) -> None:
    steps = [step for step in trace.steps if step.decode] or trace.steps
    numbers = [step.step for step in steps]
    time, slow, traffic = figure.subplots(3, sharex=True)
    time.plot(numbers, [(s.ended_ns - s.began_ns) / _MS for s in steps], color=_COLOURS["compute"])
    stalls = [step.stall_ns / _MS for step in steps]
    time.fill_between(numbers, stalls, color=_COLOURS["stall"], label="stall")
    time.set_ylim(bottom=0)
    time.set_ylabel("ms a step")
    time.legend(**_ABOVE)
    slow.plot(numbers, [100 * step.slowdown for step in steps], color=_COLOURS["attention"])
    slow.set_ylim(bottom=0)
    slow.set_ylabel("% slower")
    for kind, name in (("load", "loaded_bytes"), ("write", "written_bytes")):
        values = [getattr(step, name) / _MIB for step in steps]
        label = "to the device" if kind == "load" else "to the pool"
        traffic.plot(numbers, values, color=_COLOURS[kind], label=label)
    traffic.set_ylim(bottom=0)
    traffic.set_ylabel("MiB a step")
    traffic.set_xlabel("step")
    traffic.legend(**_ABOVE)


_BUDGET = (
    "What the controller would allow a step to stream by the objective, coloured by what bounds "
    "it, and what the steps streamed: what runs is never cut."
)


def _draw_budget(figure: Figure, trace: Trace) -> None:
    axes = figure.subplots()
    numbers = [step.step for step in trace.steps]
    axes.step(
        numbers,
        [step.loaded_bytes / _MIB for step in trace.steps],
        where="mid",
        color=_INK,
        linewidth=0.8,
        label="streamed",
    )
    for reason, colour in _REASONS.items():
        points = [(s.step, s.budget_bytes / _MIB) for s in trace.steps if s.budget_reason == reason]
        if points:
            axes.plot(*zip(*points, strict=True), ".", color=colour, label=f"bound: {reason}")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MiB a step")
    axes.set_xlabel("step")
    axes.legend(**_ABOVE)


_RESIDENCY = "The share of each layer's KV that is on the device when its attention begins."


def _draw_residency(figure: Figure, trace: Trace) -> None:
    layers = [event for event in trace.events if event.kind == "layer"]
    axes = figure.subplots()
    if not layers:
        return
    first = min(event.step for event in layers)
    width = max(event.step for event in layers) - first + 1
    shares = [[1.0] * width for _ in range(max(event.layer for event in layers) + 1)]
    for event in layers:
        shares[event.layer][event.step - first] = _share(event)
    extent = (first - 0.5, first + width - 0.5, len(shares) - 0.5, -0.5)
    image = axes.imshow(
        shares,
        aspect="auto",
        vmin=0,
        vmax=1,
        cmap="cividis",
        extent=extent,
        interpolation="nearest",
    )
    axes.set_ylabel("layer")
    axes.set_xlabel("step")
    figure.colorbar(image, ax=axes, label="share on the device")


def _share(event: Event) -> float:
    return 1 - event.streamed_bytes / event.bytes if event.bytes else 1.0
