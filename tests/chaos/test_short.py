"""The short form of `make chaos` for every test run: twenty faults, every stream exact, nothing leaked, nothing left behind."""

from __future__ import annotations

import pytest

from tests.chaos import nemesis
from tests.chaos.settings import check, toy_fleet

pytestmark = pytest.mark.timeout(180)

NUM_FAULTS, NUM_STREAMS = 20, 64


async def test_twenty_faults_cost_nobody_a_token(tmp_path):
    seed = "2"
    fleet = toy_fleet(tmp_path / "fleet", seed, NUM_STREAMS)
    async with fleet:
        result = await nemesis.campaign(
            fleet,
            seed=seed,
            num_faults=NUM_FAULTS,
            num_streams=NUM_STREAMS,
            pause_s=(0.25, 0.75),
            stop_s=(4.0, 5.0),
            shape={"max_tokens": [40, 100]},
        )
    print(nemesis.table(result))
    assert result["rows"]["all"]["interrupted"] >= 100
    check(result, fleet, recovery_s=10.0)  # the machine may be busy with other tests
