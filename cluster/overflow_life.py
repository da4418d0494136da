"""One life of an overflow worker, from its configuration to its end. Knows no Ray: `deployments.py` runs it in a Serve replica,
`local.py` in its own process. No torch is imported here.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable

from api.tokenizer import Tokenizer
from cluster.agent import Agent, new_incarnation
from cluster.orders import Order, OrderedNetwork
from cluster.overflow import OverflowWorker, Settings
from cluster.preflight import max_model_len
from cluster.upstream import OpenAIServer, Upstream
from configs.schema import Config, OverflowConfig
from models.config import read_config
from models.locate import locate
from protocol.errors import ConfigError, Unsupported
from protocol.messages import Leave
from protocol.network import Clock, Network


def model_of(config: Config, server: OverflowConfig) -> Config:
    """The configuration of the model that this server stands in for."""
    return next(one for one in config.each() if server.serves in (None, one.served_name))


def upstream_of(config: Config, server: OverflowConfig) -> OpenAIServer:
    """Raises ConfigError when the key is not in the environment."""
    key = None
    if server.key_env is not None:
        key = os.environ.get(server.key_env)
        if not key:
            raise ConfigError(f"overflow: {server.url} has no key: {server.key_env} is not in the environment")
    one = model_of(config, server)
    tokenizer = Tokenizer(locate(one.model.name, one.model.revision), one.model.chat_template)
    return OpenAIServer(server.url, server.model or one.served_name, tokenizer, key, server.timeout_s)


class OverflowLife:
    """Make it on an event loop, `await start()`; `drain()` and `close()` end it. upstream: an engine of the caller."""

    def __init__(
        self,
        config: Config,
        number: int,
        secret: bytes,
        network: Network,
        find: Callable[[], Awaitable[str]],
        upstream: Upstream | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        server = config.overflow[number]
        one = model_of(config, server)
        allowed = max_model_len(one, read_config(locate(one.model.name, one.model.revision)))
        self.name = f"{one.prefix}overflow:{number}"
        self._config = config
        self._network = OrderedNetwork(network, self._take_order)
        self._find = find
        self._drain_s = config.scheduler.drain_s
        self._leaving: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        settings = Settings(
            incarnation=new_incarnation("overflow", number, one.prefix),
            name=self.name,
            model=one.served_name,
            max_model_len=min(allowed, server.max_len or allowed),
            max_num_seqs=server.max_num_seqs,
            price_per_hour=server.price_per_hour,
        )
        self.worker = OverflowWorker(settings, upstream or upstream_of(config, server), self._network, clock, secret)
        self.agent: Agent | None = None

    async def start(self) -> None:
        """A server that is not there yet is no reason to fail: it is looked for, and gets nothing meanwhile."""
        await self.worker.start()
        self.agent = Agent(self.worker, self.worker.info(), self._network, self._find, self._config.scheduler.heartbeat_s)
        await self.agent.start()

    def _take_order(self, order: Order) -> None:
        if not isinstance(order, Leave):
            raise Unsupported(f"{self.name} is a server elsewhere and has no other role")
        self.leave(order.seconds)

    def leave(self, within_s: float | None = None) -> None:
        """Drain, then end this process. On the event loop."""
        if within_s is not None:
            self._drain_s = max(0.0, min(self._drain_s, within_s * 0.75))
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._leave())

    async def _leave(self) -> None:
        try:
            await self.drain()
            await self.close()
        finally:
            os._exit(0)

    async def drain(self) -> None:
        if self._draining is None:
            self.worker.is_draining = True
            if self.agent is not None:
                self.agent.beat_now()
            self._draining = asyncio.create_task(self.worker.drain(self._drain_s))
        await asyncio.shield(self._draining)

    async def close(self) -> None:
        if self.agent is not None:
            await self.agent.close()
        await self.worker.close()
        await self._network.close()
