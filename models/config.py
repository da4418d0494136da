"""The shape of a model, read from a Hugging Face config.json. No torch: the CLI prints it before anything heavy is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from models.quantization import StoredQuantization, parse_stored
from protocol.errors import ModelError

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "TandemToyForCausalLM": "toy",
}


class Rope(msgspec.Struct, frozen=True):
    """Rotary embedding. kind: "default", "linear" (positions / factor) or "llama3" (low frequencies / factor, blended)."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a runner needs to know about a checkpoint before it opens the weights."""

    architecture: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()  # per layer: how many tokens a token sees; None or missing: all before it
    dtype: str = "float32"  # of the checkpoint
    quantization: StoredQuantization | None = None  # of the checkpoint

    @property
    def family(self) -> str:
        return FAMILIES[self.architecture]

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None


def read_config(folder: Path) -> ModelConfig:
    """From folder/config.json and, for the stop tokens, generation_config.json. Raises ModelError."""
    path = folder / "config.json"
    raw = _read_json(path)
    if raw is None:
        raise ModelError(
            f"{path} does not exist; a model is a directory with config.json, tokenizer.json and *.safetensors, "
            "as Hugging Face lays it out"
        )
    generation = _read_json(folder / "generation_config.json") or {}
    return parse_config(raw, generation, path)


def parse_config(raw: dict[str, Any], generation: dict[str, Any], path: Path) -> ModelConfig:
    names = raw.get("architectures") or []
    name = next((name for name in names if name in FAMILIES), None)
    if name is None:
        raise ModelError(
            f"{path}: architecture {', '.join(names) or '(none named)'} is not one of those served: {', '.join(FAMILIES)}"
        )
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"{path}: hidden_act {activation!r} is not served, only silu")
    reader = _Reader(raw, path)
    family = FAMILIES[name]
    num_heads = reader.integer("num_attention_heads")
    num_kv_heads = reader.integer("num_key_value_heads", num_heads)
    hidden_size = reader.integer("hidden_size")
    num_layers = reader.integer("num_hidden_layers")
    head_dim = reader.integer("head_dim", 128 if family == "qwen3" else hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(f"{path}: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}")
    if head_dim % 2:
        raise ModelError(f"{path}: head_dim {head_dim} is odd; rotary embeddings need pairs")
    attention_bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        architecture=name,
        vocab_size=reader.integer("vocab_size"),
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=reader.integer("intermediate_size"),
        max_position_embeddings=reader.integer("max_position_embeddings", 2048),
        eos_token_ids=_token_ids(raw.get("eos_token_id"), generation.get("eos_token_id")),
        bos_token_id=next(iter(_token_ids(raw.get("bos_token_id"))), None),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_rope(raw, path),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=True if family == "qwen2" else attention_bias and family != "mistral",
        o_bias=attention_bias and family in ("llama", "qwen3"),
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        windows=_windows(raw, family, num_layers),
        quantization=parse_stored(raw.get("quantization_config"), path),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
    )


class _Reader:
    """Positive integers out of a config, with errors that name file and key."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw = raw
        self.path = path

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"{self.path}: {key} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{self.path}: {key} must be a positive integer, got {value!r}")
        return value


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object; download it again")
    return value


def _token_ids(*values: Any) -> tuple[int, ...]:
    found: dict[int, None] = {}
    for value in values:
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int):
                found[token] = None
    return tuple(found)


def _rope(raw: dict[str, Any], path: Path) -> Rope:
    """Both spellings: rope_theta + rope_scaling, and the newer rope_parameters that holds them together."""
    given = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ModelError(f"{path}: rope type {kind!r} is not served; default, linear and llama3 are")
    partial = given.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ModelError(f"{path}: partial_rotary_factor {partial} is not served, only 1.0")
    try:
        return Rope(
            theta=float(given.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
            kind=kind,
            factor=float(given["factor"]) if kind != "default" else 1.0,
            low_freq_factor=float(given["low_freq_factor"]) if kind == "llama3" else 1.0,
            high_freq_factor=float(given["high_freq_factor"]) if kind == "llama3" else 4.0,
            original_max_position_embeddings=int(given["original_max_position_embeddings"]) if kind == "llama3" else 8192,
        )
    except KeyError as error:
        raise ModelError(f"{path}: rope type {kind!r} needs {error}, which is missing") from error


def _windows(raw: dict[str, Any], family: str, num_layers: int) -> tuple[int | None, ...]:
    # Mistral's configuration class slides by 4,096 tokens unless the file says otherwise; null switches it off.
    window = raw.get("sliding_window", 4096 if family == "mistral" else None)
    if not window or family == "llama":
        return ()
    if family == "mistral":
        return (int(window),) * num_layers
    if not raw.get("use_sliding_window", False):
        return ()
    kinds = raw.get("layer_types")
    if kinds is None:
        full = int(raw.get("max_window_layers", 28))
        kinds = ["full_attention" if layer < full else "sliding_attention" for layer in range(num_layers)]
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
