"""The command line: options reach their keys, refusals come before anything starts, and nothing heavy is imported."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import cli
from configs.flags import FLAGS
from configs.load import Resolved
from configs.schema import KEYS
from protocol.errors import ConfigError
from scheduler.scheduler import Scheduler

ROOT = Path(__file__).resolve().parents[2]
OTHER = {
    "--served-model-name": "mine",
    "--revision": "v2",
    "--max-model-len": "2048",
    "--dtype": "bfloat16",
    "--device": "cpu",
    "--block-size": "32",
    "--num-gpu-blocks-override": "77",
    "--kv-cache-memory-bytes": "1GiB",
    "--host-cache-bytes": "5000",
    "--gpu-memory-utilization": "0.5",
    "--seed": "7",
    "--quantization": "int4",
    "--chat-template": "t.jinja",
    "--step-log": "steps.jsonl",
    "--prefill": "3",
    "--decode": "2",
    "--prefill-tp": "2",
    "--prefill-pp": "3",
    "--decode-tp": "4",
    "--decode-pp": "5",
    "--max-num-seqs": "8",
    "--max-num-batched-tokens": "64",
    "--preemption-mode": "swap",
    "--speculative-method": "ngram",
    "--speculative-model": "drafts/small",
    "--num-speculative-tokens": "7",
    "--prompt-lookup-max": "6",
    "--prompt-lookup-min": "3",
    "--host": "127.0.0.2",
    "--port": "8123",
    "--api-key": "secret",
    "--scheduling-policy": "fair",
    "--tenants": "t.yaml",
    "--kv-transport": "tcp",
    "--bind-host": "10.1.0.0/16",
    "--port-range": "20000-20999",
}


def resolve(*argv: str, env: dict[str, str] | None = None) -> Resolved:
    args = cli.build_parser().parse_args(["serve", *argv])
    return cli.resolve(args, env or {})


def changed(resolved: Resolved) -> list[str]:
    return [key for key in KEYS if not resolved.provenance[key].startswith(("default", "preset"))]


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("TANDEM_")]:
        monkeypatch.delenv(name)


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [f for f in FLAGS if f.type != "bool"], ids=lambda f: f.flag)
def test_an_option_sets_its_key_and_no_other(flag: Any) -> None:
    value = OTHER[flag.flag]
    if value is None:
        return
    resolved = resolve(flag.flag, value)
    assert changed(resolved) == [flag.key]
    assert resolved.provenance[flag.key] == f"flag {flag.flag}"
    assert resolved.config.get(flag.key) != resolve().config.get(flag.key)
    assert changed(resolve(f"{flag.flag}={value}")) == [flag.key]


@pytest.mark.parametrize("flag", [f for f in FLAGS if f.type == "bool"], ids=lambda f: f.flag)
def test_a_switch_goes_both_ways(flag: Any) -> None:
    assert resolve(flag.flag).config.get(flag.key) is True
    assert resolve(flag.negative).config.get(flag.key) is False
    assert resolve(flag.negative, flag.flag).config.get(flag.key) is True
    assert changed(resolve(flag.negative)) == [flag.key]


def test_the_model_is_the_argument() -> None:
    assert resolve("toy").config.model.name == "toy"
    assert resolve("some dir/with spaces").config.model.name == "some dir/with spaces"
    assert resolve(env={"TANDEM_MODEL_NAME": "toy"}).config.model.name == "toy"
    assert resolve("bundled", env={"TANDEM_MODEL_NAME": "toy"}).config.model.name == "bundled"


def test_presets_files_and_sets(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("decode: {replicas: 2}\n")
    resolved = resolve("--preset", "low-latency", "--config", str(path), "--set", "prefill.replicas=3", "--set=model.seed=9")
    config = resolved.config
    assert (config.decode.replicas, config.prefill.replicas, config.model.seed, config.decode.max_num_seqs) == (2, 3, 9, 16)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["serve", "--max-modl-len", "5"], "did you mean --max-model-len?"),
        (["serve", "--no-enable-chunked-prefil"], "did you mean --no-enable-chunked-prefill?"),
        (["serve", "--max-model", "5"], "unknown option --max-model"),
        (["serve", "a", "b"], "unknown argument b"),
        (["serve", "--tensor-parallel-size", "2"], "--prefill-tp and --decode-tp"),
        (["serve", "-tp", "2"], "--prefill-tp and --decode-tp"),
        (["serve", "--speculative-config", "{}"], "--speculative-method ngram or draft"),
        (["serve", "--speculative-method", "draft"], "needs a draft model: --speculative-model"),
        (["serve", "--speculative-method", "ngram", "--speculative-model", "x"], "is for decode.speculative_method draft"),
        (["serve", "--prompt-lookup-min", "5"], "decode.prompt_lookup_min 5 is above decode.prompt_lookup_max 4"),
        (["serve", "--speculative-method", "eagle"], "decode.speculative_method = 'eagle'"),
        (["serve", "--num-speculative-tokens", "0"], "decode.num_speculative_tokens = '0'"),
        (["serve", "--preemption-mode", "swap", "--decode-tp", "2"], "built for workers of one rank"),
        (["serve", "toy", "--speculative-model", "bundled"], "a draft model needs the tokenizer of its target"),
        (["serve", "--pipeline-parallel-size=2"], "--prefill-pp and --decode-pp"),
        (["serve", "--prefill-tp", "0"], "prefill.tp = '0' (flag --prefill-tp)"),
        (["serve", "--decode-pp", "two"], "decode.pp = 'two' (flag --decode-pp)"),
        (["srve"], "unknown command srve; did you mean serve?"),
        (["serve", "--port"], "argument --port: expected one argument"),
        (["serve", "--max-num-seqs", "-4"], "decode.max_num_seqs = '-4' (flag --max-num-seqs)"),
        (["serve", "--prefill", "-1"], "prefill.replicas = '-1' (flag --prefill)"),
        (["serve", "--prefill", "0", "--decode", "0"], "decode.replicas = '0' (flag --decode)"),
        (["serve", "--port", "0"], "gateway.port = '0' (flag --port)"),
        (["serve", "--host", "0.0.0.0"], "gateway.api_key"),
        (["serve", "--quantization", "fp8"], "not built yet"),
        (["serve", "--decode", "0"], "at least 1"),
        (["config", "show", "--set", "model.nmae=x"], "did you mean model.name?"),
        (["status", "--url", "http://127.0.0.1:1"], "nobody answers at http://127.0.0.1:1"),
    ],
)
def test_what_is_wrong_is_one_sentence(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(argv)
    captured = capsys.readouterr()
    assert status in (1, 2)
    assert captured.out == ""
    assert sentence in captured.err
    assert captured.err.count("\n") == 1


def test_only_what_is_built_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    listed = capsys.readouterr().out
    assert all(word in listed for word in ("serve", "config", "status", "doctor", "version"))
    assert cli.main(["fly"]) == 2
    assert "unknown command fly; there are serve, deploy, up, down, config" in capsys.readouterr().err
    assert cli.main(["config"]) == 2


# ---- commands --------------------------------------------------------------------------------------------------------


def test_config_show_names_every_key_and_its_origin(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", "toy", "--port", "8123", "--api-key", "hunter2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(KEYS)
    assert any(line.split() == ["gateway.port", "8123", "flag", "--port"] for line in lines)
    assert any(line.split() == ["model.name", "toy", "argument", "MODEL"] for line in lines)
    assert not any("hunter2" in line for line in lines)
    assert cli.main(["config", "show", "--json", "--no-enable-prefix-caching"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model.enable_prefix_caching"] == {"value": False, "from": "flag --no-enable-prefix-caching"}
    assert set(found) == set(KEYS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out.startswith("tandem-serve")


def test_serve_checks_first_and_hands_over_what_was_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Resolved] = []
    launch = type(sys)("cluster.launch")
    launch.run = lambda resolved: given.append(resolved) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cluster.launch", launch)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "--port", port]) == 2
        assert given == []
    assert cli.main(["serve", "toy", "--port", port]) == 7
    assert given[0].config.model.name == "toy"


def test_a_taken_port_names_who_and_what_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "localhost", "0.0.0.0"):
            with pytest.raises(ConfigError, match=f"port {port} on .* is taken.*--port") as error:
                cli.check_port(host, port)
        assert str(os.getpid()) in error.value.message
    cli.check_port("127.0.0.1", port)


def test_an_address_of_nobody_here_is_named() -> None:
    with pytest.raises(ConfigError, match="cannot listen on 192.0.2.7"):
        cli.check_port("192.0.2.7", 8000)
    with pytest.raises(ConfigError, match="no-such-host.invalid"):
        cli.check_port("no-such-host.invalid", 8000)


def test_urls_of_listening_addresses() -> None:
    assert cli.url_of("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert cli.url_of("::", 80) == "http://[::1]:80"
    assert cli.url_of("127.0.0.1", 8000) == "http://127.0.0.1:8000"


# ---- in a fresh process ----------------------------------------------------------------------------------------------


def python(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **env},
    )


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time, cluster.cli\n"
        "try: cluster.cli.main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'ray', 'transformers', 'numpy', 'psutil'}))\n"
        "print(time.process_time())"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    heavy, took = done.stdout.splitlines()[-2:]
    assert heavy == "[]"
    assert float(took) < 1.0, f"{took} s of CPU"


def test_somebody_elses_packages_in_the_working_directory_are_not_imported(tmp_path: Path) -> None:
    for name in ("api", "models", "configs", "protocol"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('a foreign package was imported')")
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    done = python("-m", "cluster", "config", "show", cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "model.name" in done.stdout


def test_serve_refuses_when_another_package_would_be_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("raise SystemExit('a foreign package was imported')")
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = python("-m", "cluster", "serve", "--port", "8123", cwd=tmp_path.parent, PYTHONPATH=path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"`engine` would be imported from {tmp_path / 'engine'}" in done.stderr
    assert "foreign" not in done.stderr


def test_nothing_shadows_here() -> None:
    cli.check_nothing_shadows()


# ---- status ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def gateway() -> Iterator[tuple[str, dict[str, Any]]]:
    """A server that answers what the test puts into `answers`, with a key."""
    answers: dict[str, Any] = {"key": "k", "health": 200}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/health":
                code, body = answers["health"], {"error": {"message": "no decode worker yet"}}
            elif self.headers["authorization"] != f"Bearer {answers['key']}":
                code, body = 401, {"error": {"message": "no key"}}
            else:
                code, body = 200, answers["data"]
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()


def test_status_prints_a_table(gateway: tuple[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    from protocol.kv import KVLayout
    from protocol.messages import Outcome, WorkerInfo
    from protocol.parallel import ALONE, Parallel

    url, answers = gateway
    scheduler = Scheduler()
    for role in ("prefill", "decode"):
        scheduler.register(
            WorkerInfo(
                incarnation=f"{role}-0",
                role=role,
                name=f"{role}:0",
                address="h:1",
                model="bundled",
                layout=KVLayout(2, 2, 16, 16, "float32", "hash"),
                num_blocks=500,
                max_model_len=100,
                max_num_seqs=8,
                pid=1,
                host="h",
                device="cpu",
                parallel=Parallel(2, 1) if role == "decode" else ALONE,
                rank_pids=(1, 4711) if role == "decode" else (),
            ),
            0.0,
        )
    ended = Outcome(
        request_id="r",
        epoch=1,
        kind="finished",
        tenant="t",
        slo_class="standard",
        prompt_tokens=5,
        cached_tokens=0,
        output_tokens=9,
        queue_s=0.0,
        ttft_s=0.125,
        tpot_s=0.5,
        e2e_s=2.5,
    )
    scheduler.outcome(ended, 1.0)
    answers["data"] = {"models": ["bundled"], "ready": True, "reason": "", "status": scheduler.status(1.0), "error": None}
    assert cli.main(["status", "--url", f"{url}/v1/", "--api-key", "k"]) == 0
    out = capsys.readouterr().out
    assert f"{url}  healthy  bundled" in out
    assert "decode:0" in out
    assert "2 x 1" in out
    assert "1 4711" in out
    assert "0 of 500" in out
    assert "125.0 ms" in out
    assert "2.50 s" in out
    assert "1 finished" in out
    assert cli.main(["status", "--url", url, "--api-key", "k", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"]["counters"] == {"finished": 1}


def test_status_of_what_is_not_healthy(gateway: tuple[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    url, answers = gateway
    answers["health"], answers["data"] = 503, {"models": ["bundled"], "status": {}, "error": None, "reason": ""}
    assert cli.main(["status", "--url", url]) == 1
    assert "TANDEM_GATEWAY_API_KEY" in capsys.readouterr().err
    assert cli.main(["status", "--url", url, "--api-key", "k"]) == 1
    out = capsys.readouterr().out
    assert "not healthy" in out
    assert "no decode worker yet" in out
    answers["data"] = ["something", "else"]
    assert cli.main(["status", "--url", url, "--api-key", "k"]) == 1
    assert "is it Tandem" in capsys.readouterr().err
