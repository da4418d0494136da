"""The dashboard's page: complete in itself, under a strict policy, without a figure, and with the published chart library."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fake_backend import FakeBackend

from api import page
from api.app import build_app
from api.backend import Settings, hash_api_key
from api.tokenizer import Tokenizer

PARSES_TEXT = r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(|new Function|document\.write"
SCRIPTS = sorted(path.name for path in page.FOLDER.glob("*.js"))


@pytest.fixture
async def client(byte_level: Tokenizer) -> AsyncIterator[httpx.AsyncClient]:
    backend = FakeBackend(byte_level)
    app = build_app(backend, backend.tokenizer, Settings(api_keys={hash_api_key("sk-1"): "tenant"}))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://tandem", verify=False) as client:
        yield client


async def test_every_file_that_the_page_names_is_served_without_a_key(client: httpx.AsyncClient) -> None:
    html = (await client.get("/dashboard")).text
    named = re.findall(r'(?:src|href)="(dashboard/[^"]+)"', html)
    for name in SCRIPTS:
        source = (page.FOLDER / name).read_text()
        named += ["dashboard/assets/" + other for other in re.findall(r'from "\./([\w.]+)"', source)]
    assert len(set(named)) >= 12
    for path in set(named):
        answer = await client.get("/" + path)
        assert answer.status_code == 200, path
        assert answer.headers["x-content-type-options"] == "nosniff"
        expected = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}[path.rsplit(".", 1)[1]]
        assert answer.headers["content-type"].startswith(expected)


async def test_the_policy_forbids_what_the_page_does_not_need(client: httpx.AsyncClient) -> None:
    answer = await client.get("/dashboard")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", answer.text), "inline code would not run"
    for name in SCRIPTS:
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(|new Function|document\.write", (page.FOLDER / name).read_text()
        ), name


async def test_nothing_comes_from_elsewhere(client: httpx.AsyncClient) -> None:
    for path in (page.FOLDER / name for name in (*SCRIPTS, "index.html", "page.css", "parts.css")):
        found = [url for url in re.findall(r"https?://[^\s\"'`)]+", path.read_text()) if url != "http://www.w3.org/2000/svg"]
        assert not found, (path.name, found)


async def test_the_page_holds_no_figure_and_its_figures_need_the_key(client: httpx.AsyncClient) -> None:
    assert "org/model" not in (await client.get("/dashboard")).text
    assert (await client.get("/dashboard/data")).status_code == 401


async def test_an_asset_is_sent_once(client: httpx.AsyncClient) -> None:
    first = await client.get("/dashboard/assets/main.js")
    again = await client.get("/dashboard/assets/main.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["nothing.js", "..%2fpage.py", "index.html", "%2e%2e/page.py", "__init__.py"])
async def test_other_names_reach_no_file(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.get(f"/dashboard/assets/{name}")
    assert answer.status_code in (401, 404)
    assert "error" in answer.json()


async def test_the_chart_library_is_the_published_one(client: httpx.AsyncClient) -> None:
    answer = await client.get("/dashboard/assets/uplot.js")
    assert b"github.com/leeoniya/uPlot (v1.6.31)" in answer.content[:80]


def test_an_altered_or_missing_wheel_costs_the_charts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "youplot" / "vendor").mkdir(parents=True)
    (tmp_path / "youplot" / "__init__.py").write_text("raise RuntimeError('the wheel was imported')\n")
    (tmp_path / "youplot" / "vendor" / "uplot.iife.min.js").write_text("var uPlot = 'somebody else';")
    monkeypatch.syspath_prepend(tmp_path)
    assert not page.CHART_FILES.keys() & page.load_assets().keys()
    monkeypatch.setattr(page, "CHART_PACKAGE", "a_package_that_is_not_there")
    assert not page.CHART_FILES.keys() & page.load_assets().keys()
    assert "main.js" in page.load_assets()


def test_the_page_is_small() -> None:
    """First paint stays quick: all of it, chart library included, is less than a photograph."""
    assets = page.load_assets()
    assert sum(len(asset.body) for asset in assets.values()) < 200_000


@pytest.mark.skipif(shutil.which("node") is None, reason="no node: the scripts are parsed by the browser tests alone")
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse(name: str) -> None:
    done = subprocess.run(
        ["node", "--input-type=module", "--check"], stdin=(page.FOLDER / name).open(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


async def test_where_tenants_have_keys_the_figures_of_all_want_the_operators(byte_level: Tokenizer) -> None:
    backend = FakeBackend(byte_level)
    keys = {hash_api_key("sk-all"): "default", hash_api_key("sk-1"): "acme"}
    app = build_app(backend, backend.tokenizer, Settings(api_keys=keys, operators=("default",)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://tandem", verify=False) as client:
        for path in (
            "/dashboard/data",
            "/dashboard/live",
            "/dashboard/requests",
            "/dashboard/requests/x",
            "/admin/sla",
            "/admin/sla.csv",
        ):
            answer = await client.get(path, headers={"authorization": "Bearer sk-1"})
            assert answer.status_code == 403, path
            assert answer.json()["error"]["type"] == "permission_error"
        assert (await client.get("/dashboard/data", headers={"authorization": "Bearer sk-all"})).status_code == 200
        assert (await client.get("/v1/models", headers={"authorization": "Bearer sk-1"})).status_code == 200
