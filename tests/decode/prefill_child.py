"""A prefill worker on the toy model in a process of its own, slow enough to be killed in the middle. Run by test_killed.py."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from cluster.wire import SocketNetwork
from engine.blocks import BlockPool
from engine.runner import ModelRunner
from kvtransfer.group import Connector
from kvtransfer.pool import KVPool
from kvtransfer.process import boot_id, start_ticks
from models.load import load_model
from prefill.worker import PrefillWorker, Settings

SECRET = b"the cluster's secret"
BLOCK_SIZE, CHUNK = 8, 16


async def main(incarnation: str, transports: tuple[str, ...], step_s: float) -> None:
    loop = asyncio.get_running_loop()
    loaded = load_model("toy")
    layout = loaded.kv_layout(BLOCK_SIZE)
    kv = KVPool(layout, 64)
    runner = ModelRunner(loaded, kv.tensor, layout)
    run = runner.run

    def slow(*args, **kwargs):
        time.sleep(step_s)
        return run(*args, **kwargs)

    runner.run = slow  # type: ignore[method-assign]
    network = SocketNetwork(incarnation, SECRET)
    engine = ThreadPoolExecutor(1, "engine")
    settings = Settings(
        incarnation=incarnation,
        layout=layout,
        max_model_len=512,
        transports=transports,
        boot_id=boot_id(),
        pid=os.getpid(),
        start_ticks=start_ticks(),
        max_num_batched_tokens=CHUNK,
    )
    worker = PrefillWorker(
        settings,
        runner,
        BlockPool(64, BLOCK_SIZE),
        Connector(kv, SECRET, incarnation),
        network,
        time.monotonic,
        lambda function: loop.run_in_executor(engine, function),
        SECRET,
    )
    await worker.start()
    print(network.address, flush=True)

    async def tick() -> None:
        while True:
            await asyncio.sleep(0.25)
            worker.tick()

    await asyncio.gather(worker.run(), tick())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], tuple(sys.argv[2].split(",")), float(sys.argv[3])))
