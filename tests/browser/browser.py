"""Chromium as the tests of the page drive it: the one that is installed (Debian's), by playwright; nothing is downloaded."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--js-flags=--expose-gc",
]  # fmt: skip
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1360, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1360, "height": 900}, "color_scheme": "dark"},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
        "color_scheme": "light",
    },
}


def chromium_path() -> str | None:
    """Of a Chromium that is installed: TANDEM_CHROMIUM, or the first of the usual names."""
    named = os.environ.get("TANDEM_CHROMIUM")
    return named or next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


def why_not() -> str:
    """Why no browser can be driven here; "" when one can."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "playwright is not installed (pip install playwright; it downloads no browser by itself)"
    return "" if chromium_path() else "no Chromium here (Debian: apt-get install chromium), or name one in TANDEM_CHROMIUM"


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A playwright Browser."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def page_at(browser: Any, url: str, look: str = "light", ready: bool = True, may_say: str = "^$") -> Iterator[Any]:
    """The dashboard, opened. At the end its console may hold no complaint, but for what `may_say` (a pattern) expects."""
    context = browser.new_context(**LOOKS[look])
    context.set_default_timeout(60_000)  # of two cores that serve, load and show, the page gets what is left
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(f"uncaught: {error}"))
    try:
        page.goto(f"{url}/dashboard")
        if ready:
            page.wait_for_selector("body.drawn")
        yield page
    finally:
        context.close()
    unexpected = [line for line in complaints if not re.search(may_say, line)]
    assert not unexpected, unexpected


def until(page: Any, expression: str, seconds: float = 15.0) -> None:
    """Wait until it is true in the page. (playwright's own wait polls by `eval`, which the page's policy forbids.)"""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"never true within {seconds:g} s: {expression}"
        page.wait_for_timeout(50)


def heap_bytes(page: Any) -> int:
    """What the page's scripts hold after a collection."""
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.enable")
    session.send("HeapProfiler.collectGarbage")
    session.send("HeapProfiler.collectGarbage")
    used = int(session.send("Runtime.getHeapUsage")["usedSize"])
    session.detach()
    return used


def artefacts() -> Path:
    """Where screenshots go: TANDEM_ARTEFACTS, or build/browser of the tree (which git ignores)."""
    folder = Path(os.environ.get("TANDEM_ARTEFACTS") or Path(__file__).resolve().parents[2] / "build" / "browser")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def running(app: Any, port: int = 0) -> Iterator[str]:
    """An ASGI app on a port of its own, in a thread. -> its URL."""
    import uvicorn

    if not port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline, "the server does not start"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
