"""The two lists of a configuration: `also`, further models, and `overflow`, other servers. As a file and as options say them.

    also:
      - toy                                    --also toy
      - model: {name: /models/llama}           --also /models/llama,decode.replicas=2
        decode: {replicas: 2}
    overflow:
      - {url: "http://gpu:8000/v1", model: m}  --overflow http://gpu:8000/v1,model=m

Called by `load.py` only, which knows how one value is parsed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import yaml

from configs.schema import INHERITED, KEYS, Key, OverflowConfig
from protocol.errors import ConfigError

Raw = tuple[Any, str, bool]  # value, where it came from, whether it is text still to be parsed
Item = dict[str, Raw]
Convert = Callable[[Key, Any, str, bool], Any]
POOL_SECTIONS = ("model", "prefill", "decode")


def items_in(text: str, name: str, where: str) -> list[Item]:
    """The entries of the list `name` of a YAML document. Raises ConfigError with the line."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return []
    found: list[Item] = []
    for key, body in root.value:
        if key.value != name or body.tag == "tag:yaml.org,2002:null":
            continue
        if not isinstance(body, yaml.SequenceNode):
            raise ConfigError(f"{where}:{key.start_mark.line + 1}: {name} is a list: entries begin with `- `", param=name)
        found += [_item(node, name, where) for node in body.value]
    return found


def _item(node: yaml.Node, name: str, where: str) -> Item:
    line = f"file {where}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.ScalarNode):
        return {"model.name" if name == "also" else "url": (str(node.value), line, False)}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{line}: an entry of {name} is a name, or `key: value` pairs", param=name)
    item: Item = {}
    for key, body in node.value:
        here = f"{where}:{key.start_mark.line + 1}"
        if name == "also" and isinstance(body, yaml.MappingNode):
            pairs = [(f"{key.value}.{inner.value}", value, f"{where}:{inner.start_mark.line + 1}") for inner, value in body.value]
        else:
            pairs = [(str(key.value), body, here)]
        for full, value, place in pairs:
            loader = yaml.SafeLoader("")
            try:
                item[full] = (loader.construct_object(value, deep=True), f"file {place}", False)
            finally:
                loader.dispose()
    return item


def items_of(options: Iterable[str], name: str) -> list[Item]:
    """The same of `--also MODEL,key=value` and `--overflow URL,key=value`."""
    flag = f"--{name}"
    found: list[Item] = []
    for option in options:
        first, *pairs = (part.strip() for part in option.split(","))
        item: Item = {"model.name" if name == "also" else "url": (first, f"flag {flag}", name != "also")}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals:
                form = "MODEL,section.name=value" if name == "also" else "URL,name=value"
                raise ConfigError(f"{flag} {option}: {pair!r} is not of the form {form}", param=flag)
            item[key.strip()] = (value.strip(), f"flag {flag}", True)
        found.append(item)
    return found


def further_models(
    items: list[Item], first: Mapping[str, Mapping[str, Any]], convert: Convert
) -> tuple[list[dict[str, dict[str, Any]]], dict[str, str]]:
    """(each model's sections, where each value came from). first: the first model's sections, for what is inherited."""
    models, provenance = [], {}
    for i, item in enumerate(items):
        sections: dict[str, dict[str, Any]] = {
            section: {name: value for name, value in first[section].items() if f"{section}.{name}" in INHERITED}
            for section in POOL_SECTIONS
        }
        for key, (value, origin, is_text) in item.items():
            section, _, name = key.partition(".")
            if section not in POOL_SECTIONS or key not in KEYS:
                known = [known for known in KEYS if known.split(".")[0] in POOL_SECTIONS]
                raise _unknown(f"also.{i}.{key}", origin, [f"also.{i}.{known}" for known in known])
            try:
                sections[section][name] = convert(KEYS[key], value, origin, is_text)
            except ConfigError as error:
                raise ConfigError(f"also.{i}.{error.message}", param=f"also.{i}.{key}") from None
            provenance[f"also.{i}.{key}"] = origin
        if not sections["model"].get("name"):
            raise ConfigError(f"also.{i} names no model: model.name is missing", param=f"also.{i}.model.name")
        models.append(sections)
    return models, provenance


def overflow_servers(items: list[Item]) -> tuple[list[OverflowConfig], dict[str, str]]:
    servers, provenance = [], {}
    known = OverflowConfig.__struct_fields__
    for i, item in enumerate(items):
        for key, (_, origin, _) in item.items():
            if key not in known:
                raise _unknown(f"overflow.{i}.{key}", origin, [f"overflow.{i}.{name}" for name in known])
            provenance[f"overflow.{i}.{key}"] = origin
        is_text = any(raw[2] for raw in item.values())
        try:
            servers.append(msgspec.convert({key: raw[0] for key, raw in item.items()}, OverflowConfig, strict=not is_text))
        except msgspec.ValidationError as error:
            raise ConfigError(f"overflow.{i} ({next(iter(item.values()))[1]}): {error}", param=f"overflow.{i}") from None
    return servers, provenance


def _unknown(key: str, origin: str, known: list[str]) -> ConfigError:
    nearest = difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return ConfigError(f"unknown key {key} ({origin}){hint}", param=key)
