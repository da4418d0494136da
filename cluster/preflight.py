"""What can be told about a configuration and its model before anything is started: no torch, no Ray, headers instead of weights.

`examine` is called by `tandem serve`, so that what a worker would trip over half a minute later is one sentence now. The numbers
that several parts must agree on (`max_model_len`, `cpu_kv_bytes`) are computed here for all of them.
"""

from __future__ import annotations

import os

import psutil

from api.tokenizer import Tokenizer
from cluster.tenants_file import check_tenants
from configs.schema import Config
from engine.memory import num_blocks_on_cpu
from kvtransfer.layout import rank_layout
from models.checkpoint import read_header, weight_files
from models.config import ModelConfig, read_config
from models.locate import BUILT_IN, locate
from models.quantization import check_parts, choose
from models.split import check as check_split
from protocol.errors import ConfigError
from protocol.kv import KVLayout

CPU_KV_SHARE = 0.2  # of the memory that is available at start, for all workers of this host together
MIN_CPU_KV_BYTES, MAX_CPU_KV_BYTES = 256 << 20, 8 << 30
DEFAULT_BLOCK_SIZE = {"cpu": 32, "cuda": 16}  # tokens
MAX_VOCAB_PADDING = 1024  # by which the vocabularies of two models of one tokenizer may differ
DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # Linux, WSL2


def examine(config: Config) -> None:
    """Raises ModelError or ConfigError: one sentence that names the file or the key, and what to do."""
    check_tenants(config)
    for one in config.each():
        _examine_model(one)


def _examine_model(config: Config) -> None:
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
    _check_groups(config, model)
    _examine_draft(config, model)
    if runs_on_cpu(config, model):
        _check_cpu_pool(config, _layout(config, model), max_len)


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


def cpu_kv_bytes(config: Config, role: str) -> int:
    """The KV pool of one rank of a worker of this role: all ranks of all workers share this host's memory."""
    num_ranks = config.parallel(role).num_ranks
    if config.model.kv_cache_bytes:
        return config.model.kv_cache_bytes // num_ranks
    share = psutil.virtual_memory().available * CPU_KV_SHARE / config.num_workers
    return int(min(max(share, MIN_CPU_KV_BYTES), MAX_CPU_KV_BYTES)) // num_ranks


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


def _layout(config: Config, model: ModelConfig) -> KVLayout:
    dtype = "float32" if config.model.dtype == "auto" else config.model.dtype
    return KVLayout(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_size=config.model.block_size or DEFAULT_BLOCK_SIZE["cpu"],
        dtype="uint8" if model.family == "toy" else dtype,
        model_hash="",
    )


def _check_groups(config: Config, model: ModelConfig) -> None:
    for role in config.roles:
        try:
            check_split(model, config.parallel(role))
            check_parts(model, choose(config.model.quantization, model), config.parallel(role))
        except ConfigError as error:
            raise ConfigError(f"{role} workers of {config.parallel(role)}: {error.message}", param=f"{role}.tp") from None


def _examine_draft(config: Config, model: ModelConfig) -> None:
    """That the draft model is there and can be read."""
    name = config.decode.speculative_model
    if name is None:
        return
    folder = locate(name, None)
    draft = read_config(folder)
    check_draft(config, model, draft)
    if draft.family != "toy":
        for path in weight_files(folder):
            read_header(path)


def check_draft(config: Config, model: ModelConfig, draft: ModelConfig) -> None:
    """Raises ConfigError for a draft model of another tokenizer, as far as the sizes show it."""
    if abs(model.vocab_size - draft.vocab_size) > MAX_VOCAB_PADDING or (model.family == "toy") != (draft.family == "toy"):
        raise ConfigError(
            f"the draft model {config.decode.speculative_model} has {draft.vocab_size} tokens and {config.model.name} has "
            f"{model.vocab_size}; a draft model needs the tokenizer of its target (--speculative-model)",
            param="decode.speculative_model",
        )


def kv_share(config: Config, role: str, target: KVLayout) -> float:
    """Of a rank's memory for KV, the part that is the target's; the rest is for as many blocks of the draft model."""
    name = config.decode.speculative_model
    if role != "decode" or name is None:
        return 1.0
    draft = read_config(locate(name, None))
    own = KVLayout(draft.num_layers, draft.num_kv_heads, draft.head_dim, target.block_size, target.dtype, "")
    return target.block_nbytes / (target.block_nbytes + own.block_nbytes)


def _check_cpu_pool(config: Config, layout: KVLayout, max_len: int) -> None:
    if config.model.num_blocks_override is not None:
        return
    for role in config.roles:
        parallel = config.parallel(role)
        for rank in range(parallel.num_ranks):
            own = rank_layout(layout, parallel, rank)
            num_blocks_on_cpu(own, int(cpu_kv_bytes(config, role) * kv_share(config, role, own)), max_len)
