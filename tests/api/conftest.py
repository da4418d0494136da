"""Lets the test files of this folder import their helpers, and makes the tokenizers once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from api.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    import small_tokenizers

    return Tokenizer(small_tokenizers.byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    import small_tokenizers

    return Tokenizer(small_tokenizers.sentencepiece(tmp_path_factory.mktemp("sentencepiece")))
