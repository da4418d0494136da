"""Three minutes of a shared cluster: `make demo`. Three tenants, a live trace, a flood, a killed worker; no GPU.

It starts `tandem serve toy` with one prefill and two decode workers, plays three tenants against it, lets one of them flood
the queue, kills a decode worker with SIGKILL, and ends by itself. Open the address that it prints: all of it is seen there.

The toy model's next token is a hash of every byte of KV that it reads, so each answer can be held against what it must be:
one wrong byte, or a block of another request, would change it. "0 wrong" in the summary means all of them were compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from tqdm import tqdm

from bench.client import Client, Sample
from bench.load import Lengths, gaps
from configs.tenants import hash_key
from models.toy import toy_answer

ROOT = Path(__file__).resolve().parents[1]
VICTIM = "decode:1"
START_S = 180.0


class Tenant(NamedTuple):
    """Requests per second in calm weather, and what they look like."""

    name: str
    says: str
    rate: float
    prompt: Lengths
    output: Lengths


TENANTS = (
    Tenant("acme", "a chat: short questions, answers of a paragraph", 1.2, Lengths(24, 90), Lengths(200, 500)),
    Tenant("globex", "documents: long prompts, short answers", 0.6, Lengths(250, 600), Lengths(100, 300)),
    Tenant("initech", "a batch job, well behaved until it is not", 0.5, Lengths(60, 200), Lengths(250, 600)),
)
FLOOD = 50.0  # times as many, from the third tenant
QUEUE = 24  # requests; what comes beyond is refused, with the reason
TENANT_CLASSES = {"acme": "interactive", "globex": "standard", "initech": "batch"}
CLASSES = """classes:
  interactive: {ttft_s: 2, tpot_s: 0.2, band: 0, when_late: queue}
  standard: {ttft_s: 4, tpot_s: 0.3, band: 1, when_late: queue}
  batch: {ttft_s: 60, tpot_s: 1, attainment: 0.9, band: 2, when_late: queue}
"""


class Asked(NamedTuple):
    prompt: list[int]
    max_tokens: int
    sample: Sample


def main(argv: list[str] | None = None) -> int:
    """-> 0 when no stream was cut and no token was wrong."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180.0, help="length of the show (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="default: one that is free")
    parser.add_argument("--rate", type=float, default=1.0, help="all tenants, so many times as busy")
    parser.add_argument(
        "--linger", type=float, default=0.0, metavar="S", help="afterwards the cluster stays so long, to be looked at"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the summary here, too")
    args = parser.parse_args(argv)
    port = args.port or _free_port()
    keys = {tenant.name: f"sk-{tenant.name}-{secrets.token_hex(6)}" for tenant in TENANTS}
    operator = f"sk-operator-{secrets.token_hex(6)}"
    with tempfile.TemporaryDirectory(prefix="tandem-demo-") as folder:
        server = _start(port, operator, _write_tenants(Path(folder), keys), Path(folder) / "serve.log")
        try:
            _wait(server, port, Path(folder) / "serve.log")
            say(f"dashboard   http://127.0.0.1:{port}/dashboard#key={operator}")
            for tenant in TENANTS:
                say(f"{tenant.name:<11} {tenant.says}")
            asked, killed = asyncio.run(_show(args, port, operator, keys))
            summary = _summary(asked, killed, port, operator)
            if args.linger:
                say(f"lingering   the cluster stays for {args.linger:g} s; Ctrl-C ends it")
                time.sleep(args.linger)
        except KeyboardInterrupt:
            say("stopped     by hand")
            return 130
        finally:
            _stop(server)
    if args.json:
        args.json.write_text(json.dumps(summary, indent=1))
    return 0 if summary["wrong"] == 0 and summary["cut"] == 0 else 1


STARTED = time.monotonic()


def say(text: str) -> None:
    tqdm.write(f"{time.monotonic() - STARTED:6.1f} s  {text}")
    sys.stdout.flush()


# ---- the cluster -----------------------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _write_tenants(folder: Path, keys: dict[str, str]) -> Path:
    """Classes and tenants; the keys themselves stand nowhere."""
    rows = [
        f"  {name}: {{api_keys: [{hash_key(key)}], class: {TENANT_CLASSES[name]}, price: {{input: 0.2, output: 0.8}}}}"
        for name, key in keys.items()
    ]
    path = folder / "tenants.yaml"
    path.write_text(CLASSES + "\n".join(["tenants:", *rows]) + "\n")
    return path


def _start(port: int, operator: str, tenants: Path, log: Path) -> subprocess.Popen[bytes]:
    """The operator's key goes through the environment, where `ps` cannot see it."""
    env = {**os.environ, "TANDEM_GATEWAY_API_KEY": operator}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    words = ["serve", "toy", "--prefill", "1", "--decode", "2", "--max-num-seqs", "8", "--port", str(port)]
    words += ["--kv-cache-memory-bytes", "32MiB", "--set", f"scheduler.max_queue_requests={QUEUE}"]
    words += ["--tenants", str(tenants)]
    say("starting    one prefill worker, two decode workers (tandem serve toy)")
    with log.open("wb") as out:
        command = [sys.executable, "-m", "cluster", *words]
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)


