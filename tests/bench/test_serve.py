"""`tandem bench serve` against a small server of our own: what it counts, what it writes, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench.client import Sample
from bench.report import cdf, ticks
from bench.summary import Promise, quantile, summarize
from tests.bench import small_traces

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """Answers with `max_tokens` pieces; refuses every `refuse`-th request; breaks off every `breaks`-th."""

    def __init__(self, refuse: int = 0, breaks: int = 0) -> None:
        self.refuse, self.breaks = refuse, breaks
        self.asked: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.now, self.most = 0, 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET"):
            body = json.dumps({"data": [{"id": "m"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            writer.close()
            return
        length = int(re.findall(r"Content-Length: (\d+)", head)[0])
        asked = json.loads(await reader.readexactly(length))
        self.asked.append(asked)
        self.heads.append(head)
        number = len(self.asked)
        self.now += 1
        self.most = max(self.most, self.now)
        if self.refuse and number % self.refuse == 0:
            body = json.dumps({"error": {"code": "tenant_share", "message": "no"}}).encode()
            writer.write(b"HTTP/1.1 429 No\r\nRetry-After: 3\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            await self._stream(writer, asked, bool(self.breaks and number % self.breaks == 0))
        self.now -= 1
        writer.close()

    async def _stream(self, writer: asyncio.StreamWriter, asked: dict[str, Any], breaks: bool) -> None:
        def chunk(text: bytes) -> None:  # cut in the middle of a line, as a network does
            for piece in (text[:7], text[7:]):
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))

        for i in range(asked["max_tokens"]):
            chunk(b'data: {"choices": [{"text": "w%d "}]}\n\n' % i)
            await writer.drain()
            await asyncio.sleep(0.004)
            if breaks and i == 2:
                return
        usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": asked["max_tokens"]}
        chunk(b'data: {"choices": [], "usage": %s}\n\n' % json.dumps(usage).encode())
        chunk(b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()


@contextlib.contextmanager
def running(server: Server) -> Iterator[str]:
    started, loop = threading.Event(), asyncio.new_event_loop()
    port = 0

    async def begin() -> None:
        nonlocal port
        listening = await asyncio.start_server(server.answer, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        started.set()

    def work() -> None:
        loop.run_until_complete(begin())
        loop.run_forever()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)


def bench(url: str, folder: Path, *words: str) -> dict[str, Any]:
    path = folder / "out.json"
    assert command.main(["serve", "--json", str(path), "--url", url, *words]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_an_open_loop_with_refusals_and_broken_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Server(refuse=5, breaks=7)
    report = tmp_path / "report.html"
    with running(server) as url:
        found = bench(
            url, tmp_path, "--rate", "40,80", "--requests", "20", "--prompt-tokens", "5:9", "--output-tokens", "6",
            "--slo", "ttft=1,tpot=100ms", "--html", str(report), "--tenant-key", "a=sk-a", "--tenant-key", "b=sk-b",
        )  # fmt: skip
    assert [run["offered_rate"] for run in found["runs"]] == [40, 80]
    for run in found["runs"]:
        assert run["completed"] + run["refused"] + run["failed"] == run["num_prompts"] == 20
        assert run["refused"] == 4
        assert run["failed"] in (2, 3)
        assert run["attainment"] == run["completed"] / 20  # nobody was late; the refused and the broken kept nothing
        assert run["total_output_tokens"] == 6 * run["completed"]
        assert 3 < run["median_tpot_ms"] < 60
        assert set(run["tenants"]) == {"a", "b"}
        assert "429 tenant_share" in run["reasons"]
    assert all(5 <= len(asked["prompt"]) <= 9 and asked["ignore_eos"] for asked in server.asked)
    for asked, head in zip(server.asked, server.heads, strict=True):
        assert f"Authorization: Bearer sk-{asked['user']}" in head
        assert re.search(r"X-Request-Id: bench-\w+-\d+", head)
    told = capsys.readouterr().out
    assert "429 tenant_share" in told
    assert "good/s" in told
    check_page(report.read_text())


class Page(HTMLParser):
    """Counts what is opened and closed, and gathers what would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        if tag not in ("meta", "tr", "th", "td"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("tr", "th", "td"):
            assert self.open.pop() == tag


def check_page(text: str) -> None:
    """One file, nothing loaded, nothing run, four kinds of plots."""
    page = Page()
    page.feed(text)
    assert page.open == ["html"] or page.open == []
    assert not page.loaded
    assert "script" not in page.seen
    assert page.seen.count("svg") >= 5  # two distributions, goodput, two timelines
    assert "url(" not in text
    for title in ("Time to first token", "Time per output token", "Goodput against load", "Timeline", "by tenant", "tenant_share"):
        assert title in text


def test_a_closed_loop_holds_its_number(tmp_path: Path) -> None:
    server = Server()
    with running(server) as url:
        found = bench(url, tmp_path, "--concurrency", "3", "--requests", "12", "--output-tokens", "8", "--prompt-tokens", "4")
    assert server.most == 3
    assert found["runs"][0]["completed"] == 12
    assert found["runs"][0]["max_concurrency"] == 3


@pytest.mark.parametrize("name", ["azure", "servegen", "vtc", "mooncake"])
def test_a_trace_is_replayed(tmp_path: Path, name: str) -> None:
    server = Server()
    path = small_traces.write(tmp_path, name)
    spans = {"azure": 14.542, "servegen": 0.104, "vtc": 0.2079, "mooncake": 3.0}
    with running(server) as url:
        found = bench(url, tmp_path, "--trace", str(path), "--speed", "40", "--scale", "0.05", "--max-output", "4")
    run = found["runs"][0]
    assert run["completed"] == len(server.asked) == len(run["samples"])
    assert all(asked["max_tokens"] <= 4 for asked in server.asked)
    assert [sample["planned"] for sample in run["samples"]][0] == 0
    assert run["samples"][-1]["planned"] == pytest.approx(spans[name] / 40, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rate", "1", "--concurrency", "1"], "either --rate or --concurrency"), ([], "is needed"),
        (["--slo", "ttft"], "wanted ttft"),
        (["--rate", "0"], "above zero"), (["--prompt-tokens", "9:3"], "LOW:HIGH"), (["--trace", "/nowhere"], "/nowhere"),
        (["--url", "localhost"], "http://HOST:PORT"), (["--slo", "ttft=-1"], "above zero"),
    ],
)  # fmt: skip
def test_bad_asking_is_one_sentence(tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with running(Server()) as url, pytest.raises(SystemExit) as caught:
        command.main(["serve", "--url", url, *words])
    assert said in f"{caught.value} {capsys.readouterr().err}"


def test_nobody_there_is_one_sentence() -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["serve", "--url", "http://127.0.0.1:9", "--rate", "1"])
    assert "bench serve: " in str(caught.value)


