"""config.json in both spellings, and every refusal as one sentence that names the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.config import read_config
from models.locate import BUILT_IN, locate
from protocol.errors import ModelError

ROOT = Path(__file__).resolve().parents[2]
PLAIN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "eos_token_id": [7, 8],
}


def write(folder: Path, **changes: Any) -> Path:
    raw = {key: value for key, value in {**PLAIN, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def test_defaults(tmp_path: Path) -> None:
    config = read_config(write(tmp_path))
    assert (config.family, config.num_kv_heads, config.head_dim) == ("llama", 4, 16)
    assert (config.rope.theta, config.rope.kind, config.eos_token_ids) == (10_000.0, "default", (7, 8))
    assert not any((config.qkv_bias, config.qk_norm, config.tie_word_embeddings, config.windows))


def test_generation_config_adds_stop_tokens(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert read_config(write(tmp_path)).eos_token_ids == (7, 8, 9)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
    ],
)
def test_both_spellings_of_rope(tmp_path: Path, changes: dict[str, Any]) -> None:
    rope = read_config(write(tmp_path, **changes)).rope
    assert (rope.theta, rope.kind, rope.factor) == (5e5, "linear", 4.0)


def test_families(tmp_path: Path) -> None:
    qwen2 = read_config(write(tmp_path, architectures=["Qwen2ForCausalLM"], sliding_window=32))
    assert qwen2.qkv_bias
    assert not qwen2.o_bias
    assert qwen2.windows == ()
    sliding = {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 3}
    assert read_config(write(tmp_path, architectures=["Qwen2ForCausalLM"], **sliding)).windows == (None, None, None, 32)
    qwen3 = read_config(write(tmp_path, architectures=["Qwen3ForCausalLM"]))
    assert (qwen3.qk_norm, qwen3.head_dim) == (True, 128)
    assert read_config(write(tmp_path, architectures=["MistralForCausalLM"])).window(0) == 4096
    assert read_config(write(tmp_path, architectures=["MistralForCausalLM"], sliding_window=None)).window(0) is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not one of those served: LlamaForCausalLM"),
        ({"architectures": None}, "none named"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers must be a positive integer, got 'three'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not served"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "needs 'low_freq_factor'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError, match="config.json") as caught:
        read_config(write(tmp_path, **changes))
    assert sentence in caught.value.message


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match="download it again"):
        read_config(tmp_path)


def test_locate_directories_and_built_in_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    assert locate(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path.parent)
    assert locate(tmp_path.name) == tmp_path
    assert locate("toy") == BUILT_IN["toy"]
    assert read_config(locate("bundled")).family == "llama"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere", "no directory, and no hub id"),
        ("/no/such", "no directory"),
        ("./x/y", "no directory"),
        ("a/b/c", "no hub id"),
    ],
)
def test_locate_refuses_nonsense_without_a_download(name: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        locate(name)


def test_locate_a_file_and_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no config.json"):
        locate(str(tmp_path))
    (tmp_path / "x").touch()
    with pytest.raises(ModelError, match="is a file"):
        locate(str(tmp_path / "x"))


def test_config_and_locate_need_no_torch() -> None:
    code = "import sys, models.config, models.locate; sys.exit('torch' in sys.modules or 'huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
