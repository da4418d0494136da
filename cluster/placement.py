"""Where what computes nothing may run: gateways, the scheduler, and the workers in front of other servers.

They ask Ray for no CPU, so that they fit on a laptop, and would therefore also be placed on a head that is to do no work. On a
cluster whose nodes offer a resource for them, TANDEM_CONTROL_RESOURCE (in the environment of every node) names it: then they run
only there. The Helm chart does so.
"""

from __future__ import annotations

import os
from typing import Any

SHARE = 0.001  # of one unit: how many run on a node is not what the resource is about


def control_options() -> dict[str, Any]:
    """What Ray is asked for each of them."""
    name = os.environ.get("TANDEM_CONTROL_RESOURCE")
    return {"num_cpus": 0, "resources": {name: SHARE}} if name else {"num_cpus": 0}
