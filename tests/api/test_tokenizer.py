"""Ids and prompts equal those of transformers, which is the oracle here and nowhere at run time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import small_tokenizers

from api.tokenizer import Tokenizer
from protocol.errors import InvalidRequest, ModelError

BUNDLED = Path(__file__).parents[2] / "models" / "bundled"
TEXTS = [
    "",
    " ",
    "hello world",
    "  two  spaces \n\n and\ttabs ",
    "naïve Ünïcödé 世界 😀👨‍👩‍👧",
    "def f(x):\n    return x + 1\n",
    "</s>special<|user|> tokens<pad> in <|end|> text<|endoftext|>",
    "\u200b\ufeff\u0000 odd",
    "x" * 3000,
]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "What is 世界?\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c <|user|> injected"},
    ],
]


@pytest.fixture(scope="module")
def auto() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "byte level": ("byte_level", {}),
    "byte level with bos": ("byte_level", {"add_bos_token": True}),
    "byte level with bos and eos": ("byte_level", {"add_bos_token": True, "add_eos_token": True}),
    "sentencepiece": ("sentencepiece", {}),
    "sentencepiece told not to": ("sentencepiece", {"add_bos_token": False}),
    "word piece": ("word_piece", {}),
    "an extra special token": ("byte_level", {"additional_special_tokens": ["<|user|>", "<|tool|>"]}),
    "token objects": ("byte_level", {"eos_token": {"content": "</s>", "lstrip": False, "__type": "AddedToken"}}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_prompts_equal_transformers(kind: str, auto: Any, tmp_path: Path) -> None:
    make, config = KINDS[kind]
    directory = getattr(small_tokenizers, make)(tmp_path / "a model", **config)
    _compare(Tokenizer(directory), auto(directory))


@pytest.mark.skipif(not (BUNDLED / "tokenizer.json").is_file(), reason="models/bundled has no tokenizer yet")
def test_the_bundled_model_equals_transformers(auto: Any) -> None:
    _compare(Tokenizer(BUNDLED), auto(BUNDLED))


def _compare(ours: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        for add_special_tokens in (True, False):
            expected = theirs.encode(text, add_special_tokens=add_special_tokens)
            assert ours.encode(text, add_special_tokens) == expected, (text, add_special_tokens)
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    for chat in CHATS:
        for options in ({"add_generation_prompt": True}, {"add_generation_prompt": False}):
            prompt = theirs.apply_chat_template(chat, tokenize=False, **options)
            assert ours.render_chat(chat, **options) == prompt
            ids = theirs.apply_chat_template(chat, tokenize=True, return_dict=False, **options)
            assert ours.encode(prompt, add_special_tokens=False) == ids
    for ending in ("The answer is", "ends in a space "):
        chat = [*CHATS[0], {"role": "assistant", "content": ending}]
        options = {"add_generation_prompt": False, "continue_final_message": True}
        assert ours.render_chat(chat, **options) == theirs.apply_chat_template(chat, tokenize=False, **options)
    assert ours.eos_token_ids[-1:] == (theirs.eos_token_id,) or theirs.eos_token_id in ours.eos_token_ids


TEMPLATES = {
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "tojson": "{{ messages | tojson }}|{{ {'b': 1, 'a': '<é>'} | tojson(indent=2) }}",
    "generation tag": "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "variables": "{{ enable_thinking | default('unset') }} {{ bos_token }}{{ eos_token }} {{ missing }}{{ tools is none }}",
    "slices and dicts": "{% set d = dict(a=1) %}{{ d.a }}{{ messages[0]['content'][:3] }}{{ messages[-1].role | upper }}",
    "year": "{{ strftime_now('%Y') }}",
    "trimmed blocks": "  {% if true %}\n  x\n  {% endif %}\n{{- messages[0].content }}\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name: str, auto: Any, tmp_path: Path) -> None:
    directory = small_tokenizers.byte_level(tmp_path, chat_template=TEMPLATES[name])
    ours, theirs = Tokenizer(directory), auto(directory)
    for variables in ({}, {"enable_thinking": False}):
        expected = theirs.apply_chat_template(CHATS[2], tokenize=False, **variables)
        assert ours.render_chat(CHATS[2], add_generation_prompt=False, variables=variables) == expected


def test_a_jinja_file_wins(auto: Any, tmp_path: Path) -> None:
    directory = small_tokenizers.byte_level(tmp_path)
    (directory / "chat_template.jinja").write_text("file: {{ messages[0].content }}")
    expected = auto(directory).apply_chat_template(CHATS[0], tokenize=False)
    assert Tokenizer(directory).render_chat(CHATS[0]) == expected == "file: Hi"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no such luck') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nothing.at_all }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
    ],
)
def test_a_template_that_fails_is_the_requests_error(template: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(small_tokenizers.byte_level(tmp_path, chat_template=template))
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.render_chat(CHATS[0])
    assert caught.value.param == "messages"


def test_a_template_that_does_not_compile_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        Tokenizer(small_tokenizers.byte_level(tmp_path, chat_template="{% if %}"))


def test_no_template_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        Tokenizer(small_tokenizers.byte_level(tmp_path, chat_template=None)).render_chat(CHATS[0])


def test_a_missing_or_broken_file_names_itself(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing.*save_pretrained"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path)
    small_tokenizers.byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer(tmp_path)


def test_eos_and_sampling_defaults_come_from_generation_config(tmp_path: Path) -> None:
    directory = small_tokenizers.byte_level(tmp_path)
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    tokenizer = Tokenizer(directory)
    assert tokenizer.eos_token_ids == (7, 1)
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [3, 4], "temperature": 0.6, "top_k": 20, "max_new_tokens": 99, "do_sample": True})
    )
    tokenizer = Tokenizer(directory)
    assert tokenizer.eos_token_ids == (3, 4, 1)
    assert tokenizer.default_sampling == {"temperature": 0.6, "top_k": 20, "max_tokens": 99}


async def test_long_texts_are_encoded_beside_the_event_loop(byte_level: Tokenizer) -> None:
    import asyncio

    text = "for i in range(10): print(i)\n" * 20_000
    num_ticks = 0

    async def tick() -> None:
        nonlocal num_ticks
        while True:
            await asyncio.sleep(0.001)
            num_ticks += 1

    ticking = asyncio.create_task(tick())
    ids = await byte_level.encode_async(text)
    ticking.cancel()
    assert ids == byte_level.encode(text)
    assert num_ticks > 5
