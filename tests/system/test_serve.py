"""`tandem serve` on the bundled model: a prefill and a decode worker in processes of their own, and a real client in front.

One cluster for the whole module; what kills processes comes last.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import time

import openai
import psutil
import pytest

from tests.system.served import Served, serve

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

LONG = "def parse_arguments(argv):\n    " + "parser.add_argument('--name', help='the name')\n    " * 12


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a folder with spaces")
    (folder / "api").mkdir()  # somebody else's packages in the working directory must not become ours
    (folder / "models").mkdir()
    for name in ("api", "models"):
        (folder / name / "__init__.py").write_text("raise RuntimeError('the wrong package was imported')\n")
    with serve(folder, "--prefill", "1", "--decode", "1", "--kv-cache-memory-bytes", "256MiB") as running:
        running.wait(lambda: len(running.alive()) == 2, 60, "both workers")
        yield running


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)


def test_it_prints_what_a_user_needs(served):
    served.wait(lambda: "curl http" in served.tail(), 30, "the curl line")
    text = served.log.read_text()
    assert f"http://127.0.0.1:{served.port}/v1" in text
    for word in ("prefill", "decode", "blocks", "loaded", "ready", "Ctrl-C"):
        assert word in text, word


def test_roles_run_in_processes_of_their_own_and_say_so(served):
    pids = {served.pid_of(f"tandem:{name}") for name in ("decode:0", "prefill:0", "gateway:0", "scheduler")}
    assert None not in pids
    assert len(pids) == 4


def test_nothing_listens_beyond_loopback(served):
    for process in [psutil.Process(served.process.pid), *served.processes()]:
        for connection in process.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1"), (
                    process.name(),
                    connection.laddr,
                )


def test_kv_travels_and_the_answer_is_the_same_either_way(served, client):
    before = served.alive()
    first = client.completions.create(model="bundled", prompt=LONG, max_tokens=24, temperature=0)
    served.wait(
        lambda: served.alive()["decode:0"]["stats"]["transfers"] > before["decode:0"]["stats"]["transfers"],
        10,
        "a transfer",
    )
    again = client.completions.create(model="bundled", prompt=LONG, max_tokens=24, temperature=0)
    assert first.choices[0].text == again.choices[0].text
    assert first.usage.completion_tokens == 24
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    short = client.completions.create(model="bundled", prompt="def ", max_tokens=16, temperature=0)
    assert short.choices[0].text.strip()


def test_streaming_chat(client):
    chunks = list(
        client.chat.completions.create(
            model="bundled",
            messages=[{"role": "user", "content": "What is Tandem?"}],
            max_tokens=32,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] in (
        ["stop"],
        ["length"],
    )
    assert chunks[-1].usage.completion_tokens > 0
    assert chunks[-1].choices == []


def test_logprobs_n_stop_and_seed(client):
    asked = {"model": "bundled", "prompt": LONG, "max_tokens": 12}
    answer = client.completions.create(**asked, temperature=0, logprobs=2, n=2)
    assert answer.choices[0].text == answer.choices[1].text
    assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.token_logprobs) == 12
    seeded = [client.completions.create(**asked, temperature=1.5, seed=7).choices[0].text for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert client.completions.create(**asked, temperature=1.5, seed=8).choices[0].text != seeded[0]
    stopped = client.completions.create(**{**asked, "max_tokens": 64}, temperature=0, stop=["name"])
    assert "name" not in stopped.choices[0].text


def test_bad_input_is_refused_in_the_openai_shape(client, served):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="bundled", prompt="x", max_tokens=5, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="x")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="bundled", prompt=[99999999])
    status, body = served.post("/v1/completions", {"model": "bundled", "prompt": "x", "max_tokens": 10**9})
    assert status == 400
    assert body["error"]["param"]


def test_the_other_doors(served):
    assert served.get("/health") == (200, b"")
    text = served.get("/metrics")[1].decode()
    for name in ("vllm:time_to_first_token_seconds_count", "vllm:num_requests_running", "tandem_kv_transfers_total"):
        assert name in text, name
    assert served.get("/dashboard")[0] == 200
    assert json.loads(served.get("/v1/models")[1])["data"][0]["id"] == "bundled"
    status, body = served.post("/tokenize", {"model": "bundled", "prompt": "def f():"})
    assert status == 200
    assert body["count"] == len(body["tokens"]) > 0


def test_thirty_two_streams_at_once_all_end_well(served):
    def one(i: int) -> str:
        status, body = served.post(
            "/v1/completions", {"model": "bundled", "prompt": f"# {i}\n{LONG}", "max_tokens": 20, "temperature": 0}
        )
        assert status == 200, body
        return body["choices"][0]["finish_reason"]

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        assert set(pool.map(one, range(32))) <= {"length", "stop"}
    idle(served)


def idle(served: Served) -> None:
    """No worker holds a block, and the scheduler knows of nothing in flight."""

    def is_idle() -> bool:
        status = served.status()
        return status["in_flight"]["total"] == 0 and all(
            w["stats"]["num_used_blocks"] == 0 for w in status["workers"] if w["alive"]
        )

    served.wait(is_idle, 20, "all blocks back")


def test_a_killed_scheduler_costs_nobody_a_token(served):
    """Running streams do not notice; a new request waits for its successor."""
    idle(served)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        body = {"model": "bundled", "max_tokens": 300, "temperature": 0, "stream": True, "ignore_eos": True}
        streams = [pool.submit(terminal_events, served, {**body, "prompt": f"# {i}\n{LONG}"}) for i in range(6)]
        time.sleep(0.5)
        os.kill(served.pid_of("tandem:scheduler"), signal.SIGKILL)
        killed = time.monotonic()
        served.wait(lambda: answers(served), 20, "new requests answered")
        print(f"\nscheduler killed: answers after {time.monotonic() - killed:.1f} s")
        assert [stream.result(timeout=120) for stream in streams] == [["length"]] * 6
    served.wait(lambda: len(served.alive()) == 2, 20, "both workers registered again")
    idle(served)


@pytest.mark.parametrize("victim", ["prefill:0", "decode:0"])
def test_a_killed_worker_costs_no_stream_its_end(served, victim):
    """Under load; new requests are answered within 20 s without a hand, and free blocks return to the starting count."""
    idle(served)
    before = served.alive()[victim]

    def one(i: int) -> list[str]:
        """The terminal events of one stream."""
        body = {
            "model": "bundled",
            "prompt": f"# {victim} {i}\n{LONG}",
            "max_tokens": 150,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
        }
        return terminal_events(served, body)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        streams = [pool.submit(one, i) for i in range(12)]
        time.sleep(1.0)
        os.kill(served.pid_of(f"tandem:{victim}"), signal.SIGKILL)
        killed = time.monotonic()
        served.wait(lambda: answers(served), 20, "new requests answered")
        recovery = time.monotonic() - killed
        ends = [stream.result(timeout=180) for stream in streams]
    assert all(len(end) == 1 for end in ends), ends
    print(f"\n{victim} killed: answers after {recovery:.1f} s; ends: {sorted({end[0] for end in ends})}")
    served.wait(lambda: served.alive().get(victim, before)["incarnation"] != before["incarnation"], 60, f"{victim} is back")
    idle(served)
    assert served.alive()[victim]["stats"]["num_free_blocks"] == before["stats"]["num_free_blocks"]


def answers(served: Served) -> bool:
    try:
        return served.post("/v1/completions", {"model": "bundled", "prompt": "import ", "max_tokens": 4}, 20)[0] == 200
    except OSError:
        return False


def terminal_events(served: Served, body: dict) -> list[str]:
    """Raw SSE: every finish_reason and every error of the stream."""
    data = json.dumps(body).encode()
    found: list[str] = []
    with socket.create_connection(("127.0.0.1", served.port), timeout=170) as sock:
        lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(data)}"]
        head = "\r\n".join([*lines, "Connection: close", "", ""])
        sock.sendall(head.encode() + data)
        text = b""
        while chunk := sock.recv(65536):
            text += chunk
    for line in text.decode().splitlines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            found.append("error")
        found += [choice["finish_reason"] for choice in event.get("choices", ()) if choice["finish_reason"]]
    return found


def test_ctrl_c_stops_everything_and_leaves_nothing_behind(served):
    children = served.processes()
    assert children
    assert served.stop() == 0
    gone, left = psutil.wait_procs(children, timeout=5)
    assert not left, left
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections linger; a listener does not
        sock.bind(("127.0.0.1", served.port))
    assert "stopped" in served.tail()
