"""Finds the form of skinny_linear.py for each shape, against the library. Called by `bench kernels --tune` where there is a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F

from bench.kernel_cases import LLAMA_8B, QWEN_06B, num_sets, random, relative
from bench.kernel_ceilings import graph_times
from kernels.linear_forms import Form, Table, candidates
from kernels.skinny_linear import skinny_linear

ROWS = (1, 2, 4, 8, 16, 32, 64)
WORTH = 0.97  # of the library's time: less is within what two runs differ by
TOLERANCE = 1e-2


def tune(path: Path, about: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """Writes the table and returns what was measured. A form that fails or is wrong is left out."""
    table, found = Table(about["device"]), []
    for shape in (LLAMA_8B, QWEN_06B):
        for name, (out, inner) in shape.matrices.items():
            weights = [random(out, inner, scale=inner**-0.5) for _ in range(num_sets(2.0 * out * inner))]
            for rows in ROWS:
                x = random(rows, inner)
                library = _median([lambda w=w, x=x: F.linear(x, w) for w in weights], repeats)
                wanted = x.double() @ weights[0].double().t()
                best: tuple[float, Form | None] = (library * WORTH, None)
                for form in candidates("plain", rows, out, inner):
                    try:
                        if relative(skinny_linear(x, weights[0], form=form), wanted) > TOLERANCE:
                            continue
                        calls = [lambda w=w, x=x, form=form: skinny_linear(x, w, form=form) for w in weights]
                        best = min(best, (_median(calls, 5), form), key=lambda pair: pair[0])
                    except RuntimeError:  # too much shared memory for this card, for one
                        continue
                table.put("plain", rows, out, inner, best[1])
                found.append(
                    {
                        "shape": f"{shape.name} {name}",
                        "rows": rows,
                        "library_us": 1e6 * library,
                        "us": 1e6 * best[0],
                        "form": best[1],
                    }
                )
                print(
                    f"{shape.name} {name:<8} {rows:>3} rows: library {1e6 * library:.1f} us, best {1e6 * best[0]:>8.1f}  {best[1]}"
                )
    path.write_text(table.as_json(**about))
    return found


def _median(calls: list[Any], repeats: int) -> float:
    samples = sorted(graph_times(calls, repeats))
    return samples[len(samples) // 2]
