"""Small tokenizers of each kind, made on the spot, in directories as models have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "def hello(name):\n    return f'Hello, {name}! Grüße, 世界 😀'\n",
    "The quick brown fox jumps over the lazy dog. Ça va? Привет, мир!",
    "for i in range(10):\n    print(i, end=' ')  # 数える\n",
    "User: hi\nAssistant: hello there, how are you today?\n",
] * 4
SPECIAL = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {%- if message['role'] not in ['system', 'user', 'assistant'] %}\n"
    "        {{- raise_exception('only system, user and assistant, not ' + message['role']) }}\n"
    "    {%- endif %}\n"
    "{{- '<|' + message['role'] + '|>\\n' + message['content'] | trim + eos_token + '\\n' }}\n"
    "{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def byte_level(directory: Path, **config: Any) -> Path:
    """GPT-2's kind."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _save(backend, directory, config)


def sentencepiece(directory: Path, **config: Any) -> Path:
    """Llama 2's kind: BPE over characters, with a token for each byte as the fallback."""
    plain = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    plain.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain.train_from_iterator(
        [text for text in CORPUS if text.isascii()],
        trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", *SPECIAL], show_progress=False),
    )
    model = json.loads(plain.to_str())["model"]
    vocab: dict[str, int] = {token: i for i, token in enumerate(["<unk>", *SPECIAL])}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]:
        vocab.setdefault(token, len(vocab))
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [tuple(m) for m in model["merges"]], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = plain.normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in ["<unk>", *SPECIAL]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return _save(backend, directory, config)


def unigram(directory: Path, **config: Any) -> Path:
    """T5's kind, whose decoder has no table of pieces."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False),
    )
    return _save(backend, directory, config)


def word_piece(directory: Path, **config: Any) -> Path:
    """BERT's kind."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    )
    return _save(backend, directory, config)


def _save(backend: tokenizers.Tokenizer, directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "additional_special_tokens": ["<|user|>", "<|assistant|>"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        **config,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory
