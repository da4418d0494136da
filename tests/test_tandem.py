"""The Python face in vLLM's shapes: one process, no Ray."""

from __future__ import annotations

import subprocess
import sys

import pytest

from models.toy import toy_next_token
from protocol.errors import ConfigError, InvalidRequest
from tandem import LLM, SamplingParams


def oracle(prompt: list[int], num_tokens: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(toy_next_token(token_ids))
    return token_ids[len(prompt) :]


@pytest.fixture(scope="module", params=[{}, {"prefill": 1, "decode": 1}], ids=["decode only", "1 + 1"])
def llm(request):
    with LLM(model="toy", max_model_len=256, num_gpu_blocks_override=64, block_size=8, **request.param) as made:
        yield made


GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def test_prompts_are_strings_or_token_ids(llm):
    by_text = llm.generate("Hello, world", GREEDY, use_tqdm=False)[0]
    by_ids = llm.generate({"prompt_token_ids": by_text.prompt_token_ids}, GREEDY, use_tqdm=False)[0]
    assert by_text.prompt == "Hello, world"
    assert by_text.finished
    assert by_ids.outputs[0].token_ids == by_text.outputs[0].token_ids == oracle(by_text.prompt_token_ids, 6)
    assert by_text.outputs[0].finish_reason == "length"
    assert by_text.outputs[0].text


def test_answers_keep_the_order_of_the_prompts(llm):
    prompts = [{"prompt_token_ids": list(range(i, i + 20))} for i in range(12)]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == oracle(prompt["prompt_token_ids"], 6)


def test_each_prompt_may_have_parameters_of_its_own(llm):
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 3)]
    outputs = llm.generate(["a", "b"], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 3]
    with pytest.raises(InvalidRequest, match="sampling_params"):
        llm.generate(["a"], params, use_tqdm=False)


def test_n_logprobs_and_prompt_logprobs(llm):
    params = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=4, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    output = llm.generate({"prompt_token_ids": list(range(30))}, params, use_tqdm=False)[0]
    assert [choice.index for choice in output.outputs] == [0, 1]
    for choice in output.outputs:
        assert len(choice.logprobs) == len(choice.token_ids) == 4
        for token, entry in zip(choice.token_ids, choice.logprobs, strict=True):
            assert token in entry
            assert len(entry) in (2, 3)
        assert choice.cumulative_logprob == pytest.approx(
            sum(e[t].logprob for t, e in zip(choice.token_ids, choice.logprobs, strict=True))
        )
    assert output.prompt_logprobs[0] is None
    assert all(token in entry for token, entry in zip(range(1, 30), output.prompt_logprobs[1:], strict=True))


def test_chat(llm):
    output = llm.chat([{"role": "user", "content": "Hi"}], GREEDY, use_tqdm=False)[0]
    assert output.outputs[0].token_ids == oracle(output.prompt_token_ids, 6)


def test_bad_input_names_the_field(llm):
    with pytest.raises(InvalidRequest, match="prompt"):
        llm.generate({"prompt_token_ids": []}, GREEDY, use_tqdm=False)
    with pytest.raises(InvalidRequest, match="vocabulary"):
        llm.generate({"prompt_token_ids": [10**6]}, GREEDY, use_tqdm=False)
    with pytest.raises(InvalidRequest, match="temperature"):
        SamplingParams(temperature=-1)
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        LLM(model="toy", tensor_parallel_size=2)
    assert llm.generate("still alive", GREEDY, use_tqdm=False)[0].finished


def test_importing_it_is_light():
    code = "import sys, tandem; print([m for m in ('ray', 'torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def test_a_seed_repeats_what_was_drawn_and_none_does_not():
    def draws(seed: int | None) -> list[list[int]]:
        params = SamplingParams(temperature=3.0, max_tokens=8, ignore_eos=True)
        with LLM("toy", seed=seed, max_model_len=256, num_gpu_blocks_override=64) as made:
            return [output.outputs[0].token_ids for output in made.generate(["same"] * 3, params, use_tqdm=False)]

    first = draws(7)
    assert first == draws(7)
    assert len({tuple(tokens) for tokens in first}) == 3
    assert draws(8) != first
    assert draws(None) != draws(None)


async def test_it_works_where_a_loop_runs_already_as_in_a_notebook():
    with LLM("toy", prefill=1, max_model_len=256, num_gpu_blocks_override=64) as made:
        output = made.generate({"prompt_token_ids": [1, 2, 3]}, GREEDY, use_tqdm=False)[0]
    assert output.outputs[0].token_ids == oracle([1, 2, 3], 6)


def test_the_transport_that_is_asked_for_is_the_one_used():
    with LLM("toy", prefill=1, max_model_len=256, num_gpu_blocks_override=64, transfer__transport="shm") as made:
        assert made.generate({"prompt_token_ids": [5] * 40}, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == oracle([5] * 40, 6)
        assert made._cluster.transports == ("shm",)


def test_a_program_that_never_closes_it_ends_quietly():
    code = (
        "from tandem import LLM, SamplingParams\n"
        "llm = LLM('toy', prefill=1, max_model_len=64, num_gpu_blocks_override=64)\n"
        "print(len(llm.generate('x', SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)[0].outputs[0].token_ids))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "2", "")


def test_speculative_config_is_vllms():
    prompt = {"prompt_token_ids": [1, 2, 3, 4] * 8}
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    with LLM(model="toy") as llm:
        (plain,) = llm.generate(prompt, params, use_tqdm=False)
    for config in (
        {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 1},
        {"method": "draft_model", "model": "toy", "num_speculative_tokens": 5},
        {"model": "toy"},
    ):
        with LLM(model="toy", speculative_config=config, decode__adapt_speculation=False) as llm:
            (found,) = llm.generate(prompt, params, use_tqdm=False)
            stats = llm._cluster.workers[0].stats()
        assert found.outputs[0].token_ids == plain.outputs[0].token_ids
        assert stats.accepted_tokens > 10 or "method" in config and config["method"] == "ngram"
    with pytest.raises(ConfigError, match="speculative_config has no 'eagle'"):
        LLM(model="toy", speculative_config={"eagle": True})
