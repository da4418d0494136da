"""`tandem calibrate`: a cost file from what a running cluster remembers of its requests, with the error on requests held out.

    tandem bench serve --url http://127.0.0.1:8000 --trace azure.csv.gz --scale 0.1 --requests 150 --json load.json
    tandem calibrate --url http://127.0.0.1:8000 --load load.json --out cost.yaml

Reads over HTTP the timelines of the last finished requests (GET /dashboard/requests, and /dashboard/requests/ID for each) and the
workers' figures (GET /dashboard/data), with the operators' key where there is one; --load, a result of `tandem bench serve --json`,
adds what lies between client and gateway. A fifth of the requests is held out: nothing is fitted to them, the printed error is
theirs.

What is fitted: prefill (a step, a token, a token squared) from the time between a prompt's first chunk and its token; decode (a
step, a token of context, a sequence) from the marks that timelines keep of every 16th token or so, with the batch reconstructed
from all timelines; how much longer each takes while the other role works (roles that share cores); hand-over; both ways through the
gateway.
"""

from __future__ import annotations

import argparse
import itertools
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import yaml

from configs.schema import DecodeConfig, PrefillConfig
from protocol.errors import ConfigError, TandemError
from simulation.costs import Contention, Cost, DecodeCost, KvShape, PrefillCost, RoleLimits

TIMEOUT_S = 10.0
MAX_REQUESTS = 1000  # as many as /dashboard/requests gives at once
MIN_REQUESTS = 20
HELD_OUT = 5  # every fifth
MIN_STRETCH = 6  # tokens between two marks, below which the wait for a step under way is too much of it
SLOWDOWNS = tuple(1.0 + 0.05 * i for i in range(41))


