"""The hash of a checkpoint: samples of large tensors, all of small ones, and nothing of how they lie in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models import identity
from models.config import ModelConfig
from models.identity import PIECE_NBYTES, SAMPLE_NBYTES, STRIDE_NBYTES, WHOLE_NBYTES, model_hash, sampled
from models.weights import Slot, find, open_checkpoint

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=10,
    num_layers=1,
    hidden_size=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=8,
    max_position_embeddings=16,
)


@pytest.mark.parametrize(
    "nbytes", [0, 1, PIECE_NBYTES, WHOLE_NBYTES, WHOLE_NBYTES + 1, 5 * STRIDE_NBYTES, 5 * STRIDE_NBYTES + SAMPLE_NBYTES, 1 << 30]
)
def test_samples(nbytes: int) -> None:
    pieces = list(sampled(nbytes))
    ends = [offset + length for offset, length in pieces]
    assert ends == sorted(ends)
    assert all(offset >= 0 and end <= nbytes for (offset, _), end in zip(pieces, ends, strict=True))
    if nbytes <= WHOLE_NBYTES:
        assert sum(length for _, length in pieces) == nbytes
        return
    assert pieces[0][0] == 0
    assert ends[-1] == nbytes
    assert all(b[0] - a[0] <= STRIDE_NBYTES for a, b in zip(pieces, pieces[1:], strict=False))
    assert len(pieces) <= -(-nbytes // STRIDE_NBYTES) + 1


def hash_of(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    save_file(tensors, folder / "model.safetensors")
    files = open_checkpoint(folder)
    return model_hash(CONFIG, find(files, {name: Slot(tensor) for name, tensor in tensors.items()}))


def test_what_changes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small tensor: any bit. A large one: a bit in a sample, and whatever touches a stretch of it; its name, shape and type."""
    for name, value in (("WHOLE_NBYTES", 1 << 12), ("STRIDE_NBYTES", 1 << 12), ("SAMPLE_NBYTES", 64)):
        monkeypatch.setattr(identity, name, value)
    tensors = {"large": torch.randn(64, 256), "small": torch.randn(1024)}  # 64 KiB, 4 KiB
    seen = {hash_of(tmp_path, tensors)}
    assert hash_of(tmp_path, {name: tensors[name] for name in ("small", "large")}) in seen

    def change(name: str, index: int, count: int = 1) -> None:
        other = {key: tensor.clone() for key, tensor in tensors.items()}
        other[name].view(-1)[index : index + count] += 1.0
        seen.add(hash_of(tmp_path, other))

    for index in (0, 517, 1023):
        change("small", index)
    for index in (0, 15, 1024, 16383, 16368):
        change("large", index)
    change("large", 3000, 1100)
    seen.add(hash_of(tmp_path, {"larger": tensors["large"], "small": tensors["small"]}))
    seen.add(hash_of(tmp_path, {"large": tensors["large"].view(256, 64), "small": tensors["small"]}))
    seen.add(hash_of(tmp_path, {"large": tensors["small"].view(4, 256), "small": tensors["large"].view(-1)}))
    assert len(seen) == 13
