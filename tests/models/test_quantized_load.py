"""Quantised weights from the checkpoint to the logits: rounded at load, GPTQ, AWQ, shared by ranks; and every refusal."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.panels import PanelMatrix, StackedMatrix
from kernels.quantized import quantize
from models.config import read_config
from models.load import load_model
from models.quantization import Quantization, check_parts, choose
from models.sizes import weight_nbytes
from protocol.errors import ConfigError, ModelError
from protocol.parallel import Parallel
from tests.models.quantized_checkpoints import float_twin, quantize_checkpoint
from tests.offline import Offline
from tests.oracle import Judge, first_divergence, make_checkpoint, ragged_prompts
from tests.ranks import Ranks

SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
PROMPTS = ragged_prompts(6, 8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("floats"), tie_word_embeddings=False, **SHAPE)


def greedy(engine: Offline, num_tokens: int = 12) -> list[list[int]]:
    sequences = [engine.add(str(i), prompt, max_tokens=num_tokens) for i, prompt in enumerate(PROMPTS)]
    engine.run()
    return [sequence.output_token_ids for sequence in sequences]


def agree(found: Offline, wanted: Path) -> None:
    """The quantised engine's tokens are those of transformers on the same weights as floats."""
    judge = Judge(wanted)
    for prompt, tokens in zip(PROMPTS, greedy(found), strict=True):
        assert first_divergence(judge.greedy(prompt, len(tokens)), tokens) is None


def offline(folder: Path, quantization: str = "auto") -> Offline:
    return Offline(load_model(str(folder), device="cpu", quantization=quantization))


# ---- rounded at load -------------------------------------------------------------------------------------------------


def rounded_twin(source: Path, folder: Path, bits: dict[str, int]) -> Path:
    """The checkpoint whose float weights are what rounding leaves. bits: by the end of a module's name; absent: 8."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and (module.endswith("_proj") or module == "lm_head"):
            own = next((count for end, count in bits.items() if module.endswith(end)), 8)
            tensors[name] = quantize(tensor, own).dequantized()
    save_file(tensors, folder / "model.safetensors")
    return folder


INT4 = {"q_proj": 4, "k_proj": 4, "gate_proj": 4, "up_proj": 4, "down_proj": 4}


@pytest.mark.parametrize(("asked", "bits"), [("int8", {}), ("int4", INT4)])
def test_tokens_are_those_of_the_rounded_weights(source: Path, tmp_path: Path, asked: str, bits: dict[str, int]) -> None:
    engine = offline(source, asked)
    layer = engine.loaded.model.layers[0]  # type: ignore[attr-defined]
    assert isinstance(layer.down, PanelMatrix)
    assert isinstance(layer.qkv, StackedMatrix if asked == "int4" else PanelMatrix)
    agree(engine, rounded_twin(source, tmp_path / "twin", bits))


def test_a_tied_head_is_rounded_and_the_embedding_is_not(tmp_path: Path) -> None:
    folder = make_checkpoint("llama3-rope", tmp_path, **SHAPE)
    model: Any = load_model(str(folder), device="cpu", quantization="int8").model
    weight = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.embedding, weight)
    assert torch.equal(model.head.dequantized(), quantize(weight, 8).dequantized())


def test_another_rounding_is_another_model(source: Path) -> None:
    """So KV never passes between them: layouts with different hashes are refused."""
    hashes = {
        asked: load_model(str(source), device="cpu", quantization=asked).model_hash for asked in ("auto", "none", "int8", "int4")
    }
    assert hashes["auto"] == hashes["none"]
    assert len(set(hashes.values())) == 3
    layouts = {load_model(str(source), device="cpu", quantization=asked).kv_layout(16) for asked in ("none", "int8", "int4")}
    assert len(layouts) == 3


@pytest.mark.parametrize("asked", ["int8", "int4"])
@pytest.mark.parametrize("size", [Parallel(2, 1), Parallel(1, 2), Parallel(2, 2)], ids=str)
def test_ranks_say_what_one_worker_says(source: Path, asked: str, size: Parallel) -> None:
    alone = offline(source, asked)
    with Ranks(str(source), size, quantization=asked) as ranks:
        assert ranks.engine.loaded.model_hash == alone.loaded.model_hash
        assert greedy(ranks.engine) == greedy(alone)
    assert not ranks.errors


def test_loading_needs_little_more_than_the_quantised_model(tmp_path: Path) -> None:
    config = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 2000, "num_hidden_layers": 8}
    folder = make_checkpoint("llama", tmp_path, dtype="bfloat16", num_attention_heads=8, num_key_value_heads=8, **config)
    code = """
