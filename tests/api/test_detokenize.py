"""Incremental text equals the text of all tokens at once, however it is cut, and stop strings are found wherever they fall."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import small_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from api.detokenize import Detokenizer, StopStrings
from api.tokenizer import Tokenizer
from protocol.request import SamplingParams


def run(tokenizer: Tokenizer, ids: Sequence[int], cuts: Sequence[int] = (), **fields: object) -> tuple[list[str], str | None]:
    """Feed `ids` in pieces that end at `cuts`; the deltas and the stop string."""
    detokenizer = Detokenizer(tokenizer, SamplingParams(**fields))  # type: ignore[arg-type]
    deltas: list[str] = []
    edges = [0, *sorted(cuts), len(ids)]
    for start, end in zip(edges, edges[1:], strict=False):
        text, stop = detokenizer.feed(ids[start:end])
        deltas.append(text)
        if stop is not None:
            assert detokenizer.feed(ids[end:]) == ("", None)
            assert detokenizer.flush() == ""
            return deltas, stop
    return [*deltas, detokenizer.flush()], None


def random_ids(tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """Tokens of every kind: pieces, single bytes, special tokens, ids beyond the vocabulary."""
    size = tokenizer.vocab_size
    return [rng.randrange(size + 3) for _ in range(rng.randrange(1, 40))]


@pytest.mark.parametrize("skip", [True, False])
def test_byte_level_deltas_join_to_the_full_decode(byte_level: Tokenizer, skip: bool) -> None:
    rng = random.Random(1)
    for _ in range(600):
        ids = random_ids(byte_level, rng)
        deltas, stop = run(byte_level, ids, rng.choices(range(len(ids) + 1), k=5), skip_special_tokens=skip)
        assert stop is None
        assert "".join(deltas) == byte_level.decode(ids, skip_special_tokens=skip)


def each_byte(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The slow twin of the sentencepiece decoder: ill-formed bytes become U+FFFD one by one, well-formed ones stay."""
    data = b"".join(tokenizer.token_bytes(i) for i in ids if i not in tokenizer.pieces.special_ids)
    text = ""
    while data:
        for length in (4, 3, 2, 1):
            try:
                text += data[:length].decode()
                data = data[length:]
                break
            except UnicodeDecodeError:
                continue
        else:
            text += "\ufffd"
            data = data[1:]
    return text.removeprefix(" ")


def test_sentencepiece_bytes_that_are_not_utf8(sentencepiece: Tokenizer) -> None:
    """The backend replaces a whole run of bytes when one of them is wrong, good glyphs too; a stream cannot."""
    assert sentencepiece.pieces.is_additive
    rng = random.Random(2)
    for _ in range(600):
        ids = random_ids(sentencepiece, rng)
        deltas, _ = run(sentencepiece, ids, rng.choices(range(len(ids) + 1), k=5))
        assert "".join(deltas) == each_byte(sentencepiece, ids)


def test_sentencepiece_deltas_join_to_the_full_decode(sentencepiece: Tokenizer) -> None:
    """Random pieces, with runs of byte tokens in between that are glyphs, or the beginning of one."""
    rng = random.Random(3)
    tokens = {sentencepiece.backend.id_to_token(i): i for i in range(sentencepiece.vocab_size)}
    byte_ids = [tokens[f"<0x{byte:02X}>"] for byte in range(256)]
    others = [i for i in range(sentencepiece.vocab_size) if i not in set(byte_ids)]
    for _ in range(600):
        ids: list[int] = []
        for _ in range(rng.randrange(1, 12)):
            glyphs = "".join(rng.choices("é世😀Ж", k=rng.randrange(1, 4))).encode()
            run_of_bytes = glyphs if rng.random() < 0.7 else "😀".encode()[: rng.randrange(1, 4)]
            ids += [*rng.choices(others, k=rng.randrange(1, 6)), *(byte_ids[byte] for byte in run_of_bytes)]
            ids.append(tokens["e"])
        deltas, _ = run(sentencepiece, ids, rng.choices(range(len(ids) + 1), k=5))
        assert "".join(deltas) == sentencepiece.decode(ids)


@pytest.mark.parametrize("text", ["naïve 😀 世界", " leading", "a  b", "", "\n\n", "ends in half a glyph: é"])
def test_encoded_text_comes_back(byte_level: Tokenizer, sentencepiece: Tokenizer, text: str) -> None:
    for tokenizer in (byte_level, sentencepiece):
        ids = tokenizer.encode(text, add_special_tokens=False)
        deltas, _ = run(tokenizer, ids, range(len(ids)))
        assert "".join(deltas) == text == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["unigram", "word_piece"])
