"""`python -m cluster.leaving SECONDS`: this machine is about to go. For a pod's preStop hook and a unit's ExecStop.

Asks Ray to drain this node. Ray then places nothing here any more, and Serve starts replacements elsewhere, if there is room, and
stops the replicas here before the deadline; each of ours drains: what runs ends, or goes on at another worker. Waits until none of
ours is left here, at most the seconds given. Always exits with 0 once it has asked or found that there is nobody to ask: what
stops the machine goes on either way. Ray's own `ray stop` comes afterwards, from whoever called this.

Needs RAY_ADDRESS (or the address of a Ray on this machine), and Ray's token where it has one.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

POLL_S = 0.5
MARGIN_S = 3.0  # between Ray's deadline and ours
PREEMPTION = 2  # autoscaler.proto, DrainNodeReason: with a deadline, whether the node is idle or not


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    try:
        within_s = float(words[0])
    except (IndexError, ValueError):
        print("usage: python -m cluster.leaving SECONDS", file=sys.stderr)
        return 2
    deadline = time.monotonic() + within_s
    left = ours_here()
    if not left:
        print("nothing of ours runs here")
        return 0
    problem = ask_to_drain(max(1.0, within_s - MARGIN_S))
    if problem is not None:
        print(f"Ray was not told that this node goes: {problem}", file=sys.stderr)
        return 0
    while left and time.monotonic() < deadline:
        time.sleep(POLL_S)
        left = ours_here()
    print(f"still here after {within_s:g} s: {', '.join(left)}" if left else "nothing of ours is left here")
    return 0


def ours_here() -> list[str]:
    """Titles of worker and gateway processes of this machine (of this container: it has processes of its own)."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = (process.info["cmdline"] or [""])[0]
        if title.startswith("tandem:") and not title.startswith("tandem:scheduler"):  # Ray restarts that one elsewhere by itself
            found.append(title)
    return sorted(found)


def ask_to_drain(within_s: float) -> str | None:
    """None when Ray agreed, else why not."""
    try:
        import ray
        from ray._private import services

        address = services.canonicalize_bootstrap_address_or_die(os.environ.get("RAY_ADDRESS"))
        client = ray._raylet.GcsClient(address=address)
        node_id = this_node(client)
        if node_id is None:
            return f"none of the nodes at {address} is this machine"
        until_ms = int((time.time() + within_s) * 1000)
        agreed, reason = client.drain_node(node_id, PREEMPTION, "this machine is about to go", until_ms)
    except Exception as error:  # whatever it is: the machine goes all the same
        return f"{type(error).__name__}: {error}"
    return None if agreed else str(reason)


def this_node(client: Any) -> str | None:
    """The id (hex) of the living node whose address is one of this machine's; RAY_NODE_IP decides where several are."""
    import psutil

    wanted = os.environ.get("RAY_NODE_IP")
    here = {wanted} if wanted else {e.address for entries in psutil.net_if_addrs().values() for e in entries}
    for node_id, info in client.get_all_node_info().items():
        if info.state == 0 and info.node_manager_address in here:  # GcsNodeInfo.ALIVE
            return str(node_id.hex())
    return None


if __name__ == "__main__":
    sys.exit(main())
