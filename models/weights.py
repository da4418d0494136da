"""Tensors out of safetensors files: mapped, checked, and copied once into the parameters they belong to.

What the headers say is read and checked in `checkpoint.py`. Pages of the map are given back tensor by tensor, so that a
checkpoint is never in memory twice. Called by models/load.py.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
import xxhash
from torch import Tensor

from models.checkpoint import read_header, weight_files
from protocol.errors import ModelError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class LoadProgress(msgspec.Struct, frozen=True):
    """How far a load is."""

    bytes_done: int
    bytes_total: int
    seconds: float

    @property
    def gb_per_s(self) -> float:
        return self.bytes_done / 1e9 / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Where one checkpoint tensor goes: a view into a parameter. arrange reorders it on the way, None leaves it as it is."""

    target: Tensor
    arrange: Callable[[Tensor], Tensor] | None = None


class SafetensorsFile:
    """One mapped file. Raises ModelError for whatever is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        self.nbytes = header.nbytes
        self._data_at = header.data_at
        self._entries = header.entries
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be mapped: {error}; fetch it again or correct its permissions") from error
        self._whole = torch.frombuffer(self._map, dtype=torch.uint8)

    def names(self) -> list[str]:
        """In the order of the file, which is the order to read it in."""
        return sorted(self._entries, key=lambda name: self._entries[name]["data_offsets"][0])

    def tensor_nbytes(self, name: str) -> int:
        start, end = self._entries[name]["data_offsets"]
        return int(end - start)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def raw(self, name: str) -> Tensor:
        """The tensor's bytes as uint8, a view of the map."""
        start, end = self._entries[name]["data_offsets"]
        return self._whole[self._data_at + start : self._data_at + end]

    def tensor(self, name: str) -> Tensor:
        """A view of the map where its alignment allows, else a copy."""
        entry = self._entries[name]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ModelError(f"{self.path}: tensor {name} is {entry['dtype']}; bf16, f16 and f32 checkpoints are served")
        raw = self.raw(name)
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(entry["shape"])

    def give_back(self, name: str) -> None:
        """Drop the mapped pages of this tensor from this process; the kernel's page cache keeps them as it sees fit."""
        start, end = (self._data_at + offset for offset in self._entries[name]["data_offsets"])
        page = mmap.PAGESIZE
        start, end = -(-start // page) * page, end // page * page
        if end > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)


def open_checkpoint(folder: Path) -> list[SafetensorsFile]:
    """Every weight file of a model directory. Raises ModelError."""
    return [SafetensorsFile(path) for path in weight_files(folder)]


def fill(
    files: list[SafetensorsFile],
    slots: dict[str, Slot],
    progress: Callable[[LoadProgress], None] | None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[bytes, LoadProgress]:
    """Copy every tensor named in slots out of the files. Returns (xxh3-128 over their names and bytes, the last progress).

    Tensors that no slot names are left alone. Raises ModelError.
    """
    where: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.names():
            if name in slots:
                where[name] = file
    missing = sorted(slots.keys() - where.keys())
    if missing:
        raise ModelError(
            f"{files[0].path.parent}: {len(missing)} tensors are missing from the checkpoint, first {missing[0]}; "
            "config.json and the weights do not belong together, or a file is missing"
        )
    total = sum(file.tensor_nbytes(name) for name, file in where.items())
    digests: dict[str, bytes] = {}
    started = clock()
    state = LoadProgress(0, total, 0.0)
    for name, file in where.items():
        slot = slots[name]
        if file.shape(name) != tuple(slot.target.shape):
            raise ModelError(
                f"{file.path}: tensor {name} has shape {list(file.shape(name))}, config.json asks for "
                f"{list(slot.target.shape)}; they do not belong together"
            )
        source = file.tensor(name)
        slot.target.copy_(source if slot.arrange is None else slot.arrange(source))
        digests[name] = xxhash.xxh3_128_digest(file.raw(name).numpy().data)
        del source
        file.give_back(name)
        state = LoadProgress(state.bytes_done + file.tensor_nbytes(name), total, clock() - started)
        if progress is not None:
            progress(state)
    summary = xxhash.xxh3_128(b"".join(name.encode() + digests[name] for name in sorted(digests)))
    return summary.digest(), state
