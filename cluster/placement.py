"""Where what computes nothing may run: gateways, the scheduler, and the workers in front of other servers.

They ask Ray for no CPU, so that they fit on a laptop, and would therefore be placed on any node of a cluster. Two names in the
environment of every node change that; `tandem up`, the systemd units and the Helm chart set them:

    TANDEM_CONTROL_RESOURCE     a resource that nodes offer: gateways, and all the others, run only there
    TANDEM_SCHEDULER_RESOURCE   the same for the scheduler alone. `node:__internal_head__` is Ray's own name for the head: Ray takes
                                up to a minute to find a silent node dead, and only then starts the scheduler elsewhere; without
                                Redis it cannot outlive the head anyway
"""

from __future__ import annotations

import os
from typing import Any

SHARE = 0.001  # of one unit: how many run on a node is not what the resource is about
HEAD = "node:__internal_head__"


def control_options() -> dict[str, Any]:
    """What Ray is asked for each of them."""
    return _on(os.environ.get("TANDEM_CONTROL_RESOURCE"))


def scheduler_options() -> dict[str, Any]:
    """The same for the scheduler."""
    return _on(os.environ.get("TANDEM_SCHEDULER_RESOURCE") or os.environ.get("TANDEM_CONTROL_RESOURCE"))


def _on(name: str | None) -> dict[str, Any]:
    return {"num_cpus": 0, "resources": {name: SHARE}} if name else {"num_cpus": 0}
