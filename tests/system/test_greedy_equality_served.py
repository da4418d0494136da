"""Greedy equality with everything real: 2 prefill + 2 decode workers in processes of their own, KV over TCP, HTTP in front."""

from __future__ import annotations

import concurrent.futures

import pytest

from models.locate import locate
from tests.oracle import NEAR_TIE, Judge, ragged_prompts
from tests.system.served import serve

pytestmark = [pytest.mark.more, pytest.mark.timeout(600)]


def test_two_and_two_over_tcp_equal_transformers(tmp_path):
    prompts = ragged_prompts(32, 32, 4000, longest=200)
    args = ("--prefill", "2", "--decode", "2", "--kv-transport", "tcp", "--kv-cache-memory-bytes", "128MiB")
    with serve(tmp_path, *args, "--set", "scheduler.disaggregation_threshold=0") as served:

        def alive() -> list[dict]:
            return [worker for worker in served.status()["workers"] if worker["alive"]]

        def answer(prompt: list[int]) -> list[int]:
            body = {"model": "bundled", "prompt": prompt, "max_tokens": 64, "temperature": 0, "ignore_eos": True}
            status, got = served.post("/v1/completions", {**body, "return_token_ids": True}, 120)
            assert status == 200, got
            return got["choices"][0]["token_ids"]

        served.wait(lambda: len(alive()) == 4, 60, "four workers")
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(answer, prompts))
        moved = sum(worker["stats"]["transfers"] for worker in alive() if worker["role"] == "decode")
    assert moved >= len(prompts) // 2
    judge = Judge(locate("bundled"))
    for prompt, token_ids in zip(prompts, found, strict=True):
        assert len(token_ids) == 64
        logprobs = judge.logprobs([*prompt, *token_ids])[len(prompt) - 1 : -1]
        gaps = logprobs.max(-1).values - logprobs.gather(1, logprobs.new_tensor(token_ids).long()[:, None])[:, 0]
        assert float(gaps.max()) <= NEAR_TIE, f"prompt of {len(prompt)} tokens: logit gap {float(gaps.max()):.2e}"
