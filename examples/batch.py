"""A file of requests in, a file of answers out, in the lines of OpenAI's batch files; goes on where it was stopped.

python -m examples.batch requests.jsonl answers.jsonl
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import openai
from tqdm import tqdm

from examples.connection import API_KEY, URL

AT_ONCE = 16


async def run(requests: Path, answers: Path) -> int:
    """-> how many were asked now. A line: {"custom_id": ..., "url": "/v1/completions", "body": {...}}."""
    lines = [json.loads(line) for line in requests.read_text().splitlines() if line.strip()]
    done = {json.loads(line)["custom_id"] for line in answers.read_text().splitlines()} if answers.exists() else set()
    left = [line for line in lines if line["custom_id"] not in done]
    gate = asyncio.Semaphore(AT_ONCE)
    bar = tqdm(total=len(left), unit="req", delay=2, disable=None)
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=API_KEY, max_retries=8) as client:
        with answers.open("a") as out:

            async def ask(line: dict[str, Any]) -> None:
                async with gate:
                    answer = await client.post(line["url"].removeprefix("/v1"), body=line["body"], cast_to=object)
                out.write(json.dumps({"custom_id": line["custom_id"], "response": answer}) + "\n")
                out.flush()  # whoever stops it keeps what there is
                bar.update()

            await asyncio.gather(*(ask(line) for line in left))
    bar.close()
    return len(left)


def main(argv: list[str]) -> int:
    asked = asyncio.run(run(Path(argv[0]), Path(argv[1])))
    print(f"{asked} asked, answers in {argv[1]}")
    return asked


if __name__ == "__main__":
    main(sys.argv[1:])
