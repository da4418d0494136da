"""Two tenants of one server, each with a key of its own; what each was promised and got is told apart.

TANDEM_GATEWAY_API_KEY=sk-all make serve ARGS="--tenants configs/tenants.example.yaml"
TANDEM_API_KEY=sk-all python -m examples.two_tenants
"""

from __future__ import annotations

import openai

from examples.connection import API_KEY, MODEL, URL
from examples.sla_report import fetch

KEYS = {"acme": "sk-acme", "globex": "sk-globex"}


def main() -> dict[str, int]:
    """-> tenant -> requests that the server counted."""
    for number, (tenant, key) in enumerate(KEYS.items(), 1):
        client = openai.OpenAI(base_url=f"{URL}/v1", api_key=key)
        for i in range(3 * number):
            client.completions.create(model=MODEL, prompt=f"# {tenant} {i}\ndef ", max_tokens=8)
    rows = {row["tenant"]: row for row in fetch(API_KEY)["rows"]}
    for tenant in KEYS:
        row = rows[tenant]
        print(
            f"{tenant:<8} {row['requests']} requests, TTFT p95 {1000 * row['ttft']['p95']:.0f} ms, {row['tokens']['output']} tokens"
        )
    return {tenant: rows[tenant]["requests"] for tenant in KEYS}


if __name__ == "__main__":
    main()
