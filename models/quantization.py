"""Which weights are integers: rounded at load (--quantization), or as a GPTQ or AWQ checkpoint has them. No torch.

Embedding, norms and biases stay floats. Rounded at load, int8 has a scale for each row; int4 has one for each 32 inputs, and
keeps what suffers most in int8: the values and what follows the attention, and the head (as llama.cpp's mixtures of K-quants do;
docs/quantization.md has the figures). Called by models/config.py, models/llama.py, models/load.py, models/sizes.py and
cluster/preflight.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from protocol.errors import ConfigError, ModelError
from protocol.parallel import Parallel, part

if TYPE_CHECKING:
    from models.config import ModelConfig

CHOICES = ("auto", "none", "int8", "int4")
INT4_GROUP_LEN = 32
WITH_INT4_KEPT_IN_INT8 = ("v_proj", "o_proj", "lm_head")
FLAG = "--quantization"


class StoredQuantization(msgspec.Struct, frozen=True, kw_only=True):
    """What quantization_config of a checkpoint says. group_len 0: a scale for each row."""

    method: str  # "gptq" or "awq"
    bits: int
    group_len: int
    is_symmetric: bool
    zero_offset: int = 0  # GPTQ's first format stores zero points less one
    is_act_order: bool = False
    has_head: bool = False
    only: tuple[str, ...] = ()  # if any: no module but these is quantised
    kept: tuple[str, ...] = ()  # modules with one of these in their names are not

    def covers(self, module: str) -> bool:
        """Whether this linear module ("model.layers.0.mlp.up_proj", "lm_head") is quantised."""
        if module == "lm_head":
            return self.has_head and not any(name in module for name in self.kept)
        return not any(name in module for name in self.kept) and (not self.only or any(module.endswith(n) for n in self.only))


class Quantization(msgspec.Struct, frozen=True):
    """How one model's matrices are held. rounded: "int8", "int4" or "" ; stored: of the checkpoint; neither: floats."""

    rounded: str = ""
    stored: StoredQuantization | None = None

    @property
    def is_any(self) -> bool:
        return bool(self.rounded) or self.stored is not None

    def bits(self, module: str) -> int:
        """Of a linear module's weights; 0: floats."""
        if self.stored is not None:
            return self.stored.bits if self.stored.covers(module) else 0
        if self.rounded == "int4":
            return 8 if module.endswith(WITH_INT4_KEPT_IN_INT8) else 4
        return 8 if self.rounded == "int8" else 0

    def group_len(self, module: str) -> int:
        """Inputs that share a scale; 0: all of a row."""
        if self.stored is not None:
            return self.stored.group_len
        return INT4_GROUP_LEN if self.bits(module) == 4 else 0

    def __str__(self) -> str:
        if self.stored is not None:
            group = f" in groups of {self.stored.group_len}" if self.stored.group_len else ""
            return f"{self.stored.method} int{self.stored.bits}{group}"
        return self.rounded or "none"


FLOATS = Quantization()


def choose(asked: str, config: ModelConfig) -> Quantization:
    """asked: one of CHOICES. Raises ConfigError where it contradicts the checkpoint."""
    if asked not in CHOICES:
        raise ConfigError(f"quantization must be one of {', '.join(CHOICES)}, got {asked!r} ({FLAG})", param="model.quantization")
    stored = config.quantization
    if stored is None:
        if asked in ("int8", "int4") and config.family == "toy":
            raise ConfigError(f"the toy model has no weights to quantise; leave {FLAG} away", param="model.quantization")
        return Quantization(rounded="" if asked in ("auto", "none") else asked)
    if asked not in ("auto", f"int{stored.bits}"):
        raise ConfigError(
            f"the checkpoint is quantised already ({Quantization(stored=stored)}), which {FLAG} {asked} cannot change",
            param="model.quantization",
        )
    return Quantization(stored=stored)


