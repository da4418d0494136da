"""Products of few rows against float64: the Triton kernel in its interpreter where there is no GPU; odd shapes, every kind of
weight, any number of splits, poisoned memory. And the table that chooses a form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on Linux)")

from kernels import linear_forms, reference, reference_linear
from kernels.linear_forms import Form, Table, default_form, read_table
from kernels.skinny_linear import kind_of, skinny_linear
from tests.kernels.poisoned import DEVICE

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
KINDS = ["plain", "int8", "fp8", "int4", "int4 zero"]
SMALL = Form(16, 16, 32, 1, num_stages=2)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def make_weight(kind: str, out: int, inner: int, dtype: torch.dtype, group: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    if kind == "plain":
        return {"weight": random(out, inner, seed=1, dtype=dtype)}
    if kind == "fp8":
        return {"weight": random(out, inner, seed=1).to(torch.float8_e4m3fn), "scale": random(out, seed=2).abs() + 0.1}
    if kind == "int8":
        weight = torch.randint(-128, 128, (out, inner), generator=generator, dtype=torch.int8)
        return {"weight": weight.to(DEVICE), "scale": random(out, seed=2).abs() / 64 + 0.001}
    packed = torch.randint(0, 256, (out, inner // 2), generator=generator, dtype=torch.uint8).to(DEVICE)
    made = {"weight": packed, "scale": random(out, inner // group, seed=2).abs() + 0.1}
    if kind == "int4 zero":
        made["zero"] = torch.randint(0, 16, made["scale"].shape, generator=generator).float().to(DEVICE)
    return made


def wanted(x: torch.Tensor, made: dict[str, torch.Tensor], *more: torch.Tensor | None) -> torch.Tensor:
    weight = made["weight"].double() if "scale" not in made else reference_linear.dequantized(**made)
    out = x.double() @ weight.T
    for term in more:
        out = out if term is None else out + term.double()
    return out


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert bool(torch.isfinite(found.float()).all())
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    real_empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real_empty(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 17, 33])
@pytest.mark.parametrize("splits", [1, 3])
def test_every_kind(kind: str, rows: int, splits: int) -> None:
    x, made = random(rows, 192), make_weight(kind, 37, 192, torch.float32)
    found = skinny_linear(x, **made, form=SMALL._replace(splits=splits))
    assert error(found, wanted(x, made)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_bias_and_residual(kind: str, splits: int) -> None:
    x, made = random(3, 128), make_weight(kind, 40, 128, torch.float32)
    bias, residual = random(40, seed=7), random(3, 40, seed=8)
    found = skinny_linear(x, **made, bias=bias, residual=residual, form=SMALL._replace(splits=splits))
    assert error(found, wanted(x, made, bias, residual)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("out", "inner"), [(1, 1), (7, 5), (129, 33), (64, 100)])
@pytest.mark.parametrize("splits", [1, 4])
def test_odd_shapes(out: int, inner: int, splits: int) -> None:
    x, made = random(2, inner), make_weight("plain", out, inner, torch.float32)
    found = skinny_linear(x, **made, form=SMALL._replace(splits=splits))
    assert error(found, wanted(x, made)) < TOLERANCE[torch.float32]
    assert error(found, reference.linear(x, made["weight"]).double()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("group", [32, 64, 128])
def test_groups_of_int4(group: int) -> None:
    x, made = random(3, 256), make_weight("int4 zero", 20, 256, torch.float32, group)
    for tile_in in (32, group):
        found = skinny_linear(x, **made, form=SMALL._replace(tile_in=tile_in, splits=2))
        assert error(found, wanted(x, made)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_the_default_form(kind: str) -> None:
    """float16; the interpreter computes bfloat16 products as integers, so that type is left to the GPU test below."""
    x, made = random(3, 1056, dtype=torch.float16), make_weight(kind, 70, 1056, torch.float16)
    assert error(skinny_linear(x, **made), wanted(x, made)) < TOLERANCE[torch.float16]


def test_strided_rows_and_no_rows() -> None:
    wide, made = random(4, 300), make_weight("plain", 16, 100, torch.float32)
    x = wide[:, 100:200]
    assert error(skinny_linear(x, **made, form=SMALL), wanted(x, made)) < TOLERANCE[torch.float32]
    assert skinny_linear(x[:0], **made).shape == (0, 16)


def test_wrong_arguments_are_named() -> None:
    x, made = random(2, 64), make_weight("int4", 16, 64, torch.float32)
    with pytest.raises(AssertionError, match="steps of 64 do not divide groups of 32"):
        skinny_linear(x, **made, form=SMALL._replace(tile_in=64))
    with pytest.raises(AssertionError, match="a scale belongs to a quantised weight"):
        skinny_linear(x, random(16, 64), scale=random(16))


# ---- which form ------------------------------------------------------------------------------------------------------


def test_a_default_form_splits_alike_for_every_batch() -> None:
    for kind in ("plain", "int8", "fp8", "int4"):
        for out, inner in ((4096, 4096), (1024, 14336), (151936, 1024), (576, 576)):
            forms = [default_form(kind, rows, out, inner, 128) for rows in (1, 16, 17, 64, 300)]
            assert len({(form.splits, form.tile_in, form.tile_out) for form in forms}) == 1
    assert default_form("plain", 1, 4096, 4096).splits > 1
    assert default_form("plain", 1, 151936, 1024).splits == 1


def test_candidates_can_be_launched() -> None:
    tried = linear_forms.candidates("plain", 8, 4096, 4096)
    assert len(tried) > 20
    assert all(linear_forms._checked(form) == form for form in tried)
    assert {form.tile_in for form in linear_forms.candidates("int4", 8, 4096, 4096, 64)} == {64}


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    table = Table("a card")
    table.put("plain", 5, 96, 64, Form(16, 64, 128, 4))
    table.put("plain", 1, 96, 64, None)
    path = tmp_path / "forms.json"
    path.write_text(table.as_json(torch="2.11"))
    again = read_table(path)
    assert again.device == "a card"
    assert again.choose("plain", 7, 96, 64) == again.choose("plain", 8, 96, 64) == Form(16, 64, 128, 4)
    assert again.choose("plain", 9, 96, 64) is None
    assert again.choose("plain", 1, 96, 64) is None
    assert len(again) == 2


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"device": "x", "forms": [["plain", 1, 2, 3, [16, 60, 128, 1, 4, 4]]]}', '{"forms": 3}']
)
def test_a_broken_table_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "forms.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"forms\.json is no table of linear forms"):
        read_table(path)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 16, 64, 200])
def test_on_a_gpu_at_serving_shapes(kind: str, rows: int) -> None:
    x, made = random(rows, 4096, dtype=torch.bfloat16), make_weight(kind, 1536, 4096, torch.bfloat16, 128)
    found = skinny_linear(x, **made)
    assert error(found, wanted(x, made)) < TOLERANCE[torch.bfloat16]
    assert torch.equal(skinny_linear(x[:1], **made), found[:1]), f"{kind_of(made['weight'])}: a row depends on its batch"
