"""Reading the SLA report: who was promised what, how much of it was kept, and who is about to run out of patience.

python -m examples.sla_report
"""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from examples.connection import API_KEY, URL

LOW = 0.25  # of the error budget


def fetch(key: str = API_KEY, window_s: int = 300) -> dict[str, Any]:
    """GET /admin/sla: {"window_s", "rows": one per tenant and class}. Times in seconds."""
    asked = urllib.request.Request(f"{URL}/admin/sla?window={window_s}", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(asked, timeout=10) as answer:
        report: dict[str, Any] = json.load(answer)
        return report


def main() -> list[str]:
    """-> the tenants whose error budget runs low."""
    low = []
    for row in fetch()["rows"]:
        kept, left = row["attainment"], row["budget_left"]
        told = (
            "nothing ended yet"
            if kept is None
            else f"{kept:.1%} kept of {row['promise']['attainment']:.1%}, {left:.0%} of the budget left"
        )
        refused = sum(row["refused"].values())
        print(f"{row['tenant']}, {row['class']}: {row['requests']} requests, {told}" + (f", {refused} refused" if refused else ""))
        if left is not None and left < LOW:
            low.append(row["tenant"])
    return low


if __name__ == "__main__":
    main()
