"""How sure the model was of each token, and what else it thought of.

python -m examples.logprobs
"""

from __future__ import annotations

import math

import openai

from examples.connection import API_KEY, MODEL, URL


def main(prompt: str = "import ") -> list[tuple[str, float]]:
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key=API_KEY)
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0, logprobs=3)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    rows = []
    for token, logprob, top in zip(found.tokens, found.token_logprobs or [], found.top_logprobs or [], strict=True):
        others = ", ".join(f"{other!r} {math.exp(value):.0%}" for other, value in (top or {}).items() if other != token)
        print(f"{token!r:<14} {math.exp(logprob):6.1%}   else {others}")
        rows.append((token, logprob))
    return rows


if __name__ == "__main__":
    main()
