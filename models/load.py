"""A model by its name, or one rank's part of it, ready to run. The one way in for prefill/, decode/, tandem.py and tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from models.config import ModelConfig, read_config
from models.identity import model_hash
from models.interface import WHOLE, Model, Shard, TensorRanks
from models.locate import locate
from models.quantization import FLOATS, Quantization, check_parts, choose
from models.weights import LoadProgress, fill, find, open_checkpoint
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
    """model is the part of `shard`. model_hash names the whole model's weights and configuration (models/identity.py); two
    workers with the same hash compute the same KV, whatever their sizes."""

    model: Model
    config: ModelConfig
    model_hash: str
    dtype: torch.dtype
    device: torch.device
    path: Path
    progress: LoadProgress  # as the load ended
    shard: Shard = WHOLE
    quantization: Quantization = FLOATS

    def kv_layout(self, block_size: int) -> KVLayout:
        """The layout of a KV pool for the whole model; the pool's dtype is the model's. A rank's own pool holds the part that
        kvtransfer.layout.rank_layout says."""
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
    shard: Shard = WHOLE,
    ranks: TensorRanks | None = None,
    quantization: str = "auto",
) -> LoadedModel:
    """name: whatever models.locate.locate() finds. Raises ModelError, ConfigError, each one sentence with what to do.

    dtype "auto": float32 on the CPU, the checkpoint's own on a GPU. device "auto": a GPU if torch sees one. shard: which part to
    load; nothing else is read but samples for the hash. ranks: the other tensor ranks, where there are some. quantization "auto":
    as the checkpoint is; "int8", "int4": rounded as it is loaded (models/quantization.py).
    """
    assert ranks is not None or shard.parallel.tp_size == 1, "tensor ranks without each other"
    path = locate(name, revision)
    config = read_config(path)
    held = choose(quantization, config)
    check_parts(config, held, shard.parallel)
    if config.family == "toy":
        return _load_toy(path, config, device, shard, ranks)
    where = choose_device(device)
    kind = choose_dtype(dtype, where, config)
    files = open_checkpoint(path)
    from models.llama import Llama

    try:
        with torch.inference_mode():
            model = Llama(config, kind, where, shard, ranks, held)
            # The whole model without memory knows the names of all its tensors; the hash covers those, and a tensor that is
            # missing is seen by every rank.
            names = Llama(config, kind, torch.device("meta"), quantization=held).slots()
            digest = model_hash(config, find(files, names), held.rounded)
            state = fill(files, model.slots(), progress)
            model.pack()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ModelError(f"{path}: the weights do not fit into the memory of {where} ({error})") from error
    return LoadedModel(model, config, digest, kind, where, path, state, shard, held)


def _load_toy(path: Path, config: ModelConfig, device: str, shard: Shard, ranks: TensorRanks | None) -> LoadedModel:
    from models.toy import ToyModel, toy_hash

    if device not in ("auto", "cpu"):
        raise ConfigError(f"the toy model runs on the CPU only, not on {device!r} (--device)", param="model.device")
    model = ToyModel(config, shard, ranks)
    return LoadedModel(model, config, toy_hash(), torch.float32, torch.device("cpu"), path, LoadProgress(0, 0, 0.0), shard)


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
