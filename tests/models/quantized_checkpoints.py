"""GPTQ and AWQ checkpoints made from a float one, packed with numpy straight from what the formats' documents say.

Nothing of models/quantized_load.py is used. `float_twin` is the same model with the weights that the packed ones stand for, in
plain float32: what transformers and the float engine are given.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # field i of an integer holds output AWQ_ORDER[i] of eight


class Rounded(NamedTuple):
    """codes [in, out], zeros and scales [groups, out], group_of [in]."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    group_of: np.ndarray

    def weight(self) -> np.ndarray:
        """[out, in]."""
        wide = self.codes.astype(np.float32) - self.zeros[self.group_of].astype(np.float32)
        return (wide * self.scales[self.group_of].astype(np.float32)).T.copy()


def round_weight(weight: np.ndarray, bits: int, group_len: int, *, symmetric: bool, shuffled: bool, seed: int) -> Rounded:
    """weight [out, in]."""
    out_width, in_width = weight.shape
    group_len = group_len if group_len > 0 else in_width
    num_groups = -(-in_width // group_len)
    group_of = np.arange(in_width) // group_len
    if shuffled:
        group_of = np.random.default_rng(seed).permutation(group_of)
    top = 2**bits - 1
    codes = np.zeros((in_width, out_width), np.int64)
    zeros, scales = np.zeros((num_groups, out_width), np.int64), np.zeros((num_groups, out_width), np.float16)
    for group in range(num_groups):
        part = weight[:, group_of == group].T  # [inputs of the group, out]
        low, high = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
        if symmetric:
            high = np.maximum(np.abs(low), high)
            low = -high
        scale = np.maximum((high - low) / top, 1e-6).astype(np.float16)
        zero = np.full(out_width, 2 ** (bits - 1)) if symmetric else np.clip(np.round(-low / scale.astype(np.float32)), 1, top)
        scales[group], zeros[group] = scale, zero
        codes[group_of == group] = np.clip(np.round(part / scale.astype(np.float32)) + zero, 0, top)
    return Rounded(codes, zeros, scales, group_of)


def _pack(values: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Neighbours on this axis into one int32, the first in the lowest bits."""
    values = np.moveaxis(values, axis, -1)
    fields = values.reshape(*values.shape[:-1], -1, 32 // bits)
    packed = np.zeros(fields.shape[:-1], np.uint32)
    for field in range(32 // bits):
        packed |= fields[..., field if order is None else order[field]].astype(np.uint32) << np.uint32(bits * field)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed, -1, axis)).view(np.int32).copy())


def quantize_checkpoint(
    source: Path,
    folder: Path,
    method: str,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    desc_act: bool = False,
    form: str = "gptq",
    with_g_idx: bool = True,
    kept: tuple[str, ...] = (),
    with_head: bool = False,
    config: dict[str, Any] | None = None,
) -> Path:
    """source: a float32 checkpoint in one file. Writes folder, and folder/../NAME-floats.

    kept: modules_to_not_convert. config: into quantization_config.
    """
    twin = float_twin(folder)
    shutil.copytree(source, folder)
    shutil.copytree(source, twin)
    tensors = load_file(source / "model.safetensors")
    stored, floats = dict(tensors), dict(tensors)
    for seed, name in enumerate(sorted(tensors)):
        module = name.removesuffix(".weight")
        is_linear = module.endswith("_proj") or (with_head and module == "lm_head")
        if not is_linear or not name.endswith(".weight") or any(word in module for word in kept):
            continue
        shared = "qkv" if any(word in module for word in ("q_proj", "k_proj", "v_proj")) else module
        rounded = round_weight(
            tensors[name].numpy(), bits, group_size, symmetric=symmetric, shuffled=desc_act,
            seed=sum(map(ord, shared)) if shared == "qkv" else seed,
        )  # fmt: skip
        del stored[name]
        floats[name] = torch.from_numpy(rounded.weight())
        stored[f"{module}.scales"] = torch.from_numpy(rounded.scales)
        if method == "gptq":
            less = 0 if form in ("gptq_v2", "mislabelled") else 1
            stored[f"{module}.qweight"] = _pack(rounded.codes, bits, 0)
            stored[f"{module}.qzeros"] = _pack(rounded.zeros - less, bits, 1)
            if with_g_idx:
                stored[f"{module}.g_idx"] = torch.from_numpy(rounded.group_of.astype(np.int32))
        else:
            stored[f"{module}.qweight"] = _pack(rounded.codes, bits, 1, AWQ_ORDER)
            stored[f"{module}.qzeros"] = _pack(rounded.zeros, bits, 1, AWQ_ORDER)
    said: dict[str, Any] = {
        "quant_method": method,
        "bits": bits,
        "group_size": group_size,
        "modules_to_not_convert": list(kept) or None,
    }
    if method == "gptq":
        said |= {"sym": symmetric, "desc_act": desc_act, "lm_head": with_head}
        said |= {"checkpoint_format": "gptq" if form == "mislabelled" else form} if form != "unnamed" else {}
    else:
        said |= {"version": "gemm", "zero_point": True}
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(text | {"quantization_config": said | (config or {})}))
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in floats.items()}, twin / "model.safetensors")
    return folder


def float_twin(folder: Path) -> Path:
    return folder.with_name(folder.name + "-floats")
