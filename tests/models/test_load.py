"""Loading: right values in right places, progress, identity, and every kind of damage as one sentence."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.llama import Llama
from models.load import load_model
from models.weights import LoadProgress
from protocol.errors import ConfigError, ModelError
from tests.oracle import make_checkpoint


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "with a space"))


def hash_of(folder: Path) -> str:
    return load_model(str(folder), device="cpu").model_hash


def test_progress_and_values(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Llama, "pack", lambda self: None)  # packed matrices cannot be looked into
    seen: list[LoadProgress] = []
    loaded = load_model(str(checkpoint), device="cpu", progress=seen.append)
    assert isinstance(loaded.model, Llama)
    tensors = load_file(checkpoint / "model.safetensors")
    assert seen[-1].bytes_done == seen[-1].bytes_total == sum(t.nbytes for t in tensors.values())
    assert [p.bytes_done for p in seen] == sorted(p.bytes_done for p in seen)
    assert loaded.progress == seen[-1]
    layer = loaded.model.layers[1]
    assert torch.equal(layer.down, tensors["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(layer.gate_up[80:], tensors["model.layers.1.mlp.up_proj.weight"])
    q = tensors["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(layer.qkv[0:4], q[[0, 8, 1, 9]])  # the two of a rotary pair are neighbours
    assert loaded.kv_layout(16).dtype == "float32"
    assert len(set(map(id, (loaded.model.head, loaded.model.embedding)))) == 2


def test_shards_and_half_precision(pristine: Path, tmp_path: Path) -> None:
    sharded = make_checkpoint("qwen3", tmp_path / "sharded", shards=True)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert hash_of(sharded) == hash_of(pristine)
    half = make_checkpoint("qwen3", tmp_path / "half", dtype="bfloat16")
    loaded = load_model(str(half), device="cpu")
    assert loaded.dtype is torch.float32
    assert isinstance(loaded.model, Llama)
    source = load_file(half / "model.safetensors")["model.embed_tokens.weight"]
    assert source.dtype is torch.bfloat16
    assert torch.equal(loaded.model.embedding, source.float())
    assert load_model(str(half), dtype="bfloat16", device="cpu").model.embedding.dtype is torch.bfloat16  # type: ignore[attr-defined]


def test_the_hash_names_the_weights(checkpoint: Path) -> None:
    before = hash_of(checkpoint)
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # one bit of one weight
    path.write_bytes(data)
    assert hash_of(checkpoint) != before


def rewrite(folder: Path, change: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    elif change == "dtype":
        tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("missing", "1 tensors are missing from the checkpoint, first model.layers.1.mlp.down_proj.weight"),
        ("shape", "model.layers.1.mlp.down_proj.weight has shape [48, 79], config.json asks for [48, 80]"),
        ("dtype", "model.layers.1.mlp.down_proj.weight is I8"),
    ],
)
def test_wrong_tensors(checkpoint: Path, change: str, sentence: str) -> None:
    rewrite(checkpoint, change)
    with pytest.raises(ModelError) as caught:
        load_model(str(checkpoint), device="cpu")
    assert sentence in caught.value.message
    assert str(checkpoint) in caught.value.message


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    first = next(name for name in header if name != "__metadata__")
    match kind:
        case "truncated":
            data = data[:-100]
        case "empty":
            data = b""
        case "header length":
            data = struct.pack("<Q", 1 << 60) + data[8:]
        case "header text":
            data = data[:8] + b"x" + data[9:]
        case "cut in the header":
            data = data[: size // 2]
        case "a page of HTML":
            data = b"<!DOCTYPE html>\n<html>Please log in</html>" * 50
        case "negative offset" | "wrong size" | "no list":
            offsets: object = {"negative offset": [-4, 0], "wrong size": [0, 4], "no list": 7}[kind]
            header[first]["data_offsets"] = offsets
            text = json.dumps(header).encode()
            data = struct.pack("<Q", len(text)) + text + data[8 + size :]
    path.write_bytes(data)


@pytest.mark.parametrize(
    "kind",
    [
        "truncated", "empty", "header length", "header text", "cut in the header", "a page of HTML", "negative offset",
        "wrong size", "no list",
    ],
)  # fmt: skip
def test_damaged_files(checkpoint: Path, kind: str) -> None:
    damage(checkpoint / "model.safetensors", kind)
    with pytest.raises(ModelError, match=r"model\.safetensors.*fetch it again") as caught:
        load_model(str(checkpoint), device="cpu")
    assert "\n" not in caught.value.message


def test_missing_files(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*.safetensors weights; it has pytorch_model.bin"):
        load_model(str(checkpoint), device="cpu")
    sharded = make_checkpoint("llama", tmp_path / "sharded", shards=True)
    victim = min(sharded.glob("*.safetensors"))
    victim.unlink()
    with pytest.raises(ModelError, match=f"lacks 1 of .* weight files, first {victim.name}"):
        load_model(str(sharded), device="cpu")
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ModelError, match="is no index of safetensors files"):
        load_model(str(sharded), device="cpu")


def test_dtype_and_device_are_checked(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="dtype must be auto or one of"):
        load_model(str(checkpoint), dtype="int3", device="cpu")
    with pytest.raises(ConfigError, match="the toy model runs on the CPU only"):
        load_model("toy", device="cuda")
    with pytest.raises(ConfigError, match="device must be auto, cpu or cuda"):
        load_model(str(checkpoint), device="tpu")


def test_loading_keeps_one_copy_of_the_weights(tmp_path: Path) -> None:
    """Anonymous memory grows by the weights once, although they are cast and fused on the way."""
    import subprocess
    import sys

    config = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4000, "num_hidden_layers": 8}
    folder = make_checkpoint("llama", tmp_path, dtype="bfloat16", num_attention_heads=8, num_key_value_heads=8, **config)
    code = """
import sys, resource, torch
from kernels import ops
from models.load import load_model
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
ops.linear(torch.zeros(9, 1024), ops.pack(torch.zeros(1024, 1024)))  # what a process needs once: threads, compiled kernels
before, peak = anonymous(), [0]
def progress(state):
    peak[0] = max(peak[0], anonymous())
loaded = load_model(sys.argv[1], device="cpu", progress=progress)
weights = 2 * loaded.progress.bytes_total  # bf16 -> float32
print((peak[0] - before) / weights)
"""
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=root, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1.25


def test_the_engine_path_imports_neither_transformers_nor_a_compiler() -> None:
    import subprocess
    import sys

    code = (
        "import sys, engine.runner, models.load, models.llama, models.toy;"
        "sys.exit(any(name in sys.modules for name in ('transformers', 'torch._inductor', 'triton', 'huggingface_hub', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2]).returncode == 0
