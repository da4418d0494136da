"""What a decode step costs beside its arithmetic: the real worker loop with a model whose forward pass costs nothing.

    python -m bench steps
    python -m bench steps --batch 64 --profile steps.prof

Requests are reserved as a gateway would reserve them, their prompts go through the loop, and then every step decodes one token of
each: plan, batch of tensors, runner, sampler, blocks and prefix hashes, stopping, frames encoded for the gateway. Left out is the
model's own time (embed, forward, logits, all of them next to nothing here). Microseconds, medians; the sampler reads rows of 512.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import engine.runner
from cluster.local import LocalCluster
from configs.load import load
from decode.worker import DecodeWorker
from models.load import load_model
from protocol.messages import Reserve, encode
from protocol.request import Request, SamplingParams
from protocol.ticket import Ticket, WorkerRef

VOCAB_SIZE = 512
GOAL_US = 300.0  # at batch 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", default="1,16,64", help="sequences in a step (default: %(default)s)")
    parser.add_argument("--context", type=int, default=256, help="tokens of each prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="measured ones (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0: one uniform is drawn per row")
    parser.add_argument("--profile", type=Path, help="write a cProfile of the steps; the figures are then worth nothing")


def run(args: argparse.Namespace) -> dict[str, Any]:
    rows = {}
    names = ("step", "min", "plan", "runner", "sampler", "emit")
    print(f"{'batch':>5} " + " ".join(f"{name:>8}" for name in names) + "   (us; the sampler is part of the runner)")
    for batch in (int(part) for part in args.batch.split(",")):
        rows[batch] = row = asyncio.run(_measure(batch, args))
        cells = " ".join(f"{row[name]:8.0f}" for name in (f"{name}_us" for name in names))
        print(f"{batch:5d} {cells}", flush=True)
    return {"context": args.context, "steps": args.steps, "temperature": args.temperature, "batches": rows}


class FreeModel:
    """models.interface.Model that computes nothing."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._logits = torch.randn(4096, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))

    def embed(self, batch: Any) -> Tensor:
        return self.new_hidden(len(batch.token_ids))

    def new_hidden(self, num_rows: int) -> Tensor:
        started = time.perf_counter()
        hidden = torch.zeros(num_rows, 1)
        self.seconds += time.perf_counter() - started
        return hidden

    def forward(self, batch: Any, hidden: Tensor, kv: Tensor, on_layer: Any = None) -> Tensor:
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        started = time.perf_counter()
        logits = self._logits[: len(hidden)]
        self.seconds += time.perf_counter() - started
        return logits


async def _measure(batch: int, args: argparse.Namespace) -> dict[str, float]:
    model = FreeModel()
    num_blocks = batch * ((args.context + args.steps + 2064) // 32 + 2)
    flags = {
        "model.name": "toy", "model.block_size": 32, "model.num_blocks_override": num_blocks, "model.max_len": 16384,
        "decode.max_num_seqs": batch, "prefill.replicas": 0, "scheduler.disaggregation_threshold": 0,
    }  # fmt: skip
    made = LocalCluster(load(flags=flags, env={}).config, dataclasses.replace(load_model("toy"), model=model))
    await made.start()
    try:
        for loop in made._loops:
            loop.cancel()
        (worker,) = made.workers
        assert isinstance(worker, DecodeWorker)
        gateway = SimpleNamespace(is_closed=False, send=encode, name="gateway")
        for i in range(batch):
            wanted = Request(
                request_id=f"{i:024x}",
                model="toy",
                prompt_token_ids=tuple((7 * i + k) % 500 + 5 for k in range(args.context)),
                sampling=SamplingParams(temperature=args.temperature, max_tokens=args.steps + 1000, ignore_eos=True, seed=i),
            )
            ref = WorkerRef(worker.settings.incarnation, "decode", "d:1")
            await worker.handle(gateway, Reserve(Ticket(wanted.request_id, 1, ref, None), wanted))  # type: ignore[arg-type]
        while any(sequence.output_len == 0 for sequence in worker._sequences.running):
            await worker.step()
        return await _steps(worker, model, args)
    finally:
        await made.close()


async def _steps(worker: DecodeWorker, model: FreeModel, args: argparse.Namespace) -> dict[str, float]:
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*given)
            finally:
                spent[name] += time.perf_counter() - started

        return call

    worker._plan, worker._emit = timed("plan", worker._plan), timed("emit", worker._emit)  # type: ignore[method-assign]
    worker.runner.run = timed("runner", worker.runner.run)  # type: ignore[method-assign]
    untimed, engine.runner.sample = engine.runner.sample, timed("sampler", engine.runner.sample)
    profiler = None
    if args.profile is not None:
        import cProfile

        profiler = cProfile.Profile()
    samples: dict[str, list[float]] = defaultdict(list)
    try:
        for number in range(20 + args.steps):
            spent.clear()
            model.seconds = 0.0
            if profiler is not None and number == 20:
                profiler.enable()
            started = time.perf_counter()
            await worker.step()
            seconds = time.perf_counter() - started - model.seconds
            if number >= 20:
                samples["step"].append(seconds)
                for name in ("plan", "runner", "sampler", "emit"):
                    samples[name].append(spent[name] - (model.seconds if name == "runner" else 0.0))
    finally:
        engine.runner.sample = untimed
    if profiler is not None:
        profiler.disable()
        profiler.dump_stats(args.profile)
    found = {f"{name}_us": 1e6 * statistics.median(values) for name, values in samples.items()}
    return {**found, "min_us": 1e6 * min(samples["step"]), "p90_us": 1e6 * sorted(samples["step"])[int(0.9 * args.steps)]}