def test_decoders_without_pieces_use_a_window(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = Tokenizer(getattr(small_tokenizers, kind)(tmp_path_factory.mktemp(kind)))
    assert not tokenizer.pieces.is_additive
    rng = random.Random(3)
    for _ in range(300):
        ids = random_ids(tokenizer, rng)
        deltas, _ = run(tokenizer, ids, range(len(ids)))
        assert "".join(deltas) == tokenizer.decode(ids)


def test_a_split_glyph_is_held_back_and_every_delta_is_valid(byte_level: Tokenizer) -> None:
    single = {byte_level.token_bytes(i): i for i in range(byte_level.vocab_size)}
    ids = [single[bytes([byte])] for byte in "é😀".encode()]
    deltas, _ = run(byte_level, ids, range(1, len(ids)))
    assert deltas == ["", "é", "", "", "", "😀", ""]
    deltas, _ = run(byte_level, ids[:-1], range(1, len(ids)))
    assert "".join(deltas) == "é\ufffd"


def test_a_first_space_belongs_to_the_answer_after_a_prompt(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("hello there", add_special_tokens=False)
    prompt = sentencepiece.encode("User:")
    alone = Detokenizer(sentencepiece, SamplingParams())
    after = Detokenizer(sentencepiece, SamplingParams(), prompt_token_ids=prompt)
    after_bos = Detokenizer(sentencepiece, SamplingParams(), prompt_token_ids=prompt[:1])
    assert alone.feed(ids)[0] == "hello there"
    assert after.feed(ids)[0] == " hello there"
    assert after_bos.feed(ids)[0] == "hello there"


def test_the_text_of_an_ending_token_is_left_out(byte_level: Tokenizer) -> None:
    eos = byte_level.eos_token_ids[0]
    word = byte_level.encode("hello", add_special_tokens=False)
    stop_id = word[-1]

    def text(ids: list[int], **fields: object) -> str:
        detokenizer = Detokenizer(byte_level, SamplingParams(skip_special_tokens=False, **fields), [eos])  # type: ignore[arg-type]
        return detokenizer.feed(ids)[0] + detokenizer.flush()

    assert text([*word, eos]) == "hello"
    assert text([*word, eos], ignore_eos=True) == "hello</s>"
    assert text([*word, eos], include_stop_str_in_output=True) == "hello</s>"
    assert text(word, stop_token_ids=[stop_id]) == byte_level.decode(word[:-1])
    assert text([eos, *word, eos], min_tokens=len(word)) == "</s>hello"


# ---- stop strings --------------------------------------------------------------------------------------------------


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """The slow twin: the stop that ends first; of those the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(0, 30), max_size=6),
    st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_are_found_wherever_the_text_is_cut(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    matcher = StopStrings(stops, include)
    edges = [0, *sorted(cuts), len(text)]
    out, found = "", None
    for start, end in zip(edges, edges[1:], strict=False):
        given_out, found = matcher.push(text[start:end])
        out += given_out
        if found is not None:
            break
    expected = first_stop(text, stops)
    if expected is None:
        assert found is None
        assert out + matcher.take_held() == text
        return
    end, stop = expected
    assert found == stop
    assert out == text[: end if include else end - len(stop)]


def test_random_tokens_with_stop_strings(byte_level: Tokenizer) -> None:
    """Stops are cut out of the middle of the full text, so they begin and end inside tokens and inside glyphs' tokens."""
    rng = random.Random(4)
    num_stopped = 0
    for _ in range(500):
        ids = random_ids(byte_level, rng)
        text = byte_level.decode(ids)
        if len(text) < 2:
            continue
        start = rng.randrange(len(text) - 1)
        stop = text[start : start + rng.randrange(1, 6)]
        include = rng.random() < 0.5
        deltas, found = run(byte_level, ids, range(1, len(ids)), stop=[stop, "never there"], include_stop_str_in_output=include)
        end, _ = first_stop(text, [stop]) or (0, "")
        assert "".join(deltas) == text[: end if include else end - len(stop)]
        num_stopped += found == stop
    assert num_stopped > 300


def test_only_what_may_become_a_stop_string_is_held(byte_level: Tokenizer) -> None:
    matcher = StopStrings(["\nUser:"], include=False)
    assert matcher.push("fine\n") == ("fine", None)
    assert matcher.push("Us") == ("", None)
    assert matcher.push("es") == ("\nUses", None)
    assert matcher.push("\n\nUser: more") == ("\n", "\nUser:")


def test_min_tokens_disarm_stop_strings(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("hello hello hello", add_special_tokens=False)
    deltas, stop = run(byte_level, ids, range(len(ids)), stop="hello")
    assert ("".join(deltas), stop) == ("", "hello")
    num_first = len(byte_level.encode("hello", add_special_tokens=False))
    deltas, stop = run(byte_level, ids, range(len(ids)), stop="hello", min_tokens=num_first, max_tokens=None)
    assert ("".join(deltas), stop) == ("hello ", "hello")


def test_long_stop_strings_cost_little(byte_level: Tokenizer) -> None:
    """A hostile stop string: linear in the text, whatever is in it."""
    import time

    matcher = StopStrings(["a" * 1023 + "b"] * 16, include=False)
    started = time.perf_counter()
    for _ in range(100):
        matcher.push("a" * 100)
    assert time.perf_counter() - started < 2.0


# ---- random glyphs in random bytes ---------------------------------------------------------------------------------------

GLYPHS = st.sampled_from(
    ["a", " ", "\n", "\u00e9", "e\u0301", "\u00df", "\u6f22", "\u5b57", "\u304b\u306a", "\ud55c"]  # accents, CJK
    + ["\u0928\u092e\u0938\u094d\u0924\u0947", "\u0301", "\u200d", "\ufeff", "\U0010fffd"]  # combining, joining, the last plane
    + ["\U0001f642", "\U0001f44d\U0001f3fd", "\U0001f1e9\U0001f1ea", "\U0001f3f3\ufe0f\u200d\U0001f308"]  # emoji, composed ones
    + ["\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"]
)


def as_tokens(tokenizer: Tokenizer, parts: list[tuple[str, bool]], single: dict[bytes, int]) -> list[int]:
    """Each part as the tokenizer cuts it, or (True) one token for each of its bytes."""
    ids: list[int] = []
    for text, in_bytes in parts:
        whole = [single[bytes([byte])] for byte in text.encode()]
        ids += whole if in_bytes else tokenizer.encode(text, False)
    return ids


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.lists(GLYPHS, min_size=1, max_size=6).map("".join), st.booleans()), max_size=12), st.randoms())
def test_no_delta_ends_within_a_glyph(byte_level: Tokenizer, parts: list[tuple[str, bool]], rng: random.Random) -> None:
    single = {byte_level.token_bytes(i): i for i in range(byte_level.vocab_size) if len(byte_level.token_bytes(i)) == 1}
    ids = as_tokens(byte_level, parts, single)
    detokenizer = Detokenizer(byte_level, SamplingParams())
    data, given_so_far = b"", ""
    position = 0
    while position < len(ids):
        step = rng.choice((1, 1, 1, 2, 5))
        delta, _ = detokenizer.feed(ids[position : position + step])
        data += b"".join(byte_level.token_bytes(i) for i in ids[position : position + step])
        position += step
        given_so_far += delta
        held = next(n for n in range(4) if is_utf8(data[: len(data) - n]))
        assert given_so_far.encode() == data[: len(data) - held], "all whole glyphs, and nothing of the one that is not"
        assert "\ufffd" not in delta
    assert given_so_far + detokenizer.flush() == byte_level.decode(ids) == "".join(text for text, _ in parts)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.lists(GLYPHS, min_size=1, max_size=4).map("".join), st.booleans()), max_size=8), st.data())
def test_replacement_characters_come_only_where_the_whole_text_has_them(
    byte_level: Tokenizer, parts: list[tuple[str, bool]], data: st.DataObject
) -> None:
    """Tokens are left out and doubled, so that bytes of glyphs are missing or stray."""
    single = {byte_level.token_bytes(i): i for i in range(byte_level.vocab_size) if len(byte_level.token_bytes(i)) == 1}
    ids = as_tokens(byte_level, parts, single)
    times = data.draw(st.lists(st.sampled_from((0, 1, 1, 1, 1, 2)), min_size=len(ids), max_size=len(ids)))
    ids = [token for token, number in zip(ids, times, strict=True) for _ in range(number)]
    detokenizer = Detokenizer(byte_level, SamplingParams())
    deltas = [detokenizer.feed([token])[0] for token in ids]
    whole = byte_level.decode(ids)
    for number in range(len(deltas)):
        assert whole.startswith("".join(deltas[: number + 1])), "what was given is never taken back"
    assert "".join(deltas) + detokenizer.flush() == whole


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