def _wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_S
    with tqdm(desc="starting", bar_format="{desc} {elapsed}", delay=2, disable=None, leave=False) as bar:
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    return
            except OSError:
                bar.update()
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the cluster does not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Ctrl-C, and its own processes if that is not enough."""
    children = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
    for child in children:
        if child.is_running():
            child.kill()


def _get(port: int, path: str, key: str) -> str:
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(asked, timeout=15) as answer:
        return str(answer.read().decode())


# ---- the show --------------------------------------------------------------------------------------------------------


async def _show(args: argparse.Namespace, port: int, operator: str, keys: dict[str, str]) -> tuple[list[Asked], dict[str, float]]:
    """Every tenant's requests until the end; in between the flood and the kill."""
    client = Client(f"http://127.0.0.1:{port}", keys, timeout_s=300.0)
    end, asked, running = args.seconds, [], set()
    flood = (0.30 * end, 0.62 * end)
    killed: dict[str, float] = {}

    async def one(item: Asked) -> None:
        body = {"model": "toy", "prompt": item.prompt, "max_tokens": item.max_tokens, "temperature": 0.0, "ignore_eos": True}
        await client.complete(item.sample, {**body, "return_token_ids": True})

    async def play(tenant: Tenant, number: int) -> None:
        rng = random.Random(f"{args.seed} {tenant.name}")
        waits = gaps(1.0, 1.0, 1, rng)
        at = 0.0
        while True:
            floods = tenant is TENANTS[-1] and flood[0] < at < flood[1]
            at += next(waits) / (args.rate * tenant.rate * (FLOOD if floods else 1.0))
            if at >= end:
                return
            await asyncio.sleep(max(0.0, at - client.now()))
            prompt = [rng.randrange(10, 500) for _ in range(tenant.prompt.draw(rng))]
            item = Asked(prompt, tenant.output.draw(rng), Sample(tenant.name, at, request_id=f"{tenant.name}-{len(asked)}"))
            asked.append(item)
            task = asyncio.create_task(one(item))
            running.add(task)
            task.add_done_callback(running.discard)

    async def narrate() -> None:
        for at, act in (
            (flood[0], lambda: say(f"flood       {TENANTS[-1].name} sends {FLOOD:g} times as much; the queue holds {QUEUE}")),
            (0.46 * end, lambda: killed.update(_kill(port, operator))),
            (flood[1], lambda: say("calm        the flood is over")),
        ):
            await asyncio.sleep(max(0.0, at - client.now()))
            await asyncio.to_thread(act)
            if at == 0.46 * end:
                asyncio.get_running_loop().create_task(_until_back(port, operator, killed))

    async def clock() -> None:
        with tqdm(total=round(end), desc="the show", unit="s", delay=2, disable=None, leave=False, colour=_colour()) as bar:
            while (now := client.now()) < end:
                done = sum(item.sample.outcome == "ok" for item in asked)
                bar.set_postfix_str(f"{done} delivered, {len(running)} running", refresh=False)
                bar.update(min(round(now), round(end)) - bar.n)
                await asyncio.sleep(0.5)

    client.origin = time.perf_counter()
    await asyncio.gather(*(play(tenant, i) for i, tenant in enumerate(TENANTS)), narrate(), clock())
    say(f"ending      {len(running)} streams run to their end")
    await asyncio.gather(*running)
    return asked, killed


