"""A small model, a small cluster, a few requests: what the simulator's tests run."""

from __future__ import annotations

import random

from bench.traces import Arrival
from configs.tenants import SloClass
from simulation.cluster import Setup
from simulation.costs import Cost, DecodeCost, KvShape, LargeDecodeCost, PrefillCost, RoleLimits
from simulation.scenario import config_of, tenants_of


def small_cost(**changes: object) -> Cost:
    fields: dict[str, object] = {
        "name": "small",
        "model": "m",
        "source": "made up",
        "prefill": PrefillCost(per_step_s=0.004, per_token_s=2e-5, per_token2_s=3e-9),
        "decode": DecodeCost(per_step_s=0.01, per_context_token_s=1e-6, per_seq_s=1e-4),
        "decode_large": LargeDecodeCost(per_step_s=0.008, per_context_token_s=1e-6, per_seq_s=2e-4, above=5),
        "kv": KvShape(num_layers=4, num_kv_heads=2, head_dim=16, block_size=16),
        "num_blocks": 64,
        "prefill_limits": RoleLimits(max_num_batched_tokens=128, max_num_seqs=4),
        "decode_limits": RoleLimits(max_num_batched_tokens=32, max_num_seqs=12),
        "transfer_s": 0.001,
    }
    return Cost(**{**fields, **changes})  # type: ignore[arg-type]


def some_arrivals(number: int, seed: int, rate: float = 6.0, block: int = 32) -> list[Arrival]:
    rng = random.Random(seed)
    at, found = 0.0, []
    for _ in range(number):
        at += rng.expovariate(rate)
        prompt = rng.choice((1, 15, 16, 17, 40, 100, 260, 400))
        family = rng.randrange(4)
        prefix = tuple(1000 * family + i for i in range(prompt // block))
        found.append(Arrival(at, f"t{family % 2}", prompt, rng.choice((1, 2, 7, 33, 90)), prefix, block))
    return found


def a_setup(arrivals: list[Arrival], cost: Cost, prefill: int = 1, decode: int = 1, **changes: object) -> Setup:
    tenants = tenants_of(arrivals, SloClass(ttft_s=1.0, tpot_s=0.05, when_late="queue"))
    config = config_of(tenants, disaggregation_threshold=48)
    setup = Setup((cost,) * prefill, (cost,) * decode, tenants, config, max_tokens=128, hash_len=arrivals[0].block)
    return setup._replace(**changes)
