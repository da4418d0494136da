"""Traces of real services as plain arrivals: Azure CSV, Mooncake JSONL, ServeGen CSV, VTC CSV, and CSV of lengths alone.

The format is told by the first line, whatever the file is called; .gz is read as it is. Nothing is sent from here.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, TextIO

MOONCAKE_BLOCK = 512  # tokens behind one hash id


class Arrival(NamedTuple):
    """One request of a trace. at_s: seconds since the first (nan: the file has lengths alone). prefix: ids of the prompt's
    blocks of `block` tokens each, equal where prompts are equal; () where the trace does not say."""

    at_s: float
    tenant: str
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...] = ()
    block: int = MOONCAKE_BLOCK


class TraceError(Exception):
    """What is wrong with a trace, with file and line."""


# the columns that tell a format -> its name, and a row's arrival (seconds of any origin), tenant, prompt and output lengths
_Row = dict[str, str]
_CSV: dict[tuple[str, ...], tuple[str, Callable[[_Row], tuple[float, str, int, int]]]] = {
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"): (
        "azure",
        lambda row: (_azure_time(row["TIMESTAMP"]), "", int(row["ContextTokens"]), int(row["GeneratedTokens"])),
    ),
    ("arrival_s", "tenant", "input_tokens", "output_tokens"): (
        "servegen",
        lambda row: (float(row["arrival_s"]), row["tenant"], int(row["input_tokens"]), int(row["output_tokens"])),
    ),
    ("arrival_s", "client", "prompt_tokens", "output_tokens"): (
        "vtc",
        lambda row: (float(row["arrival_s"]), row["client"], int(row["prompt_tokens"]), int(row["output_tokens"])),
    ),
    ("num_prefill_tokens", "num_decode_tokens"): (
        "lengths",
        lambda row: (math.nan, "", int(row["num_prefill_tokens"]), int(row["num_decode_tokens"])),
    ),
}
FORMATS = ("mooncake", *(name for name, _ in _CSV.values()))


def read_trace(path: Path, limit: int | None = None) -> tuple[str, list[Arrival]]:
    """-> (its format, the first `limit` arrivals in order of time, the first at 0). Raises TraceError, OSError."""
    with _open(path) as file:
        first = file.readline()
        if first.lstrip().startswith("{"):
            name, rows = "mooncake", _mooncake(first, file, path)
        else:
            name, rows = _csv(first, file, path)
        arrivals = []
        for arrival in rows:
            arrivals.append(arrival)
            if limit is not None and len(arrivals) >= limit:
                break
    if not arrivals:
        raise TraceError(f"{path}: no request in it")
    if name == "lengths":
        return name, arrivals
    arrivals.sort(key=lambda arrival: arrival.at_s)
    origin = arrivals[0].at_s
    return name, [arrival._replace(at_s=arrival.at_s - origin) for arrival in arrivals]


def _open(path: Path) -> TextIO:
    return gzip.open(path, "rt", encoding="utf-8", newline="") if path.suffix == ".gz" else path.open(encoding="utf-8", newline="")


def _csv(first: str, file: TextIO, path: Path) -> tuple[str, Iterator[Arrival]]:
    columns = tuple(name.strip() for name in first.strip().split(","))
    for wanted, (name, parse) in _CSV.items():
        if set(wanted) <= set(columns):
            return name, _csv_rows(columns, parse, file, path)
    known = "; ".join(",".join(wanted) for wanted in _CSV)
    raise TraceError(f"{path}:1: neither JSON lines nor a CSV that is known here: columns {known}")


def _csv_rows(
    columns: tuple[str, ...], parse: Callable[[_Row], tuple[float, str, int, int]], file: TextIO, path: Path
) -> Iterator[Arrival]:
    for number, cells in enumerate(csv.reader(file), 2):
        if not cells:
            continue
        try:
            at, tenant, prompt, output = parse(dict(zip(columns, cells, strict=True)))
        except ValueError as error:
            raise TraceError(f"{path}:{number}: {error}") from None
        if prompt > 0 and output > 0:  # a few rows of real traces have none
            yield Arrival(at, tenant, prompt, output)


def _mooncake(first: str, file: TextIO, path: Path) -> Iterator[Arrival]:
    for number, line in enumerate((first, *file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            arrival = Arrival(row["timestamp"] / 1000, "", row["input_length"], row["output_length"], tuple(row["hash_ids"]))
        except (ValueError, KeyError, TypeError) as error:
            raise TraceError(f"{path}:{number}: {type(error).__name__} {error}") from None
        if arrival.prompt_tokens > 0 and arrival.output_tokens > 0:
            yield arrival


def _azure_time(text: str) -> float:
    day, _, clock = text.strip().partition(" ")  # seven digits after the point: one more than datetime takes
    hours, minutes, seconds = clock.split("+")[0].split(":")
    return datetime.fromisoformat(day).timestamp() + 3600 * int(hours) + 60 * int(minutes) + float(seconds)
