"""Many requests at once from one program: asyncio and the openai package; at most eight under way.

python -m examples.async_client
"""

from __future__ import annotations

import asyncio

import openai

from examples.connection import API_KEY, MODEL, URL

AT_ONCE = 8


async def ask_all(prompts: list[str]) -> list[str]:
    """The answers, in the order of the prompts. A refusal (429, 503) is tried again when the server says so."""
    gate = asyncio.Semaphore(AT_ONCE)
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=API_KEY, max_retries=5) as client:

        async def ask(prompt: str) -> str:
            async with gate:
                answer = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=24, temperature=0)
                return answer.choices[0].text

        return await asyncio.gather(*(ask(prompt) for prompt in prompts))


def main() -> list[str]:
    prompts = [f"def function_{i}(value):\n    " for i in range(24)]
    answers = asyncio.run(ask_all(prompts))
    print(f"{len(answers)} answers; the first: {answers[0]!r}")
    return answers


if __name__ == "__main__":
    main()
