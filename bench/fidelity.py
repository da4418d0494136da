"""The simulator against a real cluster on this machine: calibrate on one trace, simulate another, compare request by request.

    python -m bench fidelity --traces ../shared/traces --json fidelity.json

Starts `tandem serve` (one prefill and one decode worker) with random weights of a 30-million-parameter Llama, so that a step takes
milliseconds of computing and not of waiting; replays part of the VTC trace, calibrates, replays part of the Azure trace, which
calibration never saw, and simulates just these arrivals. Open loop; run it on an idle machine. Under eight minutes.

Printed: mean absolute relative error of each request's time from due to end (goal 10 %), the error of the p99 of TTFT (goal 25 %).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from bench import load
from bench.client import Client, Sample
from bench.observing import _server
from bench.traces import Arrival, read_trace
from configs.schema import SchedulerConfig
from configs.tenants import without_file
from scheduler.latency import quantile
from simulation import calibrate, policies
from simulation.cluster import Setup, Simulation
from simulation.costs import Cost
from simulation.results import End

BUNDLED = Path(__file__).resolve().parents[1] / "models" / "bundled"
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 2,
         "head_dim": 64}  # fmt: skip
MAX_PROMPT, MAX_OUTPUT = 900, 96
GOAL_E2E, GOAL_TTFT = 0.10, 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traces", type=Path, default=os.environ.get("TANDEM_TRACES"), help="folder (default: $TANDEM_TRACES)")
    parser.add_argument("--model", help="a model directory (default: random weights, made for this run)")
    parser.add_argument("--calibrate-on", default="vtc_arena_multi_client.csv", metavar="TRACE")
    parser.add_argument("--judge-on", default="azure2023_conv.csv.gz", metavar="TRACE")
    parser.add_argument("--requests", type=int, default=120, help="of each trace (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=0.3, help="of the judging trace's lengths (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1.2, help="requests a second, by speeding the trace up or down")
    parser.add_argument("--cost", type=Path, help="keep the calibrated cost file here")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.traces is None or not Path(args.traces).is_dir():
        raise SystemExit("bench fidelity: --traces FOLDER (or TANDEM_TRACES) is needed: the traces are not part of the repository")
    started = time.monotonic()
    tuning = _arrivals(Path(args.traces) / args.calibrate_on, args, 1.0)
    judging = _arrivals(Path(args.traces) / args.judge_on, args, args.scale)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(random_model(Path(folder) / "model"))
        with _server(Path(__file__).resolve().parents[1], model, ["--kv-cache-memory-bytes", "512MiB"]) as server:
            client = Client(server.url, {})
            name = asyncio.run(client.get("/v1/models"))["data"][0]["id"]
            _replay(client, name, [a._replace(at_s=0.2 * i) for i, a in enumerate(tuning[:10])], seed=1)  # warms it up
            print(f"replaying {len(tuning)} requests of {args.calibrate_on}", flush=True)
            seen = _replay(client, name, tuning, seed=2)
            ask = calibrate.asker(server.url, "")
            walked = calibrate.timelines(ask, len(tuning))
            cost, told = calibrate.fit(walked, ask("/dashboard/data"), [vars(sample) for sample in seen], "fidelity")
            print("\n".join(told), flush=True)
            print(f"replaying {len(judging)} requests of {args.judge_on}, which calibration has not seen", flush=True)
            real = _replay(client, name, judging, seed=3)
    if args.cost:
        args.cost.write_text(calibrate.as_yaml(cost), encoding="utf-8")
    found = compare(real, cost)
    found["calibration"] = cost.errors
    found["self"] = {k: v for k, v in compare(seen, cost).items() if k != "requests"}
    found["wall_s"] = time.monotonic() - started
    print(
        f"on the trace that calibrated: e2e MAPE {found['self']['e2e_mape']:.1%}, p99 TTFT {found['self']['ttft_p99_error']:+.1%}\n"
        f"on the other one: e2e MAPE {found['e2e_mape']:.1%} (goal {GOAL_E2E:.0%}), median {found['e2e_median_error']:.1%}; "
        f"p99 TTFT {found['ttft_p99_real_s']:.3f} s, simulated {found['ttft_p99_simulated_s']:.3f} s: "
        f"{found['ttft_p99_error']:+.1%} (goal within {GOAL_TTFT:.0%})"
    )
    return found


def compare(real: Sequence[Sample], cost: Cost) -> dict[str, Any]:
    """The same arrivals, simulated; per request and in sum."""
    good = sorted((s for s in real if s.outcome == "ok" and s.first is not None), key=lambda s: s.planned)
    origin = good[0].planned
    arrivals = [Arrival(s.sent - origin, s.tenant, s.prompt_tokens, s.output_tokens) for s in good]
    order = sorted(range(len(arrivals)), key=lambda i: arrivals[i].at_s)
    config = SchedulerConfig()
    setup = Setup(
        prefill=(cost,),
        decode=(cost,),
        tenants=without_file(config.ttft_target_s, config.tpot_target_s, config.attainment_target),
        config=config,
        max_tokens=MAX_OUTPUT,
        share_cores=True,
    )
    simulation = Simulation(setup, [arrivals[i] for i in order], policies.scheduler_for("tandem"))
    results = simulation.run()
    simulation.check_integrity()
    at = {index: row for row, index in enumerate(results.index)}
    rows = []
    for index, i in enumerate(order):
        sample, row = good[i], at[index]
        if results.end[row] != End.FINISHED:
            continue
        late = sample.sent - sample.planned  # the client's own, which a simulated one has not
        rows.append(
            {
                "e2e_s": sample.end - sample.planned - late, "simulated_e2e_s": results.e2e_s[row],
                "ttft_s": (sample.ttft or 0.0) - late, "simulated_ttft_s": results.ttft_s[row],
                "prompt": sample.prompt_tokens, "output": sample.output_tokens,
            }
        )  # fmt: skip
    errors = sorted(abs(r["simulated_e2e_s"] / r["e2e_s"] - 1) for r in rows)
    ttft = {key: quantile(sorted(r[key] for r in rows), 0.99) for key in ("ttft_s", "simulated_ttft_s")}
    return {
        "compared": len(rows), "offered": len(real),
        "e2e_mape": sum(errors) / len(errors), "e2e_median_error": errors[len(errors) // 2], "e2e_p90_error": quantile(errors, 0.9),
        "e2e_mean_ratio": sum(r["simulated_e2e_s"] for r in rows) / sum(r["e2e_s"] for r in rows),
        "ttft_p99_real_s": ttft["ttft_s"], "ttft_p99_simulated_s": ttft["simulated_ttft_s"],
        "ttft_p99_error": ttft["simulated_ttft_s"] / ttft["ttft_s"] - 1,
        "requests": rows,
    }  # fmt: skip


def _arrivals(path: Path, args: argparse.Namespace, scale: float) -> list[Arrival]:
    """The trace's first requests, shorter for the small model, at the wanted rate."""
    _, arrivals = read_trace(path, args.requests)
    arrivals = load.fitted(arrivals, scale, MAX_PROMPT, MAX_OUTPUT)
    span = max(arrivals[-1].at_s, 1e-9)
    return load.faster(arrivals, args.rate * span / len(arrivals))


