"""What no single key of the configuration can tell: keys at odds with each other. Called once everything is resolved."""

from __future__ import annotations

import re

from configs.schema import Config, is_loopback
from protocol.errors import ConfigError


def check(config: Config) -> None:
    """What no single key can tell. Raises ConfigError that names the keys and values at odds."""
    gateway = config.gateway
    if not is_loopback(gateway.host) and not gateway.api_key:
        raise ConfigError(
            f"gateway.host {gateway.host} can be reached from other machines, and there is no gateway.api_key; set "
            "TANDEM_GATEWAY_API_KEY (or --api-key), or listen on 127.0.0.1",
            param="gateway.api_key",
        )
    if gateway.api_key is not None and (not gateway.api_key.strip() or not gateway.api_key.isascii()):
        raise ConfigError("gateway.api_key must be printable ASCII and not blank", param="gateway.api_key")
    labels: dict[str, int] = {}
    for i, one in enumerate(config.each()):
        where = f"also.{i - 1}." if i else ""
        _check_model(one, where)
        if one.label in labels:
            raise ConfigError(
                f"{where}model: another model is called {one.label} already; give one of them another model.served_name",
                param=f"{where}model.served_name",
            )
        labels[one.label] = i
    _check_switch(config)
    _check_ports(config.transfer.port_range)
    names = [one.served_name for one in config.each()]
    for i, server in enumerate(config.overflow):
        if not re.match(r"https?://[^/]+", server.url):
            raise ConfigError(f"overflow.{i}.url {server.url} is not a URL such as http://host:8000/v1", param=f"overflow.{i}.url")
        if server.serves is not None and server.serves not in names:
            raise ConfigError(
                f"overflow.{i}.serves {server.serves} is none of the models here: {', '.join(names)}", param=f"overflow.{i}.serves"
            )


def _check_switch(config: Config) -> None:
    if not config.scheduler.switch_roles:
        return
    for i, one in enumerate(config.each()):
        if max(one.prefill.parallel.num_ranks, one.decode.parallel.num_ranks) > 1:
            raise ConfigError(
                f"scheduler.switch_roles is built for workers of one rank, and {one.served_name} has groups (tp or pp above 1); "
                "switch it off",
                param="scheduler.switch_roles",
            )
        if one.prefill.fewest < one.prefill.most or one.decode.fewest < one.decode.most:
            raise ConfigError(
                f"scheduler.switch_roles and pools that are sized ({'also.' + str(i - 1) + '.' if i else ''}prefill.max_replicas, "
                "decode.max_replicas) would pull at the same workers; use one of them",
                param="scheduler.switch_roles",
            )


def _check_ports(text: str | None) -> None:
    if text is None:
        return
    found = re.fullmatch(r"(\d{1,5})-(\d{1,5})", text)
    if found is None or not 1024 <= int(found[1]) <= int(found[2]) <= 65535:
        raise ConfigError(
            f"transfer.port_range {text!r} is not a range of ports from 1024 to 65535, such as 20000-20999",
            param="transfer.port_range",
        )


def _check_pools(config: Config, where: str) -> None:
    for role in ("prefill", "decode"):
        pool, name = config.pool(role), f"{where}{role}"
        if pool.fewest > pool.replicas:
            raise ConfigError(
                f"{name}.min_replicas {pool.fewest} is above {name}.replicas {pool.replicas}, with which the pool begins",
                param=f"{name}.min_replicas",
            )
        if pool.most < pool.replicas:
            raise ConfigError(
                f"{name}.max_replicas {pool.most} is below {name}.replicas {pool.replicas}, with which the pool begins",
                param=f"{name}.max_replicas",
            )
        if pool.fewest == 0 and (role == "decode" or pool.most):
            raise ConfigError(
                f"{name}.min_replicas is 0; a pool that is sized keeps one worker, by which its load is measured",
                param=f"{name}.min_replicas",
            )


def _check_speculation(config: Config, where: str) -> None:
    decode = config.decode
    if decode.prompt_lookup_min > decode.prompt_lookup_max:
        raise ConfigError(
            f"{where}decode.prompt_lookup_min {decode.prompt_lookup_min} is above decode.prompt_lookup_max "
            f"{decode.prompt_lookup_max}",
            param="decode.prompt_lookup_min",
        )
    if decode.speculative_method == "draft" and decode.speculative_model is None:
        raise ConfigError(
            f"{where}decode.speculative_method draft needs a draft model: --speculative-model DIR",
            param="decode.speculative_model",
        )
    if decode.speculative_method == "ngram" and decode.speculative_model is not None:
        raise ConfigError(
            f"{where}decode.speculative_model {decode.speculative_model} is for decode.speculative_method draft, and that is ngram",
            param="decode.speculative_model",
        )


def _check_model(config: Config, where: str) -> None:
    """One model and its pools. where: before its keys, in messages."""
    _check_pools(config, where)
    decode, model = config.decode, config.model
    if decode.max_num_batched_tokens < decode.max_num_seqs:
        raise ConfigError(
            f"{where}decode.max_num_batched_tokens {decode.max_num_batched_tokens} is below decode.max_num_seqs "
            f"{decode.max_num_seqs}: a step has one token for each sequence; raise the first or lower the second",
            param="decode.max_num_batched_tokens",
        )
    _check_speculation(config, where)
    if decode.preemption_mode == "swap" and decode.parallel.num_ranks > 1:
        raise ConfigError(
            f"{where}decode.preemption_mode swap is built for workers of one rank: the ranks of a group (tp or pp above 1) do not "
            "store and restore together yet; leave it at recompute",
            param="decode.preemption_mode",
        )
    if model.host_cache_bytes:
        if not model.enable_prefix_caching and decode.preemption_mode != "swap":
            raise ConfigError(
                "model.host_cache_bytes keeps prefixes that the prefix cache evicts, and model.enable_prefix_caching is false",
                param="model.host_cache_bytes",
            )
        if max(config.prefill.parallel.num_ranks, decode.parallel.num_ranks) > 1:
            raise ConfigError(
                "model.host_cache_bytes is built for workers of one rank: the ranks of a group (tp or pp above 1) do not store and "
                "restore together yet; leave it at 0",
                param="model.host_cache_bytes",
            )
    whole = not decode.enable_chunked_prefill and model.max_len is not None
    if whole and decode.max_num_batched_tokens < (model.max_len or 0):
        raise ConfigError(
            "decode.enable_chunked_prefill is false, so a prompt must fit into one step: decode.max_num_batched_tokens "
            f"{decode.max_num_batched_tokens} is below model.max_len {model.max_len}",
            param="decode.max_num_batched_tokens",
        )
