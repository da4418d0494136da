"""The load of an ablation and its table; its servers are what `tandem serve` makes of the options."""

from __future__ import annotations

import pytest

from bench import ablate
from bench.client import Sample
from bench.summary import Promise, summarize
from configs.load import load


def test_the_load_is_the_same_at_any_rate_and_half_of_it_shares_a_beginning() -> None:
    slow, fast = (ablate.arrivals_of(rate, 400, 3) for rate in (1.0, 4.0))
    assert [one._replace(at_s=0.0) for one in slow] == [one._replace(at_s=0.0) for one in fast]
    assert fast[-1].at_s == pytest.approx(slow[-1].at_s / 4)
    assert slow[-1].at_s == pytest.approx(400, rel=0.2)
    shared = [one for one in slow if one.prefix]
    assert 0.4 < len(shared) / len(slow) < 0.6
    assert all(one.prompt_tokens >= ablate.STEM_LEN + ablate.PROMPT.low for one in shared)
    assert ablate.arrivals_of(1.0, 400, 4) != slow
    longest = max(one.prompt_tokens + one.output_tokens for one in slow)
    assert longest <= ablate.MAX_LEN


@pytest.mark.parametrize("row", ablate.ROWS, ids=lambda row: row.name)
def test_each_row_is_a_configuration_that_differs_as_its_name_says(row: ablate.Row) -> None:

    config = main_config(row.options)
    assert (config.decode.without == "continuous-batching") == (row.name == "no continuous batching")
    assert (config.decode.without == "paging") == (row.name == "no paging")
    assert config.decode.enable_chunked_prefill == (row.name not in ("no chunking", "neither of the two"))
    assert config.model.enable_prefix_caching == (row.name != "no prefix cache")
    assert (config.prefill.replicas == 0) == (row.name in ("no disaggregation", "neither of the two"))
    assert config.scheduler.admission == (row.name != "no admission")


def main_config(options):
    """What serve makes of these options, by the table that it goes by."""
    from configs.flags import FLAGS

    by_flag = {flag.flag: flag for flag in FLAGS}
    flags, sets, parts = {}, [f"model.max_len={ablate.MAX_LEN}"], iter(options)
    for part in parts:
        if part == "--set":
            sets.append(next(parts))
        elif part.startswith("--no-") and f"--{part[5:]}" in by_flag:
            flags[by_flag[f"--{part[5:]}"].key] = "false"
        else:
            flags[by_flag[part].key] = next(parts)
    return load(flags=flags, sets=sets, env={}).config


def test_the_table_has_a_line_per_server() -> None:
    samples = [
        Sample("", 0.0, first=0.5, end=1.0, outcome="ok", output_tokens=3, gaps=[0.1, 0.2]),
        Sample("", 0.0, outcome="refused"),
    ]
    row = summarize(samples, Promise(1.0, 0.2), 2.0) | {"kv_waste": 0.031, "kv_used": 0.5, "cached_share": 0.25}
    text = ablate.table([("all", row), ("none", summarize([], Promise(), 0.0) | {"kv_waste": 0, "kv_used": 0, "cached_share": 0})])
    lines = text.splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| all | 1 | 1 | 0 | 1.5 | 0.50 | 500 | 500 |")
    assert "3.1 | 50 | 25 |" in lines[2]
