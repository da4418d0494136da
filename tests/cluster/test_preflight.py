"""`tandem serve` says what is wrong with a model or its settings in one sentence, before it starts anything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import cli, preflight
from models.locate import BUILT_IN

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = BUILT_IN["bundled"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The bundled model, to be damaged."""
    return Path(shutil.copytree(BUNDLED, tmp_path / "a model"))


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("TANDEM_")]:
        monkeypatch.delenv(name)
    launch = type(sys)("cluster.launch")
    launch.run = lambda resolved: 77  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cluster.launch", launch)
    monkeypatch.setattr(cli, "check_port", lambda host, port: None)


def serve(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """-> (status, the one sentence)."""
    status = cli.main(["serve", *argv])
    captured = capsys.readouterr()
    assert captured.err.count("\n") == (0 if status == 77 else 1), captured.err
    return status, captured.err


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json; a model is a directory with"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "unknown architecture": (
        lambda f: edit(f / "config.json", architectures=["GPT2LMHeadModel"]),
        "architecture GPT2LMHeadModel is not one of those served: LlamaForCausalLM",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing; Tandem reads fast tokenizers"),
    "tokenizer is no JSON": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no *.safetensors weights"),
    "cut weights": (lambda f: cut(f / "model.safetensors"), "the file is damaged or its download was cut short; fetch it again"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "has 0 bytes and is no safetensors file"),
    "a web page": (lambda f: (f / "model.safetensors").write_text("<html>" * 99), "claims a header of"),
    "a missing shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
        "lacks 1 of 1 weight files",
    ),
}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_model(folder: Path, damage: Any, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve(capsys, str(folder))[0] == 77
    damage(folder)
    status, text = serve(capsys, str(folder))
    assert status == 1
    assert sentence in text
    assert str(folder) in text


@pytest.mark.parametrize(
    ("argv", "status", "sentence"),
    [
        (["/no/such/folder"], 1, "'/no/such/folder' is no directory, and no hub id"),
        (["--max-model-len", "2049"], 2, "model.max_len 2049 (--max-model-len) is above what the model was made for, 2048"),
        (["--kv-cache-memory-bytes", "1MiB"], 2, "but one sequence of max_model_len = 2048 needs 64 (6 MB)"),
        (["--no-enable-chunked-prefill"], 2, "--set decode.max_num_batched_tokens=2048, or lower --max-model-len"),
        (["toy", "--device", "cuda"], 2, "the toy model runs on the CPU only"),
        (["toy", "--dtype", "bfloat16"], 2, "leave --dtype away"),
        (["--revision", "v2"], 2, "--revision v2 belongs to a model of a hub; bundled is on this machine"),
        (["~nobody-of-that-name/x"], 1, "cannot look at '~nobody-of-that-name/x'"),
        (
            ["--prefill-tp", "3"],
            2,
            "prefill workers of 3 x 1 (tp x pp): 3 tensor ranks (--prefill-tp, --decode-tp), but the model has 2 KV",
        ),
        (
            ["--decode-pp", "7"],
            2,
            "decode workers of 1 x 7 (tp x pp): 7 pipeline stages (--prefill-pp, --decode-pp), but the model has",
        ),
        (["toy", "--decode-tp", "2", "--decode-pp", "5"], 2, "5 pipeline stages"),
        (["--decode-tp", "2", "--kv-cache-memory-bytes", "1MiB"], 2, "but one sequence of max_model_len = 2048 needs 64 (3 MB)"),
        (["--chat-template", "/no/such.jinja"], 2, "cannot read the chat template /no/such.jinja: No such file"),
    ],
)
def test_settings_that_do_not_fit_the_model(
    argv: list[str], status: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    got, text = serve(capsys, *argv)
    assert (got, sentence in text) == (status, True), text


def test_what_fits_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0].content }}")
    for argv in (
        ["--max-model-len", "2048", "--chat-template", str(template)],
        ["--kv-cache-memory-bytes", "1MiB", "--max-model-len", "128"],
        ["--kv-cache-memory-bytes", "1MiB", "--num-gpu-blocks-override", "64"],
        ["--no-enable-chunked-prefill", "--max-model-len", "256"],
        ["--dtype", "bfloat16", "--kv-cache-memory-bytes", "4MiB"],
        ["toy"],
        ["toy", "--prefill-tp", "4", "--decode-tp", "2", "--decode-pp", "2"],
        ["--prefill-pp", "6", "--decode-tp", "6"],
        ["--prefill", "0", "--prefill-tp", "3"],
    ):
        assert serve(capsys, *argv)[0] == 77, argv


def test_a_template_that_does_not_compile(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in %}")
    status, text = serve(capsys, "--chat-template", str(template))
    assert status == 1
    assert f"the chat template in {template} does not compile" in text


def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "DRIVERS", ("/no/driver",))
    status, text = serve(capsys, "--device", "cuda")
    assert status == 2
    assert "there is no NVIDIA driver here (no /no/driver); use --device cpu" in text
    monkeypatch.setattr(preflight, "DRIVERS", ("/dev/null",))
    assert serve(capsys, "--device", "cuda")[0] == 77


def test_revision_is_the_one_looked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(preflight, "locate", lambda *args: asked.append(args) or BUNDLED)
    assert serve(capsys, "some/model", "--revision", "v2")[0] == 77
    assert asked == [("some/model", "v2")]


def test_from_a_shell_it_is_quick_and_needs_neither_torch_nor_ray(folder: Path) -> None:
    """The real command in a process of its own: one sentence, status 1, no traceback."""
    cut(folder / "model.safetensors")
    code = (
        "import sys; from cluster import cli\n"
        f"status = cli.main(['serve', {str(folder)!r}, '--port', '18765'])\n"
        "print(sorted({'torch', 'ray', 'transformers'} & sys.modules.keys()), status)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    took = time.monotonic() - began
    assert done.stdout.split("\n")[0] == "[] 1", done.stdout + done.stderr
    assert done.stderr.startswith(f"tandem: {folder}/model.safetensors has ")
    assert done.stderr.count("\n") == 1
    assert took < 20
