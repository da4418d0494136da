"""Clients on real weights. There is no hash to compare with: the judge is an undisturbed run of the same prompts.

Float32 logits depend on the shape of the batch in their last bits, so a stream may part from the undisturbed one where two tokens
are as good as equal. Each parting is reported with its logit gap: how much better the undisturbed run's token was than ours.
"""

from __future__ import annotations

import random
from typing import Any

from protocol.events import Tokens
from protocol.request import Request, SamplingParams
from tests.chaos.load import Load, Stream

NUM_BEST = 5


class RealLoad(Load):
    """shape: {"prompts": token ids of each, "max_tokens": of each stream}. `answer` runs one of them by itself."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._answers: list[dict[str, Any]] = []

    async def answer(self, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        """One stream: its tokens, and of each the best alternatives as {token: log-probability}."""
        tokens: list[int] = []
        best: list[dict[int, float]] = []
        self._next_id += 1
        async for event in self.gateway.generate(_request(f"{self.name}-{self._next_id}", prompt, max_tokens, NUM_BEST)):
            if isinstance(event, Tokens):
                tokens += event.token_ids
                best += [dict(each.top) for each in event.logprobs or ()]
        return {"tokens": tokens, "best": best}

    def draw(self, rng: random.Random, request_id: str, shape: dict[str, Any]) -> tuple[Request, int | None]:
        prompt = rng.choice(shape["prompts"])
        return _request(request_id, prompt, shape["max_tokens"], None), None

    def verdict(self, stream: Stream) -> str:
        resumed = [index for (index, epoch), (_, before) in zip(stream.epochs[1:], stream.epochs, strict=False) if epoch != before]
        answer = {"prompt": list(stream.request.prompt_token_ids), "tokens": stream.tokens[0], "resumed_at": resumed}
        self._answers.append(answer)
        return stream.check_end()

    def answers(self) -> list[dict[str, Any]]:
        return self._answers


def _request(request_id: str, prompt: list[int], max_tokens: int, logprobs: int | None) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, seed=1, ignore_eos=True, logprobs=logprobs)
    return Request(request_id=request_id, model="bundled", prompt_token_ids=tuple(prompt), sampling=sampling)


def partings(wanted: dict[str, Any], tokens: list[int]) -> tuple[int, float] | None:
    """Where a stream first differs from the undisturbed one, and by what logit gap; None: nowhere."""
    for place, (ours, theirs) in enumerate(zip(tokens, wanted["tokens"], strict=True)):
        if ours != theirs:
            best = {int(token): value for token, value in wanted["best"][place].items()}
            return place, best[theirs] - best.get(ours, float("-inf"))
    return None
