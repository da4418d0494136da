"""A made-up cluster behind the real page: the routes that the dashboard reads, with figures by a seeded clockwork.

For looking at the page (`python tests/browser/fake_cluster.py 8900`), and for tests that need an hour of updates within
seconds: POST /fake {"ticks": N} makes the clock jump N seconds, one event of the stream per second of it.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from api.page import add_page_routes

TENANTS = (("acme", 1.0, 1.1), ("globex", 1.0, 0.8), ("initech", 2.5, 2.4))  # name, how slow, how many
PROMISE = {"ttft_s": 1.0, "tpot_s": 0.1}
START = 1_790_000_000.0
STEP_S = 5
POINTS = 720
TEXT = (
    "The prefill worker reads the whole prompt at once: it is bound by arithmetic. It writes keys and values into blocks, "
    "and each block leaves for the decode worker as soon as its layer is computed. The decode worker checks every block's "
    "digest, and then writes one token after another: it is bound by memory."
)


class FakeCluster:
    """Figures as a function of a counter of seconds. Nothing in it is measured."""

    def __init__(self, seed: int = 1, is_empty: bool = False, key: str = "") -> None:
        self.rng = random.Random(seed)
        self.is_empty = is_empty
        self.key = key
        self.seconds = 0
        self.history: dict[str, list[float | None]] = {"t": []}
        self.events: list[dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.lost: dict[str, int] = {}  # worker -> the second in which it returns
        self.refused = {"tenant_share": 0, "would_time_out": 0}
        self.listeners: set[asyncio.Queue[dict[str, Any]]] = set()
        for name in ("prefill:0", "prefill:1", "decode:0", "decode:1"):
            self.tell("worker_up", f"{name} is serving", worker=name)
        if not is_empty:
            for _ in range(3600):
                self.second()

    @property
    def now(self) -> float:
        return START + self.seconds

    def tell(self, kind: str, text: str, worker: str | None = None, request_id: str | None = None, count: int = 1) -> None:
        self.events.append({"t": self.now, "kind": kind, "text": text, "worker": worker, "request_id": request_id, "count": count})
        del self.events[:-200]

    def load(self) -> float:
        """0 to 1 and beyond, in waves and a flood now and then."""
        wave = 0.55 + 0.2 * math.sin(self.seconds / 240) + 0.08 * math.sin(self.seconds / 31)
        return wave + (0.75 if 380 < (self.seconds % 1300) < 520 else 0.0)

    def second(self) -> dict[str, Any]:
        self.seconds += 1
        if self.is_empty:
            return {}
        load, rng = self.load(), self.rng
        for name, until in list(self.lost.items()):
            if self.seconds >= until:
                del self.lost[name]
                self.tell("worker_up", f"{name} is serving again, 6.2 s after it was lost", worker=name)
        if self.seconds % 1300 == 470:
            self.kill("decode:1")
        if load > 1.15 and self.seconds % 4 == 0:
            self.refused["tenant_share"] += 3
            last = self.events[-1]
            if last["kind"] == "refused":
                last.update(count=last["count"] + 3, t=self.now)
            else:
                self.tell("refused", "initech was refused: over its share of the queue", count=3)
        for _ in range(2):
            self._request(load)
        point = self._point(load, rng)
        if self.seconds % STEP_S == 1 or not self.history["t"]:
            for name, value in point.items():
                self.history.setdefault(name, []).append(value)
                del self.history[name][:-POINTS]
        return point

    def kill(self, name: str) -> None:
        self.lost[name] = self.seconds + 7
        self.tell("worker_lost", f"{name} is gone: no heartbeat for 3.0 s", worker=name)
        self.tell("resumed", "5 streams went on elsewhere; no token was lost", worker=name, count=5)

    def _point(self, load: float, rng: random.Random) -> dict[str, float | None]:
        noise = rng.uniform(0.92, 1.08)
        ttft = 0.16 * noise * math.exp(1.25 * load * load)
        tpot = 0.028 * noise * (1 + 0.7 * load)
        requests = 5.2 * load * noise
        refused = max(0.0, load - 1.1) * 4
        kept = min(1.0, max(0.0, 1.35 - 0.3 * load)) if load > 1 else 1.0 - 0.002 * noise
        return {
            "t": self.now,
            **{"ttft_p50": 0.45 * ttft, "ttft_p95": ttft, "ttft_p99": 1.35 * ttft},
            **{"tpot_p50": 0.8 * tpot, "tpot_p95": tpot, "tpot_p99": 1.2 * tpot},
            "requests_per_s": requests,
            "refused_per_s": refused,
            "failed_per_s": 0.0,
            "goodput_per_s": requests * kept,
            "output_tokens_per_s": 118 * min(load, 1.1) * noise,
            "input_tokens_per_s": 610 * min(load, 1.2) * noise,
            "queue": max(0.0, round(16 * (load - 0.9))),
            "running": round(9 * min(load, 1.3) * noise),
            "kv_used_share": min(0.96, 0.5 * load * noise),
            "kv_bytes_per_s": 2.1e8 * load * noise,
            "attainment": kept,
        }

    def _request(self, load: float) -> None:
        rng, number = self.rng, len(self.requests) and int(self.requests[0]["id"][4:], 16) + 1
        tenant, slow, _ = rng.choices(TENANTS, weights=[one[2] for one in TENANTS])[0]
        queue, prefill = rng.uniform(1, 8) + 500 * max(0.0, load - 0.9) * slow, rng.uniform(40, 420)
        transfer, output = rng.uniform(2, 18), rng.randrange(12, 190)
        decode = output * rng.uniform(24, 42)
        state = rng.choices(["finished", "decode", "prefill", "refused"], weights=[90, 5, 2, 3 if load > 1.1 else 0])[0]
        row = {
            "id": f"req-{number:08x}", "client_id": None, "tenant": tenant, "class": "standard", "model": "bundled",
            "state": state, "received": self.now - rng.random(), "prompt_tokens": rng.randrange(20, 900),
            "cached_tokens": rng.choice([0, 0, 64, 128]), "output_tokens": output, "queue_ms": queue, "prefill_ms": prefill,
            "transfer_ms": transfer, "decode_ms": decode, "ttft_ms": queue + prefill, "tpot_ms": decode / output,
            "e2e_ms": queue + prefill + transfer + decode, "resumptions": int(rng.random() < 0.02),
            "prefill_worker": f"prefill:{rng.randrange(2)}", "decode_worker": f"decode:{rng.randrange(2)}", "failure": None,
        }  # fmt: skip
        if state == "prefill":
            row |= {"transfer_ms": None, "decode_ms": None, "prefill_ms": 0.4 * prefill, "ttft_ms": None, "tpot_ms": None}
        if state == "refused":
            row |= {name: None for name in row if name.endswith("_ms")} | {"failure": "tenant_share", "output_tokens": 0}
        self.requests.insert(0, row)
        del self.requests[100:]

    def worker(self, name: str) -> dict[str, Any]:
        load, role = self.load(), name.split(":")[0]
        is_lost, beat = name in self.lost, 1 + 0.1 * math.sin(self.seconds + len(name))
        running = round((2.4 if role == "prefill" else 6.5) * load * beat)
        return {
            "name": name, "role": role, "state": "lost" if is_lost else "ready", "alive": not is_lost, "incarnation": "a1b2c3",
            "parallel": "1 x 1", "running": 0 if is_lost or self.is_empty else running,
            "waiting": 0 if self.is_empty else max(0, round(7 * (load - 1.0))), "blocks_total": 2048,
            "blocks_used": 0 if self.is_empty else int(2048 * min(0.95, (0.2 if role == "prefill" else 0.55) * load * beat)),
            "blocks_cached": 0 if self.is_empty else 420,
            "tokens_per_s": 0 if self.is_empty else (300 if role == "prefill" else 58) * load * beat,
            "steps_per_s": 22.0, "last_token_age_s": 0.2, "rss_bytes": 612_000_000,
        }  # fmt: skip

    def snapshot(self, with_history: bool = True) -> dict[str, Any]:
        workers = [self.worker(name) for name in ("prefill:0", "prefill:1", "decode:0", "decode:1")]
        links = [
            {
                "from": f"prefill:{i}", "to": f"decode:{j}", "transport": "shm" if i == j else "tcp",
                "bytes_per_s": 0 if self.is_empty else (9e7 if i == j else 2.4e7) * self.load(),
                "transfers": 3 * self.seconds, "failures": 0,
            }
            for i in range(2)
            for j in range(2)
        ]  # fmt: skip
        last = {name: values[-1] for name, values in self.history.items() if values}
        queued = last.get("queue") or 0
        series = {"step_s": STEP_S, **({"history": self.history} if with_history else {"point": {**last, "t": self.now}})}
        return {
            "now": self.now, "version": "0.1.0", "models": ["bundled"], "ready": True, "reason": None, "error": None,
            "promise": PROMISE, "status": {"in_flight": {"total": sum(w["running"] for w in workers)}},
            "sla": {"window_s": 300, "rows": [] if self.is_empty else [self.row(*tenant) for tenant in TENANTS]},
            "pools": {"queue": {"requests": queued, "tokens": 300 * queued}, "workers": workers, "links": links},
            "series": series, "events": self.events,
        }  # fmt: skip

    def row(self, name: str, slow: float, share: float) -> dict[str, Any]:
        load = self.load() * (1 if slow == 1 else 1.15)
        ttft, tpot = 0.16 * math.exp(load * load) * slow**0.7, 0.029 * (1 + 0.7 * load)
        kept = 0.9991 if slow == 1 else max(0.93, 0.997 - 0.03 * max(0.0, load - 0.7))
        total = int(1500 * share)
        return {
            "tenant": name, "class": "standard", "ttft": {"p50": 0.45 * ttft, "p95": ttft, "p99": 1.4 * ttft},
            "tpot": {"p50": 0.8 * tpot, "p95": tpot, "p99": 1.15 * tpot}, "promise": {**PROMISE, "attainment": 0.99},
            "attainment": kept, "budget_left": max(0.0, 1 - (1 - kept) / 0.01), "goodput_per_s": 1.7 * share * kept,
            "requests": total, "finished": total - 4, "failed": 0, "cancelled": 4, "refused": self.refused if slow > 1 else {},
            "tokens": {"input": 390 * total, "cached": 120 * total, "output": 88 * total}, "cost": 0.0031 * total,
        }  # fmt: skip

    def timeline(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        queue, prefill = row["queue_ms"] or 0.5, row["prefill_ms"] or 40.0
        marks: list[tuple[float, str, str | None]] = [(0, "received", None), (0.4, "tokenized", None), (queue, "admitted", None)]
        marks += [(queue + 1.2, "reserved", row["decode_worker"]), (queue + 3, "prefill_start", row["prefill_worker"])]
        at = queue + prefill
        marks += [(at, "prefill_end", row["prefill_worker"]), (at + 0.5, "first_token", row["prefill_worker"])]
        marks += [(at + (row["transfer_ms"] or 5), "transfer_end", row["decode_worker"])]
        step = row["tpot_ms"] or 30.0
        for i in range(1, row["output_tokens"]):
            marks.append((at + i * step, "token", row["decode_worker"]))
        end = at + row["output_tokens"] * step
        if row["resumptions"]:
            marks += [(at + 0.4 * (end - at), "resumed", "decode:0")]
        marks.append((end, "end", None))
        return [{"at_ms": t, "name": name, "worker": worker, "detail": None} for t, name, worker in sorted(marks)]


WHY = {
    "chosen": "prefill:0",
    "policy": "least predicted time to first token",
    "predicted_ttft_s": 0.212,
    "deadline_s": 1.0,
    "candidates": [
        {"worker": "prefill:0", "queue_s": 0.012, "prefill_s": 0.188, "transfer_s": 0.006, "cached_tokens": 128},
        {"worker": "prefill:1", "queue_s": 0.094, "prefill_s": 0.231, "transfer_s": 0.006, "cached_tokens": 0},
    ],
    "decode": {"chosen": "decode:1", "predicted_tpot_s": 0.041, "free_blocks": 1122},
}


def build(fake: FakeCluster, pace_s: float = 1.0) -> FastAPI:
    """The page and its data. The clock ticks once per `pace_s` while somebody listens."""
    app = FastAPI(openapi_url=None)
    add_page_routes(app)

    def is_allowed(http: HttpRequest) -> bool:
        return not fake.key or http.headers.get("authorization") == f"Bearer {fake.key}"

    async def tick() -> None:
        fake.second()
        for queue in fake.listeners:
            queue.put_nowait(fake.snapshot(with_history=False))

    async def clockwork() -> None:
        while True:
            await asyncio.sleep(pace_s)
            await tick()

    @app.get("/dashboard/data")
    async def data(http: HttpRequest) -> Response:
        return JSONResponse(fake.snapshot()) if is_allowed(http) else Response(status_code=401)

    @app.get("/dashboard/live")
    async def live(http: HttpRequest) -> Response:
        if not is_allowed(http):
            return Response(status_code=401)
        if not hasattr(app.state, "clock"):
            app.state.clock = asyncio.create_task(clockwork())

        async def stream() -> AsyncIterator[str]:
            queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
            fake.listeners.add(queue)
            try:
                yield f"event: snapshot\ndata: {json.dumps(fake.snapshot())}\n\n"
                while True:
                    yield f"event: tick\ndata: {json.dumps(await queue.get())}\n\n"
            finally:
                fake.listeners.discard(queue)

        return StreamingResponse(stream(), media_type="text/event-stream")

    @app.get("/dashboard/requests")
    async def requests(tenant: str = "", state: str = "", limit: int = 100) -> Response:
        rows = [r for r in fake.requests if (not tenant or r["tenant"] == tenant) and (not state or r["state"] == state)]
        return JSONResponse({"requests": rows[:limit]})

    @app.get("/dashboard/requests/{name}")
    async def request(name: str) -> Response:
        row = next((r for r in fake.requests if name in (r["id"], r["client_id"])), None)
        if row is None:
            return JSONResponse({"error": {"message": "no such request"}}, 404)
        return JSONResponse({"request": row, "timeline": fake.timeline(row), "why": WHY})

    @app.post("/v1/chat/completions")
    async def chat(http: HttpRequest) -> Response:
        asked = await http.json()
        words = (TEXT.split(" ") * 8)[: min(asked["max_tokens"], 80)]

        async def stream() -> AsyncIterator[str]:
            await asyncio.sleep(0.3)
            for word in words:
                await asyncio.sleep(0.03)
                yield f"data: {json.dumps({'choices': [{'delta': {'content': word + ' '}}]})}\n\n"
            usage = {"prompt_tokens": 21, "completion_tokens": len(words)}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

        name, number = http.headers["x-request-id"], int(fake.requests[0]["id"][4:], 16) + 1
        played = {
            **fake.requests[0],
            "id": f"req-{number:08x}",
            "client_id": name,
            "resumptions": 0,
            "queue_ms": 2.0,
            "prefill_ms": 290.0,
            "tpot_ms": 30.0,
        }
        fake.requests.insert(0, {**played, "output_tokens": len(words), "tenant": "default", "e2e_ms": 300 + 30 * len(words)})
        return StreamingResponse(stream(), media_type="text/event-stream", headers={"x-request-id": name})

    @app.post("/fake")
    async def jump(http: HttpRequest) -> Response:
        asked = await http.json()
        for i in range(asked.get("ticks", 0)):
            await tick()
            if i % 20 == 19:
                await asyncio.sleep(0.01)  # the page reads meanwhile
        if "kill" in asked:
            fake.kill(asked["kill"])
        return JSONResponse({"seconds": fake.seconds})

    return app


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(build(FakeCluster(is_empty="empty" in sys.argv)), port=int(sys.argv[1]), log_level="warning")
