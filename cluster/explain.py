"""One decision of the scheduler in words: what came in, what was promised, who could have had it, the choice, what came true.

`explained` makes the document of GET /admin/decisions/{id} from what `Scheduler.explain` remembers and the history's row of the
same request; `show` is `tandem explain`. Its fields:

    id          of the request; request: what came in (client_id model tenant class priority prompt_tokens max_tokens ...)
    promise     ttft_s tpot_s: its class's, or its own where it asked for tighter ones
    steps       at_s (since it came), what, and the details of each
    candidates  worker role queue_s ttft_s tpot_s (predicted, seconds; None: does not apply) cached (prompt tokens) load (sequences)
                why_not ("": it could have had it)
    came_true   None while nothing did
    result      the row of /dashboard/requests, None when it is not remembered there
    words       the same as sentences
"""

from __future__ import annotations

from typing import Any

from cluster.cluster_status import show_request
from cluster.terminal import Paint, table

MAX_SHOWN = 64  # workers of a table
MAX_SEEN = 8  # of them in the list of requests


def show(url: str, api_key: str | None, request_id: str, as_json: bool) -> int:
    """Print it. Raises TandemError when there is nobody, or no such request."""
    return show_request(url, api_key, request_id, as_json, "admin/decisions", lines)


def explained(request_id: str, decision: dict[str, Any], row: dict[str, Any] | None) -> dict[str, Any]:
    """The document. row: of the history."""
    document = {"id": request_id, **{name: value for name, value in decision.items() if name != "request_id"}, "result": row}
    return {**document, "words": words(document)}


def why_of(decision: dict[str, Any], chosen: set[str | None]) -> dict[str, Any]:
    """What the list of requests shows of it beside the history's own: promise, steps, and whom the scheduler looked at."""
    seen = [
        {
            "worker": one["worker"],
            "role": one["role"],
            "chosen": one["worker"] in chosen,
            **{f"{name}_ms": _ms(one[f"{name}_s"]) for name in ("queue", "ttft", "tpot")},
            "cached_tokens": one["cached"],
            "running": one["load"],
            "why_not": one["why_not"],
        }
        for one in decision["candidates"][:MAX_SEEN]
    ]
    steps = [step for step in decision["steps"] if step["what"] != "placed"]
    return {"promise": decision["promise"], **({"seen": seen} if seen else {}), **({"steps": steps} if steps else {})}


def lines(found: dict[str, Any], paint: Paint) -> list[str]:
    """For a terminal: the sentences, and the candidates as a table."""
    said = found.get("words") or []
    out = [paint(said[0], "bold"), *(f"  {line}" for line in said[1:])] if said else []
    candidates = found.get("candidates") or []
    if not candidates:
        return out
    chosen = _chosen(found)
    rows: list[tuple[str, ...]] = [
        tuple(paint(name, "dim") for name in ("", "worker", "queue", "TTFT", "TPOT", "cached", "running", "why not"))
    ]
    for one in candidates[:MAX_SHOWN]:
        mark = "→" if one.get("worker") in chosen else ""
        times = tuple(_seconds(one.get(name)) for name in ("queue_s", "ttft_s", "tpot_s"))
        rows.append(
            (mark, str(one.get("worker")), *times, str(one.get("cached", 0)), str(one.get("load", 0)), one.get("why_not") or "")
        )
    more = len(candidates) - MAX_SHOWN
    return [*out, "", paint("who could have had it (predicted)", "bold"), *table(rows), *([f"and {more} more"] if more > 0 else [])]


def words(found: dict[str, Any]) -> list[str]:
    """Sentences, the first of them a title."""
    asked, promise = found.get("request") or {}, found.get("promise") or {}
    client = f" ({asked['client_id']})" if asked.get("client_id") else ""
    out = [f"request {found['id']}{client}"]
    retry = ", refused before" if asked.get("is_retry") else ""
    out.append(
        f"tenant {asked.get('tenant')}, class {asked.get('class')}, model {asked.get('model')}, "
        f"priority {asked.get('priority', 0)}: {asked.get('prompt_tokens')} prompt tokens, "
        f"at most {asked.get('max_tokens')} out{retry}"
    )
    if promise.get("ttft_s") is not None:
        out.append(
            f"promised: first token within {_seconds(promise['ttft_s'])}, each further one {_seconds(promise.get('tpot_s'))}"
        )
    for step in found.get("steps") or ():
        out.append(f"after {_seconds(step.get('at_s', 0.0))}: {told(step)}")
    possible = [one for one in found.get("candidates") or () if not one.get("why_not")]
    if found.get("candidates"):
        out.append(f"{len(possible)} of {len(found['candidates'])} workers that were looked at could have had it")
    return out + _truth(found)


def told(step: dict[str, Any]) -> str:
    """A step in words: `what`, and those of its details that say something."""
    details = [
        f"{name.removesuffix('_s').replace('_', ' ')} {_seconds(value) if name.endswith('_s') else _plain(value)}"
        for name, value in step.items()
        if name not in ("at_s", "what") and value not in (None, "", [], ())
    ]
    return str(step.get("what", "")).replace("_", " ") + (": " + ", ".join(details) if details else "")


def _truth(found: dict[str, Any]) -> list[str]:
    true, row = found.get("came_true") or {}, found.get("result") or {}
    out = []
    predicted = next((step["ttft_s"] for step in reversed(found.get("steps") or []) if step.get("ttft_s") is not None), None)
    if true.get("placed_to_first_token_s") is not None:
        before = f", predicted {_seconds(predicted)}" if predicted is not None else ""
        out.append(f"came true: first token {_seconds(true['placed_to_first_token_s'])} after its placement{before}")
    if true.get("kind"):
        ttft, tpot = _seconds(true.get("ttft_s")), _seconds(true.get("tpot_s"))
        out.append(
            f"{true['kind']}: {true.get('output_tokens')} tokens out, {true.get('cached_tokens')} of the prompt from a cache, "
            f"queued {_seconds(true.get('queue_s'))}, TTFT {ttft}, TPOT {tpot}; {_kept(found, true)}"
        )
    elif row.get("state"):
        out.append(f"now: {row['state']}" + (f" ({row['failure']})" if row.get("failure") else ""))
    return out


def _kept(found: dict[str, Any], true: dict[str, Any]) -> str:
    promise = found.get("promise") or {}
    if true["kind"] != "finished" or promise.get("ttft_s") is None:
        return "nothing to hold against the promise"
    broken = [
        f"{name.upper()} was {_seconds(true[f'{name}_s'])} instead of {_seconds(promise[f'{name}_s'])}"
        for name in ("ttft", "tpot")
        if (promise.get(f"{name}_s") or 0) and (true.get(f"{name}_s") or 0.0) > promise[f"{name}_s"]
    ]
    return "the promise was not kept: " + ", ".join(broken) if broken else "the promise was kept"


def _chosen(found: dict[str, Any]) -> set[str]:
    row = found.get("result") or {}
    named = {row.get("prefill_worker"), row.get("decode_worker")}
    for step in found.get("steps") or ():
        named |= {step.get("prefill"), step.get("decode")}
    return {name for name in named if isinstance(name, str)}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{1e3 * value:.1f} ms" if abs(value) < 1 else f"{value:.2f} s"
