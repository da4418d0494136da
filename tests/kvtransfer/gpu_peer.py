"""A decode worker's pool in a process of its own, driven by lines of JSON: `python -m tests.kvtransfer.gpu_peer`. Not a test."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from protocol.kv import KVEndpoint, KVLayout
from protocol.ticket import Grant, Manifest

ROOT = Path(__file__).resolve().parents[2]
SECRET = b"the cluster's secret"


class Setup(msgspec.Struct):
    layout: KVLayout
    num_blocks: int
    device: str
    transports: tuple[str, ...]


class Order(msgspec.Struct):
    do: str  # expect | forget | verify | read | flip
    grant: Grant | None = None
    manifest: Manifest | None = None
    layer: int = 0
    block: int = 0


class Answer(msgspec.Struct):
    endpoints: dict[str, KVEndpoint] = {}
    refuses: dict[str, bool] = {}
    bad: tuple[tuple[int, int], ...] = ()
    data: str = ""
    error: str = ""


class Peer:
    """The other process, seen from a test."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: str, transports: tuple[str, ...]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kvtransfer.gpu_peer"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.pid = self._process.pid
        self._write(Setup(layout, num_blocks, device, transports))
        self.endpoints = self._answer().endpoints

    def order(self, do: str, **fields: Any) -> Answer:
        self._write(Order(do, **fields))
        return self._answer()

    def run(self, layer: int, block: int) -> bytes:
        return base64.b64decode(self.order("read", layer=layer, block=block).data)

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _write(self, message: Any) -> None:
        self._process.stdin.write(msgspec.json.encode(message) + b"\n")
        self._process.stdin.flush()

    def _answer(self) -> Answer:
        line = self._process.stdout.readline()
        assert line, "the peer's process ended; its errors are above"
        answer = msgspec.json.decode(line, type=Answer)
        assert not answer.error, answer.error
        return answer


def main() -> None:
    import torch

    from kvtransfer.digest import verify
    from kvtransfer.link import make_receivers
    from kvtransfer.pool import KVPool

    def answer(**fields: Any) -> None:
        sys.stdout.buffer.write(msgspec.json.encode(Answer(**fields)) + b"\n")
        sys.stdout.buffer.flush()

    setup = msgspec.json.decode(sys.stdin.buffer.readline(), type=Setup)
    pool = KVPool(setup.layout, setup.num_blocks, setup.device)
    raw = pool.tensor.view(torch.uint8)
    raw.fill_(0xA5)
    if pool.is_on_gpu:
        torch.cuda.synchronize()
    receivers = make_receivers(pool, setup.transports, SECRET, incarnation="D1", stall_timeout_s=3.0)
    answer(endpoints={name: receiver.endpoint() for name, receiver in receivers.items()})
    for line in sys.stdin.buffer:
        order = msgspec.json.decode(line, type=Order)
        try:
            if order.do == "expect":
                for receiver in receivers.values():
                    receiver.expect(order.grant)
                answer()
            elif order.do == "forget":
                answer(refuses={name: receiver.forget(order.grant.grant_id) for name, receiver in receivers.items()})
            elif order.do == "verify":
                answer(bad=tuple(verify(pool, order.grant, order.manifest)))
            elif order.do == "read":
                answer(data=base64.b64encode(raw[order.layer, order.block].cpu().numpy().tobytes()).decode())
            elif order.do == "flip":
                raw[order.layer, order.block, 0, 0, 0, 0] ^= 1
                if pool.is_on_gpu:
                    torch.cuda.synchronize()
                answer()
            else:
                answer(error=f"what is {order.do}?")
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")
    for receiver in receivers.values():
        receiver.close()
    pool.close()


if __name__ == "__main__":
    main()
