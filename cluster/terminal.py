"""Text for terminals: colour where it is wanted, bars, small curves, tables. Used by `trace_view.py` and `top.py`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TextIO

COLOURS = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "magenta": "35", "cyan": "36", "dim": "2", "bold": "1"}
STEPS = " ▁▂▃▄▅▆▇█"
_CODES = re.compile(r"\x1b\[[0-9;]*m")


def wants_colour(out: TextIO) -> bool:
    """A terminal that can, unless NO_COLOR says otherwise (no-color.org); FORCE_COLOR decides where there is no terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (out.isatty() and os.environ.get("TERM") != "dumb")


class Paint:
    """paint("text", "red"): coloured, or as it is."""

    def __init__(self, is_on: bool) -> None:
        self.is_on = is_on

    def __call__(self, text: str, *styles: str) -> str:
        codes = ";".join(COLOURS[style] for style in styles)
        return f"\x1b[{codes}m{text}\x1b[0m" if self.is_on and codes else text


def width_of(text: str) -> int:
    """Columns that it takes, colours left out."""
    return len(_CODES.sub("", text))


def cut(text: str, width: int) -> str:
    """At most `width` columns; the colours of what is left stay."""
    out, used = [], 0
    for part in re.split(r"(\x1b\[[0-9;]*m)", text):
        if _CODES.fullmatch(part):
            out.append(part)
        else:
            out.append(part[: max(0, width - used)])
            used += len(part)
    return "".join(out)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns, two spaces apart."""
    widths = [max(width_of(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell + " " * (w - width_of(cell)) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in lines]


def spark(values: Sequence[float | None], width: int) -> str:
    """The last `width` values as a small curve from 0 to the largest of them; a gap where there is none."""
    shown = list(values)[-width:]
    top = max((v for v in shown if v is not None), default=0.0)
    return "".join(" " if v is None else STEPS[round(v / top * 8)] if top > 0 else STEPS[1] for v in shown)


def bar(share: float, width: int) -> str:
    filled = round(max(0.0, min(1.0, share)) * width)
    return "█" * filled + "░" * (width - filled)


def ms(value: float | None) -> str:
    """Milliseconds, or seconds from ten of them on."""
    if value is None:
        return "-"
    return f"{value / 1e3:.2f} s" if value >= 10_000 else f"{value:.1f} ms"


def seconds(value: float | None) -> str:
    return "-" if value is None else ms(1e3 * value)


def count(value: float | None) -> str:
    """1234567 -> 1.23M"""
    if value is None:
        return "-"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:.4g}"
