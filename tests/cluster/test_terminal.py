"""`tandem trace`, `tandem top`, `tandem sla report`: what they show, in what width, and without colour where none is wanted."""

from __future__ import annotations

import io
from typing import Any

import pytest

from cluster import cli
from cluster.terminal import Paint, bar, count, cut, ms, spark, table, wants_colour, width_of
from cluster.top import picture
from cluster.trace_view import lines, waterfall
from protocol.timeline import Mark

PLAIN = Paint(False)
MARKS = [
    Mark(0.0, "received"),
    Mark(0.01, "tokenized"),
    Mark(0.03, "admitted"),
    Mark(0.04, "reserved", "decode:0"),
    Mark(0.05, "prefill_start", "prefill:0"),
    Mark(0.15, "prefill_end", "prefill:0"),
    Mark(0.16, "transfer_end", "decode:0", "2.0 ms until verified"),
    Mark(1.0, "end", None, "finished"),
]
WHY = {
    "predicted_ttft_ms": 120.0, "actual_ttft_ms": 150.0, "cached_tokens": 16, "expected_output_tokens": 64,
    "candidates": [
        {"worker": "decode:0", "chosen": True, "state": "ready", "prefill_queue_ms": 0.0, "decoding": 3, "context_tokens": 90,
         "blocks_free": 7},
        {"worker": "decode:1", "chosen": False, "state": "draining", "prefill_queue_ms": 0.0, "decoding": 0, "context_tokens": 0,
         "blocks_free": 9},
    ],
}  # fmt: skip
ROW = {
    "id": "abc", "client_id": "mine", "tenant": "a", "class": "standard", "model": "m", "state": "finished", "prompt_tokens": 30,
    "cached_tokens": 16, "output_tokens": 9, "ttft_ms": 150.0, "tpot_ms": 8.5, "e2e_ms": 1000.0, "resumptions": 0,
    "prefill_worker": "prefill:0", "decode_worker": "decode:0", "failure": None,
}  # fmt: skip


def documents(marks: list[Mark]) -> list[dict[str, Any]]:
    return [{"at_ms": 1e3 * m.at_s, "name": m.name, "worker": m.worker, "detail": m.detail} for m in marks]


# ---- trace -----------------------------------------------------------------------------------------------------------


def test_a_waterfall_is_drawn_to_scale() -> None:
    drawn = waterfall(MARKS, "finished", PLAIN)
    names = [line.split()[0] for line in drawn]
    assert names == ["intake", "queue", "reserve", "wait", "prefill", "transfer", "decode"]
    assert drawn[-1].count("█") == round(0.84 * 48)
    assert drawn[4].index("█") > drawn[3].index("█")
    assert "840.0 ms" in drawn[-1]
    assert "decode:0" in drawn[-1]
    assert len({line.index("│") for line in drawn}) == 1


def test_what_was_lost_looks_lost() -> None:
    drawn = waterfall([*MARKS[:-1], Mark(0.5, "resumed", None, "gone"), Mark(0.9, "end")], "failed", PLAIN)
    assert [("▒" in line, "lost" in line) for line in drawn][-2:] == [(True, True), (True, True)]


def test_a_request_in_words() -> None:
    text = "\n".join(lines({"request": ROW, "timeline": documents(MARKS), "why": WHY}, PLAIN))
    for part in (
        "request abc  finished",
        "mine",
        "prefill:0 → decode:0",
        "30 in (16 cached), 9 out",
        "TTFT 150.0 ms",
        "2.0 ms until verified",
    ):
        assert part in text
    assert "predicted 120.0 ms, was 150.0 ms" in text
    chosen = [line for line in text.splitlines() if line.startswith("→")]
    assert [line.split()[1] for line in chosen] == ["decode:0"]


def test_what_has_no_marks_says_why() -> None:
    text = "\n".join(lines({"request": {"id": "x", "state": "queued"}, "timeline": [], "why": None}, PLAIN))
    assert "gateway.timelines" in text


# ---- top -------------------------------------------------------------------------------------------------------------


def snapshot(**values: Any) -> dict[str, Any]:
    quantiles = {"p50": 0.1, "p95": 0.2, "p99": None}
    row = {
        "tenant": "a", "class": "standard", "ttft": quantiles, "tpot": quantiles, "attainment": 0.9996, "budget_left": 0.5,
        "promise": {"attainment": 0.99}, "goodput_per_s": 1.5, "refused": {"tenant_share": 3},
    }  # fmt: skip
    worker = {
        "name": "decode:0", "state": "ready", "parallel": "1 x 1", "running": 2, "waiting": 0, "blocks_used": 50,
        "blocks_total": 100,
        "tokens_per_s": 12345.0, "steps_per_s": 10.0, "last_token_age_s": 0.1, "rss_bytes": 5e8,
    }  # fmt: skip
    link = {"from": "prefill:0", "to": "decode:0", "transport": "shm", "bytes_per_s": 2e6, "transfers": 4, "failures": 1}
    return {
        "ready": True, "version": "1", "models": ["toy"], "error": None, "reason": None,
        "sla": {"window_s": 300, "rows": [row]},
        "series": {"history": {"t": [1, 2], "output_tokens_per_s": [1.0, 2.0], "ttft_p95": [None, 0.2]}},
        "pools": {"queue": {"requests": 1, "tokens": 20}, "workers": [worker], "links": [link]},
        "events": [{"t": 1e9, "kind": "refused", "text": "tenant a was refused", "count": 3}],
        **values,
    }  # fmt: skip


def test_top_shows_every_part() -> None:
    text = "\n".join(picture("http://x", snapshot(), PLAIN, 120))
    for part in ("99.9 %", "100.0 ms", "1.50/s", "50/100", "█████░░░░░", "prefill:0 → decode:0", "1 failed", "(x3)", "12.3k"):
        assert part in text, part
    assert "\x1b" not in text


def test_top_has_an_empty_state() -> None:
    empty = snapshot(
        sla={"window_s": 300, "rows": []}, pools={"queue": {"requests": 0, "tokens": 0}, "workers": [], "links": []},
        series={"point": None}, events=[], error="the scheduler does not answer", ready=False,
    )  # fmt: skip
    text = "\n".join(picture("http://x", empty, PLAIN, 40))
    for part in ("no request yet", "no worker has registered", "none yet", "the scheduler does not answer", "not ready"):
        assert part in text, part


# ---- pieces ----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert wants_colour(Terminal())
    assert not wants_colour(io.StringIO())
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert wants_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(Terminal())


def test_pieces() -> None:
    red = Paint(True)("word", "red")
    assert width_of(red) == 4
    assert width_of(cut(red + "more", 6)) == 6
    assert {width_of(line) for line in table([("a", red), ("long", "b")])} == {len("long  word"), len("long  b")}
    assert spark([0.0, 4.0, None, 8.0], 10) == " ▄ █"
    assert spark([0.0, 0.0], 10) == "▁▁"
    assert (bar(0.5, 4), bar(7, 2), bar(-1, 2)) == ("██░░", "██", "░░")
    assert (ms(12.34), ms(12_340), ms(None)) == ("12.3 ms", "12.34 s", "-")
    assert (count(999), count(12_345), count(1.5e6), count(None)) == ("999", "12.3k", "1.5M", "-")


@pytest.mark.parametrize("words", [["trace", "some-id"], ["sla", "report"], ["top", "--once"]], ids=" ".join)
def test_nobody_there_is_one_sentence(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main([*words, "--url", "http://127.0.0.1:9"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("tandem: nobody answers at http://127.0.0.1:9")
    assert len(said.splitlines()) == 1