def _colour() -> str | None:
    return None if os.environ.get("NO_COLOR") else "blue"


def _kill(port: int, operator: str) -> dict[str, float]:
    workers = json.loads(_get(port, "/dashboard/data", operator))["status"]["workers"]
    victim = next(worker for worker in workers if worker["name"] == VICTIM and worker["alive"])
    say(f"killing     {VICTIM} (process {victim['pid']}) with SIGKILL, {victim['stats']['num_running']} streams on it")
    os.kill(victim["pid"], signal.SIGKILL)
    return {"at": time.monotonic(), "pid": victim["pid"]}


async def _until_back(port: int, operator: str, killed: dict[str, float]) -> None:
    while True:
        await asyncio.sleep(0.5)
        try:
            status = json.loads(await asyncio.to_thread(_get, port, "/dashboard/data", operator))["status"]
        except (OSError, ValueError):
            continue
        if any(w["name"] == VICTIM and w["alive"] and w["pid"] != killed["pid"] for w in status.get("workers", ())):
            killed["back_s"] = time.monotonic() - killed["at"]
            say(f"back        {VICTIM} serves again, {killed['back_s']:.1f} s after it was killed")
            return


# ---- the summary -----------------------------------------------------------------------------------------------------


def _summary(asked: list[Asked], killed: dict[str, float], port: int, operator: str) -> dict[str, Any]:
    """Counts, every answer compared, and the report as the server gives it."""
    report = _get(port, "/admin/sla?format=md&window=600", operator)
    delivered = [item for item in asked if item.sample.outcome == "ok"]
    wrong: list[str] = []
    for item in tqdm(delivered, desc="comparing every token", delay=2, disable=None, leave=False, colour=_colour()):
        got, right = item.sample.token_ids, toy_answer(item.prompt, item.max_tokens)
        if got != right:
            at = next((i for i, pair in enumerate(zip(got, right, strict=False)) if pair[0] != pair[1]), min(len(got), len(right)))
            resumptions = item.sample.metrics.get("resumptions")
            wrong.append(f"{item.sample.request_id}: {len(got)} tokens of {len(right)}, differs at {at}, {resumptions} resumptions")
    outcomes = Counter(item.sample.outcome for item in asked)
    refused = Counter(item.sample.tenant for item in asked if item.sample.outcome == "refused")
    reasons = Counter(item.sample.reason for item in asked if item.sample.outcome != "ok")
    resumed = sum(bool(item.sample.metrics.get("resumptions")) for item in delivered)
    tokens = sum(len(item.sample.token_ids) for item in delivered)
    print(f"\n  streams delivered   {len(delivered)} of {len(asked)} asked for, {tokens} tokens")
    print(f"  streams resumed     {resumed}" + (f"; {VICTIM} back after {killed['back_s']:.1f} s" if "back_s" in killed else ""))
    print(f"  refused in time     {outcomes['refused']}" + "".join(f", {name} {n}" for name, n in refused.most_common()))
    print(f"  cut                 {outcomes['failed']}")
    print(f"  wrong               {len(wrong)} (every token of every delivered stream was compared)\n")
    cut = [f"{item.sample.request_id}: {item.sample.reason}" for item in asked if item.sample.outcome == "failed"]
    for line in (wrong + cut)[:10]:
        print(f"  {line}")
    for reason, number in reasons.most_common(5):
        print(f"  {number} x {reason}")
    print(f"\n{report}")
    return {
        "asked": len(asked), "delivered": len(delivered), "resumed": resumed, "refused": dict(refused), "cut": outcomes["failed"],
        "wrong": len(wrong), "tokens": tokens, "back_s": killed.get("back_s"), "report": report,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
