"""What each token adds to a text, as bytes where the tokenizer's decoder allows it.

Almost every tokenizer of today is one of two kinds, and for both the bytes of a text are the concatenation of the bytes
of its tokens: byte-level BPE (GPT-2, Llama 3, Qwen), and sentencepiece-style BPE with byte fallback (Llama 2, Mistral,
Gemma). A table of pieces makes detokenizing O(1) per token and exact. Any other decoder has no such table
(`is_additive` is False); `detokenize.py` then decodes a small window instead.

Not a tokenizer: it only reads one. Called by `tokenizer.py` and `detokenize.py`.
"""

from __future__ import annotations

import codecs
import contextlib
import json
from typing import Any

import tokenizers


def _bytes_of_chars() -> dict[str, int]:
    """GPT-2's printable alphabet for the 256 bytes: printable Latin-1 stands for itself, the rest starts at U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


BYTES_OF_CHARS = _bytes_of_chars()
EACH_BYTE = "tandem.each_byte"  # an error handler for codecs: one U+FFFD for each byte that is not UTF-8


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _replace_each_byte)


class Pieces:
    """The table of one tokenizer, filled as tokens are asked for.

    strip_left: how many spaces the decoder takes off the front of a whole text. errors: how ill-formed bytes are shown
    (a codecs error handler), so that the result equals the decoder's own.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._replacements: list[tuple[str, str]] = []
        self._has_byte_fallback = False
        self._cache: dict[int, bytes] = {}
        self.texts: dict[int, str] = {}  # of the tokens asked for so far, those whose bytes are whole glyphs
        self.strip_left = 0
        self.errors = "replace"
        steps = _steps(_part(backend, "decoder"))
        self.is_byte_level = [step["type"] for step in steps] == ["ByteLevel"]
        self.is_additive = self.is_byte_level or self._read_sentencepiece(steps)
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)

    def _read_sentencepiece(self, steps: list[dict[str, Any]]) -> bool:
        """Replace*, ByteFallback, Fuse, Strip, each where conversions of sentencepiece put it; else not additive."""
        fused = False
        for step in steps:
            kind = step["type"]
            if kind == "Replace" and not fused and "String" in step["pattern"]:
                self._replacements.append((step["pattern"]["String"], step["content"]))
            elif kind == "ByteFallback" and not fused:
                self._has_byte_fallback = True
            elif kind == "Fuse":
                fused = True
            elif kind == "Strip" and fused and step["content"] == " " and step["stop"] == 0:
                self.strip_left = step["start"]
            else:
                return False
        self.errors = EACH_BYTE
        return fused

    def __getitem__(self, token_id: int) -> bytes:
        """What the token adds; b"" for an id that the tokenizer does not know. Partial glyphs stay partial."""
        piece = self._cache.get(token_id)
        if piece is None:
            piece = self._cache[token_id] = self._make(token_id)
            with contextlib.suppress(UnicodeDecodeError):
                self.texts[token_id] = piece.decode()
        return piece

    def _make(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if not self.is_additive:
            return self._backend.decode([token_id], skip_special_tokens=False).encode()
        if self.is_byte_level:
            try:
                return bytes(BYTES_OF_CHARS[char] for char in token)
            except KeyError:  # an added token is written as it is
                return token.encode()
        for old, new in self._replacements:
            token = token.replace(old, new)
        if self._has_byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        return token.encode()


def _part(backend: tokenizers.Tokenizer, name: str) -> dict[str, Any] | None:
    """One part of the pipeline as tokenizer.json writes it, without the vocabulary (which can be tens of megabytes)."""
    part = getattr(backend, name)
    return None if part is None else json.loads(part.__getstate__())


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for child in decoder["decoders"] for step in _steps(child)]
    return [decoder]
