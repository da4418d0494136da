"""The fleets of the chaos tests, and what every run of them must show at its end."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.chaos.fleet import Fleet, make_config


def toy_fleet(folder: Path, seed: str, num_streams: int) -> Fleet:
    """Three and three. A decode worker holds a little more than half of the streams, so that two always hold them all; each life
    of a prefill worker draws whether it sends over shm or tcp. Steps are slowed down to those of a small GPU model: two cores
    stay free enough to tell a late worker from a dead one."""
    rng = random.Random(f"{seed}/transports")
    specs: dict[str, dict[str, Any]] = {
        "decode": {"min_step_s": 0.03, "transports": ["shm", "tcp"]},
        "prefill": {"min_step_s": 0.015, "transports": lambda: [rng.choice(["shm", "tcp"])]},
    }
    config = make_config(decode__max_num_seqs=int(0.56 * num_streams), prefill__max_num_batched_tokens=192)
    return Fleet(folder, config, {"gateway": 2, "prefill": 3, "decode": 3}, specs)


def bundled_fleet(folder: Path, seed: str) -> Fleet:
    config = make_config(
        model__name="bundled",
        model__block_size=0,
        model__num_blocks_override=None,
        model__kv_cache_bytes=64 << 20,
        model__max_len=None,
    )
    rng = random.Random(f"{seed}/transports")
    specs = {"decode": {"transports": ["shm", "tcp"]}, "prefill": {"transports": lambda: [rng.choice(["shm", "tcp"])]}}
    return Fleet(folder, config, {"gateway": 1, "prefill": 2, "decode": 2}, specs)


def check(result: dict[str, Any], fleet: Fleet, recovery_s: float) -> None:
    """Safety always, and liveness within recovery_s; of the fleet, after it was closed, nothing is left."""
    assert result["wrong"] == 0, result["named"]
    assert result["lost"] == 0, result["named"]
    assert result["failed"] == 0, result["named"]
    assert not fleet.ended_by_themselves, fleet.ended_by_themselves
    assert result["leaked_blocks"] == 0
    assert result["rows"]["all"]["unresolved"] == 0
    assert result["rows"]["all"]["p99_s"] <= recovery_s, result["slow"]
    assert all(after <= before for before, after in result["gateway_fds"].values()), result["gateway_fds"]
    assert not result["segments_left"]
    assert not fleet.survivors()
