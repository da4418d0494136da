"""Several models and overflow servers in one configuration: what a file and options say, what is inherited, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from configs.load import load
from configs.schema import Config, with_inherited
from protocol.errors import ConfigError

FILE = """
model: {name: bundled, kv_cache_bytes: 256MiB, max_len: 512, served_name: small}
decode: {replicas: 3, max_num_seqs: 7, max_num_batched_tokens: 99}
also:
  - toy
  - model:
      name: /models/llama
      served_name: big
    decode: {replicas: 2, max_num_seqs: 9}
overflow:
  - {url: "http://gpu:8000/v1", model: there, serves: big, max_num_seqs: 4}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(FILE)
    return path


def test_a_file_names_further_models(file: Path) -> None:
    resolved = load(file=file, env={})
    small, toy, big = resolved.config.each()
    assert [one.served_name for one in (small, toy, big)] == ["small", "toy", "big"]
    assert (toy.model.kv_cache_bytes, toy.decode.max_num_seqs) == (256 << 20, 7), "as the machine's owner set it for the first"
    assert (toy.model.max_len, toy.decode.replicas) == (None, 1), "of a model, and of a pool: its own"
    assert (big.decode.replicas, big.decode.max_num_seqs, big.decode.max_num_batched_tokens) == (2, 9, 99)
    assert {one.num_workers for one in (small, toy, big)} == {4 + 2 + 3}
    assert [one.prefix for one in (small, toy, big)] == ["small/", "toy/", "big/"]
    assert resolved.config.overflow[0].serves == "big"
    rows = {key: (value, origin) for key, value, origin in resolved.rows()}
    assert rows["also.1.decode.replicas"] == (2, f"file {file}:9")
    assert rows["overflow.0.max_num_seqs"][0] == 4


def test_options_come_after_the_file_and_one_model_alone_has_no_prefix(file: Path) -> None:
    config = load(
        file=file, env={}, also=["a/b-model,decode.replicas=2,model.max_len=64"], overflow=["http://x/v1,max_len=9"]
    ).config
    last = config.each()[-1]
    assert (last.label, last.decode.replicas, last.model.max_len) == ("b-model", 2, 64)
    assert config.overflow[-1].max_len == 9
    assert load(env={}).config.prefix == ""
    assert load(env={}).config == Config()


def test_the_wire_form_is_the_same_configuration(file: Path) -> None:
    for one in load(file=file, env={}).config.each():
        assert msgspec.json.decode(msgspec.json.encode(one), type=Config) == one


def test_the_document_of_a_serve_file_inherits_too() -> None:
    raw = {"model": {"name": "bundled", "block_size": 64}, "also": [{"model": {"name": "toy"}}]}
    assert msgspec.convert(with_inherited(raw), Config).also[0].model.block_size == 64


def test_each_model_keeps_the_others_beside_it(file: Path) -> None:
    config = load(file=file, env={}).config
    for one in config.each():
        assert {one.served_name, *(also.model.served_name or also.model.name for also in one.also)} == {"small", "toy", "big"}
    assert config.each()[0] == config


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({"also": ["toy,decode.replica=2"]}, ["also.0.decode.replica", "did you mean also.0.decode.replicas"]),
        ({"also": ["toy,gateway.port=2"]}, ["unknown key also.0.gateway.port"]),
        ({"also": ["toy,decode.replicas=0"]}, ["also.0.decode.replicas", "at least 1"]),
        ({"also": ["toy,x"]}, ["MODEL,section.name=value"]),
        ({"also": ["bundled"]}, ["another model is called bundled already", "served_name"]),
        ({"also": [""]}, ["also.0.model.name"]),
        ({"also": ["toy,decode.max_num_batched_tokens=2"]}, ["also.0.decode.max_num_batched_tokens 2 is below"]),
        ({"overflow": ["gpu:8000"]}, ["overflow.0.url", "http://host:8000/v1"]),
        ({"overflow": ["http://x/v1,modle=m"]}, ["overflow.0.modle", "did you mean overflow.0.model"]),
        ({"overflow": ["http://x/v1,serves=nobody"]}, ["overflow.0.serves nobody", "bundled"]),
        ({"overflow": ["http://x/v1,max_num_seqs=0"]}, ["overflow.0", "max_num_seqs"]),
        ({"sets": ["decode.min_replicas=2"]}, ["decode.min_replicas 2 is above decode.replicas 1"]),
        ({"sets": ["prefill.max_replicas=0"]}, ["prefill.max_replicas 0 is below prefill.replicas 1"]),
        ({"sets": ["decode.min_replicas=0"]}, ["decode.min_replicas is 0"]),
        ({"sets": ["prefill.min_replicas=0", "prefill.max_replicas=2"]}, ["prefill.min_replicas is 0", "keeps one worker"]),
        ({"sets": ["scheduler.switch_roles=true", "decode.max_replicas=2"]}, ["scheduler.switch_roles", "decode.max_replicas"]),
        ({"sets": ["scheduler.switch_roles=true", "decode.tp=2"]}, ["scheduler.switch_roles", "one rank"]),
    ],
)
def test_what_is_wrong_is_named(kwargs: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(env={}, **kwargs)
    assert all(part in error.value.message for part in parts), error.value.message


def test_a_wrong_list_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    for text, parts in (
        ("also: toy\n", [":1", "list"]),
        ("also:\n  - [a]\n", [":2"]),
        ("also:\n  - model: {nmae: toy}\n", [":2", "also.0.model.nmae"]),
        ("overflow:\n  - {model: m}\n", [":2", "url"]),
    ):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError) as error:
            load(file=path, env={})
        assert all(part in error.value.message for part in parts), error.value.message


def test_pools_that_follow_their_load() -> None:
    config = load(env={}, sets=["decode.max_replicas=3", "decode.replicas=2", "decode.min_replicas=1"]).config
    assert config.is_sized
    assert (config.decode.fewest, config.decode.most, config.num_workers) == (1, 3, 4)
    assert not load(env={}).config.is_sized
