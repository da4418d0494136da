"""`tandem status`: asks a running gateway over HTTP and prints a small table. Called by `cli.py`; no Ray, no torch."""

from __future__ import annotations

import json
import math
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

from cluster.terminal import Paint, wants_colour
from protocol.errors import NotFound, Overloaded, TandemError, Unauthorized, WorkerLost

TIMEOUT_S = 10.0


def show(url: str, api_key: str | None, as_json: bool) -> int:
    """Print what is there. 0 when it is healthy, 1 when it is not; raises TandemError when there is nobody."""
    url = url.rstrip("/").removesuffix("/v1")
    health, reason = _health(url)
    data = get_json(f"{url}/dashboard/data", api_key)
    if as_json:
        print(json.dumps({"url": url, "healthy": health, "reason": reason, **data}, indent=2))
    else:
        print("\n".join(lines(url, health, reason, data)))
    return 0 if health else 1


def lines(url: str, healthy: bool, reason: str, data: dict[str, Any]) -> list[str]:
    """The table. `data` is what /dashboard/data answers: `status` in it is `scheduler.status.status_of`."""
    status = data.get("status") or {}
    models = ", ".join(data.get("models") or ())
    out = [f"{url}  {'healthy' if healthy else 'not healthy'}  {models}".rstrip()]
    if not healthy or data.get("error"):
        out.append(f"  {data.get('error') or reason or data.get('reason') or 'no reason given'}")
    out += _tenants_file(status.get("tenants_file"))
    if status:
        out += ["", *_workers(status), "", *_requests(status), "", *_latencies(status)]
    return out


def _tenants_file(file: dict[str, Any] | None) -> list[str]:
    if file is None:
        return []
    problem = file.get("problem")
    if problem is None:
        return [f"  tenants: {file['path']}, version {file['version']}"]
    kept = f"version {file['version']} stays in force" if file["version"] else "nothing is in force"
    return [f"  tenants: {file['path']}:{problem['line']}: {problem['reason']}; {kept}"]


def _workers(status: dict[str, Any]) -> list[str]:
    workers = status.get("workers", ())
    rows: list[tuple[str, ...]] = [
        ("worker", "tp x pp", "state", "running", "waiting", "KV blocks in use", "prefix kept", "last token", "heartbeat", "pids")
    ]
    for worker in workers:
        stats, beat = worker.get("stats") or {}, f"{worker['beat_age_s']:.1f} s ago"
        if worker["alive"]:
            age = stats.get("last_token_age_s", -1.0)
            now = (
                str(stats.get("num_running", 0)),
                str(stats.get("num_waiting", 0)),
                f"{stats.get('num_used_blocks', 0)} of {worker['num_blocks']}",
                str(stats.get("num_cached_blocks", 0)),
                f"{age:.1f} s ago" if age >= 0 else "none yet",
            )
        else:
            now = ("-",) * 5  # what a dead worker said last is not true any more
        group, pids = f"{worker['tp']} x {worker['pp']}", " ".join(map(str, worker["rank_pids"]))
        rows.append((worker["name"], group, worker["state"], *now, beat, pids))
    return (_table(rows) if workers else ["no worker has registered yet"]) + _starting(status)


def _starting(status: dict[str, Any]) -> list[str]:
    """Of each name that nobody alive bears, how far its newest life is."""
    alive = {worker["name"] for worker in status.get("workers", ()) if worker["alive"]}
    newest = {phase["name"]: phase for phase in status.get("starting", ())}
    return [
        f"{name}  starting: {phase['phase']} {phase['detail']}".rstrip() + f", {phase['elapsed_s']:.1f} s"
        for name, phase in newest.items()
        if name not in alive and phase["phase"] != "ready"
    ]


