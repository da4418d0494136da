"""Which files hold a model's weights, and what their headers say. No torch: `tandem serve` reads this before it starts anything.

The safetensors format is read by hand (8 bytes of header length, a JSON header, the data), because every way in which a file
can be wrong must become one sentence that names the file. The bytes themselves are read in `models/weights.py`.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import msgspec

from protocol.errors import ModelError

ITEM_NBYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4}
MAX_HEADER_NBYTES = 100_000_000
INDEX_NAME = "model.safetensors.index.json"
AGAIN = "the file is damaged or its download was cut short; fetch it again"


class Header(msgspec.Struct, frozen=True):
    """One safetensors file. entries: tensor -> {"dtype", "shape", "data_offsets"}; offsets count from `data_at`."""

    nbytes: int
    data_at: int
    entries: dict[str, dict[str, Any]]


def weight_files(folder: Path) -> list[Path]:
    """Those of the index, or model.safetensors, or whatever *.safetensors is there. Raises ModelError."""
    index = folder / INDEX_NAME
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [name for name in names if not (folder / name).exists()]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is no index of safetensors files ({error}); fetch it again") from error
        if missing:
            raise ModelError(f"{folder} lacks {len(missing)} of {len(names)} weight files, first {missing[0]}; fetch it again")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    paths = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not paths:
        others = [path.name for suffix in ("*.bin", "*.pth", "*.gguf", "*.pt") for path in folder.glob(suffix)]
        hint = f"; it has {others[0]}, which is not read: convert it with transformers' save_pretrained" if others else ""
        raise ModelError(f"{folder} holds no *.safetensors weights{hint}")
    return paths


def read_header(path: Path) -> Header:
    """Checked against the length of the file, so that a download that was cut short is seen here. Raises ModelError."""
    try:
        with open(path, "rb") as file:
            nbytes = file.seek(0, 2)
            if nbytes < 8:
                raise ModelError(f"{path} has {nbytes} bytes and is no safetensors file; {AGAIN}")
            file.seek(0)
            (header_nbytes,) = struct.unpack("<Q", file.read(8))
            if header_nbytes > min(MAX_HEADER_NBYTES, nbytes - 8):
                raise ModelError(f"{path} claims a header of {header_nbytes} bytes in a file of {nbytes}; {AGAIN}")
            text = file.read(header_nbytes)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}; fetch it again or correct its permissions") from error
    data_at = 8 + header_nbytes
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            _check(path, name, entry, nbytes - data_at)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} has no readable safetensors header ({error}); {AGAIN}") from error
    return Header(nbytes, data_at, entries)


def _check(path: Path, name: str, entry: dict[str, Any], data_nbytes: int) -> None:
    start, end = entry["data_offsets"]
    count = 1
    for size in entry["shape"]:
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"shape of {name}")
        count *= size
    if not 0 <= start <= end:
        raise ValueError(f"data_offsets of {name}")
    if end > data_nbytes:
        raise ModelError(f"{path} has {data_nbytes} bytes of data, but tensor {name} ends at byte {end}; {AGAIN}")
    item_nbytes = ITEM_NBYTES.get(entry["dtype"])
    if item_nbytes is not None and count * item_nbytes != end - start:
        raise ValueError(f"{name} of shape {entry['shape']} and {entry['dtype']} takes {end - start} bytes")
