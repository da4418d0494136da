"""What the tests of the chart share: rendering with Helm's own engine, and KubeRay's definition as a strict schema.

`python tests/helm/test_chart.py` writes what of the chart is made from other files: the configuration's part of
values.schema.json, and the copies of dashboards and rules (Helm packs nothing from outside of a chart's folder).
"""

from __future__ import annotations

import copy
import gzip
import importlib.util
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from configs.schema import SECRET_KEYS, SECTIONS, Config

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "tandem"
DECIDED_BY_THE_CHART = {"gateway.host", "gateway.port", "transfer.bind_host", "transfer.port_range", "scheduler.tenants_file"}
OBSERVABILITY = ROOT / "configs" / "observability"
COPIED = ("rules.yml", "grafana-sla.json", "grafana-cluster.json")  # to helm/tandem/files
EXAMPLES = sorted(path.stem for path in (CHART / "examples").glob("*.yaml"))
KUBERNETES = "1.33"
GIVEN = {"image": {"repository": "registry.example/tandem"}, "secrets": {"existingSecret": "tandem"}}
Values = dict[str, Any]

needs_helm = pytest.mark.skipif(
    importlib.util.find_spec("helm_python") is None, reason="helm-python-sdk is not installed (make setup)"
)
needs_kubernetes = pytest.mark.skipif(
    importlib.util.find_spec("kubernetes_validate") is None, reason="kubernetes-validate is not installed (make setup)"
)


def merged(base: Values, more: Values) -> Values:
    result = copy.deepcopy(base)
    for key, value in more.items():
        result[key] = merged(result[key], value) if isinstance(value, dict) and key in result else value
    return result


def render(more: Values | None = None, given: Values = GIVEN) -> dict[str, str]:
    from helm_python.chart import Chart

    rendered = Chart.load(str(CHART)).render(merged(given, more or {}), name="prod", namespace="serving")
    return {Path(name).name: text for name, text in rendered.items()}


def example(name: str) -> Values:
    """The values of an example, with what every example leaves to the user."""
    return merged(
        {"image": {"repository": "registry.example/tandem"}}, yaml.safe_load((CHART / "examples" / f"{name}.yaml").read_text())
    )


def everything(more: Values | None = None, given: Values = GIVEN) -> list[Values]:
    """All documents."""
    texts = [text for name, text in render(more, given).items() if name.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def documents(more: Values | None = None, given: Values = GIVEN) -> dict[str, Values]:
    """kind -> document, the first of its kind"""
    found: dict[str, Values] = {}
    for document in everything(more, given):
        found.setdefault(document["kind"], document)
    return found


def serve_config(more: Values | None = None, given: Values = GIVEN) -> Values:
    return yaml.safe_load(documents(more, given)["RayService"]["spec"]["serveConfigV2"])


def pod_templates(ray_service: Values) -> dict[str, Values]:
    cluster = ray_service["spec"]["rayClusterConfig"]
    return {"head": cluster["headGroupSpec"]["template"]} | {
        group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]
    }


def section_schemas() -> Values:
    """values.schema.json's part for Tandem's own configuration, from configs/schema.py."""
    definitions = msgspec.json.schema(Config)["$defs"]
    sections = {}
    for section in SECTIONS:
        struct = definitions[f"{section.capitalize()}Config"]
        keys = {}
        for name, schema in struct["properties"].items():
            key = f"{section}.{name}"
            if key in SECRET_KEYS | DECIDED_BY_THE_CHART:
                continue
            schema = {word: value for word, value in schema.items() if word != "default"}
            keys[name] = schema
        sections[section] = {
            "description": struct["description"],
            "type": "object",
            "properties": keys,
            "additionalProperties": False,
        }
    # A further model says what it likes of the same keys, and has no default that Helm would fill in.
    parts = {section: {"$ref": f"#/properties/{section}"} for section in ("model", "prefill", "decode")}
    also = {"type": "object", "properties": parts, "required": ["model"], "additionalProperties": False}
    sections["also"] = {"description": definitions["AlsoConfig"]["description"], "type": "array", "items": also}
    server = definitions["OverflowConfig"]
    keys = {name: {w: v for w, v in schema.items() if w != "default"} for name, schema in server["properties"].items()}
    one = {"type": "object", "properties": keys, "required": server["required"], "additionalProperties": False}
    sections["overflow"] = {"description": server["description"], "type": "array", "items": one}
    return sections


def strict(schema: Any) -> Any:
    """A resource definition's structural schema as a JSON schema in which an unlisted key is an error."""
    if isinstance(schema, list):
        return [strict(child) for child in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    result = {key: strict(value) for key, value in schema.items() if not key.startswith("x-kubernetes")}
    if isinstance(result.get("properties"), dict) and "additionalProperties" not in result:
        result["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    if result.pop("nullable", False) is True and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    return result


def ray_service_schema(crds: Path) -> Values:
    """crds: the folder of TANDEM_CRDS."""
    path = crds / "rayservices-crd.yaml.gz"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    definition = yaml.load(gzip.decompress(path.read_bytes()), loader)
    version = next(version for version in definition["spec"]["versions"] if version["name"] == "v1")
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def errors(schema: Values, document: Values) -> list[str]:
    import jsonschema

    return [f"{error.json_path}: {error.message}" for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]
