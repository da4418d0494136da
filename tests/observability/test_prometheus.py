"""A real Prometheus that scrapes a real `tandem serve` under load: every panel of both dashboards has data, every rule is sound.

Prometheus is Debian's: the one that is installed, or its package unpacked into a temporary folder. curl would not do: a
Prometheus negotiates the format, and what it stores is what dashboards see.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from cluster import cli
from cluster.grafana import CLUSTER, DASHBOARDS, FOLDER, SLA, VARIABLES, dashboard
from tests.system.served import Served, free_port, serve

pytestmark = [pytest.mark.more, pytest.mark.system, pytest.mark.timeout(400)]

LOAD_S = 25.0
WINDOW = "10s"  # $__rate_interval, at one scrape a second
NEEDS_AN_EVENT = {panel.title for _, row in (*SLA, *CLUSTER) for panel in row if panel.needs}


class Tools(NamedTuple):
    prometheus: str
    promtool: str


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    found = shutil.which("prometheus"), shutil.which("promtool")
    if found[0] and found[1]:
        return Tools(found[0], found[1])
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip("no prometheus is installed, and there is no apt-get to fetch Debian's")
    folder = tmp_path_factory.mktemp("prometheus")
    fetched = subprocess.run(["apt-get", "download", "prometheus"], cwd=folder, capture_output=True, text=True, timeout=120)
    packages = list(folder.glob("*.deb"))
    if fetched.returncode or not packages:
        pytest.skip(f"no prometheus is installed, and apt-get cannot fetch it: {fetched.stderr.strip()[-200:]}")
    subprocess.run(["dpkg", "-x", str(packages[0]), str(folder / "x")], check=True, timeout=120)
    return Tools(*(str(folder / "x/usr/bin" / name) for name in Tools._fields))


@pytest.mark.parametrize(
    "command",
    [["check", "config", "prometheus.yml"], ["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]],
    ids=" ".join,
)
def test_promtool_is_content(tools: Tools, command: list[str]) -> None:
    done = subprocess.run([tools.promtool, *command], cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **query: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def values(self, expression: str) -> list[float]:
        """What a panel would draw now; NaN is nothing to draw."""
        found = self.get("/api/v1/query", query=expression)["result"]
        return [value for value in (float(series["value"][1]) for series in found) if not math.isnan(value)]


def ask(served: Served, i: int) -> None:
    """Long prompts go over to decode, short ones are prefilled there; every other one shares a prefix."""
    prompt = [10 + i % 3] * 96 + [i % 400 + 10] * 8 if i % 4 else [i % 400 + 10] * 8
    served.post("/v1/completions", {"model": "toy", "prompt": prompt, "max_tokens": 24, "ignore_eos": True})


@pytest.fixture(scope="module")
def scraped(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, Served]]:
    folder = tmp_path_factory.mktemp("scraped")
    shutil.copy(FOLDER / "rules.yml", folder)
    with serve(folder, "toy", "--num-gpu-blocks-override", "256") as served, contextlib.ExitStack() as stack:
        served.wait(lambda: len(served.status()["workers"]) == 2, 60, "both workers")
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "2s"}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{served.port}"]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = free_port()
        log = stack.enter_context((folder / "prometheus.log").open("wb"))
        process = subprocess.Popen(
            [
                tools.prometheus,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        stack.callback(process.wait, 20)
        stack.callback(process.terminate)
        stop = threading.Event()
        stack.callback(stop.set)

        def load(offset: int) -> None:
            i = offset
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    ask(served, i)
                i += 4
                stop.wait(0.05)

        for offset in range(4):
            threading.Thread(target=load, args=(offset,), daemon=True).start()
        time.sleep(LOAD_S)
        assert process.poll() is None, Path(log.name).read_text()[-2000:]
        yield Prometheus(port), served


def filled_in(expression: str) -> str:
    for name in ("model_name", "tenant", "class"):
        expression = expression.replace(f"${name}", ".*")
    return expression.replace("$__rate_interval", WINDOW)


def test_the_target_is_up_and_colons_survive(scraped: tuple[Prometheus, Served]) -> None:
    prometheus, _ = scraped
    assert prometheus.values('up{job="tandem"}') == [1.0]
    names = set(prometheus.get("/api/v1/label/__name__/values"))
    for name in ("vllm:num_requests_running", "vllm:time_to_first_token_seconds_bucket", "vllm:prompt_tokens_total"):
        assert name in names
    assert not {name for name in names if name.startswith("vllm_")}


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_panel_has_data(scraped: tuple[Prometheus, Served], name: str) -> None:
    prometheus, _ = scraped
    empty, asked = [], 0
    for panel in dashboard(name)["panels"]:
        for target in panel.get("targets", ()):
            asked += 1
            if not prometheus.values(filled_in(target["expr"])) and panel["title"] not in NEEDS_AN_EVENT:
                empty.append(f"{panel['title']} {target['refId']}: {filled_in(target['expr'])}")
    print(f"{name}: {asked - len(empty)} of {asked} queries have data")
    assert not empty, "\n" + "\n".join(empty)
    assert asked >= 15


def test_the_variables_have_values(scraped: tuple[Prometheus, Served]) -> None:
    prometheus, _ = scraped
    for name, query in VARIABLES:
        series, label = query.removeprefix("label_values(").removesuffix(")").split(", ")
        found = prometheus.get(f"/api/v1/label/{label}/values", **{"match[]": series})
        assert found == {"model_name": ["toy"], "tenant": ["default"], "class": ["standard"]}[name]


def test_every_rule_evaluates_and_nothing_is_wrong_with_a_healthy_cluster(scraped: tuple[Prometheus, Served]) -> None:
    prometheus, _ = scraped
    rules = [rule for group in prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]
    assert len(rules) == 20
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []
    assert prometheus.values("tandem:slo_errors:ratio_rate5m") == [0.0]


def test_prometheus_counts_what_the_report_counts(scraped: tuple[Prometheus, Served]) -> None:
    prometheus, served = scraped
    report = json.loads(served.get("/admin/sla?window=3600")[1])["rows"][0]
    scraped_later = prometheus.values("sum(tandem_slo_requests_total)")[0]
    assert 0.8 * report["finished"] <= scraped_later <= report["finished"] + 50
    assert report["attainment"] == prometheus.values("sum(tandem_slo_kept_total) / sum(tandem_slo_requests_total)")[0] == 1.0


@pytest.mark.parametrize(
    "words", [["sla", "report"], ["sla", "report", "--format", "csv", "--window", "60"], ["top", "--once"]], ids=" ".join
)
def test_commands_show_the_running_cluster(
    scraped: tuple[Prometheus, Served], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, served = scraped
    assert cli.main([*words, "--url", served.url]) == 0
    shown = capsys.readouterr().out
    assert "default" in shown
    assert "standard" in shown


def test_a_request_is_found_by_its_own_id(scraped: tuple[Prometheus, Served], capsys: pytest.CaptureFixture[str]) -> None:
    """By the X-Request-Id that it was sent with and answered with; its bars are those of the path that it took."""
    _, served = scraped
    body = json.dumps({"model": "toy", "prompt": list(range(10, 210)), "max_tokens": 40, "ignore_eos": True}).encode()
    asked = urllib.request.Request(
        f"{served.url}/v1/completions", body, {"Content-Type": "application/json", "X-Request-Id": "trace-me"}
    )
    with urllib.request.urlopen(asked, timeout=60) as answer:
        assert answer.headers["x-request-id"] == "trace-me"
        metrics = json.load(answer)["metrics"]
    served.wait(lambda: served.get("/dashboard/requests/trace-me")[0] == 200, 10, "its outcome")
    served.wait(lambda: json.loads(served.get("/dashboard/requests/trace-me")[1])["request"]["state"] == "finished", 10, "its end")
    row = json.loads(served.get("/dashboard/requests/trace-me")[1])["request"]
    assert abs(row["ttft_ms"] - metrics["time_to_first_token_ms"]) < 0.01
    assert row["prefill_worker"] == "prefill:0"
    assert cli.main(["trace", "trace-me", "--url", served.url]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if "│" in line] == [
        "intake", "queue", "reserve", "wait", "prefill", "transfer", "decode",
    ]  # fmt: skip
    assert "prefill:0 → decode:0" in shown
    assert cli.main(["trace", "nobody", "--url", served.url]) == 1
    assert "no request 'nobody' is remembered" in capsys.readouterr().err
