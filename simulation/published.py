"""Cost files from published measurements: DistServe's fitted coefficients, and Splitwise's table, fitted here.

    python -m simulation.published ../shared/traces bench/scenarios/costs

Facts of others, carried over with attribution: DistServe (LLMServe/DistServe@82831f1, Apache-2.0; Zhong et al., OSDI 2024) and
splitwise-sim (Mutinifni/splitwise-sim@8f99e7d, MIT; Patel et al., ISCA 2024). What they do not say (block counts, KV shapes, links,
limits of a step) is derived from the model's shape and the device's memory by the rules in this file.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

GB = 1e9
MEASURED = 2048  # tokens of a prefill step: above it Splitwise's unfused attention takes over, and DistServe did not measure
MEMORY_SHARE = 0.9  # of a GPU, as vLLM's default
A100_NBYTES, H100_NBYTES = 80 * GB, 80 * GB
PRICES = {"a100": 2.0, "h100": 3.5}  # money an hour of a GPU; ordinary rents, round; only their ratio matters


ATTENTION = 80 * 8192 / 69e9  # of llama2-70b: L d / P


class Shape(NamedTuple):
    num_layers: int
    num_kv_heads: int
    head_dim: int
    weights_nbytes: float  # float16


SHAPES = {
    "opt-13b": Shape(40, 40, 128, 26 * GB),
    "opt-66b": Shape(64, 72, 128, 132 * GB),
    "llama2-70b": Shape(80, 8, 128, 138 * GB),
}


def common(model: str, gpu: str, gpus: int, source: str) -> dict[str, Any]:
    shape = SHAPES[model]
    token_nbytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 2
    memory = gpus * MEMORY_SHARE * (A100_NBYTES if gpu == "a100" else H100_NBYTES) - shape.weights_nbytes
    return {
        "name": f"{model}-{gpu}-tp{gpus}",
        "model": model,
        "source": source,
        "device": "cuda",
        "gpus": gpus,
        "price_per_hour": gpus * PRICES[gpu],
        "kv": {
            "num_layers": shape.num_layers, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim, "block_size": 16,
            "dtype": "float16",
        },
        "num_blocks": int(memory / token_nbytes / 16),
        "prefill_limits": {"max_num_batched_tokens": MEASURED, "max_num_seqs": 16},
        "decode_limits": {"max_num_batched_tokens": 512, "max_num_seqs": 256},
        "transfer_s": 0.002,
        "link_gbps": 200.0,
    }  # fmt: skip


def distserve(path: Path) -> list[dict[str, Any]]:
    """Coefficients in ms -> cost files."""
    found = []
    source = (
        "DistServe (LLMServe/DistServe@82831f1, Apache-2.0), simdistserve profile of an A100-80G; coefficients unchanged, ms to s"
    )
    for model, sizes in json.loads(path.read_text()).items():
        name = model.removeprefix("facebook/")
        for gpus, fit in sizes.items():
            a, b, c = (value / 1000 for value in fit["prefill"])
            small, large = ([value / 1000 for value in fit[f"decoding_{size}bs"]] for size in ("small", "large"))
            cost = common(name, "a100", int(gpus), source)
            if cost["num_blocks"] < 256:
                continue
            cost["prefill"] = {"per_step_s": a, "per_token_s": b, "per_token2_s": c}
            for key, (step, context, seq) in (("decode", small), ("decode_large", large)):
                cost[key] = {"per_step_s": step, "per_context_token_s": context, "per_seq_s": seq}
            cost["decode_large"]["above"] = fit["decoding_large_small_bs_threshold"]
            found.append(cost)
    return found


def splitwise(path: Path) -> list[dict[str, Any]]:
    """Rows of llama2-70b -> cost files. Prefill: least squares of relative residuals over prompts of one step alone in a batch;
    what attention adds over longer contexts follows from the model's shape (2 L d n^2 of 2 P n + 2 L d n^2 operations). Decode: the
    context's share from batches of one, the batch's share from larger ones."""
    found = []
    rows = [row for row in csv.DictReader(path.open()) if row["model"] == "llama2-70b"]
    for gpu, hardware in (("a100", "a100-80gb"), ("h100", "h100-80gb")):
        for gpus in (2, 4, 8):
            mine = [r for r in rows if r["hardware"] == hardware and int(r["tensor_parallel"]) == gpus]
            source = (
                "splitwise-sim (Mutinifni/splitwise-sim@8f99e7d, MIT), data/perf_model.csv, "
                f"llama2-70b on {hardware}, TP{gpus}; fitted"
            )
            cost = common("llama2-70b", gpu, gpus, source)
            if cost["num_blocks"] < 256:
                continue
            alone = [r for r in mine if int(r["batch_size"]) == 1]
            cost["prefill"], prefill_error = _prefill(alone)
            cost["decode"], decode_error = _decode(alone, mine)
            cost["errors"] = {"prefill_mape": round(prefill_error, 4), "decode_mape": round(decode_error, 4)}
            found.append(cost)
    return found


def _relative(features: list[list[float]], values: list[float]) -> tuple[list[float], float]:
    """Least squares with every coefficient at or above zero (dropping the most negative until none is); mean relative error."""
    x, y = np.array(features), np.array(values)
    free = list(range(x.shape[1]))
    while True:
        theta = np.zeros(x.shape[1])
        theta[free] = np.linalg.lstsq(x[:, free] / y[:, None], np.ones(len(y)), rcond=None)[0]
        if theta.min() >= 0:
            return [float(t) for t in theta], float(np.mean(np.abs(x @ theta / y - 1)))
        free.remove(int(np.argmin(theta)))


def _prefill(rows: list[dict[str, str]]) -> tuple[dict[str, float], float]:
    rows = [r for r in rows if int(r["prompt_size"]) <= MEASURED]
    sizes = [float(r["prompt_size"]) for r in rows]
    times = [float(r["prompt_time"]) / 1000 for r in rows]
    (a, b), error = _relative([[1.0, n + ATTENTION * n * n] for n in sizes], times)
    c = b * ATTENTION
    return {"per_step_s": a, "per_token_s": b, "per_token2_s": c}, error


def _decode(alone: list[dict[str, str]], rows: list[dict[str, str]]) -> tuple[dict[str, float], float]:
    def context(row: dict[str, str]) -> float:
        return float(row["prompt_size"]) + float(row["token_size"]) / 2

    short = [r for r in alone if int(r["token_size"]) == 128]
    (a, b), _ = _relative([[1.0, context(r)] for r in short], [float(r["token_time"]) / 1000 for r in short])
    # A pool that could not hold the batch (TP2 with 64) was measured doing something else.
    batches = [r for r in rows if int(r["token_size"]) == 128 and not (r["tensor_parallel"] == "2" and r["batch_size"] == "64")]
    left = [float(r["token_time"]) / 1000 - b * context(r) * int(r["batch_size"]) for r in batches]
    (a, c), _ = _relative([[1.0, float(r["batch_size"])] for r in batches], left)
    errors = [
        abs((a + b * context(r) * int(r["batch_size"]) + c * int(r["batch_size"])) / (float(r["token_time"]) / 1000) - 1)
        for r in batches
    ]
    return {"per_step_s": a, "per_context_token_s": b, "per_seq_s": c}, float(np.mean(errors))


def main(argv: list[str]) -> int:
    traces, out = Path(argv[0]), Path(argv[1])
    out.mkdir(parents=True, exist_ok=True)
    files = [*distserve(traces / "distserve_a100_coefficients.json"), *splitwise(traces / "splitwise_perf_model.csv")]
    for cost in files:
        (out / f"{cost['name']}.yaml").write_text(yaml.safe_dump(cost, sort_keys=False, width=130), encoding="utf-8")
        print(cost["name"], cost["num_blocks"], cost.get("errors", ""))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