import sys, torch
torch.set_num_threads(1)
from models.load import load_model
from kernels.panels import warm_up
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
for kind in (1, 3):
    warm_up(kind)
load_model(sys.argv[1], device="cpu", quantization=sys.argv[2])  # threads, and memory that each load takes and keeps
before, peak = anonymous(), [0]
def progress(state):
    peak[0] = max(peak[0], anonymous())
loaded = load_model(sys.argv[1], device="cpu", progress=progress, quantization=sys.argv[2])
print((peak[0] - before) / loaded.model.weight_nbytes(), loaded.progress.bytes_total * 2 / loaded.model.weight_nbytes())
"""
    root = Path(__file__).resolve().parents[2]
    for asked, smaller in (("int8", 3.0), ("int4", 4.0)):
        command = [sys.executable, "-c", code, str(folder), asked]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        peak, floats = map(float, done.stdout.split())
        assert floats > smaller  # of what float32 weights take
        assert peak < 1.9


# ---- ready-made checkpoints ------------------------------------------------------------------------------------------

MADE: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq"},
    "gptq-unnamed-format": {"method": "gptq", "form": "unnamed"},
    "gptq-v2": {"method": "gptq", "form": "gptq_v2"},
    "gptq-symmetric": {"method": "gptq", "symmetric": True},
    "gptq-symmetric-mislabelled": {"method": "gptq", "symmetric": True, "form": "mislabelled"},
    "gptq-act-order": {"method": "gptq", "desc_act": True},
    "gptq-whole-rows": {"method": "gptq", "group_size": -1},
    "gptq-without-g_idx": {"method": "gptq", "with_g_idx": False},
    "gptq-int8": {"method": "gptq", "bits": 8, "group_size": 64},
    "gptq-int8-symmetric": {"method": "gptq", "bits": 8, "group_size": 16, "symmetric": True},
    "gptq-head": {"method": "gptq", "with_head": True, "kept": ()},
    "gptq-kept": {"method": "gptq", "kept": ("v_proj", "layers.1.mlp")},
    "awq": {"method": "awq"},
    "awq-64": {"method": "awq", "group_size": 64},
    "awq-kept": {"method": "awq", "kept": ("self_attn",)},
}


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packing needs multiples of eight outputs: of the vocabulary too, where the head is packed."""
    changes = SHAPE | {"vocab_size": 256}  # and of 64, so that panels have no outputs to spare
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("even"), tie_word_embeddings=False, **changes)


@pytest.mark.parametrize("name", MADE)
def test_checkpoints_say_what_their_weights_say(even: Path, tmp_path: Path, name: str) -> None:
    folder = quantize_checkpoint(even, tmp_path / name, **MADE[name])
    engine = offline(folder)
    model: Any = engine.loaded.model
    assert engine.loaded.quantization.stored is not None
    kept = "v_proj" in MADE[name].get("kept", ())
    assert isinstance(model.layers[0].qkv, StackedMatrix if kept else PanelMatrix) or name == "awq-kept"
    assert isinstance(model.layers[0].down, PanelMatrix)
    agree(engine, float_twin(folder))


