"""What can be told about a configuration and its model before anything is started: no torch, no Ray, headers instead of weights.

`examine` is called by `tandem serve`, so that what a worker would trip over half a minute later is one sentence now. The numbers
that several parts must agree on (`max_model_len`, `cpu_kv_bytes`) are computed here for all of them.
"""

from __future__ import annotations

import os

import psutil

from api.tokenizer import Tokenizer
from configs.schema import Config
from engine.memory import num_blocks_on_cpu
from models.checkpoint import read_header, weight_files
from models.config import ModelConfig, read_config
from models.locate import BUILT_IN, locate
from protocol.errors import ConfigError
from protocol.kv import KVLayout

CPU_KV_SHARE = 0.2  # of the memory that is available at start, for all workers of this host together
MIN_CPU_KV_BYTES, MAX_CPU_KV_BYTES = 256 << 20, 8 << 30
DEFAULT_BLOCK_SIZE = {"cpu": 32, "cuda": 16}  # tokens
DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # Linux, WSL2


def examine(config: Config) -> None:
    """Raises ModelError or ConfigError: one sentence that names the file or the key, and what to do."""
    name, revision = config.model.name, config.model.revision
    folder = locate(name, revision)
    if revision is not None and (name in BUILT_IN or os.path.isdir(os.path.expanduser(name))):
        raise ConfigError(f"--revision {revision} belongs to a model of a hub; {name} is on this machine", param="model.revision")
    model = read_config(folder)
    max_len = max_model_len(config, model)
    Tokenizer(folder, config.model.chat_template)
    if model.family == "toy" and config.model.dtype not in ("auto", "float32"):
        raise ConfigError("the toy model has no weights and its KV is bytes; leave --dtype away", param="model.dtype")
    if model.family != "toy":
        for path in weight_files(folder):
            read_header(path)
    if runs_on_cpu(config, model):
        _check_cpu_pool(config, model, max_len)


def max_model_len(config: Config, model: ModelConfig) -> int:
    """Tokens of prompt and output together. Raises ConfigError when that is more than the model or a step can do."""
    asked, allowed = config.model.max_len, model.max_position_embeddings
    if asked is not None and asked > allowed:
        raise ConfigError(
            f"model.max_len {asked} (--max-model-len) is above what the model was made for, {allowed} tokens "
            "(max_position_embeddings of its config.json); lower it",
            param="model.max_len",
        )
    max_len = asked or allowed
    decode = config.decode
    if not decode.enable_chunked_prefill and decode.max_num_batched_tokens < max_len:
        raise ConfigError(
            "decode.enable_chunked_prefill is false, so a prompt must fit into one step of a decode worker: "
            f"decode.max_num_batched_tokens {decode.max_num_batched_tokens} is below the context of {max_len} tokens; "
            f"--set decode.max_num_batched_tokens={max_len}, or lower --max-model-len",
            param="decode.max_num_batched_tokens",
        )
    return max_len


def cpu_kv_bytes(config: Config, num_sharers: int) -> int:
    """The KV pool of one of `num_sharers` workers that share this host's memory."""
    share = psutil.virtual_memory().available * CPU_KV_SHARE / num_sharers
    return config.model.kv_cache_bytes or int(min(max(share, MIN_CPU_KV_BYTES), MAX_CPU_KV_BYTES))


def runs_on_cpu(config: Config, model: ModelConfig) -> bool:
    """As far as it can be told without asking the driver. Raises ConfigError when a GPU is asked for and there is none."""
    device, has_driver = config.model.device, any(map(os.path.exists, DRIVERS))
    if device == "cuda" and model.family == "toy":
        raise ConfigError("the toy model runs on the CPU only; leave --device cuda away", param="model.device")
    if device == "cuda" and not has_driver:
        raise ConfigError(
            f"--device cuda, but there is no NVIDIA driver here (no {DRIVERS[0]}); use --device cpu, or see `tandem doctor`",
            param="model.device",
        )
    return device == "cpu" or not has_driver or model.family == "toy"


def _check_cpu_pool(config: Config, model: ModelConfig, max_len: int) -> None:
    if config.model.num_blocks_override is not None:
        return
    dtype = "float32" if config.model.dtype == "auto" else config.model.dtype
    layout = KVLayout(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_size=config.model.block_size or DEFAULT_BLOCK_SIZE["cpu"],
        dtype="uint8" if model.family == "toy" else dtype,
        model_hash="",
    )
    num_workers = config.prefill.replicas + config.decode.replicas
    num_blocks_on_cpu(layout, cpu_kv_bytes(config, num_workers), max_len)
