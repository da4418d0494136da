"""Every example of the chart: what Kubernetes and KubeRay would take, and what a security review would ask of it.

The policy checks are code, so each is also shown a chart that breaks it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from cluster.app import GOING_S
from configs.check import check
from configs.schema import Config
from tests.helm import chart
from tests.helm.chart import (
    CHART,
    EXAMPLES,
    GIVEN,
    KUBERNETES,
    OBSERVABILITY,
    Values,
    documents,
    errors,
    everything,
    example,
    merged,
    needs_helm,
    needs_kubernetes,
    pod_templates,
    render,
    serve_config,
)

pytestmark = needs_helm
ALL = ["", *EXAMPLES]  # "": the chart's own values
CORE = {"NetworkPolicy", "PodDisruptionBudget", "PersistentVolumeClaim", "ConfigMap"}
OTHERS = {"RayService", "PodMonitor", "PrometheusRule"}
SIZED = {"decode": {"replicas": 2, "min_replicas": 1, "max_replicas": 4}}


def given(name: str) -> Values:
    return example(name) if name else GIVEN


# ---- policies --------------------------------------------------------------------------------------------------------


def violations(documents_: list[Values]) -> list[str]:
    """What a review would find in rendered documents, in words. Empty: nothing."""
    (service,) = (d for d in documents_ if d["kind"] == "RayService")
    out: list[str] = []
    cluster = service["spec"]["rayClusterConfig"]
    if cluster.get("authOptions", {}).get("mode") != "token" or not cluster["authOptions"].get("secretName"):
        out.append("Ray has no token from a Secret")
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        out.append("the head takes work")
    if service["spec"].get("excludeHeadPodFromServeSvc") is not True:
        out.append("the head gets requests")
    for role, template in pod_templates(service).items():
        out += [f"{role}: {what}" for what in pod_violations(template["spec"], role == "head")]
    scaler = cluster.get("autoscalerOptions")
    if cluster.get("enableInTreeAutoscaling"):
        out += container_violations(scaler, "autoscaler") if scaler else ["the autoscaler is not confined"]
    out += network_violations(documents_, service)
    budgets = [d["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"] for d in documents_ if "Budget" in d["kind"]]
    pools = {group["groupName"] for group in cluster["workerGroupSpecs"] if group["maxReplicas"]}
    out += [f"{role}: no PodDisruptionBudget" for role in sorted(pools - set(budgets))]
    if "api_key" in yaml.safe_dump(yaml.safe_load(service["spec"]["serveConfigV2"])):
        out.append("a key is in the Serve configuration")
    return out


def container_violations(container: Values, name: str) -> list[str]:
    out = []
    confined = container.get("securityContext", {})
    if confined.get("readOnlyRootFilesystem") is not True:
        out.append(f"{name}: its root can be written")
    if confined.get("allowPrivilegeEscalation") is not False:
        out.append(f"{name}: it may gain privileges")
    if confined.get("runAsNonRoot") is not True:
        out.append(f"{name}: it may run as root")
    if confined.get("capabilities", {}).get("drop") != ["ALL"] or confined.get("capabilities", {}).get("add"):
        out.append(f"{name}: it keeps capabilities")
    if confined.get("privileged"):
        out.append(f"{name}: it is privileged")
    resources = container.get("resources", {})
    if not {"cpu", "memory"} <= resources.get("requests", {}).keys() or "memory" not in resources.get("limits", {}):
        out.append(f"{name}: resources are not set")
    return out


def pod_violations(spec: Values, is_head: bool) -> list[str]:
    out = []
    if spec.get("securityContext", {}).get("seccompProfile") != {"type": "RuntimeDefault"}:
        out.append("no seccomp profile")
    if spec.get("securityContext", {}).get("runAsNonRoot") is not True or not spec["securityContext"].get("runAsUser"):
        out.append("it may run as root")
    out += [f"{name} is shared" for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    out += ["a path of the host is mounted" for volume in spec.get("volumes", ()) if "hostPath" in volume]
    if not is_head and spec.get("automountServiceAccountToken") is not False:
        out.append("it has a token of the API server")
    if not is_head and len(spec.get("topologySpreadConstraints", ())) < 2:
        out.append("its pods are not spread")
    for container in (*spec["containers"], *spec.get("initContainers", ())):
        out += container_violations(container, container["name"])
        probes = {"startupProbe", "readinessProbe", "livenessProbe"}
        out += [f"no {probe}" for probe in sorted(probes - container.keys())]
        if container["image"].rpartition(":")[2] in ("", "latest") or ":" not in container["image"]:
            out.append("its image has no version")
        for entry in container["env"]:
            if any(word in entry["name"] for word in ("KEY", "SECRET", "TOKEN")) and "value" in entry:
                out.append(f"{entry['name']} stands in the manifest")
        out += [f"port {port['hostPort']} of the host" for port in container.get("ports", ()) if "hostPort" in port]
        if not is_head and "preStop" not in container.get("lifecycle", {}):
            out.append("it is not drained")
    return out


def network_violations(documents_: list[Values], service: Values) -> list[str]:
    policies = [d["spec"] for d in documents_ if d["kind"] == "NetworkPolicy"]
    out = []
    for role, template in pod_templates(service).items():
        mine = [p for p in policies if p["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()]
        covered = {kind for policy in mine for kind in policy["policyTypes"]}
        out += [f"{role}: {kind} is open" for kind in ("Ingress", "Egress") if kind not in covered]
        for policy in mine:
            rules = [*policy.get("ingress", ()), *policy.get("egress", ())]
            out += [f"{role}: a rule without peers" for rule in rules if not (rule.get("from") or rule.get("to"))]
            out += [f"{role}: a rule without ports" for rule in rules if not rule.get("ports")]
            blocks = [peer["ipBlock"] for rule in rules for peer in rule.get("to", ()) if "ipBlock" in peer]
            for block in blocks:
                if block["cidr"] == "0.0.0.0/0" and "169.254.169.254/32" not in block.get("except", ()):
                    out.append(f"{role}: the cloud's metadata service can be reached")
    return out


@pytest.mark.parametrize("name", ALL)
def test_a_review_finds_nothing(name: str) -> None:
    assert violations(everything(given=given(name))) == []


def head(service: Values) -> Values:
    return service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]


def worker(service: Values) -> Values:
    return service["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]["template"]["spec"]


Mutate = Callable[[Values], Any]
MUTANTS: dict[str, Mutate] = {
    "no seccomp": lambda s: worker(s)["securityContext"].pop("seccompProfile"),
    "may run as root": lambda s: worker(s)["securityContext"].update(runAsNonRoot=False),
    "root can be written": lambda s: head(s)["containers"][0]["securityContext"].update(readOnlyRootFilesystem=False),
    "keeps capabilities": lambda s: head(s)["containers"][0]["securityContext"].update(capabilities={"drop": ["NET_RAW"]}),
    "gain privileges": lambda s: worker(s)["containers"][0]["securityContext"].update(allowPrivilegeEscalation=True),
    "path of the host": lambda s: worker(s)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    "resources are not set": lambda s: worker(s)["containers"][0]["resources"].pop("limits"),
    "no readinessProbe": lambda s: worker(s)["containers"][0].pop("readinessProbe"),
    "not drained": lambda s: worker(s)["containers"][0].pop("lifecycle"),
    "token of the API server": lambda s: worker(s).update(automountServiceAccountToken=True),
    "not spread": lambda s: worker(s).pop("topologySpreadConstraints"),
    "hostNetwork is shared": lambda s: head(s).update(hostNetwork=True),
    "stands in the manifest": lambda s: head(s)["containers"][0]["env"].append({"name": "API_KEY", "value": "x"}),
    "image has no version": lambda s: head(s)["containers"][0].update(image="tandem:latest"),
    "head takes work": lambda s: s["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"].pop("num-cpus"),
    "no token": lambda s: s["spec"]["rayClusterConfig"].pop("authOptions"),
    "is open": lambda s: (
        worker(s) and s["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]["template"]["metadata"].update(labels={})
    ),
}


@pytest.mark.parametrize("finding", MUTANTS)
def test_a_review_finds(finding: str) -> None:
    found = copy.deepcopy(everything())
    MUTANTS[finding](next(d for d in found if d["kind"] == "RayService"))
    assert any(finding in what for what in violations(found)), violations(found)


@pytest.mark.parametrize(
    ("values", "finding"),
    [
        ({"networkPolicy": {"enabled": False}}, "is open"),
        ({"podDisruptionBudget": {"enabled": False}}, "no PodDisruptionBudget"),
        ({"transfer": {"transport": "nccl"}}, "a rule without ports"),  # NCCL's cannot be fixed, so all among our pods are open
    ],
)
def test_what_the_values_give_up_is_found(values: Values, finding: str) -> None:
    assert any(finding in what for what in violations(everything(values)))


# ---- as Kubernetes and KubeRay would see it ----------------------------------------------------------------------------


@needs_kubernetes
@pytest.mark.parametrize("name", ALL)
def test_every_document_is_valid(name: str, crds: Path) -> None:
    import kubernetes_validate

    schema = chart.ray_service_schema(crds)
    found = everything(given=given(name))
    assert {document["kind"] for document in found} <= CORE | OTHERS
    for document in found:
        assert len(document["metadata"]["name"]) <= 63
        if document["kind"] in CORE:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        if document["kind"] == "RayService":
            assert errors(schema, document) == []
            for template in pod_templates(document).values():
                pod = {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {"name": "x"} | template["metadata"],
                    "spec": template["spec"],
                }
                kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    keys = [(document["kind"], document["metadata"]["name"]) for document in found]
    assert len(set(keys)) == len(keys), "two resources of one name"


@pytest.mark.parametrize("name", ALL)
def test_lint_and_schema_are_content(name: str) -> None:
    from helm_python.chart import Chart, lint

    Chart.load(str(CHART)).validate_schema(merged(yaml.safe_load((CHART / "values.yaml").read_text()), given(name)))
    report = lint(str(CHART), values=given(name))
    information = 1
    assert not [message for message in report["messages"] if message["severity"] > information], report


@pytest.mark.parametrize("name", ALL)
def test_the_rendered_configuration_is_one(name: str) -> None:
    config = msgspec.convert(serve_config(given=given(name))["applications"][0]["args"]["config"], Config)
    with_key = msgspec.structs.replace(config, gateway=msgspec.structs.replace(config.gateway, api_key="k" * 24))
    check(with_key)
    assert config.transfer.transport == "tcp"
    assert config.transfer.port_range == "20000-20999"


# ---- what hangs together -----------------------------------------------------------------------------------------------


def test_the_policy_lists_every_port_that_ray_and_tandem_were_given() -> None:
    found = documents({"portRange": "21000-21099"})
    (inner,) = (
        rule["ports"]
        for rule in found["NetworkPolicy"]["spec"]["ingress"]
        if {"port": 6379, "endPort": 6383, "protocol": "TCP"} in rule["ports"]
    )
    ranges = [(port["port"], port.get("endPort", port["port"])) for port in inner]
    cluster = found["RayService"]["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        for option, value in group["rayStartParams"].items():
            if option.endswith("-port") and option != "metrics-export-port":  # that one is monitoring's
                assert any(low <= int(value) <= high for low, high in ranges), option
    assert (21000, 21099) in ranges
    assert {port["name"]: port["containerPort"] for port in head(found["RayService"])["containers"][0]["ports"]} == {
        "gcs": 6379,
        "dashboard": 8265,
        "serve": 8000,
        "metrics": 8080,
    }


def test_a_pod_has_longer_than_its_workers_take_to_drain() -> None:
    for drain_s in (5, 20, 300.5):
        spec = worker(documents({"scheduler": {"drain_s": drain_s}})["RayService"])
        command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:3] == ["python", "-m", "cluster.leaving"]
        assert drain_s + GOING_S < float(command[3]) < spec["terminationGracePeriodSeconds"]
    with pytest.raises(Exception, match=r"terminationGracePeriodSeconds 30 is too short for scheduler.drain_s: it needs 160"):
        render({"terminationGracePeriodSeconds": 30, "scheduler": {"drain_s": 100}})


def test_workers_are_ready_when_tokens_are_produced() -> None:
    probes = {
        role: t["spec"]["containers"][0]["readinessProbe"]["httpGet"]
        for role, t in pod_templates(documents()["RayService"]).items()
    }
    assert probes["prefill"] == probes["decode"] == {"path": "/ready", "port": 8000}
    assert probes["head"] == {"path": "/api/gcs_healthz", "port": 8265}


def test_several_models_share_the_groups_of_their_roles() -> None:
    also = [
        {"model": {"name": "toy"}, "decode": {"replicas": 2, "max_replicas": 4}},
        {"model": {"name": "toy", "served_name": "b"}, "prefill": {"replicas": 3}},
    ]
    found = documents({"prefill": {"replicas": 2}, "also": also})["RayService"]
    groups = {g["groupName"]: g for g in found["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    assert [groups["prefill"][k] for k in ("minReplicas", "replicas", "maxReplicas")] == [6, 6, 6]
    assert [groups["decode"][k] for k in ("minReplicas", "replicas", "maxReplicas")] == [4, 4, 6]
    config = msgspec.convert(yaml.safe_load(found["spec"]["serveConfigV2"])["applications"][0]["args"]["config"], Config)
    assert [one.model.name for one in config.each()] == ["bundled", "toy", "toy"]
    assert sum(one.decode.replicas for one in config.each()) == 4
    with pytest.raises(Exception, match=r"all models need the same decode.tp"):
        render({"also": [{"model": {"name": "toy"}, "decode": {"tp": 2}}]})


def test_groups_of_ranks_have_a_pod_for_each_stage() -> None:
    found = documents({"decode": {"replicas": 2, "tp": 4, "pp": 3}})
    group = found["RayService"]["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]
    assert group["replicas"] == 6
    assert group["resources"]["tandem_decode"] == "4"
    assert "ports" not in found["NetworkPolicy"]["spec"]["ingress"][0], "stages talk over gloo's and NCCL's own ports"


def test_tenants_come_from_a_secret_that_may_change() -> None:
    found = documents({"tenants": {"existingSecret": "t", "key": "mine.yaml"}})["RayService"]
    config = yaml.safe_load(found["spec"]["serveConfigV2"])["applications"][0]["args"]["config"]
    folder, _, file = config["scheduler"]["tenants_file"].rpartition("/")
    for role, template in pod_templates(found).items():
        (volume,) = (v for v in template["spec"]["volumes"] if v["name"] == "tenants")
        assert volume["secret"] == {"secretName": "t", "items": [{"key": "mine.yaml", "path": file}]}, role
        (mount,) = (m for m in template["spec"]["containers"][0]["volumeMounts"] if m["name"] == "tenants")
        assert mount["mountPath"] == folder
        assert "subPath" not in mount, "a file mounted by itself never changes"
    assert "tenants_file" not in serve_config()["applications"][0]["args"]["config"]["scheduler"]


def test_a_head_that_remembers_in_redis() -> None:
    redis = [{"podSelector": {"matchLabels": {"app": "redis"}}}]
    values = {
        "gcsFaultTolerance": {"redisAddress": "redis://r.data:6390", "redisPasswordSecret": {"name": "r"}},
        "networkPolicy": {"redis": redis},
    }
    found = everything(values)
    (service,) = (d for d in found if d["kind"] == "RayService")
    assert service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"] == {
        "redisAddress": "redis://r.data:6390",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "r", "key": "redis-password"}}},
    }
    (policy,) = (d["spec"] for d in found if d["kind"] == "NetworkPolicy" and d["metadata"]["name"].endswith("-head"))
    assert policy["egress"] == [{"to": redis, "ports": [{"port": 6390, "protocol": "TCP"}]}]
    assert "gcsFaultToleranceOptions" not in documents()["RayService"]["spec"]["rayClusterConfig"]
    with pytest.raises(Exception, match=r"networkPolicy\.redis: gcsFaultTolerance\.redisAddress is given"):
        render(values | {"networkPolicy": {"redis": []}})


def test_the_autoscaler_is_there_where_it_is_needed_and_reaches_the_api_server() -> None:
    for more, is_there in (
        ({}, False),
        (SIZED, True),
        ({"upgrade": {"type": "NewClusterWithIncrementalUpgrade", "gatewayClassName": "g"}}, True),
    ):
        found = everything(more)
        (service,) = (d for d in found if d["kind"] == "RayService")
        cluster = service["spec"]["rayClusterConfig"]
        assert ("autoscalerOptions" in cluster) is is_there
        assert head(service)["automountServiceAccountToken"] is is_there
        assert len([d for d in found if d["kind"] == "NetworkPolicy"]) == 1 + is_there
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert service["spec"]["upgradeStrategy"]["clusterUpgradeOptions"]["gatewayClassName"] == "g"
    with pytest.raises(Exception, match=r"upgrade.gatewayClassName"):
        render({"upgrade": {"type": "NewClusterWithIncrementalUpgrade"}})


def test_budgets_let_one_pod_of_a_pool_go() -> None:
    found = everything(merged(SIZED, {"prefill": {"replicas": 0}, "podDisruptionBudget": {"protectHead": True}}))
    budgets = {d["metadata"]["name"]: d["spec"]["minAvailable"] for d in found if d["kind"] == "PodDisruptionBudget"}
    assert budgets == {"prod-tandem-decode": 0, "prod-tandem-head": 1}
    found = everything({"decode": {"replicas": 5}})
    assert {d["metadata"]["name"]: d["spec"]["minAvailable"] for d in found if "Budget" in d["kind"]}["prod-tandem-decode"] == 4


def test_monitoring_asks_one_pod_for_tandems_figures_and_carries_the_repositorys_rules_and_dashboards() -> None:
    found = everything(
        {"monitoring": {"podMonitors": True, "prometheusRule": True, "dashboards": True, "labels": {"release": "p"}}}
    )
    ours, rays = (d for d in found if d["kind"] == "PodMonitor")
    assert ours["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"] == "head"
    assert "app.kubernetes.io/component" not in rays["spec"]["selector"]["matchLabels"]
    names = {port["name"] for port in head(documents()["RayService"])["containers"][0]["ports"]}
    assert {m["spec"]["podMetricsEndpoints"][0]["port"] for m in (ours, rays)} <= names
    (rule,) = (d for d in found if d["kind"] == "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((OBSERVABILITY / "rules.yml").read_text())
    assert rule["metadata"]["labels"]["release"] == "p"
    (dashboards,) = (d for d in found if d["kind"] == "ConfigMap")
    for name, text in dashboards["data"].items():
        assert text == (OBSERVABILITY / name).read_text().rstrip("\n") or text == (OBSERVABILITY / name).read_text()
    assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert not {"PodMonitor", "PrometheusRule", "ConfigMap"} & {d["kind"] for d in everything()}


def test_the_models_volume_outlives_the_release() -> None:
    found = everything({"models": {"create": {"enabled": True, "storageClassName": "fast"}}})
    (claim,) = (d for d in found if d["kind"] == "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    (service,) = (d for d in found if d["kind"] == "RayService")
    (volume,) = (v for v in worker(service)["volumes"] if v["name"] == "models")
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert "PersistentVolumeClaim" not in documents({"models": {"existingClaim": "x", "create": {"enabled": True}}})