def test_scales_of_another_float_type_and_shards_of_a_hub(even: Path, tmp_path: Path) -> None:
    folder = quantize_checkpoint(even, tmp_path / "gptq", "gptq")
    tensors = load_file(folder / "model.safetensors")
    wide = {name: tensor.float() if name.endswith("scales") else tensor for name, tensor in tensors.items()}
    save_file(wide, folder / "model.safetensors")
    agree(offline(folder), float_twin(folder))


def test_different_orders_of_q_k_and_v_stay_apart(even: Path, tmp_path: Path) -> None:
    folder = quantize_checkpoint(even, tmp_path / "gptq", "gptq", desc_act=True)
    tensors, floats = load_file(folder / "model.safetensors"), load_file(float_twin(folder) / "model.safetensors")
    at = "model.layers.1.self_attn.k_proj"
    turn = torch.arange(64).roll(5)
    # Inputs of k turned round: another g_idx than q's and v's. qweight's inputs lie eight to an integer, so unpack, turn, pack.
    fields = torch.stack([(tensors[f"{at}.qweight"] >> (4 * i)) & 15 for i in range(8)], 1).flatten(0, 1)[turn].view(8, 8, -1)
    packed = sum(fields[:, i].long() << (4 * i) for i in range(8))
    tensors[f"{at}.qweight"] = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    tensors[f"{at}.g_idx"] = tensors[f"{at}.g_idx"][turn].clone()
    floats[f"{at}.weight"] = floats[f"{at}.weight"][:, turn].contiguous()
    save_file(tensors, folder / "model.safetensors")
    save_file(floats, float_twin(folder) / "model.safetensors")
    engine = offline(folder)
    layers = engine.loaded.model.layers  # type: ignore[attr-defined]
    assert isinstance(layers[0].qkv, PanelMatrix)
    assert isinstance(layers[1].qkv, StackedMatrix)
    agree(engine, float_twin(folder))


@pytest.mark.parametrize("name", ["gptq", "awq", "gptq-whole-rows"])
def test_ranks_share_a_checkpoint(even: Path, tmp_path: Path, name: str) -> None:
    folder = quantize_checkpoint(even, tmp_path / name, **MADE[name])
    with Ranks(str(folder), Parallel(2, 1)) as ranks:
        assert greedy(ranks.engine) == greedy(offline(folder))
    assert not ranks.errors


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "config", "sentence"),
    [
        (
            "gptq",
            {"quant_method": "bitsandbytes"},
            "quantization_config.quant_method 'bitsandbytes' is not served, only gptq and awq",
        ),
        ("gptq", {"bits": 3}, "quantization_config.bits 3 is not served, only 4 and 8"),
        ("awq", {"bits": 8}, "quantization_config.bits 8 is not served, only 4"),
        ("gptq", {"group_size": 0}, "quantization_config.group_size 0 is not served"),
        ("gptq", {"group_size": None}, "quantization_config.group_size None is not served"),
        ("gptq", {"checkpoint_format": "marlin"}, "quantization_config.checkpoint_format 'marlin'"),
        ("gptq", {"dynamic": {"x": {}}}, "quantization_config.dynamic"),
        ("gptq", {"modules_to_not_convert": "lm_head"}, "quantization_config.modules_to_not_convert must be a list"),
        ("awq", {"version": "gemv"}, "quantization_config.version 'gemv' is not served, only gemm"),
    ],
)
def test_forms_that_are_not_served(even: Path, tmp_path: Path, method: str, config: dict[str, Any], sentence: str) -> None:
    folder = quantize_checkpoint(even, tmp_path / "made", method, config=config)
    with pytest.raises(ModelError) as caught:
        read_config(folder)
    assert sentence in caught.value.message
    assert str(folder / "config.json") in caught.value.message


