"""`tandem memory MODEL`: what a model takes and how many sequences fit beside it, before anything is bought or loaded.

From config.json alone (a hub id would have to be downloaded whole for that, so a directory, or its config.json, is asked for).
A GPU is named, or a size given. Called by `cli.py`; no torch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import msgspec

from configs.load import num_bytes
from models.config import ModelConfig, read_config
from models.locate import BUILT_IN
from models.quantization import choose
from models.sizes import kv_nbytes_per_token, num_params, weight_nbytes
from protocol.errors import ConfigError
from protocol.kv import DTYPE_NBYTES
from protocol.parallel import Parallel

# Bytes as the makers' data sheets count them (10^9).
GPUS = {
    "b200": 180e9,
    "h200": 141e9,
    "h100": 80e9,
    "a100": 80e9,
    "a100-40": 40e9,
    "l40s": 48e9,
    "a10": 24e9,
    "l4": 24e9,
    "t4": 16e9,
    "rtx4090": 24e9,
}
RESERVE = 1.5e9  # of a GPU: context, kernels, the logits and activations of a step; an estimate
ACTIVATION_TOKENS = 8192  # of one step, whose widest activations are counted


class Fit(msgspec.Struct, frozen=True):
    """One worker of a model on GPUs of one size. Bytes are those of its fullest rank; None where no memory was named."""

    model: str
    tp: int
    pp: int
    dtype: str
    quantization: str
    num_params: int
    weight_bytes: int  # of the whole model
    rank_weight_bytes: int
    kv_bytes_per_token: int  # of the whole model
    rank_kv_bytes_per_token: int
    max_model_len: int
    rank_bytes: int | None = None
    kv_tokens: int | None = None  # that the pool holds
    full_sequences: float | None = None  # of max_model_len tokens
    sequences: float | None = None  # of `context` tokens
    context: int | None = None


class Asked(NamedTuple):
    """The command's options, checked."""

    folder: Path
    name: str
    parallel: Parallel
    dtype: str | None
    rank_bytes: int | None
    utilization: float
    max_len: int | None
    context: int | None
    quantization: str = "auto"


def fit(asked: Asked) -> Fit:
    """Raises ConfigError, ModelError."""
    config = read_config(asked.folder)
    dtype = asked.dtype or config.dtype
    if dtype not in DTYPE_NBYTES:
        raise ConfigError(f"--dtype {dtype} is none of {', '.join(DTYPE_NBYTES)}", param="--dtype")
    nbytes, ranks = DTYPE_NBYTES[dtype], range(asked.parallel.num_ranks)
    if config.family == "toy":
        raise ConfigError("the toy model has no weights; name another", param="MODEL")
    held = choose(asked.quantization, config)
    weights = [weight_nbytes(config, asked.parallel, rank, nbytes, held) for rank in ranks]
    per_token = [kv_nbytes_per_token(config, asked.parallel, rank, nbytes) for rank in ranks]
    max_len = min(asked.max_len or config.max_position_embeddings, config.max_position_embeddings)
    told = Fit(
        model=asked.name,
        tp=asked.parallel.tp_size,
        pp=asked.parallel.pp_size,
        dtype=dtype,
        quantization=str(held),
        num_params=num_params(config, Parallel(), 0),
        weight_bytes=weight_nbytes(config, Parallel(), 0, nbytes, held),
        rank_weight_bytes=max(weights),
        kv_bytes_per_token=kv_nbytes_per_token(config, Parallel(), 0, nbytes),
        rank_kv_bytes_per_token=max(per_token),
        max_model_len=max_len,
    )
    if asked.rank_bytes is None:
        return told
    reserve = RESERVE + _activation_bytes(config, asked.parallel, nbytes)
    room = asked.rank_bytes * asked.utilization - reserve
    kv_tokens = max(0, min(int((room - w) / kv) for w, kv in zip(weights, per_token, strict=True)))
    context = min(asked.context or max_len, max_len)
    return msgspec.structs.replace(
        told,
        rank_bytes=asked.rank_bytes,
        kv_tokens=kv_tokens,
        full_sequences=kv_tokens / max_len,
        sequences=kv_tokens / context,
        context=context,
    )


def _activation_bytes(config: ModelConfig, parallel: Parallel, nbytes: int) -> float:
    """Of one step: the residual stream, and gate and up beside it."""
    widest = 2 * config.hidden_size + 2 * math.ceil(config.intermediate_size / parallel.tp_size)
    return ACTIVATION_TOKENS * widest * nbytes


def show(asked: Asked, as_json: bool) -> int:
    told = fit(asked)
    if as_json:
        print(json.dumps(msgspec.to_builtins(told), indent=2))
        return 0
    is_group = told.tp * told.pp > 1
    ranks = f" on {told.tp} x {told.pp} (tp x pp) ranks" if is_group else ""
    full = _size(told.kv_bytes_per_token * told.max_model_len)
    held = "" if told.quantization == "none" else f", {told.quantization} weights"
    print(f"{told.model}{ranks}, {told.dtype}{held}, up to {told.max_model_len:,} tokens")
    print(f"  weights    {_size(told.weight_bytes)}, {told.num_params:,} parameters")
    print(f"  KV         {told.kv_bytes_per_token:,} bytes a token, {full} for a full sequence")
    if is_group:
        print(
            f"  each rank  {_size(told.rank_weight_bytes)} of weights, {told.rank_kv_bytes_per_token:,} bytes a token (the fullest)"
        )
    if told.rank_bytes is None:
        print(f"  name a GPU to see what fits: --gpu {', '.join(GPUS)}, or --gpu 24GiB")
        return 0
    assert told.kv_tokens is not None
    place = f"  on {_size(told.rank_bytes)} "
    if told.kv_tokens < told.max_model_len:
        is_heavy = told.rank_weight_bytes > told.rank_bytes * asked.utilization
        why = "the weights alone do not fit" if is_heavy else f"room for {told.kv_tokens:,} tokens of KV"
        print(f"{place} {why}: not one full sequence; more ranks (--tp), a lower --max-model-len, or a larger GPU")
        return 1
    print(f"{place} room for {told.kv_tokens:,} tokens of KV: {told.full_sequences:.1f} full sequences at once")
    if told.context != told.max_model_len:
        print(f"             or {told.sequences:.0f} of {told.context:,} tokens")
    return 0


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def folder_of(name: str) -> Path:
    """A built-in model, a directory, or a config.json in one. Raises ConfigError for a hub id."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    path = Path(name).expanduser()
    if path.is_file() and path.name == "config.json":
        return path.parent
    if path.is_dir():
        return path
    raise ConfigError(
        f"{name} is no directory with a config.json; for a hub id download that one file first "
        f"(hf download {name} config.json --local-dir .) and name its directory",
        param="MODEL",
    )


def gpu_bytes(text: str) -> int:
    """ "h100" or "24GiB". Raises ConfigError."""
    if text.lower() in GPUS:
        return int(GPUS[text.lower()])
    size = num_bytes(text)
    if not size:
        raise ConfigError(f"--gpu {text} is neither one of {', '.join(GPUS)} nor a size like 24GiB", param="--gpu")
    return size
