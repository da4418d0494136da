"""What speculation adds where text repeats, what it costs where it does not, and how often a draft model is right.

Everything in one process, with and without speculation in turns on the same weights. The target is the bundled model or, by
default, the same one stretched to the cost of a 100-million-parameter Llama (bench/stretched.py), which a draft model needs to be
of any use. Workloads: `copy`, source text that the prompt holds before, greedy; `free`, sampled at temperature 1, where next to
nothing repeats; `draft`, the bundled model as the draft of a stretched target with noise on its weights.

    python -m bench speculation                 a quarter of an hour on one core
    python -m bench speculation --rounds 1 --only copy
    python -m bench speculation --only coupling     acceptance by equal random numbers against rejection sampling, no timing
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import inspect
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

WORKLOADS = ("copy", "free", "draft", "coupling")
NGRAM = {"decode.speculative_method": "ngram"}


class Case(NamedTuple):
    """One row of the table: a workload at one concurrency, with one way of guessing."""

    workload: str
    concurrency: int
    temperature: float
    guess: dict[str, Any]
    label: str
    noise: float = 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=("stretched", "bundled"), default="stretched", help="the target")
    parser.add_argument("--only", choices=WORKLOADS, action="append", help="these workloads; may be repeated")
    parser.add_argument("--rounds", type=int, default=3, help="with and without speculation, in turns; medians are told")
    parser.add_argument("--tokens", type=int, default=128, help="output of each request")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 16])
    parser.add_argument("--longest", type=int, default=4, help="num_speculative_tokens")


def run(args: argparse.Namespace) -> dict[str, Any]:
    wanted = args.only or list(WORKLOADS)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases(args, wanted):
            row = asyncio.run(measure(case, args, Path(scratch)))
            rows.append(row)
            print(line(row), flush=True)
        coupling = couple(Path(scratch)) if "coupling" in wanted else []
    for found in coupling:
        print(
            f"noise {found['noise']:.2f}, T {found['temperature']}: right by rejection sampling {found['rejection']:.3f}, "
            f"by equal random numbers {found['equal_numbers']:.3f}, by a race {found['race']:.3f}, "
            f"the draft's best token {found['best_token']:.3f}"
        )
    return {"model": args.model, "threads": args.threads, "tokens": args.tokens, "rows": rows, "coupling": coupling}


def cases(args: argparse.Namespace, wanted: Sequence[str]) -> list[Case]:
    made = []
    if "copy" in wanted:
        made += [Case("copy", n, 0.0, NGRAM, "ngram") for n in args.concurrency]
    if "free" in wanted:
        made += [Case("free", n, 1.0, NGRAM, "ngram") for n in args.concurrency]
    if "draft" in wanted and args.model == "stretched":
        draft = {"decode.speculative_model": "bundled"}
        for noise in (0.02, 0.1):
            made += [Case("draft", n, t, draft, "draft", noise) for t in (0.0, 1.0) for n in args.concurrency[:2]]
    return made


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['workload']:5} {row['label']:5} noise {row['noise']:.2f} T {row['temperature']:.0f} c{row['concurrency']:<3} "
        f"{row['plain_tok_s']:7.1f} -> {row['tok_s']:7.1f} tok/s ({row['speed_up']:.2f} x)   accepted {row['accepted_len']:.2f} of "
        f"a draft of {row['draft_len']:.2f}, {row['per_step']:.2f} tokens a step, drafts in {row['draft_share']:.0%}   "
        f"same tokens {row['same']:.1%}"
    )


def prompts(tokenizer: Any, case: Case) -> list[list[int]]:
    """Of Python's heapq, which the bundled model knows the manner of."""
    text = inspect.getsource(heapq)
    made = []
    for i in range(case.concurrency):
        begin = 577 * i % 9000
        part = text[begin : begin + 700]
        made.append(tokenizer.encode(f"{part}\n{part}\n{part[:80]}" if case.workload == "copy" else part))
    return made


