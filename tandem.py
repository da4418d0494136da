"""Tandem from Python, without a server: `LLM` and `SamplingParams` in vLLM's shapes.

    from tandem import LLM, SamplingParams
    llm = LLM(model="bundled")
    for out in llm.generate(["def add(a, b):"], SamplingParams(temperature=0, max_tokens=32)):
        print(out.outputs[0].text)

One process, no Ray. `LLM(model)` is a decode worker without peers; `LLM(model, prefill=1, decode=1)` runs the whole walk with
tickets, grants, KV transfer and manifests in this process, so that a debugger can step through it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import weakref
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from protocol.errors import ConfigError, InvalidRequest, from_failure
from protocol.events import Failed, Finished, PromptScored, TokenLogprobs, Tokens
from protocol.request import Request, SamplingParams

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams"]


@dataclass(frozen=True)
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One of a request's n answers. logprobs[i] maps token ids at output position i to their Logprob."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = False
    metrics: Any = None  # protocol.events.Timing


Prompt = str | dict[str, Any]
_T = TypeVar("_T")


def _run(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, _T]) -> _T:
    """On our loop in this thread; in a thread beside it where a loop runs here already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return loop.run_until_complete(work)
    with ThreadPoolExecutor(1) as beside:
        return beside.submit(loop.run_until_complete, work).result()


def _close(cluster: Any, loop: asyncio.AbstractEventLoop) -> None:
    async def end() -> None:
        await cluster.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    _run(loop, end())
    loop.close()


