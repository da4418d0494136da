"""What configs/observability holds, looked at without a Prometheus: structure, names, and that the files are what is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.grafana import DASHBOARDS, FOLDER, dashboard
from cluster.metric_table import DISTRIBUTIONS, GPU_SERIES, WORKER_SERIES
from cluster.metrics import ClusterMetrics

OURS = re.compile(r"\b(?:vllm:|tandem_)[a-z0-9_]+")


def known_names() -> set[str]:
    """Every series that /metrics can have."""
    text = ClusterMetrics("m").text({"workers": []})
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    names |= {f"{one.name}{end}" for one in DISTRIBUTIONS for end in ("_bucket", "_sum", "_count")}
    names |= {one.name + ("_total" if one.kind == "counter" else "") for one in WORKER_SERIES}
    names |= {name for name, _ in GPU_SERIES.values()}
    return names


def targets(document: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in document["panels"] for target in panel.get("targets", ())]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_the_file_is_what_the_table_says(name: str) -> None:
    assert json.loads((FOLDER / name).read_text()) == dashboard(name), "run `python -m cluster.grafana`"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_structure(name: str) -> None:
    document = dashboard(name)
    panels = document["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"
        refs = [target["refId"] for target in panel["targets"]]
        assert len(refs) == len(set(refs)) > 0
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
    titles = [panel["title"] for panel in panels]
    assert len(titles) == len(set(titles))
    variables = {variable["name"] for variable in document["templating"]["list"]}
    used = set(re.findall(r"\$([a-z_]+)", " ".join(targets(document)))) - {"__rate_interval"}
    assert used | {"datasource"} == variables


@pytest.mark.parametrize("source", [*DASHBOARDS, "rules.yml"])
def test_every_name_that_is_asked_for_exists(source: str) -> None:
    text = (FOLDER / source).read_text()
    if source.endswith(".json"):
        text = " ".join(targets(json.loads(text)))
    else:
        text = " ".join(rule["expr"] for group in yaml.safe_load(text)["groups"] for rule in group["rules"])
    asked = set(OURS.findall(text))
    assert len(asked) > 5
    assert asked <= known_names(), asked - known_names()


def test_every_alert_is_tested_and_says_what_to_do() -> None:
    groups = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    tests = yaml.safe_load((FOLDER / "rules_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test.get("alert_rule_test", ()) if case["exp_alerts"]}
    alerts = {rule["alert"] for rule in rules if "alert" in rule}
    assert alerts == fired, "each alert is seen firing by a test"
    for rule in rules:
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("page", "ticket")
            assert rule["annotations"]["summary"]


def test_the_scrape_configuration_names_what_there_is() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert all((FOLDER / name).exists() for name in config["rule_files"])
    assert config["scrape_configs"][0]["metrics_path"] == "/metrics"


def test_the_files_are_shipped() -> None:
    import tomllib

    data = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert {f".{pattern.rsplit('.', 1)[1]}" for pattern in data["configs"]} >= {path.suffix for path in FOLDER.iterdir()}