class Walked(NamedTuple):
    """One finished request; times in seconds of one clock, the earliest request's arrival at 0. tokens: (when, how many by
    then)."""

    request_id: str
    client_id: str
    received_at: float
    placed_at: float
    reserved_at: float
    prefill_at: float
    first_at: float
    transferred_at: float
    end_at: float
    prompt: int
    cached: int
    output: int
    prefill_worker: str
    decode_worker: str
    tokens: tuple[tuple[float, int], ...]

    @property
    def is_local(self) -> bool:
        return self.prefill_worker == self.decode_worker


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the cluster listens (default: %(default)s)")
    parser.add_argument("--api-key", default="", help="the operators' key, where there is one")
    parser.add_argument("--requests", type=int, default=MAX_REQUESTS, help="how many of the last ones to read")
    parser.add_argument(
        "--load", type=Path, metavar="FILE", help="a result of `tandem bench serve --json`: adds the way to the client"
    )
    parser.add_argument("--name", default="calibrated")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the cost file")


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError for what was asked wrongly, TandemError when the cluster cannot say enough."""
    ask = asker(args.url, args.api_key)
    status = ask("/dashboard/data")
    walked = timelines(ask, min(args.requests, MAX_REQUESTS))
    samples = _samples(args.load) if args.load else []
    cost, told = fit(walked, status, samples, args.name)
    args.out.write_text(as_yaml(cost), encoding="utf-8")
    for line in told:
        print(line)
    print(f"written: {args.out}")
    return 0


def as_yaml(cost: Cost) -> str:
    return yaml.safe_dump(msgspec.to_builtins(cost), sort_keys=False, width=120)


# ---- what the cluster remembers --------------------------------------------------------------------------------------


def asker(url: str, key: str) -> Callable[[str], Any]:
    """GET a document. Raises TandemError with what the server or the network said."""

    def ask(path: str) -> Any:
        request = urllib.request.Request(url.rstrip("/") + path)
        if key:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise TandemError(f"GET {url}{path}: {error.code} {error.reason}") from None
        except (OSError, ValueError) as error:
            raise TandemError(f"GET {url}{path}: {error}; is a cluster listening there? (--url)") from None

    return ask


def timelines(ask: Callable[[str], Any], limit: int) -> list[Walked]:
    """The last finished requests, oldest first. Those that were resumed are left out: they walked twice."""
    rows = ask(f"/dashboard/requests?state=finished&limit={limit}")["requests"]
    found = []
    origin = min((row["received"] for row in rows), default=0.0)
    for row in rows:
        if row["resumptions"] or not row["output_tokens"]:
            continue
        one = _walked(row, ask(f"/dashboard/requests/{row['id']}")["timeline"], origin)
        if one is not None:
            found.append(one)
    return sorted(found, key=lambda one: one.received_at)


def _walked(row: dict[str, Any], marks: list[dict[str, Any]], origin: float) -> Walked | None:
    at = {mark["name"]: mark["at_ms"] / 1000 for mark in marks if mark["name"] != "token"}
    if not {"admitted", "reserved", "prefill_start", "prefill_end", "end"} <= at.keys():
        return None
    base = row["received"] - origin
    first = at.get("first_token", at["prefill_end"])
    tokens = [(base + first, 1)]
    tokens += [(base + m["at_ms"] / 1000, int(m["detail"].split()[0])) for m in marks if m["name"] == "token" and m["detail"]]
    return Walked(
        row["id"], row["client_id"] or "", base, base + at["admitted"], base + at["reserved"], base + at["prefill_start"],
        base + at["prefill_end"], base + at.get("transfer_end", at["prefill_end"]), base + at["end"], row["prompt_tokens"],
        row["cached_tokens"], row["output_tokens"], row["prefill_worker"] or "", row["decode_worker"] or "", tuple(tokens),
    )  # fmt: skip


def _samples(path: Path) -> list[dict[str, Any]]:
    try:
        return [sample for one in json.loads(path.read_text())["runs"] for sample in one["samples"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--load {path}: not a result of `tandem bench serve --json` ({error})", param="--load") from None


# ---- fitting ---------------------------------------------------------------------------------------------------------


class Steps(NamedTuple):
    """Observations of one role: features without slowdown, seconds, the share of each during which the other role worked."""

    features: list[list[float]]
    seconds: list[float]
    shared: list[float]
    is_held_out: list[bool]


def fit(walked: Sequence[Walked], status: dict[str, Any], samples: Sequence[dict[str, Any]], name: str) -> tuple[Cost, list[str]]:
    """-> the cost file, and sentences about its error. Raises TandemError when there is too little to see."""
    if len(walked) < MIN_REQUESTS:
        raise TandemError(
            f"{len(walked)} finished requests with timelines; {MIN_REQUESTS} are needed (`tandem bench serve`; gateway.timelines)"
        )
    workers = status["status"]["workers"]
    role = {kind: [w for w in workers if w["role"] == kind and w["alive"]] for kind in ("prefill", "decode")}
    if not role["decode"]:
        raise TandemError("no decode worker is alive there")
    limits = {kind: _limits(role[kind] or role["decode"], kind) for kind in ("prefill", "decode")}
    prefills = _prefills(walked, limits["prefill"].max_num_batched_tokens)
    decodes = _decodes(walked)
    prefill, prefill_slow, prefill_error = _fitted(prefills)
    decode, decode_slow, decode_error = _fitted(decodes)
    transfer_s = _median([max(0.0, w.transferred_at - w.first_at) for w in walked if not w.is_local and w.output > 1], 0.0)
    before_s, after_s = _ways(walked, samples)
    token_nbytes = _token_nbytes(walked, workers)
    errors = {
        "prefill_mape": round(prefill_error, 4), "decode_mape": round(decode_error, 4),
        "held_out": {"prefill": sum(prefills.is_held_out), "decode": sum(decodes.is_held_out)}, "requests": len(walked),
    }  # fmt: skip
    first = role["decode"][0]
    cost = Cost(
        name=name,
        model=first["model"],
        source=f"tandem calibrate: {len(walked)} requests of a running cluster, every fifth held out",
        device=first["device"],
        prefill=PrefillCost(per_step_s=max(prefill[0], 1e-6), per_token_s=prefill[1], per_token2_s=prefill[2]),
        decode=DecodeCost(per_step_s=max(decode[0], 1e-6), per_context_token_s=decode[1], per_seq_s=decode[2]),
        kv=KvShape(num_layers=1, num_kv_heads=1, head_dim=max(1, token_nbytes // 2), block_size=first["block_size"], dtype="uint8"),
        num_blocks=first["num_blocks"],
        prefill_limits=limits["prefill"],
        decode_limits=limits["decode"],
        overhead_s=before_s,
        return_s=after_s,
        transfer_s=transfer_s,
        link_gbps=100.0,
        contention=Contention(prefill=prefill_slow, decode=decode_slow),
        errors=errors,
    )
    told = [
        f"prefill: {1e3 * prefill[0]:.2f} ms a step + {1e6 * prefill[1]:.1f} us a token + {1e9 * prefill[2]:.2f} ns a token "
        f"squared, x{prefill_slow:.2f} while decode works",
        f"  on {sum(prefills.is_held_out)} prompts held out: error {prefill_error:.1%}",
        f"decode: {1e3 * decode[0]:.2f} ms a step + {1e6 * decode[1]:.3f} us a token of context + {1e3 * decode[2]:.3f} ms a "
        f"sequence, x{decode_slow:.2f} while prefill works",
        f"  on {sum(decodes.is_held_out)} stretches held out: error {decode_error:.1%}",
        f"hand-over {transfer_s * 1e3:.1f} ms; to a worker {before_s * 1e3:.1f} ms, back to the client {after_s * 1e3:.1f} ms",
    ]
    return cost, told


def _limits(workers: Sequence[dict[str, Any]], kind: str) -> RoleLimits:
    """As the workers say; where they do not, as `tandem serve` starts them."""
    default = PrefillConfig().max_num_batched_tokens if kind == "prefill" else DecodeConfig().max_num_batched_tokens
    tokens = workers[0].get("max_num_batched_tokens") or default
    return RoleLimits(max_num_batched_tokens=tokens, max_num_seqs=workers[0]["max_num_seqs"])


def _median(values: Sequence[float], otherwise: float) -> float:
    return float(np.median(values)) if values else otherwise


def _overlap(begin: float, end: float, busy: Sequence[tuple[float, float]]) -> float:
    """Which share of an interval lies in the union of others (sorted by their begin)."""
    covered, reached = 0.0, begin
    for a, b in busy:
        if a >= end:
            break
        if b > reached:
            covered += min(b, end) - max(a, reached)
            reached = min(b, end)
    return covered / max(end - begin, 1e-9)


def _prefills(walked: Sequence[Walked], chunk: int) -> Steps:
    """One row per prompt that had its worker to itself."""
    steps = Steps([], [], [], [])
    decoding = sorted((w.transferred_at, w.end_at) for w in walked if w.output > 1)
    for i, one in enumerate(walked):
        others = [w for w in walked if w is not one and w.prefill_worker == one.prefill_worker]
        if one.is_local or any(w.prefill_at < one.first_at and one.prefill_at < w.first_at for w in others):
            continue
        n, cached = one.prompt, one.cached
        steps.features.append([float(-(-(n - cached) // chunk)), float(n - cached), float(n * n - cached * cached)])
        steps.seconds.append(one.first_at - one.prefill_at)
        steps.shared.append(_overlap(one.prefill_at, one.first_at, decoding))
        steps.is_held_out.append(i % HELD_OUT == 0)
    return steps


def _decodes(walked: Sequence[Walked]) -> Steps:
    """One row per stretch between two marks of a request: its mean step, with the mean batch and contexts of its worker then."""
    steps = Steps([], [], [], [])
    prefilling = sorted((w.prefill_at, w.first_at) for w in walked)
    for i, one in enumerate(walked):
        # From where decode began, with the first token known, over the marks, to the end.
        points = [(one.transferred_at, 1), *one.tokens[1:], (one.end_at, one.output)]
        for (since, had), (until, has) in itertools.pairwise(points):
            if has - had < MIN_STRETCH or until <= since:
                continue
            batch = context = 0.0
            for other in walked:
                if other.decode_worker != one.decode_worker or other.output < 2:
                    continue
                a, b = max(since, other.transferred_at), min(until, other.end_at)
                if b > a:
                    share = (b - a) / (until - since)
                    at = other.prompt + other.output * ((a + b) / 2 - other.transferred_at) / max(
                        1e-9, other.end_at - other.transferred_at
                    )
                    batch += share
                    context += share * at
            steps.features.append([1.0, context, batch])
            steps.seconds.append((until - since) / (has - had))
            steps.shared.append(_overlap(since, until, prefilling))
            steps.is_held_out.append(i % HELD_OUT == 0)
    return steps


def _fitted(steps: Steps) -> tuple[list[float], float, float]:
    """-> (coefficients, slowdown while the other role works, mean relative error on what was held out)."""
    x, y, shared = np.array(steps.features), np.array(steps.seconds), np.array(steps.shared)
    held = np.array(steps.is_held_out, dtype=bool)
    if len(y) < 8 or (~held).sum() < 4:
        raise TandemError(f"{len(y)} observations of steps; more requests, or longer answers, are needed")
    keep = (~held) & (y > 0)
    best: tuple[float, list[float], float] | None = None
    for slow in SLOWDOWNS:
        factor = 1.0 + (slow - 1.0) * shared
        theta, loss = _not_negative(x[keep] * factor[keep, None], y[keep])
        if best is None or loss < best[0]:
            best = loss, theta, slow
    assert best is not None
    _, theta, slow = best
    test = held & (y > 0) if held.any() else keep
    predicted = (x[test] @ np.array(theta)) * (1.0 + (slow - 1.0) * shared[test])
    return theta, float(slow), float(np.mean(np.abs(predicted / y[test] - 1)))


def _not_negative(x: Any, y: Any) -> tuple[list[float], float]:
    """Least squares of relative residuals, every coefficient at or above zero; outliers (a stalled machine) count less. -> theta,
    loss."""
    weights = 1.0 / y
    theta = np.zeros(x.shape[1])
    for _ in range(5):  # iteratively reweighted: Huber's loss
        free = list(range(x.shape[1]))
        while True:
            theta = np.zeros(x.shape[1])
            theta[free] = np.linalg.lstsq(x[:, free] * weights[:, None], y * weights, rcond=None)[0]
            if theta.min() >= 0 or len(free) == 1:
                theta = np.maximum(theta, 0.0)
                break
            free.remove(min(free, key=lambda i: theta[i] * float(np.mean(x[:, i]))))
        residual = np.abs(x @ theta / y - 1.0)
        scale = max(1.5 * float(np.median(residual)), 1e-6)
        weights = np.sqrt(np.minimum(1.0, scale / np.maximum(residual, 1e-9))) / y
    residual = np.abs(x @ theta / y - 1.0)
    return [float(t) for t in theta], float(np.mean(np.minimum(residual, 3 * scale)))


def _ways(walked: Sequence[Walked], samples: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Seconds (from the client's sending to the worker, from the worker back) that no queue and no computing explain: medians."""
    before = _median([w.reserved_at - w.received_at for w in walked], 0.0)
    ends = {w.client_id: w for w in walked}
    beyond = [
        (sample["end"] - sample["sent"]) - (w.end_at - w.received_at)
        for sample in samples
        if sample["outcome"] == "ok" and (w := ends.get(sample["request_id"])) is not None
    ]
    return before, max(0.0, _median(beyond, 0.0))


def _token_nbytes(walked: Sequence[Walked], workers: Sequence[dict[str, Any]]) -> int:
    """Of one token's KV: what was carried over what was computed elsewhere; 1 kB where nothing was carried."""
    carried = sum(w["stats"]["transfer_bytes"] for w in workers if w["role"] == "decode" and w["alive"])
    transfers = sum(w["stats"]["transfers"] for w in workers if w["role"] == "decode" and w["alive"])
    mean_prompt = _median([float(w.prompt) for w in walked if not w.is_local], 0.0)
    if not transfers or not mean_prompt:
        return 1024
    return max(2, int(carried / transfers / mean_prompt))
