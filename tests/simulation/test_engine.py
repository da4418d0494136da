"""The mock workers: k steps in closed form are k steps token by token, nothing is lost, the same seed gives the same run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.traces import Arrival
from simulation import policies, workers
from simulation.blocks import Holding, Pool
from simulation.cluster import Setup, Simulation
from simulation.costs import Contention, Span, span_of
from simulation.links import Link, send
from simulation.results import End
from tests.simulation.small import a_setup, small_cost, some_arrivals


def rows(simulation: Simulation) -> dict[int, tuple[int, float, float, float, int]]:
    r = simulation.results
    return {i: (r.end[n], r.ttft_s[n], r.tpot_s[n], r.e2e_s[n], r.prefill_tokens[n]) for n, i in enumerate(r.index)}


def run(setup: Setup, arrivals: list[Arrival], policy: str = "tandem") -> Simulation:
    simulation = Simulation(setup, arrivals, policies.scheduler_for(policy))
    simulation.run()
    simulation.check_integrity()
    return simulation


@pytest.fixture
def token_by_token(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on every span is one step: nothing is left of the closed form but its n = 1."""

    def switch() -> None:
        start = workers.Worker._start
        monkeypatch.setattr(workers.Worker, "_start", lambda self, span, length, now: start(self, span, 1, now))

    return switch


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("policy", ["tandem", "join-shortest-queue"])
@pytest.mark.parametrize(("prefill", "num_blocks"), [(1, 64), (2, 300), (0, 48)])
def test_closed_form_equals_token_by_token(
    seed: int, policy: str, prefill: int, num_blocks: int, token_by_token: Callable[[], None]
) -> None:
    arrivals = some_arrivals(60, seed)
    setup = a_setup(arrivals, small_cost(num_blocks=num_blocks), prefill, 1 + seed % 2)
    at_once = run(setup, arrivals, policy)
    token_by_token()
    stepped = run(setup, arrivals, policy)
    assert stepped._num_events > at_once._num_events
    assert sum(w.num_steps for w in stepped.workers) == sum(w.num_steps for w in at_once.workers)
    assert sum(w.num_preemptions for w in stepped.workers) == sum(w.num_preemptions for w in at_once.workers)
    expected = rows(stepped)
    for index, row in rows(at_once).items():
        assert row == pytest.approx(expected[index], rel=1e-9, abs=1e-9), f"request {index}"


def test_some_of_those_cases_preempt_and_some_prefill_at_decode() -> None:
    """Or the test above would say nothing about either."""
    arrivals = some_arrivals(60, 1)
    crowded = run(a_setup(arrivals, small_cost(num_blocks=48), 0, 1), arrivals, "join-shortest-queue")
    assert sum(w.num_preemptions for w in crowded.workers) > 0
    assert sum(crowded.results.recomputed) > 0
    assert sum(w.prompt_tokens for w in crowded.decodes.values()) > 0
    roomy = run(a_setup(arrivals, small_cost(num_blocks=300), 1, 1), arrivals, "join-shortest-queue")
    assert sum(w.prompt_tokens for w in roomy.prefills.values()) > 0
    assert sum(w.prefix_hits for w in roomy.prefills.values()) > 0


def test_span_is_the_sum_of_its_steps() -> None:
    cost = small_cost()
    for num_seqs, context, chunk, begin in ((3, 700.0, 0, 0), (9, 2000.0, 20, 64), (0, 0.0, 128, 256)):
        a, b, c = cost.decode_terms(num_seqs)
        p = cost.prefill
        total, held, computed = 0.0, context, begin
        for _ in range(37):
            step = a + b * held + c * num_seqs if num_seqs else p.per_step_s
            after = computed + chunk
            total += step + p.per_token_s * chunk + p.per_token2_s * (after**2 - computed**2)
            held, computed = held + num_seqs, after
        span = span_of(cost, num_seqs, context, chunk, begin)
        assert span.seconds(37) == pytest.approx(total, rel=1e-12)
        assert span.steps(total) == pytest.approx(37, rel=1e-9)
    assert Span(0.5, 0.0).steps(1.25) == pytest.approx(2.5)


def test_one_request_alone_takes_what_the_formulas_say() -> None:
    cost = small_cost(num_blocks=600)
    arrivals = [Arrival(0.5, "", 300, 11, (), 32)]
    simulation = run(a_setup(arrivals, cost), arrivals)
    [(end, ttft, tpot, e2e, computed)] = rows(simulation).values()
    assert (end, computed) == (End.FINISHED, 300)
    assert ttft == pytest.approx(cost.prefill_s(300))  # chunks of 128, 128 and 44
    decode_s = sum(cost.decode_s(1, 300 + i) for i in range(10))
    nbytes = 300 * cost.kv.token_nbytes
    tail = cost.transfer_s + nbytes * 8 / (cost.link_gbps * 1e9) / cost.kv.num_layers
    assert e2e == pytest.approx(ttft + tail + decode_s, abs=1e-9)
    assert tpot == pytest.approx((tail + decode_s) / 10, abs=1e-9)


