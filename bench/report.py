"""A run as one HTML file that needs nothing else: no script, no font, no network; drawings are SVG made here.

Plots: cumulative distributions of TTFT and TPOT against the promise, goodput against load, a timeline of every request.
`serve.py` calls `page`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.client import Sample
from bench.summary import COLUMNS, Promise

if TYPE_CHECKING:
    from bench.serve import Run

STYLE = Path(__file__).with_name("report.css")
WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 16, 34
MAX_STEPS = 400  # points of one curve
MAX_BARS = 400  # requests of one timeline
NUM_COLOURS = 6
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "10 4")

Point = tuple[float, float]
Rows = Sequence[tuple[str, dict[str, Any]]]


def tag(name: str, *inside: str, **attributes: float | str) -> str:
    """An element; `inside` is markup already. kind= is its class, dash= its stroke-dasharray; numbers get one decimal."""
    names = {"kind": "class", "dash": "stroke-dasharray"}
    parts = [name]
    for key, value in attributes.items():
        text = value if isinstance(value, str) else f"{value:.1f}"
        parts.append(f'{names.get(key, key)}="{html.escape(text)}"')
    return f"<{' '.join(parts)}>{''.join(inside)}</{name}>"


def told(text: str) -> str:
    """What a browser shows under the pointer."""
    return tag("title", html.escape(text))


class Axes:
    """A plot's frame: data coordinates in, SVG text out. Both axes begin at zero."""

    def __init__(self, x_max: float, y_max: float, x_name: str, y_name: str, height: int = HEIGHT, width: int = WIDTH) -> None:
        self.x_max, self.y_max = max(x_max, 1e-9), max(y_max, 1e-9)
        self.height, self.width = height, width
        self.bottom = height - BOTTOM
        self.parts: list[str] = []
        for value in ticks(self.x_max):
            x = self.x(value)
            self.parts.append(tag("path", kind="grid", d=f"M{x:.1f} {TOP}V{self.bottom}"))
            self.parts.append(tag("text", _number(value), x=x, y=self.bottom + 15, kind="mid"))
        for value in ticks(self.y_max):
            y = self.y(value)
            self.parts.append(tag("path", kind="grid", d=f"M{LEFT} {y:.1f}H{width - RIGHT}"))
            self.parts.append(tag("text", _number(value), x=LEFT - 6, y=y + 4, kind="end"))
        self.parts.append(tag("text", html.escape(x_name), x=width - RIGHT, y=height - 4, kind="end name"))
        self.parts.append(tag("text", html.escape(y_name), x=LEFT, y=TOP - 5, kind="name"))

    def x(self, value: float) -> float:
        return LEFT + (self.width - LEFT - RIGHT) * value / self.x_max

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - TOP - 4) * value / self.y_max

    def line(self, points: Sequence[Point], number: int, title: str, step: bool = False) -> None:
        """number: which of several; each has its own colour and dash."""
        if not points:
            return
        d = ""
        for x, y in points:
            across = f"H{self.x(x):.1f}" if step and d else ""
            d += f"{across}{'L' if d else 'M'}{self.x(x):.1f} {self.y(y):.1f}"
        self.parts.append(tag("path", told(title), kind=f"line {colour(number)}", dash=DASHES[number % len(DASHES)], d=d))

    def dot(self, x: float, y: float, number: int, title: str) -> None:
        self.parts.append(tag("circle", told(title), kind=f"dot {colour(number)}", cx=self.x(x), cy=self.y(y), r=4))

    def mark(self, x: float, title: str) -> None:
        """The promise."""
        if x <= self.x_max:
            self.parts.append(tag("path", told(title), kind="promise", d=f"M{self.x(x):.1f} {TOP}V{self.bottom}"))
            side = (
                {"kind": "promised end", "x": self.x(x) - 5} if x > 0.6 * self.x_max else {"kind": "promised", "x": self.x(x) + 5}
            )
            self.parts.append(tag("text", html.escape(title), y=self.bottom - 8, **side))

    def svg(self, title: str) -> str:
        return tag("svg", *self.parts, viewBox=f"0 0 {self.width} {self.height}", role="img", **{"aria-label": title})


