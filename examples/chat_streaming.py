"""A chat whose answer is printed as it is written, and where its time went.

make serve                              in one terminal
python -m examples.chat_streaming       in another; needs the openai package
"""

from __future__ import annotations

from typing import Any

import openai

from examples.connection import API_KEY, MODEL, URL


def main(question: str = "What does the prefill worker do?") -> tuple[str, dict[str, Any]]:
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key=API_KEY)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        max_tokens=64,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, metrics = "", {}
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            print(choice.delta.content or "", end="", flush=True)
        metrics = (chunk.model_extra or {}).get("metrics") or metrics
    print("\n")
    for name in ("queue_time_ms", "prefill_time_ms", "transfer_time_ms", "time_to_first_token_ms", "mean_itl_ms"):
        print(f"  {name:<24} {metrics.get(name)}")
    return text, metrics


if __name__ == "__main__":
    main()