def check_parts(config: ModelConfig, quantization: Quantization, parallel: Parallel) -> None:
    """Whether every tensor rank gets whole groups of the matrices that are dealt by inputs. Raises ConfigError."""
    tp = parallel.tp_size
    if tp == 1 or not quantization.is_any:
        return
    heads = min(config.num_kv_heads, tp)
    ends = {
        "self_attn.o_proj": [part(config.num_kv_heads, heads, t).stop * config.head_dim * (config.num_heads // config.num_kv_heads)
                             for t in range(heads)],
        "mlp.down_proj": [part(config.intermediate_size, tp, t).stop for t in range(tp)],
    }  # fmt: skip
    for module, stops in ends.items():
        group_len = quantization.group_len(module)
        name = f"model.layers.0.{module}"
        if not quantization.bits(name):
            continue
        if quantization.stored is not None and quantization.stored.is_act_order and group_len:
            raise ConfigError(
                f"{tp} tensor ranks (--prefill-tp, --decode-tp) cannot share {module}, whose groups are in the order of "
                "activations (desc_act in quantization_config); serve this checkpoint with one",
                param="model.quantization",
            )
        if group_len and any(stop % group_len for stop in stops[:-1]):
            raise ConfigError(
                f"{tp} tensor ranks (--prefill-tp, --decode-tp) would cut a group of {group_len} weights of {module} in two; "
                f"choose a number of ranks that deals {stops[-1]} inputs in whole groups"
                + ("" if quantization.stored else f", or {FLAG} int8"),
                param="model.quantization",
            )


# ---- config.json -----------------------------------------------------------------------------------------------------


def parse_stored(raw: Any, path: Path) -> StoredQuantization | None:
    """quantization_config of a config.json. Raises ModelError that names the field which is not served."""
    if not raw:
        return None
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: quantization_config must be an object, got {raw!r}")

    def refuse(field: str, served: str) -> ModelError:
        return ModelError(f"{path}: quantization_config.{field} {raw.get(field)!r} is not served, only {served}")

    method = raw.get("quant_method")
    if method not in ("gptq", "awq"):
        raise refuse("quant_method", "gptq and awq; use the unquantised checkpoint, with --quantization int8 or int4")
    bits, group_len = raw.get("bits", raw.get("w_bit")), raw.get("group_size", raw.get("q_group_size"))
    if bits not in ((4, 8) if method == "gptq" else (4,)):
        raise refuse("bits", "4 and 8" if method == "gptq" else "4")
    if not isinstance(group_len, int) or isinstance(group_len, bool) or (group_len != -1 and (group_len < 8 or group_len % 8)):
        raise refuse("group_size", "-1 (whole rows) and multiples of 8")
    if method == "awq":
        if str(raw.get("version", "gemm")).lower() != "gemm":
            raise refuse("version", "gemm")
        return StoredQuantization(
            method="awq", bits=4, group_len=max(0, group_len), is_symmetric=not raw.get("zero_point", True),
            kept=_names(raw, "modules_to_not_convert", path),
        )  # fmt: skip
    form = raw.get("checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2") or raw.get("is_marlin_format"):
        raise refuse("checkpoint_format" if form not in ("gptq", "gptq_v2") else "is_marlin_format", "gptq and gptq_v2")
    if raw.get("dynamic"):
        raise refuse("dynamic", "one setting for all modules")
    return StoredQuantization(
        method="gptq",
        bits=bits,
        group_len=max(0, group_len),
        is_symmetric=bool(raw.get("sym", False)),
        zero_offset=0 if form == "gptq_v2" else 1,
        is_act_order=bool(raw.get("desc_act", False)),
        has_head=bool(raw.get("lm_head", False)),
        only=_names(raw, "modules_in_block_to_quantize", path),
        kept=_names(raw, "modules_to_not_convert", path),
    )


def _names(raw: dict[str, Any], field: str, path: Path) -> tuple[str, ...]:
    """A list of names, or of lists of them."""
    value = raw.get(field) or []
    flat = [name for entry in value for name in (entry if isinstance(entry, list) else [entry])] if isinstance(value, list) else [0]
    if not all(isinstance(name, str) for name in flat):
        raise ModelError(f"{path}: quantization_config.{field} must be a list of names, got {value!r}")
    return tuple(flat)
