"""`tandem deploy`: hand the application to a Ray that is up already, with the options that `tandem serve` takes.

The document is what `serve deploy FILE` reads (`--print` shows it). It holds no secrets: every node has TANDEM_CLUSTER_SECRET, and
TANDEM_GATEWAY_API_KEY where keys are asked for. `launch.py` deploys the same document where pools follow their load.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import yaml

from configs.load import Resolved
from configs.schema import SECRET_KEYS, Config, ModelConfig
from protocol.errors import ConfigError

APP_NAME = "tandem"
POLICY = "cluster.sizes:policy"


def with_absolute_paths(config: Config) -> Config:
    """Files are named from where the user stands; the workers stand elsewhere."""
    if config.scheduler.tenants_file is not None:
        file = str(Path(config.scheduler.tenants_file).expanduser().resolve())
        config = msgspec.structs.replace(config, scheduler=msgspec.structs.replace(config.scheduler, tenants_file=file))
    also = tuple(msgspec.structs.replace(one, model=_found_from_anywhere(one.model)) for one in config.also)
    return msgspec.structs.replace(config, model=_found_from_anywhere(config.model), also=also)


def _found_from_anywhere(model: ModelConfig) -> ModelConfig:
    if model.chat_template is not None:
        model = msgspec.structs.replace(model, chat_template=str(Path(model.chat_template).expanduser().resolve()))
    if model.step_log is not None:
        model = msgspec.structs.replace(model, step_log=str(Path(model.step_log).expanduser().resolve()))
    path = Path(model.name).expanduser()
    if not path.is_dir() or model.name in ("bundled", "toy"):
        return model
    return msgspec.structs.replace(model, name=str(path.resolve()), served_name=model.served_name or model.name)


def document(config: Config, secret: str | None = None) -> dict[str, Any]:
    """The Serve config file of this configuration. secret: the cluster's, where Ray is private to one command."""
    sections = msgspec.to_builtins(config)
    for key in SECRET_KEYS if secret is None else ():
        section, name = key.split(".")
        sections[section].pop(name, None)
    application: dict[str, Any] = {
        "name": APP_NAME,
        "route_prefix": "/",
        "import_path": "cluster.app:build",
        "args": {"config": sections, **({"secret": secret} if secret is not None else {})},
    }
    if config.is_sized:
        application["autoscaling_policy"] = {"policy_function": POLICY}
        application["args"]["has_policy"] = True
    http = {
        "host": config.gateway.host,
        "port": config.gateway.port,
        "keep_alive_timeout_s": max(1, round(config.gateway.keep_alive_s)),  # Serve counts in whole seconds
    }
    return {"proxy_location": "HeadOnly", "http_options": http, "applications": [application]}


def apply(found: dict[str, Any]) -> None:
    """To the Serve that this process is connected to, without waiting for it."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    client = _get_global_client()
    assert client is not None, "serve.start comes first"
    client.deploy_apps(ServeDeploySchema.model_validate(found))


def run(resolved: Resolved, only_print: bool) -> int:
    """-> the exit status. Raises ConfigError."""
    found = document(with_absolute_paths(resolved.config))
    if only_print:
        print(yaml.safe_dump(found, sort_keys=False), end="")
        return 0
    if len(os.environ.get("TANDEM_CLUSTER_SECRET", "")) < 16:
        raise ConfigError("TANDEM_CLUSTER_SECRET is not set, here and on every node; it has at least 16 characters")
    import ray
    from ray import serve

    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), namespace=APP_NAME, log_to_driver=False, logging_level="WARNING")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"no Ray cluster can be joined from here ({type(error).__name__}: {reason}); `ray start --head` makes one, "
            "RAY_ADDRESS names one, and `tandem serve` needs none"
        ) from None
    try:
        serve.start(proxy_location="HeadOnly", http_options=found["http_options"])
        apply(found)
    finally:
        ray.shutdown()
    print(f"deployed; `tandem status --port {resolved.config.gateway.port}` shows how it comes up")
    return 0