def test_same_seed_same_run_and_every_request_has_one_end() -> None:
    arrivals = some_arrivals(120, 3, rate=30.0)
    for policy in ("tandem", "random", "mooncake", "round-robin-edf"):
        setup = a_setup(arrivals, small_cost(), 2, 2)
        one, two = run(setup, arrivals, policy), run(setup, arrivals, policy)
        assert rows(one) == rows(two)
        assert sorted(one.results.index) == list(range(120))
        found = one.summary()
        ends = found["finished"] + found["rejected"] + found["timed_out"] + found["failed"]
        assert ends == found["offered"] == 120
        assert sum(part["offered"] for part in found["tenants"].values()) == 120
    other = run(a_setup(arrivals, small_cost(), 2, 2, seed=1), arrivals, "random")
    assert rows(other) != rows(run(a_setup(arrivals, small_cost(), 2, 2, seed=0), arrivals, "random"))


def test_a_run_that_cannot_reach_the_level_stops_early() -> None:
    arrivals = some_arrivals(300, 4, rate=25.0)
    setup = a_setup(arrivals, small_cost(), 1, 1)
    simulation = Simulation(setup, arrivals, policies.scheduler_for("join-shortest-queue"), stop_below=0.9, num_expected=300)
    results = simulation.run()
    assert results.num_missed >= 30
    assert len(results.end) == results.num_offered < 300
    assert End.CUT in results.end


def test_pool_shares_and_evicts_the_oldest_first() -> None:
    pool = Pool(12, 4)
    first, second = Holding(), Holding()
    assert pool.take(8, first)
    pool.seal(1, first)
    pool.seal(2, first)
    assert pool.match((1, 2, 3), second) == 2
    assert pool.used == 8
    pool.release(first)
    assert pool.used == 8, "the second one still holds both"
    pool.release(second)
    assert (pool.used, pool.cached, pool.free) == (0, 8, 12)
    assert pool.take(5, first)  # 7 blocks are left for 8 cached ones: the prefix loses its end, not its beginning
    assert pool.cached == 4
    assert pool.match((1, 2), second) == 1
    assert not pool.take(4, second)
    pool.check_integrity()


def test_transfers_share_a_link_and_hide_behind_the_prefill() -> None:
    slow, fast = Link(0.8), Link(800.0)  # 1e8 and 1e11 bytes a second
    assert send((slow, fast), 10**8, 0.0, 5.0, 0.01, 10) == pytest.approx(5.0 + 0.1 + 0.01), "all but the last layer was there"
    assert send((slow, fast), 10**9, 5.0, 6.0, 0.01, 10) == pytest.approx(15.01), "ten seconds of wire, begun with the prefill"
    assert send((fast, slow), 10**8, 6.0, 6.5, 0.0, 10) == pytest.approx(16.0), "behind the one before on the slow link"
    assert slow.nbytes == 10**9 + 2 * 10**8


def test_a_slower_neighbour_is_felt_only_while_it_works() -> None:
    arrivals = some_arrivals(40, 5)
    alone = run(a_setup(arrivals, small_cost()), arrivals)
    cost = small_cost(contention=Contention(prefill=1.5, decode=1.4))
    apart = run(a_setup(arrivals, cost), arrivals)
    together = run(a_setup(arrivals, cost, share_cores=True), arrivals)
    assert rows(apart) == rows(alone)
    mean = {name: sum(s.results.e2e_s) for name, s in (("alone", alone), ("together", together))}
    assert mean["alone"] < mean["together"] < 1.5 * mean["alone"]


def test_a_decode_worker_keeps_what_was_sent_and_is_sent_only_what_it_lacks() -> None:
    cost = small_cost()
    arrivals = [Arrival(20.0 * i, "", 10 * 32 + more, 4, tuple(range(10)), 32) for i, more in enumerate((5, 85))]
    simulation = run(a_setup(arrivals, cost), arrivals)
    (decode,) = simulation.decodes.values()
    token = cost.kv.token_nbytes
    assert decode.link.nbytes == (10 * 32 + 5 + 85) * token, "the second time only what is behind the shared prefix"
    assert decode.prefix_hits == 10 * 32
