"""A run, or several, as SVG files that need nothing else: no script, no font, no library. The frame is bench/report.py's."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.report import DASHES, NUM_COLOURS, Axes, cdf, tag

if TYPE_CHECKING:
    from simulation.results import Results

STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#444}.mid{text-anchor:middle}.end{text-anchor:end}.name{fill:#111}"
    ".grid{stroke:#e4e4e4;fill:none}.line{fill:none;stroke-width:1.8}"
    ".promise{stroke:#c33;fill:none;stroke-dasharray:3 3}.promised{fill:#c33}"
    ".c0{stroke:#1f6feb}.c1{stroke:#e36209}.c2{stroke:#2da44e}.c3{stroke:#8250df}.c4{stroke:#57606a}.c5{stroke:#bf3989}"
    "circle{fill:#fff;stroke-width:1.5}"
)
GAP, KEYS = 14, 20

Point = tuple[float, float]


class Curve:
    """One line of a plot and what it is called."""

    def __init__(self, label: str, points: Sequence[Point], step: bool = False) -> None:
        self.label = label
        self.points = points
        self.step = step


def panel(
    curves: Sequence[Curve], x_name: str, y_name: str, y_max: float | None = None, mark: tuple[float, str] | None = None
) -> Axes:
    """A frame around all of them."""
    xs = [x for curve in curves for x, _ in curve.points] or [1.0]
    ys = [y for curve in curves for _, y in curve.points] or [1.0]
    axes = Axes(max([*xs, *([1.1 * mark[0]] if mark else [])]), y_max or 1.05 * max(ys), x_name, y_name)
    if mark is not None:
        axes.mark(*mark)
    for number, curve in enumerate(curves):
        axes.line(curve.points, number, curve.label, step=curve.step)
    return axes


def page(panels: Sequence[tuple[str, Axes]], labels: Sequence[str], columns: int = 2) -> str:
    """Panels with their titles in a grid, and the legend below."""
    width, height = panels[0][1].width, panels[0][1].height + 22
    rows = -(-len(panels) // columns)
    parts = []
    for i, (title, axes) in enumerate(panels):
        x, y = (i % columns) * (width + GAP), (i // columns) * (height + GAP)
        head = f'<text x="{width / 2:.0f}" y="12" class="mid name">{html.escape(title)}</text>'
        parts.append(f'<g transform="translate({x},{y})">{head}<g transform="translate(0,18)">{"".join(axes.parts)}</g></g>')
    below = rows * (height + GAP)
    per_row = max(1, (columns * width) // 190)
    for i, label in enumerate(labels):
        x, y = 20 + (i % per_row) * 190, below + 8 + KEYS * (i // per_row)
        stroke = tag("path", kind=f"line c{i % NUM_COLOURS}", dash=DASHES[i % len(DASHES)], d=f"M{x} {y - 4}h26")
        parts.append(stroke + f'<text x="{x + 32}" y="{y}">{html.escape(label)}</text>')
    total_width, total_height = columns * (width + GAP), below + 8 + KEYS * (1 + len(labels) // per_row)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width} {total_height}" width="{total_width}" '
        f'height="{total_height}"><rect width="100%" height="100%" fill="#fff"/><style>{STYLE}</style>{"".join(parts)}</svg>\n'
    )


def of_run(results: Results, ttft_s: float, tpot_s: float, label: str) -> str:
    """Distributions of TTFT and TPOT against the promise, and goodput over time."""
    ttft = [v for v in results.ttft_s if v >= 0]
    tpot = [1000 * v for v in results.tpot_s if v >= 0]
    over_time: dict[int, list[int]] = {}
    end = max(results.offered_at, default=0.0)
    width = max(end / 60, 1e-9)
    for at, good in zip(results.offered_at, results.is_good, strict=True):
        bucket = over_time.setdefault(min(59, int(at / width)), [0, 0])
        bucket[0] += good
        bucket[1] += 1
    times = sorted(over_time)
    panels = [
        ("Time to first token", panel([Curve(label, cdf(ttft), True)], "s", "share", 1.0, (ttft_s, f"promise {ttft_s:g} s"))),
        (
            "Time per output token",
            panel([Curve(label, cdf(tpot), True)], "ms", "share", 1.0, (1000 * tpot_s, f"promise {1000 * tpot_s:g} ms")),
        ),
        (
            "Offered, and of these kept",
            panel(
                [
                    Curve("kept", [(i * width, over_time[i][0] / width) for i in times]),
                    Curve("offered", [(i * width, over_time[i][1] / width) for i in times]),
                ],
                "s",
                "requests/s",
            ),
        ),
    ]
    return page(panels, ["kept (or this run)", "offered"])
