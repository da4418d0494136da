"""A plan's page: one HTML file that needs nothing else, in which one drags the ratio of the pools and sees attainment and money."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("plan.html")


def page(found: dict[str, Any], name: str) -> str:
    """found: what `tandem plan --json` writes, with its curve."""
    # "<" inside the script could end it; JSON may write it otherwise.
    data = json.dumps({**found, "name": name}).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", data)