class LLM:
    """A model in this process.

    model: "bundled", "toy", a directory, a hub id or "modelscope:ID". prefill, decode: numbers of workers. seed: where the
    seeds of requests without one come from. Further keyword arguments are configuration keys, as `scheduler__policy="fcfs"`.

    Raises ModelError, ConfigError with a sentence; a bad prompt or parameter raises InvalidRequest from `generate`.
    """

    def __init__(
        self,
        model: str = "bundled",
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        seed: int | None = 0,
        prefill: int = 0,
        decode: int = 1,
        tensor_parallel_size: int = 1,
        block_size: int | None = None,
        num_gpu_blocks_override: int | None = None,
        gpu_memory_utilization: float | None = None,
        enable_prefix_caching: bool = True,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        device: str = "auto",
        quantization: str = "auto",
        **keys: Any,
    ) -> None:
        if tensor_parallel_size != 1:
            raise ConfigError("tensor_parallel_size above 1 is not built yet", param="tensor_parallel_size")
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # but some 0.1 ms, so that one step's products find them awake
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning idle threads cost more than they save; read when torch loads
        from cluster.local import LocalCluster
        from configs.load import load

        sets: dict[str, Any] = {
            "model.name": model,
            "model.seed": seed,
            "model.dtype": dtype,
            "model.device": device,
            "model.quantization": quantization,
            "model.max_len": max_model_len,
            "model.block_size": block_size,
            "model.num_blocks_override": num_gpu_blocks_override,
            "model.gpu_memory_utilization": gpu_memory_utilization,
            "model.enable_prefix_caching": enable_prefix_caching,
            "prefill.replicas": prefill,
            "decode.replicas": decode,
            "decode.max_num_seqs": max_num_seqs,
            "decode.max_num_batched_tokens": max_num_batched_tokens,
            "prefill.max_num_batched_tokens": max_num_batched_tokens,
            "scheduler.max_queue_requests": 1_000_000,
            "scheduler.max_queue_tokens": 10**12,
            "scheduler.max_queue_bytes": 1 << 40,
            "scheduler.queue_timeout_s": 1e6,
            "scheduler.disaggregation_threshold": 0,
            "gateway.request_timeout_s": 1e6,
            "gateway.prefill_timeout_s": 1e6,
            "gateway.token_timeout_s": 1e6,
            "transfer.lease_s": 1e6,
            **{name.replace("__", "."): value for name, value in keys.items()},
        }
        config = load(flags={key: value for key, value in sets.items() if value is not None}, env={}).config
        self._ids = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._cluster = LocalCluster(config)
        self._run(self._cluster.start())
        self._finalizer = weakref.finalize(self, _close, self._cluster, self._loop)  # at the latest when Python ends

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the model's and the pool's memory back. Idempotent."""
        self._finalizer()

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return _run(self._loop, work)

    def get_tokenizer(self) -> Any:
        return self._cluster.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """One RequestOutput per prompt, in order. A prompt is a string or {"prompt_token_ids": [...]} (or {"prompt": "..."})."""
        listed: Sequence[Prompt] = [prompts] if isinstance(prompts, (str, dict)) else prompts
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(listed)
        else:
            params = list(sampling_params)
        if len(params) != len(listed):
            raise InvalidRequest(f"{len(listed)} prompts, but {len(params)} sampling_params", param="sampling_params")
        requests = [self._request(prompt, sampling) for prompt, sampling in zip(listed, params, strict=True)]
        return self._run(self._generate_all(requests, listed, use_tqdm))

    def chat(
        self, messages: Any, sampling_params: SamplingParams | None = None, use_tqdm: bool = True, **template: Any
    ) -> list[RequestOutput]:
        """messages: one conversation, a list of {"role", "content"}, or a list of conversations."""
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        tokenizer = self._cluster.tokenizer
        prompts = [
            {"prompt_token_ids": tokenizer.encode(tokenizer.render_chat(c, **template), add_special_tokens=False)}
            for c in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def _request(self, prompt: Prompt, sampling: SamplingParams) -> Request:
        if isinstance(prompt, str):
            token_ids = self._cluster.tokenizer.encode(prompt)
        elif "prompt_token_ids" in prompt:
            token_ids = list(prompt["prompt_token_ids"])
        elif "prompt" in prompt:
            token_ids = self._cluster.tokenizer.encode(prompt["prompt"])
        else:
            raise InvalidRequest('a prompt is a string, {"prompt": str} or {"prompt_token_ids": list}', param="prompts")
        room = self._cluster.max_model_len - len(token_ids)
        changes: dict[str, Any] = {}
        if sampling.max_tokens is None or sampling.max_tokens > room > 0:
            changes["max_tokens"] = max(1, room)
            changes["min_tokens"] = min(sampling.min_tokens, max(1, room))
        request = Request(
            request_id=str(next(self._ids)),
            model=self._cluster.config.model.name,
            prompt_token_ids=tuple(token_ids),
            sampling=msgspec.structs.replace(sampling, **changes),
            eos_token_ids=tuple(self._cluster.loaded.config.eos_token_ids),
        )
        request.validate_tokens(self._cluster.loaded.config.vocab_size, self._cluster.max_model_len)
        return request

    async def _generate_all(self, requests: list[Request], prompts: Sequence[Prompt], use_tqdm: bool) -> list[RequestOutput]:
        from tqdm import tqdm

        with tqdm(total=len(requests), desc="Processed prompts", disable=not use_tqdm) as bar:

            async def one(request: Request, prompt: Prompt) -> RequestOutput:
                output = await self._generate(request, prompt if isinstance(prompt, str) else prompt.get("prompt"))
                bar.update()
                return output

            work = (one(r, p) for r, p in zip(requests, prompts, strict=True))
            outputs = await asyncio.gather(*work, return_exceptions=True)
        for output in outputs:
            if isinstance(output, BaseException):
                raise output
        return [output for output in outputs if isinstance(output, RequestOutput)]

    async def _generate(self, request: Request, prompt: str | None) -> RequestOutput:
        choices = [CompletionOutput(i) for i in range(request.sampling.n)]
        output = RequestOutput(request.request_id, prompt, list(request.prompt_token_ids), choices)
        async for event in self._cluster.gateway.generate(request):
            if isinstance(event, Tokens):
                self._extend(choices[event.choice], event)
            elif isinstance(event, PromptScored):
                output.prompt_logprobs = [self._as_dict(entry) if entry is not None else None for entry in event.logprobs]
            elif isinstance(event, Finished):
                output.finished, output.metrics = True, event.timing
                output.num_cached_tokens = event.usage.cached_tokens
            elif isinstance(event, Failed):
                raise from_failure(event.failure)
        return output

    def _extend(self, choice: CompletionOutput, event: Tokens) -> None:
        choice.text += event.text
        choice.token_ids += event.token_ids
        choice.finish_reason = event.finish_reason or choice.finish_reason
        choice.stop_reason = event.stop_reason if event.finish_reason else choice.stop_reason
        if event.logprobs is not None:
            choice.logprobs = [*(choice.logprobs or []), *(self._as_dict(entry) for entry in event.logprobs)]
            choice.cumulative_logprob = (choice.cumulative_logprob or 0.0) + sum(e.logprob for e in event.logprobs)

    def _as_dict(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        decode = self._cluster.tokenizer.decode
        found = {token: Logprob(value, rank + 1, decode([token])) for rank, (token, value) in enumerate(entry.top)}
        found[entry.token] = Logprob(entry.logprob, entry.rank, decode([entry.token]))
        return found
