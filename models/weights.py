"""Tensors out of safetensors files: mapped, checked, and copied once into the parameters they belong to.

Reads the format itself (8 bytes of header length, a JSON header, the data), because every way in which a file can be wrong
must become one sentence that names the file. Pages of the map are given back tensor by tensor, so that a checkpoint is
never in memory twice. Called by models/load.py.
"""

from __future__ import annotations

import json
import mmap
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash
from torch import Tensor

from protocol.errors import ModelError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
MAX_HEADER_NBYTES = 100_000_000
INDEX_NAME = "model.safetensors.index.json"
AGAIN = "the file is damaged or its download was cut short; fetch it again"


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
        try:
            with open(path, "rb") as file:
                file.seek(0, 2)
                self.nbytes = file.tell()
                if self.nbytes < 8:
                    raise ModelError(f"{path} has {self.nbytes} bytes and is no safetensors file; {AGAIN}")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}; fetch it again or correct its permissions") from error
        (header_nbytes,) = struct.unpack("<Q", self._map[:8])
        self._data_at = 8 + header_nbytes
        if header_nbytes > min(MAX_HEADER_NBYTES, self.nbytes - 8):
            raise ModelError(f"{path} claims a header of {header_nbytes} bytes in a file of {self.nbytes}; {AGAIN}")
        try:
            header = json.loads(self._map[8 : self._data_at])
            header.pop("__metadata__", None)
            self._entries: dict[str, dict[str, Any]] = header
            for name, entry in header.items():
                self._check(name, entry)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} has no readable safetensors header ({error}); {AGAIN}") from error
        self._whole = torch.frombuffer(self._map, dtype=torch.uint8)

    def _check(self, name: str, entry: dict[str, Any]) -> None:
        start, end = entry["data_offsets"]
        count = 1
        for size in entry["shape"]:
            if not isinstance(size, int) or size < 0:
                raise ValueError(f"shape of {name}")
            count *= size
        if not 0 <= start <= end:
            raise ValueError(f"data_offsets of {name}")
        if self._data_at + end > self.nbytes:
            raise ModelError(f"{self.path} has {self.nbytes} bytes, but tensor {name} ends at byte {self._data_at + end}; {AGAIN}")
        dtype = DTYPES.get(entry["dtype"])
        if dtype is not None and count * dtype.itemsize != end - start:
            raise ValueError(f"{name} of shape {entry['shape']} and {entry['dtype']} takes {end - start} bytes")

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
    """Every weight file of a model directory: those of the index, or model.safetensors, or whatever *.safetensors is there."""
    index = folder / INDEX_NAME
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is no index of safetensors files ({error}); fetch it again") from error
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise ModelError(f"{folder} lacks {len(missing)} of {len(names)} weight files, first {missing[0]}; fetch it again")
        return [SafetensorsFile(folder / name) for name in names]
    single = folder / "model.safetensors"
    paths = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not paths:
        others = [path.name for suffix in ("*.bin", "*.pth", "*.gguf", "*.pt") for path in folder.glob(suffix)]
        hint = f"; it has {others[0]}, which is not read: convert it with transformers' save_pretrained" if others else ""
        raise ModelError(f"{folder} holds no *.safetensors weights{hint}")
    return [SafetensorsFile(path) for path in paths]


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
