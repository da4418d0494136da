"""The chart renders, lints, says what Tandem's own configuration says, and makes resources that Kubernetes would take.

Needs the development extra (`make setup`); the RayService is checked against KubeRay's own definition (TANDEM_CRDS).
After a change of configs/schema.py, `python tests/helm/test_chart.py` writes its sections of values.schema.json anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import msgspec
import pytest
import yaml

from cluster.deploy import POLICY
from configs.schema import SECTIONS, Config
from protocol.errors import ConfigError
from tests.helm import chart
from tests.helm.chart import (
    CHART,
    COPIED,
    GIVEN,
    KUBERNETES,
    OBSERVABILITY,
    ROOT,
    Values,
    documents,
    errors,
    merged,
    needs_helm,
    needs_kubernetes,
    pod_templates,
    render,
    section_schemas,
    serve_config,
)


@pytest.fixture(scope="module")
def ray_service_schema(crds: Path) -> Values:
    return chart.ray_service_schema(crds)


# ---- without helm ----------------------------------------------------------------------------------------------------


def test_the_values_schema_has_the_keys_of_the_configuration() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    for section, expected in section_schemas().items():
        assert schema["properties"][section] == expected, f"{section}: run python tests/helm/test_chart.py"


def test_the_values_are_a_configuration() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    msgspec.convert({section: values[section] for section in (*SECTIONS, "also", "overflow")}, Config)


@pytest.mark.parametrize("name", COPIED)
def test_the_chart_has_todays_dashboards_and_rules(name: str) -> None:
    same = (CHART / "files" / name).read_bytes() == (OBSERVABILITY / name).read_bytes()
    assert same, f"{name}: run python tests/helm/test_chart.py"


OPEN = {f"values.networkPolicy.{name}" for name in ("clients", "operator", "monitoring", "dns", "apiServer", "redis", "egress")}
OPEN |= {"values.extraEnv"}  # Kubernetes' own objects, which its schemas check once they are rendered


def test_every_object_of_the_values_schema_is_closed() -> None:
    def check(schema: Values, path: str) -> None:
        if schema.get("type") == "object" and "properties" in schema:
            assert schema.get("additionalProperties") is False, f"{path} lets unknown keys through"
        for name, child in schema.get("properties", {}).items():
            check(child, f"{path}.{name}")
        if "items" in schema and path not in OPEN:
            check(schema["items"], f"{path}[]")

    schema = json.loads((CHART / "values.schema.json").read_text())
    check(schema, "values")
    assert "global" in schema["properties"], "a parent chart always passes `global`"


def test_chart_and_project_have_one_version() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == project


# ---- rendered --------------------------------------------------------------------------------------------------------


@needs_helm
def test_lint_finds_nothing() -> None:
    from helm_python.chart import lint

    report = lint(str(CHART), values=GIVEN)
    information = 1  # an icon is recommended
    assert not [message for message in report["messages"] if message["severity"] > information], report


@needs_helm
@pytest.mark.parametrize(("missing", "words"), [("image", "image.repository"), ("secrets", "secrets.existingSecret")])
def test_what_is_required_is_asked_for_in_words(missing: str, words: str) -> None:
    given = {key: value for key, value in GIVEN.items() if key != missing}
    with pytest.raises(Exception, match=words):
        render(given=given)


@needs_helm
@pytest.mark.parametrize(
    "values",
    [
        {"decode": {"replica": 2}},
        {"also": [{"model": {"name": "toy"}, "decode": {"replica": 2}}]},
        {"also": [{"decode": {"replicas": 2}}]},
        {"overflow": [{"model": "m"}]},
        {"overflow": [{"url": "http://x/v1", "key": "in-plain-sight"}]},
        {"upgrade": {"type": "Sideways"}},
        {"portRange": "20000"},
        {"decode": {"replicas": 0}},
        {"transfer": {"transport": "carrier-pigeon"}},
        {"gateway": {"api_key": "in-plain-sight"}},
        {"pods": {"decode": {"resource": {}}}},
        {"unheard": 1},
    ],
    ids=lambda values: ".".join(str(values).replace("{", "").replace("}", "").replace("'", "").split(": ")),
)
def test_wrong_values_are_refused(values: Values) -> None:
    from helm_python.chart import Chart

    chart = Chart.load(str(CHART))
    chart.validate_schema(GIVEN)
    with pytest.raises(Exception, match=r"."):
        chart.validate_schema(merged(GIVEN, values))


@needs_helm
def test_the_served_application_is_configured_as_the_values_say() -> None:
    values = {
        "decode": {"replicas": 3, "max_num_batched_tokens": 1048576},
        "gateway": {"max_body_bytes": 2**26},
        "scheduler": {"max_queue_tokens": 40_000_000, "ttft_target_s": 0.75},
    }
    application = serve_config(values)["applications"][0]
    assert application["import_path"] == "cluster.app:build"
    config = msgspec.convert(application["args"]["config"], Config)
    assert (config.decode.replicas, config.decode.max_num_batched_tokens) == (3, 1048576)
    assert config.gateway.max_body_bytes == 2**26
    assert config.scheduler.max_queue_tokens == 40_000_000
    assert config.scheduler.ttft_target_s == 0.75
    assert (config.gateway.host, config.gateway.port) == ("0.0.0.0", 8000)


@needs_helm
def test_the_application_builds_with_the_secrets_of_the_pod_and_not_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Serve's controller does with the rendered arguments. It listens beyond loopback: no key, no application."""
    from cluster.app import build

    args = serve_config()["applications"][0]["args"]
    monkeypatch.setenv("TANDEM_CLUSTER_SECRET", "s" * 32)
    monkeypatch.delenv("TANDEM_GATEWAY_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="api_key"):
        build(args)
    monkeypatch.setenv("TANDEM_GATEWAY_API_KEY", "k" * 24)
    assert build(args)


@needs_helm
def test_one_worker_group_for_each_role_with_one_pod_for_each_worker() -> None:
    service = documents({"prefill": {"replicas": 2}, "decode": {"replicas": 5}})["RayService"]
    groups = {group["groupName"]: group for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    assert {name: group["replicas"] for name, group in groups.items()} == {"prefill": 2, "decode": 5}
    for name, group in groups.items():
        assert group["resources"] == {f"tandem_{name}": "1", "tandem_control": "1"}
    assert service["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@needs_helm
def test_secrets_come_from_the_secret_and_from_nowhere_else() -> None:
    service = documents()["RayService"]
    assert service["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token", "secretName": "tandem"}
    for role, template in pod_templates(service).items():
        env = {entry["name"]: entry for entry in template["spec"]["containers"][0]["env"]}
        for variable, key in (("TANDEM_GATEWAY_API_KEY", "api_key"), ("TANDEM_CLUSTER_SECRET", "cluster_secret")):
            assert env[variable]["valueFrom"]["secretKeyRef"] == {"name": "tandem", "key": key}, role


@needs_helm
def test_the_network_policy_covers_every_pod_and_lets_no_client_in_by_itself() -> None:
    found = documents()
    selector = found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    for template in pod_templates(found["RayService"]).values():
        assert selector.items() <= template["metadata"]["labels"].items()

    def http_peers(policy: Values) -> list[Values]:
        rules = [rule for rule in policy["spec"]["ingress"] if 8000 in [port["port"] for port in rule.get("ports", [])]]
        own = {"podSelector": {"matchLabels": selector}}
        return [peer for rule in rules for peer in rule["from"] if peer != own]

    operator = {"app.kubernetes.io/name": "kuberay-operator"}
    assert [peer["podSelector"]["matchLabels"] for peer in http_peers(found["NetworkPolicy"])] == [operator]
    client = {"podSelector": {"matchLabels": {"app": "chat"}}}
    assert client in http_peers(documents({"networkPolicy": {"clients": [client]}})["NetworkPolicy"])
    assert "NetworkPolicy" not in documents({"networkPolicy": {"enabled": False}})


@needs_helm
def test_a_change_of_configuration_leaves_the_cluster_alone() -> None:
    """KubeRay applies a changed serveConfigV2 in place, and answers a changed cluster with a second whole cluster."""
    before, after = (documents(more)["RayService"]["spec"] for more in ({}, {"scheduler": {"ttft_target_s": 1}}))
    assert before["serveConfigV2"] != after["serveConfigV2"]
    assert before["rayClusterConfig"] == after["rayClusterConfig"]


@needs_helm
def test_notes_name_the_service_and_the_secret() -> None:
    notes = render()["NOTES.txt"]
    assert "prod-tandem-serve-svc" in notes
    assert "get secret tandem" in notes


# ---- as Kubernetes would see it --------------------------------------------------------------------------------------


@needs_helm
@needs_kubernetes
def test_core_kinds_are_valid() -> None:
    import kubernetes_validate

    found = documents({"networkPolicy": {"clients": [{"podSelector": {}}], "monitoring": [{"podSelector": {}}]}})
    kubernetes_validate.validate(found["NetworkPolicy"], KUBERNETES, strict=True)
    for template in pod_templates(found["RayService"]).values():
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "x"} | template["metadata"],
            "spec": template["spec"],
        }
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        pod["spec"]["containers"][0]["readinessProb"] = {}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@needs_helm
def test_the_ray_service_is_valid(ray_service_schema: Values) -> None:
    assert errors(ray_service_schema, documents()["RayService"]) == []
    gpu = {"resources": {"limits": {"nvidia.com/gpu": 1}}, "tolerations": [{"key": "gpu", "operator": "Exists"}]}
    assert errors(ray_service_schema, documents({"pods": {"decode": gpu}})["RayService"]) == []


@needs_helm
def test_a_pool_that_follows_its_load_has_the_policy_and_pods_that_may_come_and_go() -> None:
    fixed, sized = (
        documents()["RayService"],
        documents({"decode": {"replicas": 2, "min_replicas": 1, "max_replicas": 4}})["RayService"],
    )
    groups = {g["groupName"]: g for g in sized["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    assert [groups["decode"][k] for k in ("replicas", "minReplicas", "maxReplicas")] == [2, 1, 4]
    assert [groups["prefill"][k] for k in ("replicas", "minReplicas", "maxReplicas")] == [1, 1, 1]
    assert sized["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"] is True
    assert "enableInTreeAutoscaling" not in fixed["spec"]["rayClusterConfig"]
    (application,) = yaml.safe_load(sized["spec"]["serveConfigV2"])["applications"]
    assert application["autoscaling_policy"] == {"policy_function": POLICY}
    assert "autoscaling_policy" not in yaml.safe_load(fixed["spec"]["serveConfigV2"])["applications"][0]
    assert pod_templates(sized)["head"]["spec"]["automountServiceAccountToken"] is True
    assert pod_templates(fixed)["head"]["spec"]["automountServiceAccountToken"] is False


def misspell_a_key(service: Values) -> None:
    service["spec"]["rayClusterConfig"]["workerGroupSpec"] = service["spec"]["rayClusterConfig"].pop("workerGroupSpecs")


def give_a_wrong_type(service: Values) -> None:
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"] = "two"


def forget_the_containers(service: Values) -> None:
    del service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]


@needs_helm
@pytest.mark.parametrize("mutate", [misspell_a_key, give_a_wrong_type, forget_the_containers], ids=lambda f: f.__name__)
def test_the_check_catches(mutate: Callable[[Values], None], ray_service_schema: Values) -> None:
    service = documents()["RayService"]
    mutate(service)
    assert errors(ray_service_schema, service)


if __name__ == "__main__":
    target = CHART / "values.schema.json"
    whole = json.loads(target.read_text())
    whole["properties"] |= section_schemas()
    target.write_text(json.dumps(whole, indent=2) + "\n")
    for copied in COPIED:
        (CHART / "files" / copied).write_bytes((OBSERVABILITY / copied).read_bytes())
