"""The tenants file: every mistake has a line and a reason, nothing is taken of a file that has one, and no key is ever shown."""

from __future__ import annotations

import random
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.load import presets
from configs.tenants import (
    EXPECTED,
    MAX_FILE_BYTES,
    Price,
    SloClass,
    Tenant,
    Tenants,
    TenantsError,
    hash_key,
    read_file,
    read_tenants,
    text_of,
    version_of,
)

ROOT = Path(__file__).resolve().parents[2]
A, B = hash_key("sk-a"), hash_key("sk-b")
HEAD = "classes:\n  fast: {ttft_s: 0.5, tpot_s: 0.05, band: 0}\n  slow: {ttft_s: 5, tpot_s: 1, band: 2}\n"  # three lines


def read(text: str) -> Tenants:
    return read_tenants(text, "t.yaml")


def test_a_whole_file() -> None:
    found = read(
        HEAD
        + f"""
tenants:
  acme:
    api_keys: [{A}]
    weight: 3
    class: fast
    classes: [slow, fast]
    requests_per_min: 60
    tokens_per_min: 1.5e+4
    kv_share: 0.5
    models: [m, org/n]
    price: {{input: 1, output: 2.5}}
    is_operator: yes
  no:                # YAML would read a boolean here
    class: slow
    weight:          # as if it were not there
"""
    )
    acme = found.tenant("acme")
    assert (acme.api_keys, acme.weight, acme.slo_class, acme.allowed_classes) == ((A,), 3.0, "fast", ("fast", "slow"))
    assert (acme.requests_per_min, acme.tokens_per_min, acme.kv_share, acme.cache_share) == (60.0, 15_000.0, 0.5, 1.0)
    assert (acme.models, acme.price, acme.is_operator) == (("m", "org/n"), Price(input=1.0, output=2.5), True)
    assert found.tenant("no") == Tenant(slo_class="slow")
    assert found.slo_class("fast") == SloClass(ttft_s=0.5, tpot_s=0.05, band=0)


def test_who_is_not_named_is_default_with_the_class_that_is_served_last() -> None:
    assert read(HEAD).tenant("anybody").slo_class == "slow"
    assert read(HEAD.replace("slow", "standard")).tenant("anybody").slo_class == "standard"
    assert read(HEAD + "tenants: {default: {class: fast}}").tenant("anybody").slo_class == "fast"


def test_the_example_is_good_and_no_preset() -> None:
    found = read_file(ROOT / "configs/tenants.example.yaml")
    assert hash_key("sk-acme") in found.tenants["acme"].api_keys
    assert any(one.is_operator for one in found.tenants.values())
    assert "tenants.example" not in presets()