def test_a_choice_against_the_checkpoint(even: Path, tmp_path: Path) -> None:
    folder = quantize_checkpoint(even, tmp_path / "made", "gptq")
    config = read_config(folder)
    assert choose("int4", config) == choose("auto", config)
    for asked in ("int8", "none"):
        with pytest.raises(
            ConfigError, match=rf"quantised already \(gptq int4 in groups of 32\), which --quantization {asked} cannot"
        ):
            choose(asked, config)
    with pytest.raises(ConfigError, match="must be one of auto, none, int8, int4"):
        choose("fp8", config)
    with pytest.raises(ConfigError, match="the toy model has no weights"):
        load_model("toy", quantization="int8")


def damage(folder: Path, kind: str, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.1.mlp.up_proj.{kind}"
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "change", "sentence"),
    [
        ("qweight", lambda t: t[:-1], "has shape [7, 128], config.json asks for [8, 128]"),
        ("qweight", lambda t: t.float(), "up_proj.qweight is float32; by config.json (quantization_config) int32 belong there"),
        ("scales", lambda t: t.int(), "up_proj.scales is int32; by config.json (quantization_config) floats belong there"),
        ("scales", lambda t: t.float() * 1e9, "up_proj.scales holds numbers that float16 cannot hold"),
        ("g_idx", lambda t: t * 0, "up_proj.g_idx does not deal 64 inputs to groups of 32"),
    ],
)
def test_damaged_checkpoints(even: Path, tmp_path: Path, kind: str, change: Any, sentence: str) -> None:
    folder = quantize_checkpoint(even, tmp_path / "made", "gptq", desc_act=kind == "g_idx")
    damage(folder, kind, change)
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), device="cpu")
    assert sentence in caught.value.message


def test_a_missing_order_is_missing_only_where_it_matters(even: Path, tmp_path: Path) -> None:
    folder = quantize_checkpoint(even, tmp_path / "made", "gptq", desc_act=True, with_g_idx=False)
    with pytest.raises(ModelError, match=r"are missing from the checkpoint, first model\.layers\.0\.mlp\.down_proj\.g_idx"):
        load_model(str(folder), device="cpu")


def test_groups_that_ranks_would_cut(source: Path, even: Path, tmp_path: Path) -> None:
    config = read_config(source)  # 128 inner columns
    for asked, refused in (("int4", {3}), ("int8", set()), ("none", set())):
        for tp in (1, 2, 3, 4):
            held = choose(asked, config)
            if tp in refused:
                with pytest.raises(ConfigError, match=r"would cut a group of 32 weights of mlp\.down_proj.*or --quantization int8"):
                    check_parts(config, held, Parallel(tp, 1))
            else:
                check_parts(config, held, Parallel(tp, 1))
    ordered = read_config(quantize_checkpoint(even, tmp_path / "made", "gptq", desc_act=True))
    with pytest.raises(ConfigError, match="in the order of activations"):
        check_parts(ordered, choose("auto", ordered), Parallel(2, 1))
    check_parts(ordered, choose("auto", ordered), Parallel(1, 2))


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "tied"), [("none", False), ("int8", False), ("int4", False), ("int8", True), ("int4", True)])
def test_sizes_are_those_in_memory(tmp_path: Path, asked: str, tied: bool) -> None:
    shape = SHAPE | {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 640}
    folder = make_checkpoint("llama", tmp_path, tie_word_embeddings=tied, **shape)
    loaded = load_model(str(folder), device="cpu", quantization=asked)
    told = weight_nbytes(loaded.config, Parallel(), 0, 4, loaded.quantization)
    assert loaded.model.weight_nbytes() == pytest.approx(told, rel=0.01)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["gptq", "awq", "gptq-symmetric"])
def test_sizes_of_checkpoints(even: Path, tmp_path: Path, name: str) -> None:
    loaded = load_model(str(quantize_checkpoint(even, tmp_path / name, **MADE[name])), device="cpu")
    told = weight_nbytes(loaded.config, Parallel(), 0, 4, loaded.quantization)
    assert loaded.model.weight_nbytes() == pytest.approx(told, rel=0.01)  # type: ignore[attr-defined]


def test_how_it_is_called() -> None:
    assert [str(Quantization()), str(Quantization("int4"))] == ["none", "int4"]