def colour(number: int) -> str:
    return f"c{number % NUM_COLOURS}"


def ticks(top: float) -> list[float]:
    """Round numbers from 0 to `top`, about five."""
    step = 10 ** math.floor(math.log10(top / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if top / (step * factor) <= 5.5)
    return [step * i for i in range(int(top / step + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:.6g}" if value < 10_000 else f"{value / 1000:.6g}k"


def cdf(values: Sequence[float]) -> list[Point]:
    """(value, share at or below), at most about MAX_STEPS of them, the last at 1."""
    ordered = sorted(values)
    stride = max(1, len(ordered) // MAX_STEPS)
    points = [(value, (i + 1) / len(ordered)) for i, value in enumerate(ordered) if i % stride == 0]
    return [*points, (ordered[-1], 1.0)] if ordered else []


def _cdfs(runs: Sequence[Run], of: Callable[[Sample], float | None], promised: float | None, name: str) -> str:
    curves = [
        [1000 * value for sample in run.samples if sample.outcome == "ok" and (value := of(sample)) is not None] for run in runs
    ]
    longest = max((value for curve in curves for value in curve), default=1.0)
    axes = Axes(max(longest, 1150 * (promised or 0)), 1.0, f"{name}, ms", "share of requests")
    if promised is not None:
        axes.mark(1000 * promised, f"promise {1000 * promised:g} ms")
    for number, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        axes.line([(0.0, 0.0), *cdf(curve)] if curve else [], number, run.label, step=True)
    return axes.svg(f"{name}: cumulative distribution")


def _goodput(runs: Sequence[Run], rows: Rows) -> str:
    """Against the offered rate in open loop, against the number at once in closed loop."""
    is_closed = bool(runs[0].concurrency)
    points = sorted(
        (float(run.concurrency or run.offered), row["request_goodput"], row["request_throughput"])
        for run, (_, row) in zip(runs, rows, strict=True)
    )
    last = points[-1][0]
    most = max(max(good, through) for _, good, through in points)
    name = "requests at once" if is_closed else "offered, requests/s"
    axes = Axes(1.08 * last, 1.08 * (most if is_closed else max(most, last)), name, "requests/s")
    if not is_closed:
        axes.line([(0.0, 0.0), (last, last)], 2, "offered")
    axes.line([(x, through) for x, _, through in points], 1, "answered")
    axes.line([(x, good) for x, good, _ in points], 0, "promise kept")
    for x, good, through in points:
        axes.dot(x, through, 1, f"{x:g}: {through:.2f} answered per second")
        axes.dot(x, good, 0, f"{x:g}: {good:.2f} good per second")
    return axes.svg("Goodput against load")


def _timeline(run: Run, promise: Promise) -> str:
    """A bar per request, from due to end: waiting, then tokens. At most MAX_BARS, evenly picked."""
    stride = max(1, math.ceil(len(run.samples) / MAX_BARS))
    shown = run.samples[::stride]
    height = max(120, min(560, 4 * len(shown))) + TOP + BOTTOM
    name = "requests" if stride == 1 else f"every {stride}th request"
    axes = Axes(max(run.duration_s, 1e-3), len(shown), "seconds", name, height, 2 * WIDTH)
    thick = max(1.0, min(6.0, (height - TOP - BOTTOM) / max(1, len(shown)) - 1))
    for i, sample in enumerate(shown):
        y = axes.y(len(shown) - i - 0.5)
        title = told(f"{sample.request_id} {sample.tenant} {sample.outcome} {sample.reason}".strip())
        if sample.outcome != "ok" or sample.first is None:
            cross = f"M{axes.x(sample.planned):.1f} {y - 3:.1f}l6 6m0 -6l-6 6"
            axes.parts.append(tag("path", title, kind=sample.outcome, d=cross))
            continue
        kept = "kept" if promise.is_kept(sample) else "late"
        for a, b, kind in ((sample.planned, sample.first, "wait"), (sample.first, sample.end, kept)):
            width = max(0.5, axes.x(b) - axes.x(a))
            axes.parts.append(tag("rect", title, kind=kind, x=axes.x(a), y=y - thick / 2, width=width, height=thick))
    return axes.svg(f"Timeline of {run.label}")


def _table(rows: Rows) -> str:
    lines = ["<tr><th>" + "".join(tag("th", html.escape(name)) for name, _, _ in COLUMNS)]
    for label, row in rows:
        cells = ("–" if row[name] is None else format(row[name], how) for _, name, how in COLUMNS)
        lines.append("<tr>" + tag("th", html.escape(label or "-")) + "".join(tag("td", cell) for cell in cells))
    return tag("div", tag("table", *lines), kind="scroll")


def _legend(*pairs: tuple[str, str]) -> str:
    """(class of the box, what it means)."""
    return tag("p", *(tag("span", tag("i", kind=f"box {kind}"), html.escape(text)) for kind, text in pairs), kind="keys")


def _keys(runs: Sequence[Run]) -> str:
    if len(runs) < 2:
        return ""
    keys = []
    for i, run in enumerate(runs):
        stroke = tag("path", kind=f"line {colour(i)}", dash=DASHES[i % len(DASHES)], d="M0 3H26")
        keys.append(tag("span", tag("svg", stroke, viewBox="0 0 26 6"), " ", html.escape(run.label)))
    return tag("p", *keys, kind="keys")


def _figure(title: str, *inside: str) -> str:
    return tag("figure", tag("h2", html.escape(title)), *inside)


def page(
    runs: Sequence[Run], rows: Rows, tenants: Sequence[dict[str, dict[str, Any]]], promise: Promise, url: str, model: str
) -> str:
    """The whole document."""
    promised = [f"{name.upper()} ≤ {1000 * value:g} ms" for name, value in promise._asdict().items() if value is not None]
    title = html.escape(f"Load on {model}")
    explained = (
        "Times in ms. good/s: requests per second that kept the whole promise; kept: their share of all that came, the refused "
        "ones included."
    )
    parts = [
        tag("header", tag("h1", title), tag("p", html.escape(f"{url} · promise: {', '.join(promised) or 'none'}"), kind="dim")),
        tag("section", _table(rows), tag("p", explained, kind="dim")),
        tag(
            "section",
            _figure("Time to first token", _cdfs(runs, lambda sample: sample.ttft, promise.ttft, "TTFT")),
            _figure("Time per output token", _cdfs(runs, lambda sample: sample.tpot, promise.tpot, "TPOT")),
            kind="two",
        ),
        _keys(runs),
        tag(
            "section",
            _figure("Goodput against load", _goodput(runs, rows), _legend(("c0", "promise kept"), ("c1", "answered"))),
            kind="two",
        ),
    ]
    for run, shares in zip(runs, tenants, strict=True):
        if shares:
            parts.append(tag("section", tag("h2", html.escape(f"{run.label}, by tenant")), _table(list(shares.items()))))
    kinds = _legend(
        ("wait", "waiting for the first token"),
        ("kept", "tokens, promise kept"),
        ("late", "tokens, promise missed"),
        ("cross", "✕ refused or failed"),
    )
    for run in runs:
        heading = tag("h2", html.escape(f"Timeline, {run.label}"))
        parts.append(tag("section", heading, tag("figure", _timeline(run, promise)), kinds))
    reasons = [f"{label}: {number} × {reason}" for label, row in rows for reason, number in row["reasons"].items()]
    if reasons:
        listed = tag("ul", *(tag("li", html.escape(reason)) for reason in reasons))
        parts.append(tag("section", tag("h2", "What was refused or failed"), listed))
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE.read_text(encoding='utf-8')}</style>"
    )
    return f'<!doctype html><html lang="en">{head}{tag("main", *parts)}</html>\n'