def _replay(client: Client, model: str, arrivals: Sequence[Arrival], seed: int) -> list[Sample]:
    async def everything() -> list[Sample]:
        client.origin = time.perf_counter()

        async def one(index: int, arrival: Arrival) -> Sample:
            body = {
                "model": model, "prompt": load.prompt_tokens(arrival, index, seed, 2000), "temperature": 0.0,
                "max_tokens": arrival.output_tokens, "ignore_eos": True,
            }  # fmt: skip
            sample = Sample("", arrival.at_s, request_id=f"fidelity-{seed}-{index}")
            await asyncio.sleep(max(0.0, arrival.at_s - client.now()))
            return await client.complete(sample, body)

        return list(await asyncio.gather(*(one(i, a) for i, a in enumerate(arrivals))))

    samples = asyncio.run(everything())
    bad = [sample for sample in samples if sample.outcome != "ok"]
    if len(bad) > len(samples) // 10:
        raise SystemExit(f"bench fidelity: {len(bad)} of {len(samples)} requests failed: {bad[0].reason}")
    return samples


def random_model(folder: Path) -> Path:
    """A Llama of SHAPE with random weights and the bundled model's tokenizer."""
    folder.mkdir(parents=True)
    config = {**json.loads((BUNDLED / "config.json").read_text()), **SHAPE, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((BUNDLED / name).read_bytes())
    rng = np.random.default_rng(random.Random(0).randrange(2**31))
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    heads, kv_heads = SHAPE["num_attention_heads"] * SHAPE["head_dim"], SHAPE["num_key_value_heads"] * SHAPE["head_dim"]

    def drawn(*shape: int) -> Any:
        return (rng.standard_normal(shape) * 0.02).astype(np.float32)

    weights = {"model.embed_tokens.weight": drawn(config["vocab_size"], hidden), "model.norm.weight": np.ones(hidden, np.float32)}
    for i in range(SHAPE["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, shape in (
            ("self_attn.q_proj", (heads, hidden)), ("self_attn.k_proj", (kv_heads, hidden)),
            ("self_attn.v_proj", (kv_heads, hidden)), ("self_attn.o_proj", (hidden, heads)),
            ("mlp.gate_proj", (inner, hidden)), ("mlp.up_proj", (inner, hidden)), ("mlp.down_proj", (hidden, inner)),
        ):  # fmt: skip
            weights[f"{layer}.{name}.weight"] = drawn(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{name}.weight"] = np.ones(hidden, np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
