"""The GPU kernels against the floors of the card they run on, and against the best peer that can run in the same process.

First the machine's ceilings, in this process: reading memory, copying it, bf16 and fp8 matrix products, the gap between two kernels
of a captured graph, copies from and to the host. Then each kernel on random numbers of real shapes: its result is compared with a
reference first, and a kernel that is wrong has no time. Times are those of a captured graph's replays over rotating inputs that
do not fit into the cache, per call; median of --repeats, with the spread. `floor` is bytes over the read ceiling, or operations
over the matrix ceiling, whichever is longer; `share` is floor over time. --tune FILE also tries every form of the product of
few rows against the library and writes which wins where (kernels/linear_forms.py).

Needs a CUDA device; without one it refuses. It leaves the card's settings alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.kernel_cases import Case
    from bench.kernel_ceilings import Ceilings

GROUPS = ("decode", "prefill", "linear", "quantised", "rows", "sampling", "experts", "step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="these groups of kernels")
    parser.add_argument("--repeats", type=int, default=15, help="timed replays of each graph")
    parser.add_argument("--quick", action="store_true", help="the first shapes of each group only")
    parser.add_argument("--sweep", action="store_true", help="decode attention with other splits and stages, too")
    parser.add_argument("--tune", type=Path, metavar="FILE", help="write the table of linear forms for this card")


def run(args: argparse.Namespace) -> dict[str, Any]:
    refuse_without_cuda()
    import torch

    from bench.kernel_cases import cases
    from bench.kernel_ceilings import measure_ceilings
    from bench.kernel_tuning import tune

    torch.manual_seed(0)
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "triton": _triton()}
    print("  ".join(f"{name} {value}" for name, value in about.items()))
    ceilings = measure_ceilings(args.repeats)
    for name, value in ceilings.rows():
        print(f"{name:<28} {value}")
    rows = []
    print(f"\n{'kernel':<46} {'us':>9} {'spread':>13} {'floor us':>9} {'share':>6} {'error':>8}  peers (us)")
    for case in cases(args.only, args.quick, args.sweep):
        rows.append(_measure(case, ceilings, args.repeats))
        _print(rows[-1])
        torch.cuda.empty_cache()
    result: dict[str, Any] = {"about": about, "ceilings": ceilings.as_dict(), "rows": rows}
    if args.tune is not None:
        result["tuned"] = tune(args.tune, about, args.repeats)
    return result


def refuse_without_cuda() -> None:
    """One sentence, exit 2-like: SystemExit with the reason."""
    import importlib.util

    import torch

    if not torch.cuda.is_available():
        raise SystemExit(
            "bench kernels measures a CUDA device, and torch sees none here; on a machine with one: tandem bench kernels"
        )
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("bench kernels needs triton, which is not installed here; pip install 'tandem-serve[gpu]'")


def _triton() -> str:
    import triton

    return str(triton.__version__)


def _measure(case: Case, ceilings: Ceilings, repeats: int) -> dict[str, Any]:
    from bench.kernel_ceilings import graph_times

    row: dict[str, Any] = {"name": case.name, "floor_us": 1e6 * ceilings.floor_s(case.nbytes, case.flops, case.fp8)}
    try:
        row["error"] = error = case.error()
        if not error <= case.tolerance:  # NaN is wrong, too
            row["failed"] = f"relative error {error:.1e} is above {case.tolerance:.0e}: not timed"
            return row
        samples = [1e6 * sample for sample in graph_times(case.calls, repeats)]
        row |= {"us": sorted(samples)[len(samples) // 2], "samples_us": samples}
        row["peers_us"] = {}
        for name, calls in case.peers.items():
            try:
                peer = sorted(graph_times(calls, repeats))
                row["peers_us"][name] = 1e6 * peer[len(peer) // 2]
            except (RuntimeError, NotImplementedError) as error_:
                row["peers_us"][name] = f"does not run: {str(error_).splitlines()[0][:80]}"
    except Exception as error_:  # one kernel that cannot run must not hide the others' figures
        row["failed"] = f"{type(error_).__name__}: {str(error_).splitlines()[0][:160]}"
    return row


def _print(row: dict[str, Any]) -> None:
    if "failed" in row:
        print(f"{row['name']:<46} FAILED: {row['failed']}", flush=True)
        return
    spread = f"{min(row['samples_us']):.1f}-{max(row['samples_us']):.1f}"
    peers = "  ".join(f"{name} {value if isinstance(value, str) else f'{value:.1f}'}" for name, value in row["peers_us"].items())
    print(
        f"{row['name']:<46} {row['us']:>9.1f} {spread:>13} {row['floor_us']:>9.1f} {row['floor_us'] / row['us']:>6.0%} "
        f"{row['error']:>8.1e}  {peers}",
        flush=True,
    )
