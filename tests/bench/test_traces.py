"""Traces: every format, told by its first line; what is wrong is said with file and line; the real ones where they are."""

from __future__ import annotations

import math
import os
import random
import statistics
from pathlib import Path

import pytest

from bench import load
from bench.load import Lengths
from bench.traces import TraceError, read_trace
from tests.bench import small_traces


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", sorted(small_traces.ALL))
def test_the_format_is_told_by_the_first_line(tmp_path: Path, name: str, zipped: bool) -> None:
    found, arrivals = read_trace(small_traces.write(tmp_path, name, zipped))
    assert found == name
    assert all(a.prompt_tokens > 0 and a.output_tokens > 0 for a in arrivals)
    if name != "lengths":
        assert arrivals[0].at_s == 0
        assert [a.at_s for a in arrivals] == sorted(a.at_s for a in arrivals)


def test_times_tenants_and_prefixes_are_read(tmp_path: Path) -> None:
    azure = read_trace(small_traces.write(tmp_path, "azure"))[1]
    assert [round(a.at_s, 6) for a in azure] == [0.0, 4.314579, 14.541877]
    servegen = read_trace(small_traces.write(tmp_path, "servegen"))[1]
    assert [(a.tenant, a.prompt_tokens) for a in servegen] == [("34", 64), ("104", 843), ("104", 582)]
    assert len(read_trace(small_traces.write(tmp_path, "vtc"))[1]) == 2  # a row without output is none
    mooncake = read_trace(small_traces.write(tmp_path, "mooncake"))[1]
    assert [a.at_s for a in mooncake] == [0.0, 0.0, 3.0]
    assert mooncake[1].prefix == (0, 1, 7)
    assert math.isnan(read_trace(small_traces.write(tmp_path, "lengths"))[1][0].at_s)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", ":1: neither JSON lines nor"),
        ("arrival_s,client,prompt_tokens,output_tokens\n0,a,x,1\n", ":2: invalid literal"),
        ('{"timestamp": 0}\n', ":1: KeyError"), ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request"), ("", ":1: neither"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", ":2: "),
        ("arrival_s,tenant,input_tokens,output_tokens\n1,2\n", ":2: "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_shared_prefixes_stay_shared_when_lengths_shrink(tmp_path: Path) -> None:
    arrivals = load.fitted(read_trace(small_traces.write(tmp_path, "mooncake"))[1], 0.1, 1000, 1000)
    first, second, third = (load.prompt_tokens(a, i, 7, 2000) for i, a in enumerate(arrivals))
    assert [len(first), len(second), len(third)] == [130, 110, 60]
    assert first[:102] == second[:102]  # two blocks of 51
    assert first[:51] == third[:51]
    assert first[102:110] != second[102:110]
    assert load.prompt_tokens(arrivals[0], 0, 7, 2000) == first
    assert load.prompt_tokens(arrivals[0], 0, 8, 2000) != first


@pytest.mark.parametrize(("cv", "burst"), [(1.0, 1), (0.0, 1), (3.0, 1), (1.0, 8)])
def test_arrivals_have_the_rate_and_the_spread_asked_for(cv: float, burst: int) -> None:
    rng = random.Random(3)
    arrivals = load.synthetic(20_000, 5.0, cv, burst, Lengths(10, 20), Lengths(1, 1), ["a", "b"], rng)
    assert arrivals[-1].at_s == pytest.approx(20_000 / 5.0, rel=0.08)
    gaps = [b.at_s - a.at_s for a, b in zip(arrivals, arrivals[1:], strict=False)]
    if burst == 1:
        assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, abs=0.15)
    else:
        assert sum(gap == 0 for gap in gaps) / len(gaps) == pytest.approx(1 - 1 / burst, abs=0.01)
    assert {a.tenant for a in arrivals} == {"a", "b"}
    assert {a.prompt_tokens for a in arrivals} == set(range(10, 21))


@pytest.mark.more
@pytest.mark.parametrize(
    ("name", "rows", "rate"),
    [
        ("azure2023_conv.csv.gz", 19366, 5.53), ("mooncake_conversation.jsonl.gz", 12031, 3.40),
        ("servegen_m_large_1h_5rps.csv.gz", 19347, 5.376), ("vtc_arena_multi_client.csv", 1500, 2.5),
    ],
)  # fmt: skip
def test_the_real_traces(name: str, rows: int, rate: float) -> None:
    folder = os.environ.get("TANDEM_TRACES")
    if not folder:
        pytest.skip("TANDEM_TRACES names no folder of traces")
    _, arrivals = read_trace(Path(folder) / name)
    assert rows - 20 <= len(arrivals) <= rows  # a few rows have no output
    assert len(arrivals) / arrivals[-1].at_s == pytest.approx(rate, rel=0.02)
