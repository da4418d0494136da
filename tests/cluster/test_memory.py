"""`tandem memory`: its parameters are those that a rank really allocates; its refusals say what to do."""

from __future__ import annotations

import json

import msgspec
import pytest
import torch

from cluster import cli
from models.config import ModelConfig, read_config
from models.interface import Shard
from models.llama import Llama
from models.locate import BUILT_IN
from models.sizes import kv_nbytes_per_token, num_params
from protocol.parallel import Parallel

ODD = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=99, num_layers=5, hidden_size=48, num_heads=6, num_kv_heads=2, head_dim=8,
    intermediate_size=50, max_position_embeddings=256,
)  # fmt: skip
FAMILIES = {
    "plain": ODD,
    "tied": msgspec.structs.replace(ODD, tie_word_embeddings=True),
    "biases": msgspec.structs.replace(ODD, qkv_bias=True, o_bias=True, mlp_bias=True),
    "normed": msgspec.structs.replace(ODD, architecture="Qwen3ForCausalLM", qk_norm=True),
}


def allocated(config: ModelConfig, parallel: Parallel, rank: int) -> int:
    model = Llama(config, torch.float32, torch.device("meta"), Shard(parallel, rank))
    tensors: dict[int, torch.Tensor] = {}
    for holder in (model, *model.layers):
        names = getattr(type(holder), "__slots__", None) or vars(holder)
        for name in names:
            value = getattr(holder, name)
            if isinstance(value, torch.Tensor) and name != "inv_freq":
                tensors[id(value)] = value
    return sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("parallel", [Parallel(1, 1), Parallel(2, 1), Parallel(4, 1), Parallel(1, 3), Parallel(2, 2)], ids=str)
def test_parameters_are_those_that_a_rank_allocates(name, parallel):
    for rank in range(parallel.num_ranks):
        assert num_params(FAMILIES[name], parallel, rank) == allocated(FAMILIES[name], parallel, rank)


def test_the_bundled_checkpoint_has_that_many():
    from safetensors import safe_open

    folder = BUILT_IN["bundled"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        there = sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118
    assert num_params(read_config(folder), Parallel(), 0) == there


def test_kv_of_fewer_heads_than_ranks_is_copied():
    assert kv_nbytes_per_token(ODD, Parallel(), 0, 2) == 2 * 5 * 2 * 8 * 2
    assert kv_nbytes_per_token(ODD, Parallel(4, 1), 3, 2) == 2 * 5 * 1 * 8 * 2


LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(tmp_path)


def told(capsys, *words: str) -> dict:
    assert cli.main(["memory", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_8b_on_one_and_on_two_gpus(capsys, model):
    one = told(capsys, model, "--gpu", "h100", "--context", "4096")
    assert one["num_params"] == 8_030_261_248  # what Meta's checkpoint has
    assert one["kv_bytes_per_token"] == 131_072
    assert 380_000 < one["kv_tokens"] < 430_000  # (72 GB - 16.06 GB - about 2 GB) / 131,072
    assert one["sequences"] == pytest.approx(one["kv_tokens"] / 4096)
    two = told(capsys, model, "--gpu", "h100", "--tp", "2")
    assert two["rank_kv_bytes_per_token"] == 65_536
    assert two["kv_tokens"] > 2 * one["kv_tokens"]


def test_what_does_not_fit_says_so(capsys, model):
    assert cli.main(["memory", model, "--gpu", "16GiB"]) == 1
    assert "not one full sequence" in capsys.readouterr().out
    assert cli.main(["memory", model, "--gpu", "8GiB"]) == 1
    assert "the weights alone do not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "h900"], "--gpu h900 is neither one of"),
        (["--tp", "0"], "--tp must be at least 1"),
        (["--tp", "12"], "cannot be copied evenly"),
        (["--dtype", "int3"], "--dtype int3 is none of"),
        (["--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization"),
    ],
)
def test_refusals(capsys, model, words, said):
    assert cli.main(["memory", model, *words]) == 2
    assert said in capsys.readouterr().err


def test_a_hub_id_is_not_downloaded(capsys):
    assert cli.main(["memory", "Qwen/Qwen3-0.6B"]) == 2
    assert "hf download Qwen/Qwen3-0.6B config.json" in capsys.readouterr().err


def test_torch_stays_out(tmp_path):
    import subprocess
    import sys

    code = "import sys; from cluster import cli; cli.main(['memory', 'bundled', '--gpu', 'l4']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "sequences at once" in done.stdout