async def measure(case: Case, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    from cluster.local import LocalCluster
    from configs.load import load
    from models.load import load_model
    from models.locate import locate

    name = "bundled"
    if args.model == "stretched":
        from bench.stretched import stretch

        name = str(stretch(locate("bundled"), scratch / f"target-{case.noise}", case.noise))
    loaded = load_model(name, device="cpu")
    common = {
        "model.name": name, "model.num_blocks_override": 40 * case.concurrency + 64, "prefill.replicas": 0,
        "decode.num_threads": args.threads, "decode.num_speculative_tokens": args.longest,
        "scheduler.disaggregation_threshold": 0, "scheduler.max_deflected_share": 1.0,
    }  # fmt: skip
    made = [LocalCluster(load(flags={**common, **own}, env={}).config, loaded) for own in ({}, case.guess)]
    times: list[list[float]] = [[], []]
    answers: list[list[list[int]]] = [[], []]
    for cluster in made:
        await cluster.start()
    asked = prompts(made[0].tokenizer, case)
    try:
        for cluster in made:  # the prompts' KV, and what there is to learn
            await generate(cluster, asked, case, 16)
        before = made[1].workers[0].stats()
        for _ in range(args.rounds):
            for i, cluster in enumerate(made):
                answers[i], seconds = await generate(cluster, asked, case, args.tokens)
                times[i].append(seconds)
        after = made[1].workers[0].stats()
    finally:
        for cluster in made:
            await cluster.close()
    tokens = case.concurrency * (args.tokens - 1)
    plain, own = (statistics.median(each) for each in times)
    drafts, slots = after.num_drafts - before.num_drafts, after.decode_slots - before.decode_slots
    guessed, accepted = after.draft_tokens - before.draft_tokens, after.accepted_tokens - before.accepted_tokens
    same = [sum(a == b for a, b in zip(x, y, strict=True)) / len(x) for x, y in zip(*answers, strict=True)]
    return {
        "workload": case.workload, "label": case.label, "noise": case.noise, "concurrency": case.concurrency,
        "temperature": case.temperature, "plain_tok_s": tokens / plain, "tok_s": tokens / own, "speed_up": plain / own,
        "ratios": [a / b for a, b in zip(*times, strict=True)], "accepted_len": accepted / max(1, drafts),
        "draft_len": guessed / max(1, drafts), "per_step": (slots + accepted) / max(1, slots),
        "draft_share": drafts / max(1, slots), "same": statistics.mean(same), "seconds": times,
    }  # fmt: skip


async def generate(cluster: Any, asked: list[list[int]], case: Case, num_tokens: int) -> tuple[list[list[int]], float]:
    """All at once. -> the answers, and the seconds from the last first token to the end."""
    from protocol.events import Failed, Tokens
    from protocol.request import Request, SamplingParams

    began: list[float] = []

    async def one(number: int, prompt: list[int]) -> list[int]:
        sampling = SamplingParams(temperature=case.temperature, max_tokens=num_tokens, seed=number, ignore_eos=True)
        request = Request(
            request_id=f"{time.monotonic_ns()}-{number}",
            model=cluster.config.model.name,
            prompt_token_ids=tuple(prompt),
            sampling=sampling,
        )
        tokens: list[int] = []
        async for event in cluster.gateway.generate(request):
            if isinstance(event, Failed):
                raise SystemExit(f"a request failed: {event.failure}")
            if isinstance(event, Tokens):
                if not tokens:
                    began.append(time.perf_counter())
                tokens += event.token_ids
        return tokens

    answers = await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(asked)))
    return list(answers), time.perf_counter() - max(began)


# ---- how often a draft model is right ----------------------------------------------------------------------------------


def couple(scratch: Path) -> list[dict[str, float]]:
    """Chance that a sampled token of the draft is accepted, over the positions of a text: by rejection sampling (one less the
    total variation distance), by inverse CDF of one and the same number in both models, by a race of exponential times that both
    scale by their own probabilities (Daliri et al. 2024), at some positions only, and of the draft's best token."""
    import torch

    from bench.stretched import stretch
    from models.load import load_model
    from models.locate import locate

    torch.set_num_threads(1)
    source = locate("bundled")
    draft = _log_probabilities(load_model("bundled", device="cpu"))
    found = []
    for noise in (0.02, 0.05, 0.1, 0.2):
        target = _log_probabilities(load_model(str(stretch(source, scratch / "coupled", noise)), device="cpu"))
        for temperature in (1.0, 0.7):
            p, q = ((each / temperature).double().softmax(-1) for each in (target, draft))
            ends_p, ends_q = p.cumsum(-1), q.cumsum(-1)
            overlap = torch.minimum(ends_p, ends_q) - torch.maximum(ends_p - p, ends_q - q)
            found.append({
                "noise": noise, "temperature": temperature,
                "rejection": float(torch.minimum(p, q).sum(-1).mean()),
                "equal_numbers": float(overlap.clamp(min=0).sum(-1).mean()),
                "race": _race(p[::20], q[::20]),
                "best_token": float(p.gather(1, q.argmax(-1, keepdim=True)).mean()),
            })  # fmt: skip
    return found


def _race(p: Any, q: Any) -> float:
    """Chance that the same token wins both races, mean over rows: the sum over tokens of 1 / sum_w max(p_w / p_v, q_w / q_v)."""
    import torch

    chances = []
    for mine, theirs in zip(p, q, strict=True):
        likely = torch.nonzero(torch.minimum(mine, theirs) > 1e-5)[:, 0]
        ratios = torch.maximum(mine[None, :] / mine[likely, None], theirs[None, :] / theirs[likely, None])
        chances.append(float((1 / ratios.sum(-1)).sum()))
    return statistics.mean(chances)


def _log_probabilities(loaded: Any) -> Any:
    """float32 [positions, vocab_size] over 700 tokens of Python."""
    import torch

    from api.tokenizer import Tokenizer
    from engine.batch import Chunk, build_batch, plan_step
    from engine.sequence import Sequence
    from models.locate import locate
    from protocol.request import Request, SamplingParams

    tokens = Tokenizer(locate("bundled"), None).encode(inspect.getsource(argparse))[2000:2700]
    layout = loaded.kv_layout(32)
    sequence = Sequence(
        Request(request_id="t", model="", prompt_token_ids=tuple(tokens), sampling=SamplingParams(prompt_logprobs=0))
    )
    sequence.blocks = list(range(layout.num_blocks_for(len(tokens))))
    kv = torch.zeros(layout.num_layers, len(sequence.blocks), 2, layout.num_kv_heads, 32, layout.head_dim)
    step, _ = plan_step([Chunk(sequence, len(tokens), (sequence,))], 32)
    batch = build_batch(step, layout, loaded.device)
    with torch.inference_mode():
        hidden = loaded.model.forward(batch, loaded.model.embed(batch), kv)
        return loaded.model.logits(hidden).log_softmax(-1).clone()
