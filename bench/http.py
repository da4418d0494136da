"""Four serving workloads against any OpenAI-compatible server, as a client sees them: throughput, TTFT, TPOT, inter-token latency.

    one stream        256 prompt tokens, 128 output tokens, concurrency 1
    mixed             512 / 64, concurrency 8: prefills arrive while others decode
    prefill-heavy     1024 / 16, concurrency 4
    decode-heavy      128 / 128, concurrency 16

Prompts are random token ids with a fixed seed, outputs run to their full length (ignore_eos). One process, asyncio, raw HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
import urllib.request
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Workload(NamedTuple):
    name: str
    prompt_len: int
    output_len: int
    num_requests: int
    concurrency: int


WORKLOADS = (
    Workload("one stream", 256, 128, 4, 1),
    Workload("mixed", 512, 64, 32, 8),
    Workload("prefill-heavy", 1024, 16, 16, 4),
    Workload("decode-heavy", 128, 128, 48, 16),
)


class Timeline(NamedTuple):
    """Seconds. ttft: sent to first token; gaps: between tokens; num_tokens: as the server's usage says."""

    ttft: float
    gaps: list[float]
    num_tokens: int
    cached_tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one workload by name")
    parser.add_argument("--vocab", type=int, default=2000, help="prompt token ids are below this")


def run(args: argparse.Namespace) -> dict[str, Any]:
    with urllib.request.urlopen(f"{args.url}/v1/models", timeout=10) as answer:
        model = json.loads(answer.read())["data"][0]["id"]
    rows = {}
    print(f"{'workload':<14} {'out tok/s':>9} {'TTFT p50':>9} {'TPOT p50':>9} {'ITL p50':>8} {'ITL p99':>8}   (ms)")
    for workload in WORKLOADS:
        if args.only and workload.name != args.only:
            continue
        rows[workload.name] = row = asyncio.run(_measure(args.url, model, workload, args.seed, args.vocab))
        print(
            f"{workload.name:<14} {row['output_tokens_per_s']:9.1f} {row['ttft_p50_ms']:9.0f} {row['tpot_p50_ms']:9.1f} "
            f"{row['itl_p50_ms']:8.1f} {row['itl_p99_ms']:8.1f}",
            flush=True,
        )
    return {"url": args.url, "model": model, "seed": args.seed, "workloads": rows}


async def _measure(url: str, model: str, workload: Workload, seed: int, vocab: int) -> dict[str, Any]:
    rng = random.Random(f"{seed} {workload.name}")
    prompts = [[rng.randrange(10, vocab) for _ in range(workload.prompt_len)] for _ in range(workload.num_requests)]
    gate = asyncio.Semaphore(workload.concurrency)

    async def one(prompt: list[int]) -> Timeline:
        async with gate:
            return await _stream(url, {"model": model, "prompt": prompt, "max_tokens": workload.output_len})

    started = time.perf_counter()
    timelines = await asyncio.gather(*(one(prompt) for prompt in prompts))
    elapsed = time.perf_counter() - started
    gaps = [gap for timeline in timelines for gap in timeline.gaps]
    tpots = [sum(t.gaps) / (t.num_tokens - 1) for t in timelines if t.num_tokens > 1]
    return {
        "output_tokens_per_s": sum(t.num_tokens for t in timelines) / elapsed,
        "ttft_p50_ms": 1e3 * statistics.median(t.ttft for t in timelines),
        "tpot_p50_ms": 1e3 * statistics.median(tpots),
        "itl_p50_ms": 1e3 * statistics.median(gaps),
        "itl_p99_ms": 1e3 * sorted(gaps)[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        "elapsed_s": elapsed,
        "samples": [timeline._asdict() for timeline in timelines],
    }


async def _stream(url: str, asked: dict[str, Any]) -> Timeline:
    extra = {"stream": True, "ignore_eos": True, "temperature": 0.0, "stream_options": {"include_usage": True}}
    body = json.dumps({**asked, **extra}).encode()
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    sent = time.perf_counter()
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    times: list[float] = []
    usage: dict[str, Any] = {}
    async for line in reader:
        if line.startswith(b"HTTP/") and b" 200 " not in line:
            raise SystemExit(f"{line.decode().strip()}: {(await reader.read()).decode()[-300:]}")
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise SystemExit(f"the stream failed: {event['error']}")
        if event["choices"]:
            times.append(time.perf_counter())
        usage = event.get("usage") or usage
    writer.close()
    details = usage.get("prompt_tokens_details") or {}
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    return Timeline(times[0] - sent, gaps, usage["completion_tokens"], details.get("cached_tokens") or 0)
