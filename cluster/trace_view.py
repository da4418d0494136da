"""`tandem trace`: one request's timeline as a waterfall in text, and why the scheduler placed it where it did.

Asks a running gateway over HTTP; called by `cli.py`. No Ray, no torch.
"""

from __future__ import annotations

from typing import Any

from cluster.cluster_status import show_request
from cluster.explain import told
from cluster.terminal import Paint, ms, table
from protocol.timeline import Mark, phases

BAR_WIDTH = 48
RUNNING = ("queued", "prefill", "transfer", "decode")
COLOUR_OF = {
    "intake": "dim",
    "queue": "yellow",
    "reserve": "dim",
    "wait": "yellow",
    "prefill": "blue",
    "transfer": "magenta",
    "decode": "green",
}


def show(url: str, api_key: str | None, request_id: str, as_json: bool) -> int:
    """Print it. Raises TandemError when there is nobody, or no such request."""
    return show_request(url, api_key, request_id, as_json, "dashboard/requests", lines)


def lines(found: dict[str, Any], paint: Paint) -> list[str]:
    """found: what /dashboard/requests/{id} answers."""
    row = found["request"]
    out = [f"request {row['id']}  " + paint(row.get("state", ""), "bold", _state_colour(row.get("state", "")))]
    if row.get("client_id"):
        out.append(f"  client's id   {row['client_id']}")
    if "tenant" in row:
        out.append(f"  tenant        {row['tenant']}, class {row['class']}, model {row['model']}")
    workers = [worker for worker in (row.get("prefill_worker"), row.get("decode_worker")) if worker]
    if workers:
        path = " → ".join(dict.fromkeys(workers))
        resumed = f", resumed {row['resumptions']}x" if row.get("resumptions") else ""
        out.append(f"  workers       {path}{resumed}")
    if row.get("prompt_tokens"):
        out.append(f"  tokens        {row['prompt_tokens']} in ({row['cached_tokens']} cached), {row['output_tokens']} out")
    if row.get("ttft_ms") is not None:
        out.append(f"  times         TTFT {ms(row['ttft_ms'])}, TPOT {ms(row['tpot_ms'])}, end to end {ms(row['e2e_ms'])}")
    if row.get("failure"):
        out.append(paint(f"  failure       {row['failure']}", "red"))
    marks = [Mark(m["at_ms"] / 1e3, m["name"], m["worker"], m["detail"]) for m in found["timeline"]]
    out += ["", *waterfall(marks, row.get("state", ""), paint), "", *_marks(marks, paint)]
    return out + (["", *_why(found["why"])] if found.get("why") else [])


def waterfall(marks: list[Mark], state: str, paint: Paint) -> list[str]:
    """One line per phase, drawn to scale."""
    bars = phases(marks, state if state not in RUNNING else "finished")
    if not bars:
        return ["no marks: gateway.timelines is off, or the request has not begun"]
    whole = max(bars[-1].end_s, 1e-9)
    rows = []
    for phase in bars:
        start = min(BAR_WIDTH - 1, int(phase.start_s / whole * BAR_WIDTH))
        length = max(1, min(BAR_WIDTH - start, round((phase.end_s - phase.start_s) / whole * BAR_WIDTH)))
        colour = "red" if phase.is_lost else COLOUR_OF[phase.name]
        drawn = " " * start + paint(("▒" if phase.is_lost else "█") * length, colour) + " " * (BAR_WIDTH - start - length)
        took = f"{1e3 * (phase.end_s - phase.start_s):10.1f} ms"
        rows.append((phase.name, f"│{drawn}│", took, (phase.worker or "") + (" lost" if phase.is_lost else "")))
    return table(rows)


def _marks(marks: list[Mark], paint: Paint) -> list[str]:
    rows = [(f"{1e3 * m.at_s:10.1f} ms", m.name, m.worker or "", paint(m.detail or "", "dim")) for m in marks]
    return table(rows) if rows else []


def _why(why: dict[str, Any]) -> list[str]:
    out = []
    if why.get("predicted_ttft_ms") is not None:
        actual = why.get("actual_ttft_ms")
        was = f", was {ms(actual)}" if actual is not None else ""
        expected = (
            f"; {why['cached_tokens']} prompt tokens expected in a cache; {why['expected_output_tokens']} output tokens expected"
        )
        out.append(f"why there: TTFT predicted {ms(why['predicted_ttft_ms'])}{was}{expected}")
    for step in why.get("steps") or ():
        out.append(f"{1e3 * step['at_s']:10.1f} ms  {told(step)}")
    if not why.get("candidates"):
        return out
    rows = [("", "worker", "state", "prefill queue", "decoding", "context tokens", "free blocks")]
    for worker in why["candidates"]:
        rows.append(
            (
                "→" if worker["chosen"] else "",
                worker["worker"],
                worker["state"],
                ms(worker["prefill_queue_ms"]),
                str(worker["decoding"]),
                str(worker["context_tokens"]),
                str(worker["blocks_free"]),
            )
        )
    return out + table(rows)


def _state_colour(state: str) -> str:
    return {"finished": "green", "failed": "red", "refused": "yellow", "cancelled": "yellow"}.get(state, "cyan")
