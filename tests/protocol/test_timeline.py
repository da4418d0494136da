"""The bars of a waterfall: no gap between them, no overlap, each named for what the request was waiting for."""

from __future__ import annotations

from protocol.timeline import GAP_BUCKETS, Mark, count_gaps, phases, worker_name


def marks(text: str) -> list[Mark]:
    """ "received 0, reserved 2 decode:0" """
    found = []
    for part in text.split(", "):
        name, at, *worker = part.split()
        found.append(Mark(float(at), name, worker[0] if worker else None))
    return found


HANDED_OVER = (
    "received 0, tokenized 1, admitted 2, reserved 3 decode:0, prefill_start 5 prefill:0, prefill_end 9 prefill:0, "
    "first_token 9, transfer_end 10 decode:0, token 15 decode:0, end 20"
)


def names(text: str, kind: str = "finished") -> list[str]:
    bars = phases(marks(text), kind)
    assert bars[0].start_s == 0
    for one, next_ in zip(bars, bars[1:], strict=False):
        assert one.end_s == next_.start_s, (one, next_)
    assert all(bar.start_s <= bar.end_s for bar in bars)
    return [bar.name + ("!" if bar.is_lost else "") for bar in bars]


def test_a_request_that_was_handed_over() -> None:
    assert names(HANDED_OVER) == ["intake", "queue", "reserve", "wait", "prefill", "transfer", "decode"]
    bars = {bar.name: bar for bar in phases(marks(HANDED_OVER))}
    assert (bars["prefill"].start_s, bars["prefill"].end_s, bars["prefill"].worker) == (5, 9, "prefill:0")
    assert (bars["decode"].end_s, bars["decode"].worker) == (20, "decode:0")


def test_what_its_decode_worker_prefilled_has_no_transfer() -> None:
    text = (
        "received 0, tokenized 1, admitted 2, reserved 3 decode:0, prefill_start 5 decode:0, prefill_end 9 decode:0, "
        "first_token 9, end 20"
    )
    assert names(text) == ["intake", "queue", "reserve", "wait", "prefill", "decode"]
    assert names(text, "failed")[-1] == "decode!"


def test_what_ended_with_token_one_has_neither() -> None:
    text = (
        "received 0, tokenized 1, admitted 2, reserved 3 decode:0, prefill_start 5 prefill:0, prefill_end 9 prefill:0, "
        "first_token 9, end 9.5"
    )
    assert names(text)[-1] == "prefill"
    assert names(text, "failed")[-1] == "transfer!"


def test_a_resumption_begins_again_with_the_queue() -> None:
    first = HANDED_OVER.removesuffix(", end 20")
    text = (
        f"{first}, resumed 21, admitted 22, reserved 23 decode:1, prefill_start 24 prefill:0, prefill_end 25 prefill:0, "
        "transfer_end 26 decode:1, token 30 decode:1, end 40"
    )
    assert names(text)[6:] == ["decode!", "queue", "reserve", "wait", "prefill", "transfer", "decode"]
    assert phases(marks(text))[-1].worker == "decode:1"


def test_what_was_refused_only_waited() -> None:
    assert names("received 0, tokenized 1, end 3", "failed") == ["intake", "queue!"]


def test_names_of_workers() -> None:
    assert worker_name("decode-0-12ab34cd56ef") == "decode:0"
    assert worker_name("prefill-11-12ab") == "prefill:11"
    assert worker_name("d") == "d"


def test_gaps_out_of_range_are_left_out() -> None:
    counts = count_gaps([(0, 2), (len(GAP_BUCKETS), 1), (len(GAP_BUCKETS) + 1, 9), (-1, 9), (3, -4)])
    assert len(counts) == len(GAP_BUCKETS) + 1
    assert (counts[0], counts[-1], sum(counts)) == (2, 1, 3)
