"""The page before a real cluster under load: numbers rise, a refusal says why, a killed worker is told of and returns, and a
prompt of the playground streams while its waterfall appears. Screenshots are left in build/browser (TANDEM_ARTEFACTS)."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser.browser import artefacts, chromium, page_at, until, why_not
from tests.system.served import Served, serve

pytestmark = [
    pytest.mark.more,
    pytest.mark.system,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"),
]

LONG = "def parse_arguments(argv):\n    " + "parser.add_argument('--name', help='the name')\n    " * 12
ROWS = "tandemPage.snapshot().sla.rows"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    words = ("--prefill", "1", "--decode", "2", "--kv-cache-memory-bytes", "256MiB", "--set", "scheduler.max_queue_requests=4")
    with serve(tmp_path_factory.mktemp("live"), *words, "--max-num-seqs", "8") as served:
        served.wait(lambda: sum(w["alive"] for w in served.status()["workers"]) == 3, 60, "three workers")
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


class Load:
    """So many streams at once until it is told to stop; every stream's end is kept."""

    def __init__(self, served: Served, at_once: int) -> None:
        self.served, self.at_once = served, at_once
        self.ends: list[str] = []
        self._stop = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(at_once)

    def __enter__(self) -> Load:
        self._futures = [self._pool.submit(self._work, i) for i in range(self.at_once)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for future in self._futures:
            future.result(120)
        self._pool.shutdown()

    def _work(self, i: int) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            self.ends.append(one_stream(self.served.port, f"# {i} {number}\n{LONG}"))
            if self.ends[-1].startswith("4"):
                time.sleep(0.2)


def one_stream(port: int, prompt: str, tokens: int = 120) -> str:
    """-> "length", "stop", "error", "cut", or the status of a refusal."""
    asked = {"model": "bundled", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    data = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    text = b""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as sock:
        sock.sendall(head.encode() + b"Connection: close\r\n\r\n" + data)
        while chunk := sock.recv(65536):
            text += chunk
    status = text.split(b" ", 2)[1].decode()
    if status != "200":
        return status
    if b"event: error" in text:
        return "error"
    return next((reason for reason in ("length", "stop") if b'"finish_reason":"%s"' % reason.encode() in text), "cut")


def test_an_empty_cluster_says_what_to_do(browser: Any, served: Served) -> None:
    with page_at(browser, served.url) as page:
        assert f"curl {served.url}/v1/chat/completions" in page.locator("#empty").inner_text()
        paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        print(f"\nfirst contentful paint on a real cluster: {paint:.0f} ms")
        assert paint < 1000


def test_under_load_the_numbers_rise(browser: Any, served: Served) -> None:
    with page_at(browser, served.url) as page, Load(served, 4):
        until(page, f"{ROWS}.length > 0 && {ROWS}[0].finished > 3", 30)
        before = page.evaluate(f"{ROWS}[0].tokens.output")
        until(page, f"{ROWS}[0].tokens.output > {before} + 400", 30)
        assert not page.locator("#empty").is_visible()
        until(page, "!['–', '0'].includes(document.getElementById('tile-output').textContent)", 20)
        until(page, "document.querySelectorAll('.worker .dot.on').length > 0")
        until(page, "document.querySelectorAll('.wire.busy').length > 0", 30)
        page.locator("#requests").scroll_into_view_if_needed()  # the list follows while it can be seen
        until(page, "document.querySelectorAll('.request').length > 8", 30)
        page.locator(".request").nth(6).click()
        page.wait_for_selector(".fall .ph.prefill")
        page.wait_for_selector(".why")
        assert page.locator("#detail").inner_text().count("decode:") >= 1


def test_a_refusal_says_why(browser: Any, served: Served) -> None:
    """A flood: the queue has four places."""
    with page_at(browser, served.url) as page, Load(served, 40) as load:
        until(page, f"Object.keys({ROWS}[0].refused).length > 0", 30)
        page.wait_for_selector("#event-list [data-kind=refused]", timeout=20_000)
        said = page.locator("#sla .refused.some").inner_text()
        assert "queue" in said or "waited" in said, said
        page.locator("#by-state").select_option("refused")
        until(page, "[...document.querySelectorAll('.request .st')].some(node => node.textContent.includes('refused'))")
    refused = [end for end in load.ends if end in ("429", "503")]
    assert refused
    assert set(load.ends) <= {"length", "stop", "429", "503"}


def test_a_killed_worker_is_told_of_and_returns(browser: Any, served: Served) -> None:
    with page_at(browser, served.url) as page, Load(served, 6) as load:
        until(page, "document.querySelectorAll('.worker[data-worker=\"decode:1\"] .dot.on').length > 0", 30)
        os.kill(served.pid_of("tandem:decode:1"), signal.SIGKILL)
        page.wait_for_selector("#event-list [data-kind=worker_lost]", timeout=30_000)
        page.wait_for_selector(".worker[data-worker='decode:1'][data-state=lost]", timeout=30_000)
        page.screenshot(path=artefacts() / "live-worker-lost.png")
        page.wait_for_selector("#event-list [data-kind=resumed]", timeout=30_000)
        page.wait_for_selector(".worker[data-worker='decode:1'][data-state=ready]", timeout=90_000)
        until(page, "document.querySelectorAll('#event-list [data-kind=worker_up]').length > 3", 30)
    assert set(load.ends) <= {"length", "stop"}, load.ends  # not one stream was lost


# Length of the answer and number of tokens in the waterfall at every change of either. A timer would see little of it: where two
# cores serve, load and show at once, a page may get no turn for half a second.
WATCH_THE_ANSWER = """() => { window.watched = [];
  const answer = document.getElementById("answer"), fall = document.getElementById("play-fall");
  const look = new MutationObserver(() => watched.push([answer.textContent.length, fall.querySelectorAll(".tick").length]));
  look.observe(answer, {childList: true, characterData: true, subtree: true}); look.observe(fall, {childList: true}); }"""


def test_a_prompt_streams_while_its_waterfall_appears(browser: Any, served: Served) -> None:
    with page_at(browser, served.url) as page, Load(served, 2):
        page.locator("#play-as").select_option("completion")
        page.locator("#prompt").fill(LONG)
        page.locator("#play-tokens").fill("1500")
        page.evaluate(WATCH_THE_ANSWER)
        page.locator("#send").click()
        page.wait_for_selector("#play-fall[data-from=server] .ph.decode", timeout=120_000)
        whole = page.evaluate("document.getElementById('answer').textContent.length")
        seen = page.evaluate("watched")
        between = [(length, ticks) for length, ticks in seen if 0 < length < whole]
        assert len({length for length, _ in between}) > 3, (whole, seen)  # it grew before our eyes
        assert any(ticks > 1 for _, ticks in between), (whole, seen)  # and so did its waterfall
        assert "tok/s" in page.locator("#play-facts").inner_text()
        assert "decode:" in page.locator("#play-fall").inner_text()


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_how_it_looks(browser: Any, served: Served, look: str) -> None:
    with page_at(browser, served.url, look) as page, Load(served, 5):
        page.locator("#requests").scroll_into_view_if_needed()
        until(page, "document.querySelectorAll('.request').length > 12", 30)
        page.locator(".request").nth(11).click()
        page.wait_for_selector(".fall .ph.decode")
        page.wait_for_timeout(6000)
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(600)
        page.screenshot(path=artefacts() / f"live-{look}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