WRONG = [
    # text, line, what is said
    ("", 1, "empty"),
    ("# nothing\n", 1, "empty"),
    ("[]", 1, "must be a mapping"),
    ("tenants: {}", 1, "has no classes"),
    ("classes:\n", 1, "at least one class"),
    ("classes: {}\n", 1, "at least one class"),
    ("clases: {}", 1, "unknown key 'clases'; did you mean classes?"),
    (HEAD + "tenant: {}", 4, "did you mean tenants?"),
    (HEAD + "classes: {}", 4, "has 'classes' twice: lines 1 and 4"),
    ("classes:\n  a:\n    ttft_s: 1\n    tpot: 1\n", 4, "classes.a has the unknown key 'tpot'; did you mean tpot_s?"),
    ("classes:\n  a:\n    ttft_s: 1\n", 2, "classes.a has no tpot_s: a number of seconds above 0"),
    ("classes:\n  a: 1\n", 2, "must be a mapping"),
    ("classes:\n  a: {ttft_s: 1, tpot_s: 1}\n  a: {ttft_s: 1, tpot_s: 1}\n", 3, "has 'a' twice: lines 2 and 3"),
    ("classes:\n  A: {ttft_s: 1, tpot_s: 1}\n", 2, "the name 'A'"),
    ("classes:\n  ? [a]\n  : {}\n", 2, "no plain name"),
    *(
        (f"classes:\n  a:\n    ttft_s: {bad}\n    tpot_s: 1\n", 3, f"classes.a.ttft_s must be {expected}")
        for bad, expected in (
            ("0", "a number of seconds above 0; got 0"), ("-1", "a number"), ("'1'", "a number"), ("yes", "a number"),
            ("[1]", "a number"), (".nan", "finite"), (".inf", "finite"), ("1e99", "a number"), ("2020-01-01", "a number"),
            ("{a: 1}", "a number"), ("!!python/object:os.system {}", "")
        )
        if expected
    ),
    ("classes:\n  a: {ttft_s: 1, tpot_s: 1, band: 16}\n", 2, "from 0 (served first) to 15"),
    ("classes:\n  a: {ttft_s: 1, tpot_s: 1, band: 1.5}\n", 2, "classes.a.band"),
    ("classes:\n  a: {ttft_s: 1, tpot_s: 1, attainment: 1}\n", 2, "at most 0.99999"),
    ("classes:\n  a: {ttft_s: 1, tpot_s: 1, when_late: drop}\n", 2, "refuse or queue; got 'drop'"),
    ("classes:\n  a: {ttft_s: 1, tpot_s: 1, degrade_to_class: b}\n", 2, "the class 'b', which does not exist"),
    ("classes:\n  a: {ttft_s: 1, tpot_s: 1, degrade_to_class: a}\n", 2, "circle: a -> a"),
    (
        "classes:\n  a: {ttft_s: 1, tpot_s: 1, degrade_to_class: b}\n  b: {ttft_s: 1, tpot_s: 1, degrade_to_class: c}\n"
        "  c: {ttft_s: 1, tpot_s: 1, degrade_to_class: b}\n", 2, "circle: a -> b -> c -> b",
    ),
    (HEAD + "  mid: {ttft_s: 5, tpot_s: 1, band: 3, degrade_to_class: fast}\n", 4, "promises more than mid"),
    (HEAD + "  last: {ttft_s: 1, tpot_s: 1, band: 9, degrade_to_class: slow}\n", 4, "served before last (band 2 before 9)"),
    (HEAD + "tenants:\n  x:\n    class: fats\n", 6, "tenants.x.class names the class 'fats', which does not exist; did you mean"),
    (HEAD + "tenants:\n  x:\n    weight: 1\n", 5, "the class 'standard', which does not exist"),
    (HEAD + "tenants:\n  x:\n    class: fast\n    classes:\n    - slow\n    - slwo\n", 9, "did you mean slow?"),
    (HEAD + "tenants:\n  x:\n    class: fast\n    classes: slow\n", 7, "a list of names"),
    (HEAD + "tenants:\n  x:\n    class: fast\n    wieght: 2\n", 7, "did you mean weight?"),
    (HEAD + "tenants:\n  x:\n    class: fast\n    weight: 0\n", 7, "above 0"),
    (HEAD + "tenants:\n  x:\n    class: fast\n    kv_share: 1.5\n", 7, "at most 1"),
    (HEAD + "tenants:\n  x:\n    class: fast\n    price:\n      ouput: 1\n", 8, "tenants.x.price has the unknown key 'ouput'"),
    (HEAD + "tenants:\n  x:\n    class: fast\n    price:\n      output: -1\n", 8, "tenants.x.price.output must be money"),
    (HEAD + "tenants:\n  x:\n    class: fast\n    is_operator: 1\n", 7, "true or false"),
    (HEAD + f"tenants:\n  x:\n    class: fast\n    api_keys:\n    - {A}\n    - sk-naked-key\n", 9, "hash-key"),
    (HEAD + f"tenants:\n  x:\n    class: fast\n    api_keys: [{A}, {B}, {A}]\n", 7, "x's already (line 7)"),
    (HEAD + f"tenants:\n  x: {{class: fast, api_keys: [{A}]}}\n  y: {{class: fast, api_keys: [{A}]}}\n", 6, "x's already (line 5)"),
    (HEAD + "tenants:\n  x: &x {class: fast}\n  y:\n    <<: *x\n", 7, "uses `<<`"),
    (HEAD + "tenants:\n  x: [\n", 5, "not YAML"),
    (HEAD + "tenants:\n\tx: 1\n", 5, "not YAML"),
    (HEAD + "--- \ntenants: {}\n", 4, "not YAML"),
    (HEAD + "tenants: &t {x: *t}\n", 4, "unknown key 'x'"),
    (HEAD + "tenants: " + "[" * 5000, 4, ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "said"), WRONG, ids=[f"{i}-{said[:30]}" for i, (_, _, said) in enumerate(WRONG)])
