"""Which form of skinny_linear.py multiplies which shape, as measured on one card against the library; no torch, no triton.

`tandem bench kernels --tune FILE` writes such a table; without one for the card at hand every plain product goes to the library
(cuBLASLt), so an unmeasured shape is never slower than it was. Called by kernels/cuda_ops.py and bench/kernels.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

MAX_ROWS = 64  # above it the library has enough rows to choose from
PROGRAMS = 264  # what a default form tries to have at least: two for each SM of an H200, on any card, so that bits are the same
MAX_SPLITS = 16
MIN_SPLIT_DEPTH = 512  # of one program's part of the inner dimension


class Form(NamedTuple):
    """One way to launch it. Tiles are powers of two of at least 16; splits share the inner dimension."""

    tile_rows: int  # of x
    tile_out: int  # rows of the weight
    tile_in: int  # of the inner dimension, per step
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4


def default_form(kind: str, rows: int, out_width: int, in_width: int, group: int = 0) -> Form:
    """A form that should do; where rows only widen it, so that a row's additions are the same in every batch."""
    tile_rows = 16 if rows <= 16 else 32 if rows <= 32 else 64
    tile_out = 64
    tile_in = {"plain": 128, "int8": 256, "fp8": 256, "int4": min(128, group or 128)}[kind]
    splits = 1
    while splits < MAX_SPLITS and splits * -(-out_width // tile_out) < PROGRAMS and in_width >= 2 * splits * MIN_SPLIT_DEPTH:
        splits *= 2
    return Form(tile_rows, tile_out, tile_in, splits)


def candidates(kind: str, rows: int, out_width: int, in_width: int, group: int = 0) -> list[Form]:
    """What a tuner tries."""
    first = default_form(kind, rows, out_width, in_width, group)
    depths = [first.tile_in] if kind == "int4" else [first.tile_in // 2, first.tile_in, 2 * first.tile_in]
    return [
        Form(first.tile_rows, tile_out, tile_in, splits, num_warps, num_stages)
        for tile_out in (64, 128)
        for tile_in in depths
        for splits in (1, 2, 4, 8, 16)
        for num_warps, num_stages in ((4, 3), (4, 4), (4, 6), (8, 3))
        if splits == 1 or in_width >= splits * tile_in
        if (tile_out + first.tile_rows) * tile_in * num_stages * (2 if kind == "plain" else 1) <= 200_000
    ]


def bucket(rows: int) -> int:
    """Rows as a table knows them: the power of two at or above."""
    return 1 << max(rows - 1, 0).bit_length()


class Table:
    """Forms by (kind, bucket of rows, out, in); None where the library won."""

    def __init__(self, device: str = "", forms: dict[tuple[str, int, int, int], Form | None] | None = None) -> None:
        self.device = device
        self._forms = forms or {}

    def __len__(self) -> int:
        return len(self._forms)

    def choose(self, kind: str, rows: int, out_width: int, in_width: int) -> Form | None:
        return self._forms.get((kind, bucket(rows), out_width, in_width)) if rows <= MAX_ROWS else None

    def put(self, kind: str, rows: int, out_width: int, in_width: int, form: Form | None) -> None:
        self._forms[kind, bucket(rows), out_width, in_width] = form

    def as_json(self, **about: Any) -> str:
        """about: what else the file is to say (versions, date)."""
        rows = [[*shape, None if form is None else list(form)] for shape, form in sorted(self._forms.items())]
        return json.dumps({"device": self.device, **about, "forms": rows}, indent=1)


def read_table(path: Path) -> Table:
    """Raises ValueError naming the file and what is wrong with it."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        forms = {
            (str(kind), int(rows), int(out), int(inner)): None if form is None else _checked(Form(*map(int, form)))
            for kind, rows, out, inner, form in raw["forms"]
        }
        return Table(str(raw["device"]), forms)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no table of linear forms ({error}); write it anew with `tandem bench kernels --tune`"
        ) from error


def _checked(form: Form) -> Form:
    tiles = (form.tile_rows, form.tile_out, form.tile_in, form.num_warps, 16 * form.num_warps)
    if min(form) < 1 or any(tile & (tile - 1) for tile in tiles) or min(form[:3]) < 16:
        raise ValueError(f"{form} cannot be launched")
    return form
