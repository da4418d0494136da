"""Answers without a server: the whole walk, tickets and KV transfers included, in this process.

python -m examples.offline
"""

from __future__ import annotations

from tandem import LLM, SamplingParams

PROMPTS = ["def add(a, b):", "import os\n\ndef list_files(folder):", "class Stack:\n    def __init__(self):"]


def main() -> list[str]:
    with LLM(model="bundled", prefill=1, decode=1) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24))
    for output in outputs:
        print(f"{output.prompt!r} -> {output.outputs[0].text!r} ({output.num_cached_tokens} tokens came from the prefix cache)")
    return [output.outputs[0].text for output in outputs]


if __name__ == "__main__":
    main()
