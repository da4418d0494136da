"""A model by its name, ready to run. The one way in for prefill/, decode/, tandem.py and tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from models.config import ModelConfig, read_config
from models.interface import Model
from models.locate import locate
from models.weights import LoadProgress, fill, open_checkpoint
from protocol.errors import ConfigError, ModelError
from protocol.kv import KVLayout

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "half": torch.float16,
    "float": torch.float32,
}


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """model_hash names weights and configuration; two workers with the same hash compute the same KV."""

    model: Model
    config: ModelConfig
    model_hash: str
    dtype: torch.dtype
    device: torch.device
    path: Path
    progress: LoadProgress  # as the load ended

    def kv_layout(self, block_size: int) -> KVLayout:
        """The layout of a KV pool for this model; the pool's dtype is the model's."""
        return KVLayout(
            num_layers=self.config.num_layers,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            block_size=block_size,
            dtype="uint8" if self.config.family == "toy" else str(self.dtype).removeprefix("torch."),
            model_hash=self.model_hash,
        )


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    progress: Callable[[LoadProgress], None] | None = None,
    revision: str | None = None,
) -> LoadedModel:
    """name: whatever models.locate.locate() finds. Raises ModelError, ConfigError, each one sentence with what to do.

    dtype "auto": float32 on the CPU, the checkpoint's own on a GPU. device "auto": a GPU if torch sees one.
    """
    path = locate(name, revision)
    config = read_config(path)
    if config.family == "toy":
        from models.toy import ToyModel, toy_hash

        if device not in ("auto", "cpu"):
            raise ConfigError(f"the toy model runs on the CPU only, not on {device!r} (--device)", param="model.device")
        where = torch.device("cpu")
        return LoadedModel(ToyModel(config), config, toy_hash(), torch.float32, where, path, LoadProgress(0, 0, 0.0))
    where = choose_device(device)
    kind = choose_dtype(dtype, where, config)
    files = open_checkpoint(path)
    from models.llama import Llama

    try:
        with torch.inference_mode():
            model = Llama(config, kind, where)
            digest, state = fill(files, model.slots(), progress)
            model.pack()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ModelError(f"{path}: the weights do not fit into the memory of {where} ({error})") from error
    summary = xxhash.xxh3_128(digest)
    summary.update(repr(config).encode())
    return LoadedModel(model, config, summary.hexdigest(), kind, where, path, state)


def choose_device(device: str) -> torch.device:
    if device == "auto":
        # Asking torch for CUDA costs a second; without a driver there is nothing to ask for.
        return torch.device("cuda" if os.path.exists("/dev/nvidiactl") and torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") and not device.startswith("cuda:"):
        raise ConfigError(f"device must be auto, cpu or cuda, got {device!r} (--device)", param="model.device")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("no CUDA device here, or a torch without CUDA; use --device cpu", param="model.device")
    return torch.device(device)


def choose_dtype(dtype: str, device: torch.device, config: ModelConfig) -> torch.dtype:
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {dtype!r} (--dtype)", param="model.dtype")
        return DTYPES[dtype]
    return torch.float32 if device.type == "cpu" else DTYPES.get(config.dtype, torch.bfloat16)
