"""Tensors out of safetensors files: mapped, checked, and copied once into the parameters they belong to.

What the headers say is read and checked in `checkpoint.py`. A rank of a group reads its own rows or columns only. Pages of the
map are given back tensor by tensor, so that a checkpoint is never in memory twice. Which checkpoint it is, says identity.py.
Called by models/load.py.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from models.checkpoint import read_header, weight_files
from protocol.errors import ModelError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I32": torch.int32}


class LoadProgress(msgspec.Struct, frozen=True):
    """How far a load is. Bytes are those of the tensors' parts that this rank holds."""

    bytes_done: int
    bytes_total: int
    seconds: float

    @property
    def gb_per_s(self) -> float:
        return self.bytes_done / 1e9 / self.seconds if self.seconds > 0 else 0.0


class Target(Protocol):
    """Where one checkpoint tensor, or a part of it, goes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor in the checkpoint."""

    @property
    def rows(self) -> range:
        """What of axis 0 is read."""

    @property
    def num_taken(self) -> int:
        """Numbers of it that this rank reads."""

    @property
    def is_float(self) -> bool:
        """Or integers, of a quantised checkpoint."""

    @property
    def is_optional(self) -> bool:
        """Whether a checkpoint may lack it; then None is taken."""

    def take(self, source: Tensor | None) -> None:
        """Those rows: a view that is valid during this call. Raises ModelError."""


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A Target that is a view into a parameter of floats. arrange reorders the part on the way, None
    leaves it as it is.

    The part is [start, start + its own size) of axis 0 (rows) or 1 (columns), of `total` in the checkpoint; None: all of it.
    """

    target: Tensor
    arrange: Callable[[Tensor], Tensor] | None = None
    axis: int = 0
    start: int = 0
    total: int | None = None
    is_float: bool = True
    is_optional: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor in the checkpoint."""
        sizes = list(self.target.shape)
        if self.total is not None:
            sizes[self.axis] = self.total
        return tuple(sizes)

    @property
    def rows(self) -> range:
        """What of axis 0 the part lies in."""
        rows = self.target.shape[0]
        return range(self.start, self.start + rows) if self.axis == 0 else range(rows)

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.target.shape[1]) if self.axis == 1 else slice(None)

    @property
    def num_taken(self) -> int:
        return self.target.numel()

    def take(self, source: Tensor | None) -> None:
        """A part of the rows touches no page but its own. Columns are picked out of every row, a row's pages being neighbours."""
        assert source is not None
        if self.axis == 1:
            source = source[:, self.columns]
        self.target.copy_(source if self.arrange is None else self.arrange(source))


class SafetensorsFile:
    """One mapped file. Raises ModelError for whatever is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        self.nbytes = header.nbytes
        self._data_at = header.data_at
        self._entries = header.entries
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - as long as this object lives, for read()
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be mapped: {error}; fetch it again or correct its permissions") from error
        self._whole = torch.frombuffer(self._map, dtype=torch.uint8)

    def names(self) -> list[str]:
        """In the order of the file, which is the order to read it in."""
        return sorted(self._entries, key=lambda name: self._entries[name]["data_offsets"][0])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        entry = self._entries[name]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ModelError(f"{self.path}: tensor {name} is {entry['dtype']}; bf16, f16 and f32 checkpoints are served")
        return dtype

    def span(self, name: str, rows: range | None = None) -> tuple[int, int]:
        """Bytes [start, end) of the file that hold the tensor, or these rows of it."""
        start, end = (self._data_at + offset for offset in self._entries[name]["data_offsets"])
        if rows is None:
            return start, end
        row_nbytes = (end - start) // max(1, self.shape(name)[0])
        return start + rows.start * row_nbytes, start + rows.stop * row_nbytes

    def tensor(self, name: str, rows: range) -> Tensor:
        """These rows of it: a view of the map where its alignment allows, else a copy. Nothing is read before it is looked at."""
        dtype = self.dtype(name)
        start, end = self.span(name, rows)
        raw = self._whole[start:end]
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(len(rows), *self.shape(name)[1:])

    def read(self, start: int, length: int) -> bytes:
        """Bytes of the file, past the map: reading a page of it would fetch its neighbours. Any thread. Raises ModelError."""
        data = os.pread(self._file.fileno(), length, start)
        if len(data) != length:
            raise ModelError(f"{self.path} became shorter while it was read; fetch it again")
        return data

    def give_back(self, start: int, end: int) -> None:
        """Drop the mapped pages of bytes [start, end) from this process; the kernel's page cache keeps them as it sees fit."""
        page = mmap.PAGESIZE
        start, end = -(-start // page) * page, end // page * page
        if end > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)


def open_checkpoint(folder: Path) -> list[SafetensorsFile]:
    """Every weight file of a model directory. Raises ModelError."""
    return [SafetensorsFile(path) for path in weight_files(folder)]


def fill(
    files: list[SafetensorsFile],
    slots: Mapping[str, Target],
    progress: Callable[[LoadProgress], None] | None,
    clock: Callable[[], float] = time.perf_counter,
) -> LoadProgress:
    """Hand what the slots ask for out of the files to them. Returns the last progress.

    Tensors that no slot names are left alone. Raises ModelError.
    """
    where = find(files, slots)
    total = sum(_part_nbytes(file, name, slots[name]) for name, file in where.items())
    started = clock()
    state = LoadProgress(0, total, 0.0)
    for name, file in where.items():
        slot = slots[name]
        if file.shape(name) != slot.shape:
            raise ModelError(
                f"{file.path}: tensor {name} has shape {list(file.shape(name))}, config.json asks for "
                f"{list(slot.shape)}; they do not belong together"
            )
        if file.dtype(name).is_floating_point != slot.is_float:
            found, wanted = str(file.dtype(name)).removeprefix("torch."), "floats" if slot.is_float else "int32"
            raise ModelError(f"{file.path}: tensor {name} is {found}; by config.json (quantization_config) {wanted} belong there")
        slot.take(file.tensor(name, slot.rows))
        file.give_back(*file.span(name, slot.rows))
        state = LoadProgress(state.bytes_done + _part_nbytes(file, name, slot), total, clock() - started)
        if progress is not None:
            progress(state)
    for name in slots.keys() - where.keys():
        slots[name].take(None)
    return state


def find(files: list[SafetensorsFile], slots: Mapping[str, Target]) -> dict[str, SafetensorsFile]:
    """Which file holds each of these tensors, in the order to read them in. Raises ModelError when one that must be there is
    missing."""
    where = {name: file for file in files for name in file.names() if name in slots}
    missing = sorted(name for name in slots.keys() - where.keys() if not slots[name].is_optional)
    if missing:
        raise ModelError(
            f"{files[0].path.parent}: {len(missing)} tensors are missing from the checkpoint, first {missing[0]}; "
            "config.json and the weights do not belong together, or a file is missing"
        )
    return where


def _part_nbytes(file: SafetensorsFile, name: str, slot: Target) -> int:
    return slot.num_taken * file.dtype(name).itemsize
