"""The benches of engine, steps and gateway: they measure what they say, and refuse in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from bench import engine, shapes
from models.load import load_model

TINY = ["engine", "--shape", "tiny", "--prompts", "64,96", "--batches", "1,4", "--context", "32", "--repeats", "1", "--chunk", "32"]


def test_a_run_over_a_tiny_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "READ_BYTES", 1 << 22)
    monkeypatch.setattr(engine, "SQUARE", 64)
    out, svg = tmp_path / "e.json", tmp_path / "e.svg"
    assert bench.main([*TINY[:1], "--json", str(out), *TINY[1:], "--plot", str(svg)]) == 0
    found = json.loads(out.read_text())
    assert set(found["limits"]) == {"1", "2"}
    assert all(value > 0 for row in found["limits"].values() for value in row.values())
    assert [row["prompt_len"] for row in found["prefill"]] == [64, 96]
    for row in found["prefill"]:
        assert row["tokens_per_s"] == pytest.approx(row["prompt_len"] / row["seconds"]["median"])
    for row in found["decode"]:
        assert row["step_s"]["least"] <= row["step_s"]["median"] <= row["step_s"]["most"]
        assert row["share"] == max(row["share_of_read"], row["share_of_products"])
    assert svg.read_text().startswith("<svg")
    assert "tok/s" in capsys.readouterr().out


@pytest.mark.parametrize("shape", sorted(shapes.SHAPES))
def test_operations_and_bytes_are_those_of_the_shape(shape: str) -> None:
    from models.config import parse_config

    config = parse_config({**shapes.SHAPES[shape], "torch_dtype": "bfloat16"}, {}, Path("config.json"))
    sizes = dict(shapes._tensors(shapes.SHAPES[shape]))
    elements = sum(int(torch.Size(size).numel()) for size in sizes.values())
    assert engine.matrix_params(config) == elements, "a tied head is read once, as the embedding"
    assert engine.attention_flops(config, 3) == 4.0 * config.num_heads * config.head_dim * 6 * config.num_layers


def test_the_named_shapes_have_the_sizes_of_their_names() -> None:
    def num(shape: str) -> int:
        return sum(int(torch.Size(size).numel()) for _, size in shapes._tensors(shapes.SHAPES[shape]))

    assert num("llama-135m") == 134_515_008
    assert num("qwen3-0.6b") == 596_049_920


def test_pairs_within_a_window() -> None:
    for length in range(1, 12):
        for window in (None, 1, 3, 20):
            slow = sum(min(i + 1, window or i + 1) for i in range(length))
            assert engine._pairs(length, window) == slow


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["engine"], "one of MODEL and --shape"),
        (["engine", "x", "--shape", "tiny"], "one of MODEL and --shape"),
        (["engine", "toy"], "no weights to measure"),
        (["engine", "/nowhere"], "/nowhere"),
        (["engine", "--shape", "tiny", "--repeats", "0"], "--repeats"),
        (["ablate", "--slo", "ttft=1"], "--slo wants both"),
        (["ablate", "--only", "all,nonsense"], "nonsense"),
        (["ablate", "--overload", "1"], "--overload is above 1"),
    ],
)
def test_refusals_are_sentences(argv: list[str], words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        bench.main(argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(SystemExit, match="no CUDA device here"):
        bench.main(["engine", "--shape", "tiny", "--device", "cuda"])


def test_a_shape_can_be_loaded_and_served(tmp_path: Path) -> None:
    from api.tokenizer import Tokenizer

    folder = shapes.make("tiny", tmp_path, with_tokenizer=True)
    loaded = load_model(str(folder), device="cpu")
    assert loaded.config.num_layers == 2
    assert Tokenizer(folder).encode("w5 w7", False) == [5, 7]


def test_steps(tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    assert bench.main(["steps", "--json", str(out), "--batch", "1,5", "--context", "40", "--steps", "70"]) == 0
    rows = json.loads(out.read_text())["batches"]
    for row in rows.values():
        assert 0 < row["min_us"] <= row["step_us"] <= row["p90_us"]
        assert row["plan_us"] + row["runner_us"] + row["emit_us"] <= 1.5 * row["p90_us"]


@pytest.mark.more
def test_gateway(tmp_path: Path) -> None:
    out = tmp_path / "g.json"
    asked = ["--streams", "8", "--tokens", "32", "--requests", "24", "--concurrency", "4", "--rounds", "1"]
    assert bench.main(["gateway", "--json", str(out), *asked]) == 0
    rows = json.loads(out.read_text())["rounds"]
    assert rows["tokens"][0]["tokens_per_chunk"] == pytest.approx(1.0, abs=0.3)
    assert rows["tokens"][0]["tokens_per_cpu_s"] > 1000
    assert rows["requests"][0]["requests_per_cpu_s"] > 10


def test_quantised_weights_are_fewer_bytes(tmp_path: Path) -> None:
    folder = str(shapes.make("tiny", tmp_path))
    floats, int8 = (engine.weight_nbytes(load_model(folder, device="cpu", quantization=kind)) for kind in ("none", "int8"))
    config = load_model(folder, device="cpu").config
    assert floats == 4 * engine.matrix_params(config)
    assert 0.25 < int8 / floats < 0.32
