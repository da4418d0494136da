"""A cluster whose costs are known is told of as a real one tells of itself; calibration must find them again."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from bench.client import Sample
from bench.fidelity import compare
from bench.traces import Arrival
from protocol.errors import ConfigError, TandemError
from simulation import calibrate, policies, workers
from simulation.__main__ import main
from simulation.cluster import Simulation
from simulation.costs import Contention, Cost, read_cost
from simulation.decode import DecodeWorker
from simulation.requests import Req
from tests.simulation.small import a_setup, small_cost

OVERHEAD_S, RETURN_S = 0.006, 0.004
STRIDE = 16


class Told(Simulation):
    """Keeps of each request what a gateway's timeline would. Steps are single ones, so that every token has its time."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.documents: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
        self.tokens: dict[int, list[tuple[float, int]]] = {}
        self.landed_at: dict[int, float] = {}

    def _landed(self, req: Req) -> None:
        self.landed_at[req.index] = self.now
        super()._landed(req)

    def stepped(self, worker: DecodeWorker) -> None:
        for req in worker.decoding.values():
            number = req.generated + worker.step - req.joined_step
            if number % STRIDE == 0:
                self.tokens.setdefault(req.index, []).append((self.now, number))

    def finished(self, req: Req) -> None:
        assert req.decode is not None
        base = req.arrived_at
        marks = [("received", base), ("admitted", req.placed_at), ("reserved", req.placed_at + OVERHEAD_S)]
        marks += [("prefill_start", req.begun_at), ("prefill_end", req.first_at), ("first_token", req.first_at)]
        marks += [("transfer_end", self.landed_at[req.index])] if req.index in self.landed_at else []
        timeline = [{"at_ms": 1e3 * (at - base), "name": name, "worker": None, "detail": None} for name, at in marks]
        for at, number in sorted(set(self.tokens.get(req.index, ()))):
            timeline.append({"at_ms": 1e3 * (at - base), "name": "token", "worker": None, "detail": f"{number} tokens"})
        timeline.append({"at_ms": 1e3 * (self.now - base), "name": "end", "worker": None, "detail": "finished"})
        row = {
            "id": req.admit.request_id, "client_id": f"c{req.index}", "received": 1000.0 + base, "prompt_tokens": req.prompt,
            "cached_tokens": req.cached, "output_tokens": req.output, "resumptions": 0,
            "prefill_worker": req.prefill.info.name if req.prefill else req.decode.info.name, "decode_worker": req.decode.info.name,
        }  # fmt: skip
        self.documents[req.admit.request_id] = row, timeline
        super().finished(req)

    def ask(self, path: str) -> Any:
        if path == "/dashboard/data":
            return {"status": {"workers": [self._worker(w) for w in self.workers]}}
        if path.startswith("/dashboard/requests?"):
            return {"requests": [row for row, _ in self.documents.values()]}
        return {"timeline": self.documents[path.rsplit("/", 1)[1]][1]}

    def _worker(self, worker: workers.Worker) -> dict[str, Any]:
        stats = worker.stats(self.now)
        info = worker.info
        sent = sum(w.transfer_bytes for w in self.prefills.values()), sum(w.transfers for w in self.prefills.values())
        return {
            "role": info.role, "alive": True, "model": info.model, "device": info.device, "block_size": info.layout.block_size,
            "num_blocks": info.num_blocks, "max_num_seqs": info.max_num_seqs, "max_num_batched_tokens": info.max_num_batched_tokens,
            "stats": {"transfer_bytes": sent[0], "transfers": sent[1], "num_steps": stats.num_steps},
        }  # fmt: skip


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> tuple[Told, Cost]:
    cost = small_cost(
        num_blocks=4000, decode_large=None, overhead_s=OVERHEAD_S, contention=Contention(prefill=1.2, decode=1.3),
    )  # fmt: skip
    rng, at, arrivals = random.Random(7), 0.0, []
    for _ in range(150):
        at += rng.expovariate(2.0)
        arrivals.append(Arrival(at, "", rng.randint(60, 900), rng.randint(20, 120), (), 32))
    start, stepped = workers.Worker._start, DecodeWorker._stepped
    monkeypatch.setattr(workers.Worker, "_start", lambda self, span, length, now: start(self, span, 1, now))

    def watched(self: DecodeWorker, length: int, now: float) -> None:
        stepped(self, length, now)
        self.sim.stepped(self)  # type: ignore[attr-defined]

    monkeypatch.setattr(DecodeWorker, "_stepped", watched)
    simulation = Told(a_setup(arrivals, cost, share_cores=True), arrivals, policies.scheduler_for("join-shortest-queue"))
    simulation.run()
    monkeypatch.undo()
    return simulation, cost


