"""What rounding may cost the bundled model, and that the tool's text is the one that model never saw."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import perplexity
from bench.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_rounding_costs_little() -> None:
    """Perplexity: int8 at most 0.5 % worse, int4 in groups of 32 at most 4 %, on 12 windows of held-out text."""
    losses = {
        loss.quantization: loss for loss in perplexity.measure("bundled", ["none", "int8", "int4"], perplexity.held_out(), 12)
    }
    base = losses["none"].perplexity
    assert 10 < base < 25  # a model that predicts nothing has 4,096
    assert losses["int8"].perplexity / base < 1.005
    assert losses["int4"].perplexity / base < 1.04
    assert losses["int4"].perplexity > losses["int8"].perplexity
    assert losses["int8"].weight_bytes < 0.45 * losses["none"].weight_bytes
    assert losses["int4"].weight_bytes < losses["int8"].weight_bytes


def test_the_loss_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    from models.locate import BUILT_IN

    folder = BUILT_IN["bundled"]
    text = [(ROOT / "bench" / "perplexity.py").read_text()]
    cuts = perplexity.windows(folder, text, 0, 100, 2)
    assert [len(cut) for cut in cuts] == [100, 100]
    judge = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = 0.0
    with torch.inference_mode():
        for cut in cuts:
            ids = torch.tensor([cut])
            total += float(judge(input_ids=ids, labels=ids).loss) * 99
    monkeypatch.setattr(perplexity, "WINDOW_LEN", 100)
    found = perplexity.measure("bundled", ["none"], text, 2)[0]
    assert found.num_tokens == 198
    assert found.nats == pytest.approx(total / 198, rel=1e-5)


def test_the_text_is_chosen_as_the_training_script_chose() -> None:
    source = ast.parse((ROOT / "examples" / "train_bundled_model.py").read_text())
    said = {}
    for node in source.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            said[node.targets[0].id] = node.value
    assert ast.literal_eval(said["HELD_OUT_PERCENT"]) == perplexity.HELD_OUT_PERCENT
    assert ast.literal_eval(said["SKIPPED_FOLDERS"]) == perplexity.SKIPPED_FOLDERS
    assert ast.literal_eval(said["SKIPPED_FILES"]) == perplexity.SKIPPED_FILES
    texts = list(perplexity.held_out())
    assert len(texts) > 10
    assert all(map(perplexity.is_held_out, texts))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.py"
    text.write_text("def add(a, b):\n    return a + b\n" * 40)
    words = [
        "perplexity",
        "--text",
        str(text),
        "--quantization",
        "none,int4",
        "--windows",
        "1",
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert main(words) == 0
    assert "perplexity" in capsys.readouterr().out
    losses = json.loads((tmp_path / "out.json").read_text())["losses"]
    assert [loss["quantization"] for loss in losses] == ["none", "int4"]
    assert losses[0]["num_tokens"] == losses[1]["num_tokens"] > 100