def test_every_mistake_has_its_line_and_its_reason(text: str, line: int, said: str) -> None:
    with pytest.raises(TenantsError) as caught:
        read(text)
    if said:
        assert said in caught.value.reason, caught.value.message
        assert caught.value.line == line, caught.value.message
        assert caught.value.message.startswith(f"tenants file t.yaml:{line}: ")
    assert "sk-naked-key" not in caught.value.message, "a key that was written by mistake is not repeated"


def test_a_key_that_is_the_servers_own_is_no_tenants() -> None:
    reserved = {A: "the server's own (gateway.api_key)"}
    with pytest.raises(TenantsError, match="the server's own"):
        read_tenants(HEAD + f"tenants: {{x: {{class: fast, api_keys: [{A}]}}}}", "t", reserved)
    read_tenants(HEAD + f"tenants: {{default: {{class: fast, api_keys: [{A}]}}}}", "t", reserved)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for make, said in (
        (lambda p: None, "No such file"),
        (lambda p: p.mkdir(), "Is a directory"),
        (lambda p: p.write_bytes(b"classes:\n\xff"), "UTF-8"),
        (lambda p: p.write_bytes(b"#" * (MAX_FILE_BYTES + 1)), "4 MiB"),
    ):
        path = tmp_path / said.replace(" ", "")
        make(path)
        with pytest.raises(TenantsError, match=said):
            read_file(path)
    path = tmp_path / "good"
    path.write_text(HEAD)
    assert text_of(path) == HEAD


def test_a_bomb_of_aliases_is_quick() -> None:
    text = "classes:\n  a: {ttft_s: 1, tpot_s: &a0 [x]}\n"
    for i in range(1, 60):
        text = (
            text.replace("[x]}", f"[x]}}\n  b{i}: {{ttft_s: 1, tpot_s: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]}}", 1)
            if i == 1
            else (text + f"  b{i}: {{ttft_s: 1, tpot_s: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]}}\n")
        )
    started = time.process_time()
    with pytest.raises(TenantsError):
        read(text)
    with pytest.raises(TenantsError):
        read(HEAD + "tenants:\n  t: {class: fast, models: " + "&m [" * 1 + "a]}\n  u: {class: [*m, *m]}\n")
    assert time.process_time() - started < 1.0


def test_ten_thousand_tenants() -> None:
    rows = "".join(f"  t{i}: {{api_keys: [{hash_key(str(i))}], class: fast, weight: {i % 7 + 1}}}\n" for i in range(10_000))
    started = time.process_time()
    assert len(read(HEAD + "tenants:\n" + rows).tenants) == 10_001
    assert time.process_time() - started < 8.0
    with pytest.raises(TenantsError, match="more than 10000"):
        read(HEAD + "tenants:\n" + rows + "  more: {class: fast}\n")


def test_versions_are_of_the_content() -> None:
    one = read(HEAD + f"tenants: {{x: {{class: fast, api_keys: [{A}]}}}}")
    same = read("# words\n" + HEAD + f"tenants:\n  x:\n    api_keys:\n    - {A}\n    class: fast\n")
    other = read(HEAD + f"tenants: {{x: {{class: slow, api_keys: [{A}]}}}}")
    assert version_of(one) == version_of(same) != version_of(other)


def test_every_field_has_its_words() -> None:
    for kind, words in EXPECTED.items():
        assert set(words) == {field.encode_name for field in msgspec.structs.fields(kind)}


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_a_damaged_file_is_read_or_refused_never_more(seed: int) -> None:
    """Whatever is cut, doubled or swapped in a good file: a Tenants that is whole, or a TenantsError."""
    rng = random.Random(seed)
    text = (ROOT / "configs/tenants.example.yaml").read_text()
    for _ in range(rng.randint(1, 4)):
        at, end = sorted(rng.sample(range(len(text)), 2))
        end = min(end, at + rng.randint(1, 40))
        text = rng.choice(
            [
                text[:at] + text[end:],
                text[:at] + text[at:end] * 2 + text[end:],
                text[:at] + rng.choice("{}[]:,*&!-#\n 0a") + text[at:],
            ]
        )
    try:
        found = read(text)
    except TenantsError as error:
        assert 0 <= error.line <= text.count("\n") + 2  # noqa: PT017
    else:
        for one in found.tenants.values():
            assert all(name in found.classes for name in one.allowed_classes)