def test_known_costs_are_found_again(told: tuple[Told, Cost]) -> None:
    simulation, cost = told
    walked = calibrate.timelines(simulation.ask, 1000)
    assert len(walked) == 150
    samples = [
        {"request_id": w.client_id, "outcome": "ok", "sent": w.received_at, "end": w.end_at + RETURN_S} for w in walked
    ]  # fmt: skip
    found, sentences = calibrate.fit(walked, simulation.ask("/dashboard/data"), samples, "found")
    assert found.prefill.per_token_s == pytest.approx(cost.prefill.per_token_s, rel=0.15)
    assert found.prefill_s(600) == pytest.approx(cost.prefill_s(600), rel=0.05)
    assert found.decode_s(3, 1500) == pytest.approx(cost.decode_s(3, 1500), rel=0.05)
    assert found.contention.prefill == pytest.approx(1.2, abs=0.06)
    assert found.contention.decode == pytest.approx(1.3, abs=0.06)
    assert found.overhead_s == pytest.approx(OVERHEAD_S, abs=1e-3)
    assert found.return_s == pytest.approx(RETURN_S, abs=1e-6)
    assert found.kv.token_nbytes == pytest.approx(cost.kv.token_nbytes, rel=0.2)
    assert found.errors["prefill_mape"] < 0.05
    assert found.errors["decode_mape"] < 0.05
    assert found.errors["held_out"]["decode"] > 20
    assert any("held out" in sentence for sentence in sentences)


def test_the_simulation_of_what_was_found_is_like_the_original(told: tuple[Told, Cost], tmp_path: Path) -> None:
    simulation, _ = told
    walked = calibrate.timelines(simulation.ask, 1000)
    found, _ = calibrate.fit(walked, simulation.ask("/dashboard/data"), [], "found")
    path = tmp_path / "found.yaml"
    path.write_text(calibrate.as_yaml(found))
    assert read_cost(path) == found
    real = [
        Sample("", w.received_at, w.received_at, w.first_at, w.end_at, "ok", prompt_tokens=w.prompt, output_tokens=w.output)
        for w in walked
    ]  # fmt: skip
    figures = compare(real, found)
    assert figures["compared"] == 150
    assert figures["e2e_mape"] < 0.06
    assert abs(figures["ttft_p99_error"]) < 0.15


def test_too_little_to_see_is_said(told: tuple[Told, Cost]) -> None:
    simulation, _ = told
    walked = calibrate.timelines(simulation.ask, 1000)
    with pytest.raises(TandemError, match="20 are needed"):
        calibrate.fit(walked[:10], simulation.ask("/dashboard/data"), [], "x")
    with pytest.raises(TandemError, match="no decode worker"):
        calibrate.fit(walked, {"status": {"workers": []}}, [], "x")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cost.yaml"
    assert main(["calibrate", "--url", "http://127.0.0.1:1", "--out", str(out)]) == 1
    assert "--url" in capsys.readouterr().err
    bad = tmp_path / "load.json"
    bad.write_text(json.dumps({"runs": 3}))
    with pytest.raises(ConfigError, match="--load"):
        calibrate._samples(bad)
