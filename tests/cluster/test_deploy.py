"""`tandem deploy`: the document that it hands to Serve is a configuration again, passes Serve's schema, and holds no secret."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import yaml

from cluster import app, cli, sizes
from cluster.deploy import POLICY, document
from cluster.overflow_life import model_of
from configs.load import load
from configs.schema import Config

ALSO = ["toy,decode.replicas=2,decode.max_replicas=4"]


def test_the_document_is_the_configuration_again() -> None:
    config = load(env={}, also=ALSO, overflow=["http://x/v1,serves=toy"]).config
    found = document(config)
    (application,) = found["applications"]
    assert msgspec.convert(application["args"]["config"], Config) == config
    assert application["autoscaling_policy"] == {"policy_function": POLICY}
    assert "autoscaling_policy" not in document(load(env={}).config)["applications"][0]
    assert model_of(config, config.overflow[0]).served_name == "toy"


def test_serve_takes_it() -> None:
    schema = pytest.importorskip("ray.serve.schema")
    from ray._common.utils import import_attr

    found = document(load(env={}, also=ALSO).config)
    assert schema.ServeDeploySchema.model_validate(found).applications[0].name == "tandem"
    assert import_attr(POLICY) is sizes.policy
    assert import_attr(found["applications"][0]["import_path"]) is app.build


def test_no_secret_is_in_it() -> None:
    config = load(env={"TANDEM_GATEWAY_API_KEY": "hunter2"}).config
    assert "hunter" not in yaml.safe_dump(document(config))
    assert "hunter2" in yaml.safe_dump(document(config, secret="s")), "unless Ray is this command's own"


def test_it_can_be_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["deploy", "toy", "--decode", "2", "--print"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["applications"][0]["args"]["config"]["decode"]["replicas"] == 2
    monkeypatch.delenv("TANDEM_CLUSTER_SECRET", raising=False)
    assert cli.main(["deploy", "toy"]) == 2
    assert "TANDEM_CLUSTER_SECRET" in capsys.readouterr().err


def test_each_model_has_deployments_of_its_own_and_sized_pools_have_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(env={}, also=ALSO, overflow=["http://x/v1"]).config
    first, second = config.each()
    assert app._workers("decode", first).name == "Decode"
    assert app._workers("decode", first).num_replicas == 1
    sized = app._workers("decode", second, 1)
    assert sized.name == "Decode-toy"
    bounds = sized._deployment_config.autoscaling_config
    assert (bounds.min_replicas, bounds.initial_replicas, bounds.max_replicas) == (2, 2, 4)
    assert (bounds.upscale_delay_s, bounds.downscale_delay_s) == (0, 0)
    assert app._overflow(config, 0).name == "Overflow-0"
    assert bounds.policy.policy_function == app.POOL_POLICY, "where the application has no policy"
    assert app._workers("decode", second, 1, True)._deployment_config.autoscaling_config.policy.is_default_policy_function()
    assert app.application(config, b"s" * 32)


def test_the_policy_keeps_pools_as_they_are_until_the_scheduler_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    class Which:
        def __init__(self, name: str) -> None:
            self.name = name

    class Context:
        target_num_replicas = 2

    asking = sizes.Asking()
    monkeypatch.setattr(sizes, "_asking", asking)
    monkeypatch.setattr(asking, "look", lambda now, present: None)
    decode, prefill = Which("Decode"), Which("Prefill")
    assert sizes.policy({decode: Context(), prefill: Context()}) == ({decode: 2, prefill: 2}, {})
    monkeypatch.setattr(sizes.time, "monotonic", lambda: 100.0)
    asking.sizes, asking.answered_at = {"Decode": 3}, 99.0
    assert sizes.policy({decode: Context(), prefill: Context()})[0] == {decode: 3, prefill: 2}
    one = Context()
    one.deployment_id = prefill  # type: ignore[attr-defined]
    asking.sizes = {"Decode": 3, "Prefill": 1}
    assert sizes.pool_policy(one) == (1, {})
    asking.answered_at = 60.0
    assert sizes.policy({decode: Context()})[0] == {decode: 2}, "an answer that is too old says nothing"