def _requests(status: dict[str, Any]) -> list[str]:
    queue, flight, counters = status.get("queue", {}), status.get("in_flight", {}), status.get("counters", {})
    refused = ", ".join(f"{count} {reason}" for reason, count in status.get("rejections", {}).items())
    oldest = f", the oldest for {queue['oldest_s']:.1f} s" if queue.get("requests") else ""
    out = [
        f"now        {flight.get('prefilling', 0)} prefilling, {flight.get('decoding', 0)} decoding, "
        f"{queue.get('requests', 0)} queued ({queue.get('tokens', 0)} tokens{oldest})",
        f"ended      {counters.get('finished', 0)} finished, {counters.get('failed', 0)} failed, "
        f"{counters.get('cancelled', 0)} cancelled, {counters.get('rejected', 0)} refused" + (f" ({refused})" if refused else ""),
    ]
    totals = status.get("totals", {})
    sent, received = totals.get("prefill", {}), totals.get("decode", {})
    out.append(
        f"KV moved   {received.get('transfers', 0)} transfers verified, {received.get('transfer_bytes', 0) / 1e6:.1f} MB; "
        f"failed: {sent.get('transfers_failed', 0)} at the sender, {received.get('transfers_failed', 0)} at the receiver, "
        f"{received.get('digest_failures', 0)} of them by a wrong digest"
    )
    if counters.get("workers_lost") or counters.get("resumed"):
        out.append(f"recovery   workers lost: {counters.get('workers_lost', 0)}, requests resumed: {counters.get('resumed', 0)}")
    return out


def _latencies(status: dict[str, Any]) -> list[str]:
    promise = status.get("promise", {})
    rows: list[tuple[str, ...]] = [("class", "", "p50", "p95", "p99", "promise", "kept")]
    for slo_class, found in status.get("latencies", {}).items():
        for name in ("ttft", "tpot", "e2e"):
            values, kept = found[f"{name}_s"], found["kept"].get(name)
            limit = promise.get(f"{name}_s")
            rows.append(
                (
                    slo_class if name == "ttft" else "",
                    name.upper() if name != "e2e" else "end to end",
                    *(_seconds(values[q]) for q in ("p50", "p95", "p99")),
                    _seconds(limit) if limit is not None else "",
                    _percent(kept) if kept is not None else "",
                )
            )
    window_s = status.get("window_s", 0)
    if len(rows) == 1:
        return [f"no request has finished in the last {window_s:.0f} s"]
    return [f"requests finished in the last {window_s:.0f} s:", *_table(rows)]


def _percent(share: float) -> str:
    """One decimal, never rounded up: 99.96 % is not 100 %."""
    return f"{math.floor(share * 1000) / 10:.1f} %"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _health(url: str) -> tuple[bool, str]:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=TIMEOUT_S):
            return True, ""
    except urllib.error.HTTPError as error:
        return False, _reason(error)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise WorkerLost(f"nobody answers at {url} ({reason}); is it serving? --url names another place") from None


def get_text(url: str, api_key: str | None) -> str:
    """What a gateway answers there. Raises TandemError with a sentence for people."""
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            text: str = answer.read().decode()
            return text
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise Unauthorized(f"{url} wants a key: set TANDEM_GATEWAY_API_KEY, or --api-key") from None
        if error.code == 404:
            raise NotFound(_reason(error)) from None
        raise Overloaded(f"{url} answered {error.code}: {_reason(error)}") from None
    except (OSError, ValueError) as error:
        raise WorkerLost(f"nobody answers at {url} ({getattr(error, 'reason', error)}); --url names another place") from None


def get_json(url: str, api_key: str | None) -> dict[str, Any]:
    """The same, where it is a JSON object."""
    try:
        found = json.loads(get_text(url, api_key))
    except ValueError as error:
        raise TandemError(f"{url} did not answer with its status: {error}") from None
    if not isinstance(found, dict):
        raise TandemError(f"{url} did not answer with its status; is it Tandem that listens there?")
    return found


def show_request(
    url: str, api_key: str | None, request_id: str, as_json: bool, at: str, lines: Callable[[dict[str, Any], Paint], list[str]]
) -> int:
    """Print what is known of one request at the path `at`. Raises TandemError when there is nobody, or no such request."""
    url = url.rstrip("/").removesuffix("/v1")
    found = get_json(f"{url}/{at}/{urllib.parse.quote(request_id, safe='')}", api_key)
    print(json.dumps(found, indent=2) if as_json else "\n".join(lines(found, Paint(wants_colour(sys.stdout)))))
    return 0


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        body = json.loads(error.read(65536))
    except (OSError, ValueError):
        return f"HTTP {error.code}"
    if not isinstance(body, dict):
        return f"HTTP {error.code}"
    inner = body.get("error")
    text = inner.get("message") if isinstance(inner, dict) else body.get("reason") or body.get("status")
    return str(text or f"HTTP {error.code}")
