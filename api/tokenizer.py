"""The model's tokenizer from its directory: text to ids, ids to text, messages to a prompt. No transformers.

It gives the ids that `transformers.AutoTokenizer` gives (a test compares them). Read by the HTTP routes and by the
gateway's detokenizer; one per process, safe to share between threads.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from api.chat_template import ChatTemplate
from api.pieces import Pieces
from protocol.errors import ConfigError, InvalidRequest, ModelError

LONG_TEXT_LEN = 2048  # characters; from here on encoding leaves the event loop (about 1 ms)
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKEN_OPTIONS = ("single_word", "lstrip", "rstrip", "normalized", "special")
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


class Tokenizer:
    """tokenizer.json with its side files. Raises ModelError that names the file and what to do.

    chat_template: a Jinja file that is used instead of the model's own template. special_tokens: {"eos_token": "<|end|>", ...}
    as far as the model names them. default_sampling: what generation_config.json recommends, under SamplingParams' names.
    """

    def __init__(self, directory: str | Path, chat_template: str | Path | None = None) -> None:
        self.directory = Path(directory)
        path = self.directory / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{path} is missing; Tandem reads fast tokenizers only. Write it with transformers: "
                "AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIRECTORY)"
            )
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises a bare Exception
            raise ModelError(f"{path} cannot be read: {error}") from None
        self.backend.no_truncation()
        self.backend.no_padding()
        config = {**self._json("special_tokens_map.json"), **self._json("tokenizer_config.json")}
        self.special_tokens = {name: text for name in NAMED_TOKENS if (text := _content(config.get(name)))}
        self._add_tokens(config)
        self.pieces = Pieces(self.backend)
        generation = self._json("generation_config.json")
        self.default_sampling = _default_sampling(generation)
        self.eos_token_ids = self._read_eos(generation)
        self.chat_template = self._read_template(config) if chat_template is None else self._given_template(Path(chat_template))
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

    # ---- text and ids ----------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Special tokens written in the text become special tokens, as in transformers.

        add_special_tokens: as tokenizer.json's post-processor does it; add_bos_token of the side files does not count.
        """
        # encode_batch, unlike encode, gives up the interpreter lock while it works.
        encoding = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        return list(encoding.ids)

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The same without holding up the event loop when the text is long."""
        if len(text) < LONG_TEXT_LEN:
            return self.encode(text, add_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.encode, text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text; may be part of a glyph."""
        return self.pieces[token_id]

    def token_text(self, token_id: int) -> str:
        return self.pieces[token_id].decode("utf-8", "replace")

    def token_id(self, text: str) -> int | None:
        found = self.backend.token_to_id(text)
        return None if found is None else int(found)

    @cached_property
    def vocab_size(self) -> int:
        """With added tokens. The model's logits may be wider (padding) and are what ids are checked against."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers that make the same ids of the same text and the same prompt of the same messages."""
        template = self.chat_template.source if self.chat_template is not None else ""
        parts = (self.backend.to_str(), json.dumps(self.special_tokens, sort_keys=True), template)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @cached_property
    def max_token_len(self) -> int:
        """Characters of the longest token: a text of x characters has at least x / max_token_len tokens."""
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)), default=1)

    # ---- chat ------------------------------------------------------------------------------------------------------

    def render_chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """Messages to prompt text; options as in `ChatTemplate.render`. Raises InvalidRequest.

        The template writes BOS and the like itself: encode the result with add_special_tokens=False.
        """
        if self.chat_template is None:
            raise InvalidRequest(
                "this model has no chat template (tokenizer_config.json or chat_template.jinja); use /v1/completions",
                param="messages",
            )
        return self.chat_template.render(messages, **options)

    def info(self) -> dict[str, Any]:
        """For /tokenizer_info: what a client needs to know instead of loading the tokenizer itself."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: self.special_tokens.get(name) for name in NAMED_TOKENS},
            "vocab_size": self.vocab_size,
            "chat_template": self.chat_template.source if self.chat_template else None,
        }

    # ---- reading the directory -------------------------------------------------------------------------------------

    def _json(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        if not path.is_file():
            return {}
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ModelError(f"{path} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ModelError(f"{path} holds a {type(value).__name__}, not an object")
        return value

    def _add_tokens(self, config: dict[str, Any]) -> None:
        """Tokens that only the side files know, and special ones that tokenizer.json does not mark as such."""
        known = self.backend.get_added_tokens_decoder()
        declared = config.get("added_tokens_decoder") or {}
        for index, fields in sorted((int(i), fields) for i, fields in declared.items()):
            if index not in known and isinstance(fields, dict):
                options = {name: fields[name] for name in TOKEN_OPTIONS if name in fields}
                self.backend.add_tokens([tokenizers.AddedToken(fields["content"], **options)])
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        extra = list(extra.values()) if isinstance(extra, dict) else extra
        special = {token.content for token in self.backend.get_added_tokens_decoder().values() if token.special}
        for text in (*self.special_tokens.values(), *map(_content, extra)):
            if text and text not in special:
                self.backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])
                special.add(text)

    def _read_eos(self, generation: dict[str, Any]) -> tuple[int, ...]:
        """Every id that ends an answer: of generation_config.json (else config.json), and the tokenizer's own EOS."""
        ids: list[int] = []
        value = generation.get("eos_token_id", self._json("config.json").get("eos_token_id"))
        ids += [value] if isinstance(value, int) else value if isinstance(value, list) else []
        own = self.token_id(self.special_tokens["eos_token"]) if "eos_token" in self.special_tokens else None
        return tuple(dict.fromkeys([*ids, *([] if own is None else [own])]))

    def _given_template(self, path: Path) -> ChatTemplate:
        try:
            source = path.expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            text = f"cannot read the chat template {path}: {reason} (--chat-template)"
            raise ConfigError(text, param="model.chat_template") from None
        return ChatTemplate(source, self.special_tokens, str(path))

    def _read_template(self, config: dict[str, Any]) -> ChatTemplate | None:
        """chat_template.jinja wins over tokenizer_config.json; of several named ones the "default"."""
        path = self.directory / "chat_template.jinja"
        if path.is_file():
            return ChatTemplate(path.read_text(encoding="utf-8"), self.special_tokens, str(path))
        value = config.get("chat_template")
        if isinstance(value, list):
            value = {item["name"]: item["template"] for item in value}
        if isinstance(value, dict):
            value = value.get("default")
        if value is None:
            return None
        return ChatTemplate(value, self.special_tokens, str(self.directory / "tokenizer_config.json"))


def _content(value: Any) -> str | None:
    """A token as the side files write it: a string, or an object with the string in it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _default_sampling(generation: dict[str, Any]) -> dict[str, Any]:
    """What vLLM takes from generation_config.json too; do_sample is not among them, so temperature alone decides."""
    found = {name: generation[name] for name in SAMPLING_DEFAULTS if generation.get(name) is not None}
    if "max_new_tokens" in found:
        found["max_tokens"] = found.pop("max_new_tokens")
    return found
