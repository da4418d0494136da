"""A package of ours is called `kernels`, and transformers probes that name for Hugging Face's library.

It takes ours for theirs when a distribution that provides `kernels` has a version inside its window (transformers 5.23:
0.18.2 <= v < 0.19), and then fails in every model, tokenizer and config. These tests turn any change of that window, of
our version or of what is installed into a red test instead of a puzzle.
"""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(code: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the repository root, where `kernels` is ours."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_no_distribution_is_called_kernels() -> None:
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("kernels")


def test_our_version_stays_below_the_window() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    major, minor = (int(part) for part in version.split(".")[:2])
    assert (major, minor) < (0, 18), f"version {version}: transformers would take our kernels/ for Hugging Face's"


def test_the_init_file_is_a_docstring_and_nothing_else() -> None:
    body = ast.parse((ROOT / "kernels/__init__.py").read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)


def test_importing_the_package_costs_nothing() -> None:
    done = run(
        "import sys, kernels\n"
        "assert not hasattr(kernels, '__version__')\n"
        "heavy = {'torch', 'triton', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    assert done.returncode == 0, done.stderr


def test_transformers_does_not_take_ours_for_theirs_and_still_builds_a_model() -> None:
    pytest.importorskip("transformers")
    done = run(
        "import kernels, os\n"
        "assert os.path.samefile(os.path.dirname(kernels.__file__), 'kernels'), kernels.__file__\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "assert is_kernels_available() is False, 'transformers believes that our kernels/ is its own'\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,\n"
        "                     num_attention_heads=2, num_key_value_heads=1)\n"
        "import torch\n"
        "assert LlamaForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 32)\n"
    )
    assert done.returncode == 0, done.stderr