def test_the_command_runs_it_and_the_bar_has_no_colour_unless_allowed(tmp_path: Path) -> None:
    """On a terminal of ours (a pty): a bar after two seconds, and not one escape for colour under NO_COLOR."""
    server = Server()
    words = ["bench", "serve", "--rate", "4", "--requests", "14", "--cv", "0", "--output-tokens", "2", "--prompt-tokens", "4"]
    seen = {}
    with running(server) as url:
        for no_color in ("", "1"):
            master, slave = pty.openpty()
            termios.tcsetwinsize(slave, (24, 100))
            env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": no_color, "TERM": "xterm"}
            line = [sys.executable, "-m", "cluster", *words, "--url", url]
            process = subprocess.Popen(line, stderr=slave, stdout=subprocess.PIPE, env=env, cwd=tmp_path)
            out, _ = process.communicate(timeout=60)
            seen[no_color] = os.read(master, 1 << 20).decode()
            os.close(slave)
            os.close(master)
            assert process.returncode == 0
            assert b"4 req/s" in out
    assert "req" in seen["1"]
    assert "\x1b[3" not in seen["1"]
    assert "\x1b[3" in seen[""]


# ---- figures -------------------------------------------------------------------------------------------------------


def sample(ttft: float, gaps: list[float], outcome: str = "ok", due: float = 0.0) -> Sample:
    return Sample("", due, due, due + ttft, due + ttft + sum(gaps), outcome, output_tokens=len(gaps) + 1, gaps=gaps)


def test_goodput_counts_only_whole_promises() -> None:
    promise = Promise.parse("ttft=1,tpot=100ms")
    samples = [sample(0.5, [0.05, 0.05]), sample(1.5, [0.05]), sample(0.5, [0.2, 0.2]), sample(0.2, []), sample(0.1, [], "refused")]
    row = summarize(samples, promise, 10.0)
    assert row["request_goodput"] == pytest.approx(0.2)
    assert row["attainment"] == pytest.approx(0.4)
    assert row["request_throughput"] == pytest.approx(0.4)
    assert row["p99_ttft_ms"] == 1500
    assert summarize([], promise, 1.0)["attainment"] is None
    assert promise == (1.0, 0.1, None)


def test_a_client_that_falls_behind_does_not_make_the_server_quick() -> None:
    late = Sample("", planned=1.0, sent=3.0, first=3.1, end=3.2, outcome="ok", output_tokens=1)
    assert late.ttft == pytest.approx(2.1)


def test_quantiles_are_values_that_occurred() -> None:
    assert [quantile([3.0, 1.0, 2.0], q) for q in (0.01, 0.5, 0.99)] == [1.0, 2.0, 3.0]
    assert quantile([], 0.5) is None
    assert cdf([2.0, 1.0])[-1] == (2.0, 1.0)
    assert ticks(7.0) == [0, 2, 4, 6]
    assert len(cdf([float(i) for i in range(100_000)])) < 500
