"""A checkpoint that says what the bundled model says at the cost of a 100-million-parameter one.

Speculation cannot be measured on random weights, which neither copy nor agree with a smaller model, and no larger model is
shipped. So the bundled model is embedded in a larger Llama (width 576, 30 layers, 9 query and 3 KV heads of 64, MLP 1536; the
vocabulary stays): its channels, heads and layers are some of the large one's, everything else is zero or idle, and each step
computes all of it. With noise on its weights it is a target that its draft, the bundled model, agrees with only now and then.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 576, 1536, 30, 9, 3, 64
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def stretch(source: Path, target: Path, noise: float = 0.0, seed: int = 0) -> Path:
    """source: the bundled model's folder. noise: standard deviation of what its weights are multiplied with, around 1."""
    config = json.loads((source / "config.json").read_text())
    small = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(seed)
    hidden, own_layers = config["hidden_size"], config["num_hidden_layers"]
    scale = (hidden / HIDDEN) ** 0.5  # a norm divides by the mean over more channels, all of them zero

    def spoilt(tensor: Tensor) -> Tensor:
        return tensor * (1 + noise * torch.randn(tensor.shape, generator=generator)) if noise else tensor

    def put(shape: tuple[int, ...], rows: Tensor | slice, columns: slice, values: Tensor) -> Tensor:
        made = torch.zeros(shape)
        made[rows, columns] = values
        return made

    made = {
        "model.embed_tokens.weight": put(
            (config["vocab_size"], HIDDEN), slice(None), slice(hidden), small["model.embed_tokens.weight"]
        ),
        "model.norm.weight": _norm(small["model.norm.weight"], scale),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        if layer >= own_layers:
            made |= _idle(at, generator)
            continue
        q_rows, kv_rows = (
            _head_rows(config["num_attention_heads"], config["head_dim"]),
            _head_rows(config["num_key_value_heads"], config["head_dim"]),
        )
        v_rows = _plain_rows(config["num_key_value_heads"], config["head_dim"])
        o_columns = _plain_rows(config["num_attention_heads"], config["head_dim"])
        inner, own = config["intermediate_size"], slice(hidden)
        # Scores are divided by the root of the head's size, which is another now.
        q = spoilt(small[at + "self_attn.q_proj.weight"]) * (HEAD_DIM / config["head_dim"]) ** 0.5
        made[at + "self_attn.q_proj.weight"] = put((HEADS * HEAD_DIM, HIDDEN), q_rows, own, q)
        k, v = (spoilt(small[f"{at}self_attn.{name}_proj.weight"]) for name in "kv")
        made[at + "self_attn.k_proj.weight"] = put((KV_HEADS * HEAD_DIM, HIDDEN), kv_rows, own, k)
        made[at + "self_attn.v_proj.weight"] = put((KV_HEADS * HEAD_DIM, HIDDEN), v_rows, own, v)
        o = torch.zeros(HIDDEN, HEADS * HEAD_DIM)
        o[:hidden, o_columns] = spoilt(small[at + "self_attn.o_proj.weight"])
        made[at + "self_attn.o_proj.weight"] = o
        for name in ("gate", "up"):
            values = spoilt(small[f"{at}mlp.{name}_proj.weight"])
            made[f"{at}mlp.{name}_proj.weight"] = put((INNER, HIDDEN), slice(inner), own, values)
        made[at + "mlp.down_proj.weight"] = put((HIDDEN, INNER), own, slice(inner), spoilt(small[at + "mlp.down_proj.weight"]))
        for name in ("input_layernorm", "post_attention_layernorm"):
            made[f"{at}{name}.weight"] = _norm(small[f"{at}{name}.weight"], scale)
    target.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.to(torch.bfloat16).contiguous() for name, tensor in made.items()}, target / "model.safetensors")
    config |= {
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "rms_norm_eps": config["rms_norm_eps"] * hidden / HIDDEN,
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config, indent=1))
    for name in TOKENIZER_FILES:
        shutil.copy(source / name, target / name)
    return target


def _norm(weight: Tensor, scale: float) -> Tensor:
    made = torch.zeros(HIDDEN)
    made[: len(weight)] = weight * scale
    return made


def _head_rows(num_heads: int, head_dim: int) -> Tensor:
    """Where the rows of rotary heads go: pair i, of frequency theta ** (-2 i / head_dim), is pair i * HEAD_DIM / head_dim there."""
    half, factor = head_dim // 2, HEAD_DIM // head_dim
    pairs = torch.arange(half) * factor
    rows = torch.cat((pairs, pairs + HEAD_DIM // 2))
    return (torch.arange(num_heads)[:, None] * HEAD_DIM + rows).reshape(-1)


def _plain_rows(num_heads: int, head_dim: int) -> Tensor:
    return (torch.arange(num_heads)[:, None] * HEAD_DIM + torch.arange(head_dim)).reshape(-1)


def _idle(at: str, generator: torch.Generator) -> dict[str, Tensor]:
    """A layer that adds nothing, but is computed."""

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    return {
        at + "self_attn.q_proj.weight": some(HEADS * HEAD_DIM, HIDDEN),
        at + "self_attn.k_proj.weight": some(KV_HEADS * HEAD_DIM, HIDDEN),
        at + "self_attn.v_proj.weight": some(KV_HEADS * HEAD_DIM, HIDDEN),
        at + "self_attn.o_proj.weight": torch.zeros(HIDDEN, HEADS * HEAD_DIM),
        at + "mlp.gate_proj.weight": some(INNER, HIDDEN),
        at + "mlp.up_proj.weight": some(INNER, HIDDEN),
        at + "mlp.down_proj.weight": torch.zeros(HIDDEN, INNER),
        at + "input_layernorm.weight": torch.ones(HIDDEN),
        at + "post_attention_layernorm.weight": torch.ones(HIDDEN),
    }
