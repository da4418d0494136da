"""Which part of the weights lies on which rank, and every size that a model refuses as one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.config import ModelConfig
from models.interface import NoOtherRanks, Shard
from models.llama import Llama
from models.load import load_model
from models.split import check, split
from models.weights import SafetensorsFile
from protocol.errors import ConfigError
from protocol.parallel import Parallel
from tests.oracle import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=199,
    num_layers=3,
    hidden_size=48,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=80,
    max_position_embeddings=512,
)


@pytest.mark.parametrize("size", [Parallel(tp, pp) for tp in (1, 2, 4, 6) for pp in (1, 2, 3)], ids=str)
def test_every_part_lies_somewhere_and_query_heads_beside_their_kv_head(size: Parallel) -> None:
    ranks = [split(CONFIG, Shard(size, rank)) for rank in range(size.num_ranks)]
    for stage in range(size.pp_size):
        here = ranks[stage * size.tp_size : (stage + 1) * size.tp_size]
        assert sorted(h for own in here for h in own.q_heads) == list(range(6))
        assert sorted(i for own in here for i in own.inner) == list(range(80))
        assert sorted(t for own in here for t in own.vocab) == list(range(199))
        assert {h for own in here for h in own.kv_heads} == {0, 1}
        assert all({h // 3 for h in own.q_heads} == set(own.kv_heads) for own in here)
    assert [layer for own in ranks[:: size.tp_size] for layer in own.layers] == [0, 1, 2]


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (Parallel(1, 4), r"4 pipeline stages \(--prefill-pp, --decode-pp\), but the model has only 3 layers"),
        (Parallel(3, 1), r"3 tensor ranks \(--prefill-tp, --decode-tp\), but the model has 2 KV heads .* a multiple of it"),
        (Parallel(8, 1), r"8 tensor ranks .* only 6 query heads \(num_attention_heads\); choose fewer"),
    ],
)
def test_sizes_that_a_model_refuses(size: Parallel, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check(CONFIG, size)


def test_the_check_needs_no_torch() -> None:
    code = "import sys, models.split; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("size", [Parallel(2, 1), Parallel(1, 2), Parallel(4, 2)], ids=str)
def test_a_rank_reads_its_own_part_only(size: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all ranks every byte is read once, but for norms, o's and down's biases, which each stage's ranks share, and the KV
    heads that lie on several of them. The hash is the same everywhere."""
    monkeypatch.setattr(Llama, "pack", lambda self: None)  # packed matrices cannot be looked into
    folder = make_checkpoint("qwen3", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    real, looked_at = SafetensorsFile.tensor, 0

    def spy(self: SafetensorsFile, name: str, rows: range) -> torch.Tensor:
        nonlocal looked_at
        looked_at += real(self, name, rows).nbytes if "o_proj" not in name and "down_proj" not in name else 0
        return real(self, name, rows)

    monkeypatch.setattr(SafetensorsFile, "tensor", spy)
    alone = load_model(str(folder), device="cpu")
    by_rows, looked_at = looked_at, 0
    loaded = [
        load_model(str(folder), device="cpu", shard=Shard(size, rank), ranks=NoOtherRanks()) for rank in range(size.num_ranks)
    ]
    assert {one.model_hash for one in loaded} == {alone.model_hash}
    assert {one.kv_layout(8) for one in loaded} == {alone.kv_layout(8)}
    norms = sum(t.nbytes for name, t in tensors.items() if "norm" in name)
    copies = max(1, size.tp_size // 2) - 1
    shared = (size.tp_size - 1) * norms
    shared += copies * sum(t.nbytes for name, t in tensors.items() if "k_proj" in name or "v_proj" in name)
    assert sum(one.progress.bytes_done for one in loaded) == alone.progress.bytes_total + shared
    assert looked_at == by_rows + shared
    heads = [one.model for one in loaded[: size.tp_size]]
    assert torch.equal(torch.cat([m.head for m in heads]), tensors["lm_head.weight"])  # type: ignore[attr-defined]
    downs = [one.model.layers[-1].down for one in loaded[-size.tp_size :]]  # type: ignore[attr-defined]
    assert torch.equal(torch.cat(downs, dim=1), tensors["model.layers.2.mlp.down_proj.weight"])
    if size.pp_size > 1:
        assert not hasattr(loaded[-1].model, "head")
