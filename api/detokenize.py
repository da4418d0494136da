"""Token ids in, text out, as they come: valid UTF-8 always, split glyphs held back, stop strings found and cut.

One `Detokenizer` per choice of a request, in the gateway. The text of all `feed`s and the `flush` is the text of all
tokens decoded at once, up to the stop string. O(1) per token for every tokenizer with a table of pieces.

Not here: stop token ids and EOS end a request in the engine; this only leaves their text out.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

from api.tokenizer import Tokenizer
from protocol.request import Request, SamplingParams

MAX_HELD_TOKENS = 16  # in a window that does not become text: more than any glyph needs
NUM_CONTEXT_TOKENS = 6  # of the prompt, so that a first space is kept where it belongs


class Detokenizer:
    """Text of one choice. `prompt_token_ids` are context only: after a prompt, a first space belongs to the answer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        eos_token_ids: Iterable[int] = (),
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        skipped = tokenizer.pieces.special_ids if sampling.skip_special_tokens else frozenset()
        context = [token for token in prompt_token_ids[-NUM_CONTEXT_TOKENS:] if token not in skipped]
        self._skipped = skipped
        self._text: _TextSource
        if tokenizer.pieces.is_additive:
            self._text = PieceDecoder(tokenizer, at_start=not context)
        else:
            self._text = WindowDecoder(tokenizer, context)
        self._ending = set(sampling.stop_token_ids or ())
        if not sampling.ignore_eos:
            self._ending.update(eos_token_ids)
        self._special = self._ending | skipped  # tokens that may not become text
        self._shows_ending = sampling.include_stop_str_in_output
        self._min_tokens = sampling.min_tokens
        self._num_tokens = 0
        self._stops = StopStrings(sampling.stop or (), sampling.include_stop_str_in_output) if sampling.stop else None
        self._is_over = False

    @classmethod
    def for_request(cls, tokenizer: Tokenizer, request: Request) -> Detokenizer:
        """As the gateway makes them: with the request's EOS ids and the end of its prompt."""
        return cls(tokenizer, request.sampling, request.eos_token_ids, request.prompt_token_ids)

    def feed(self, token_ids: Sequence[int]) -> tuple[str, str | None]:
        """(new text, stop string or None). After a stop string nothing more comes, whatever is fed."""
        if len(token_ids) == 1 and self._stops is None and not self._is_over and token_ids[0] not in self._special:
            self._num_tokens += 1
            return self._text.push(token_ids[0]), None
        parts: list[str] = []
        for token in token_ids:
            if self._is_over:
                break
            self._num_tokens += 1
            ends = token in self._ending and self._num_tokens >= self._min_tokens
            if token in self._skipped or (ends and not self._shows_ending):
                continue
            text = self._text.push(token)
            if self._stops is None or not text:
                parts.append(text)
                continue
            # Text of the first min_tokens tokens may begin a stop string, but not complete one.
            text, stop = self._stops.push(text, armed=self._num_tokens > self._min_tokens)
            parts.append(text)
            if stop is not None:
                self._is_over = True
                return "".join(parts), stop
        return "".join(parts), None

    def flush(self) -> str:
        """What was held back, at the end of the choice. Half a glyph becomes U+FFFD."""
        if self._is_over:
            return ""
        self._is_over = True
        text = self._text.flush()
        if self._stops is None:
            return text
        text, stop = self._stops.push(text)
        return text if stop is not None else text + self._stops.take_held()


class _TextSource(Protocol):
    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class PieceDecoder:
    """Bytes of each token from the table, through an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer, at_start: bool) -> None:
        self._pieces = tokenizer.pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")(self._pieces.errors)
        self._to_strip = self._pieces.strip_left if at_start else 0
        self._is_whole = True  # no part of a glyph is held back

    def push(self, token: int) -> str:
        if self._is_whole and not self._to_strip:
            text = self._pieces.texts.get(token)
            if text is not None:
                return text
        text = self._decoder.decode(self._pieces[token])
        self._is_whole = not self._decoder.getstate()[0]
        return self._strip(text)

    def flush(self) -> str:
        return self._strip(self._decoder.decode(b"", True))

    def _strip(self, text: str) -> str:
        while self._to_strip and text:
            if text[0] != " ":
                self._to_strip = 0
                break
            text = text[1:]
            self._to_strip -= 1
        return text


class WindowDecoder:
    """For decoders that are not additive: decode a window with and without the new tokens, keep the difference.

    The method of two offsets that vLLM and TGI use: [prefix, read) is text already given, [read, end) is pending.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._decode = tokenizer.decode
        self._given = list(context)
        self._pending: list[int] = []
        self._given_text = self._decode(self._given, skip_special_tokens=False)

    def push(self, token: int) -> str:
        self._pending.append(token)
        whole = self._decode(self._given + self._pending, skip_special_tokens=False)
        is_partial = whole.endswith("\ufffd") and len(self._pending) < MAX_HELD_TOKENS
        if is_partial or len(whole) <= len(self._given_text):
            return ""
        return self._give(whole)

    def flush(self) -> str:
        return self._give(self._decode(self._given + self._pending, skip_special_tokens=False)) if self._pending else ""

    def _give(self, whole: str) -> str:
        text = whole[len(self._given_text) :]
        self._given, self._pending = self._pending, []
        self._given_text = self._decode(self._given, skip_special_tokens=False)
        return text


class StopStrings:
    """Finds the stop string that ends first, wherever the text is cut into pieces (Knuth-Morris-Pratt, one state each).

    Of two that end at the same character the longer wins. Only text that may be the beginning of a stop string is held.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = tuple(stops)
        self._failures = [_failure_function(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._include = include
        self._held = ""

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """(text that may go out, stop string or None). Not armed: a match that completes here does not count."""
        for end, char in enumerate(text, 1):
            found = self._step(char)
            if found is not None and armed:
                whole = self._held + text[:end]
                self._held = ""
                return (whole if self._include else whole[: len(whole) - len(found)]), found
        whole = self._held + text
        num_held = 0 if self._include else max(self._states)
        self._held = whole[len(whole) - num_held :]
        return whole[: len(whole) - num_held], None

    def take_held(self) -> str:
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> str | None:
        found: str | None = None
        for i, stop in enumerate(self._stops):
            failure, state = self._failures[i], self._states[i]
            while state and stop[state] != char:
                state = failure[state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                if found is None or len(stop) > len(found):
                    found = stop
                state = failure[state - 1]
            self._states[i] = state
        return found


def _failure_function(pattern: str) -> list[int]:
    """For each prefix: the length of its longest proper suffix that is also a prefix of the pattern."""
    table = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = table[length - 1]
        if pattern[i] == pattern[length]:
            length += 1
        table[i] = length
    return table
