"""`tandem top`: the dashboard in a terminal: promises, pools, links, curves, events; and `tandem sla report`.

Asks a running gateway over HTTP; called by `cli.py`. Plain ANSI, no Ray, no torch. Without a terminal it prints one picture.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from typing import Any

from cluster.cluster_status import get_json, get_text
from cluster.terminal import Paint, bar, count, cut, seconds, spark, table, wants_colour
from protocol.errors import TandemError

ENTER, LEAVE, HOME, REST = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l", "\x1b[H", "\x1b[0J"
MAX_FAILURES = 30  # in a row, one a period


def report(url: str, api_key: str | None, kind: str, window_s: float) -> int:
    """`tandem sla report`: what /admin/sla says, as it says it."""
    url = url.rstrip("/").removesuffix("/v1")
    print(get_text(f"{url}/admin/sla?format={kind}&window={window_s:g}", api_key).rstrip("\n"))
    return 0


def run(url: str, api_key: str | None, interval_s: float, once: bool) -> int:
    """Until Ctrl-C. Raises TandemError when nobody answers, at the start or for long."""
    url = url.rstrip("/").removesuffix("/v1")
    paint = Paint(wants_colour(sys.stdout))
    data = get_json(f"{url}/dashboard/data", api_key)
    if once or not sys.stdout.isatty():
        print("\n".join(picture(url, data, paint, 120)))
        return 0
    failures = 0
    sys.stdout.write(ENTER)
    try:
        while True:
            size = shutil.get_terminal_size()
            shown = picture(url, data, paint, size.columns)[: size.lines - 1]
            sys.stdout.write(HOME + "".join(f"{cut(line, size.columns)}\x1b[K\n" for line in shown) + REST)
            sys.stdout.flush()
            time.sleep(interval_s)
            try:
                data, failures = get_json(f"{url}/dashboard/data", api_key), 0
            except TandemError as error:
                failures += 1
                if failures >= MAX_FAILURES:
                    raise
                data = {**data, "error": error.message}
    except KeyboardInterrupt:
        return 0
    finally:
        sys.stdout.write(LEAVE)
        sys.stdout.flush()


def picture(url: str, data: dict[str, Any], paint: Paint, width: int) -> list[str]:
    """data: what /dashboard/data answers."""
    healthy = paint("ready", "green") if data["ready"] else paint("not ready", "red")
    out = [f"{paint('Tandem', 'bold')} {data['version']}  {url}  {', '.join(data['models'])}  {healthy}"]
    if data.get("error") or data.get("reason"):
        out.append(paint(f"  {data.get('error') or data.get('reason')}", "red"))
    return [
        *out, "", *_promises(data, paint), "", *_curves(data, paint, width), "", *_pools(data, paint), "", *_events(data, paint)
    ]  # fmt: skip


def _promises(data: dict[str, Any], paint: Paint) -> list[str]:
    rows: list[tuple[str, ...]] = [
        tuple(
            paint(name, "dim")
            for name in (
                "tenant",
                "class",
                "kept",
                "budget left",
                "TTFT p50",
                "p95",
                "p99",
                "TPOT p50",
                "p95",
                "p99",
                "goodput",
                "refused",
            )  # fmt: skip
        )
    ]
    for row in data["sla"]["rows"]:
        kept, target = row["attainment"], row["promise"]["attainment"]
        shade = "dim" if kept is None else "green" if kept >= target else "red"
        refused = sum(row["refused"].values())
        rows.append(
            (
                row["tenant"],
                row["class"],
                paint(_percent(kept), shade),
                _percent(row["budget_left"]),
                *(seconds(row["ttft"][q]) for q in ("p50", "p95", "p99")),
                *(seconds(row["tpot"][q]) for q in ("p50", "p95", "p99")),
                f"{row['goodput_per_s']:.2f}/s",
                paint(str(refused), "yellow") if refused else "0",
            )
        )
    title = paint(f"promises, last {data['sla']['window_s']:.0f} s", "bold")
    return [title, *table(rows)] if len(rows) > 1 else [title, "no request yet: send one, and its times stand here"]


def _curves(data: dict[str, Any], paint: Paint, width: int) -> list[str]:
    history = data["series"].get("history") or {}
    room = max(10, min(120, width - 40))
    rows = []
    for name, text, show in (
        ("output_tokens_per_s", "output tokens/s", count),
        ("ttft_p95", "TTFT p95", seconds),
        ("tpot_p95", "TPOT p95", seconds),
        ("queue", "queued", count),
        ("kv_bytes_per_s", "KV bytes/s", count),
    ):
        values = history.get(name) or []
        last = next((v for v in reversed(values) if v is not None), None)
        rows.append((text, show(last), paint(spark(values, room), "cyan")))
    return [paint("the last minutes", "bold"), *table(rows)]


def _pools(data: dict[str, Any], paint: Paint) -> list[str]:
    pools = data["pools"]
    queue = pools["queue"]
    head = ("worker", "state", "group", "running", "waiting", "KV blocks", "", "tokens/s", "steps/s", "last token", "memory")
    rows: list[tuple[str, ...]] = [tuple(paint(name, "dim") for name in head)]
    for w in pools["workers"]:
        used = w["blocks_used"] / max(1, w["blocks_total"])
        state = paint(w["state"], "green" if w["state"] == "ready" else "red" if w["state"] == "lost" else "yellow")
        rows.append(
            (
                w["name"],
                state,
                w["parallel"],
                str(w["running"]),
                str(w["waiting"]),
                bar(used, 10),
                f"{w['blocks_used']}/{w['blocks_total']}",
                count(w["tokens_per_s"]),
                count(w["steps_per_s"]),
                seconds(w["last_token_age_s"]),
                f"{w['rss_bytes'] / 1e6:.0f} MB",
            )
        )
    out = [paint("pools", "bold") + f"  {queue['requests']} queued ({queue['tokens']} tokens)"]
    out += table(rows) if pools["workers"] else ["no worker has registered yet"]
    for link in pools["links"]:
        failed = paint(f", {link['failures']} failed", "red") if link["failures"] else ""
        moved = f"{count(link['bytes_per_s'])}B/s, {link['transfers']} transfers"
        out.append(f"{link['from']} → {link['to']}  {link['transport']}  {moved}{failed}")
    return out


def _events(data: dict[str, Any], paint: Paint) -> list[str]:
    out = [paint("events", "bold")]
    shades = {"worker_lost": "red", "digest_failure": "red", "refused": "yellow", "resumed": "yellow", "worker_up": "green"}
    for event in reversed(data["events"][-8:]):
        at = time.strftime("%H:%M:%S", time.localtime(event["t"]))
        times = f" (x{event['count']})" if event["count"] > 1 else ""
        out.append(f"{paint(at, 'dim')}  {paint(event['kind'], shades.get(event['kind'], 'cyan'))}  {event['text']}{times}")
    return out if len(out) > 1 else [*out, "none yet"]


def _percent(share: float | None) -> str:
    """Never rounded up: 99.96 % is not 100 %."""
    return "-" if share is None else f"{math.floor(share * 1000 + 1e-9) / 10:.1f} %"
