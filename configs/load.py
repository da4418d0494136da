"""preset < file < TANDEM_* < flag < --set: one frozen `Config`, and for every value where it came from.

`load` is the door; the command line calls it. Nothing here reads the process's own environment or arguments: they are
given to it, so that a test, a Helm chart's check and a notebook get the same answer.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import yaml

from configs.check import check
from configs.flags import BY_KEY
from configs.lists import Item, Raw, further_models, items_in, items_of, overflow_servers
from configs.schema import AUTO_KEYS, BYTE_KEYS, KEYS, LISTS, REFUSALS, SECRET_KEYS, SECTIONS, Config, Key
from protocol.errors import ConfigError

DEFAULT_PRESET = "general"
ENV_PREFIX = "TANDEM_"
ENV_OTHERS = frozenset({"TANDEM_TRACES", "TANDEM_CRDS", "TANDEM_PRESET", "TANDEM_CONFIG"})  # ours, but not keys
_TRUE, _FALSE, _NONE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}, {"none", "null", "~", ""}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
# Kubernetes writes TANDEM_GATEWAY_PORT=tcp://10.0.0.7:80 into every pod beside a Service called tandem-gateway.
_SERVICE_LINK_NAME = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)$")
_SERVICE_LINK_VALUE = re.compile(r"^(tcp|udp|sctp)://")


class Resolved(msgspec.Struct, frozen=True):
    """A configuration, where each of its values came from (key -> words), and what is worth saying about it."""

    config: Config
    provenance: dict[str, str]
    notes: tuple[str, ...] = ()

    def shown(self, key: str) -> Any:
        """The value as it may be printed: secrets are not."""
        value = self.config.get(key)
        return "********" if key in SECRET_KEYS and value is not None else value

    def rows(self) -> list[tuple[str, Any, str]]:
        """(key, printable value, where it came from), in the order of the schema; of the lists, what was given."""
        rows = [(key, self.shown(key), self.provenance[key]) for key in KEYS]
        for key, origin in self.provenance.items():
            name, *path = key.split(".")
            if name in LISTS:
                value: Any = getattr(self.config, name)[int(path[0])]
                for step in path[1:]:
                    value = getattr(value, step)
                rows.append((key, value, origin))
        return rows


def presets() -> list[str]:
    """Names of the presets that are shipped."""
    folder = resources.files("configs")
    names = (item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))
    return sorted(name for name in names if "." not in name)  # tenants.example.yaml is none


def env_name(key: str) -> str:
    """TANDEM_<SECTION>_<NAME> of a key."""
    return ENV_PREFIX + key.replace(".", "_").upper()


def load(
    preset: str | None = None,
    file: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    also: Sequence[str] = (),
    overflow: Sequence[str] = (),
) -> Resolved:
    """Resolve everything. `flags`: key -> text or value; `sets`: "section.name=value", the last one wins. also, overflow: as
    `configs/lists.py` says; they come after the file's.

    Raises ConfigError that names the key, the value and, for an unknown key, its nearest neighbour.
    """
    env = env or {}
    preset = preset or env.get("TANDEM_PRESET") or DEFAULT_PRESET
    file = file or env.get("TANDEM_CONFIG") or None
    raw: dict[str, Raw] = {}
    lists: dict[str, list[Item]] = {name: [] for name in LISTS}
    raw |= _from_preset(preset)
    if file is not None:
        raw |= _from_file(Path(file), lists)
    lists["also"] += items_of(also, "also")
    lists["overflow"] += items_of(overflow, "overflow")
    raw |= _from_env(env)
    raw |= _from_flags(flags or {})
    raw |= _from_sets(sets)

    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    provenance = {}
    for key, schema in KEYS.items():
        if key in raw:
            value, origin, is_text = raw[key]
            section, name = key.split(".")
            values[section][name] = convert(schema, value, origin, is_text)
            provenance[key] = origin
        else:
            provenance[key] = "default"
    models, origins = further_models(lists["also"], values, convert)
    servers, more_origins = overflow_servers(lists["overflow"])
    provenance |= origins | more_origins
    config = msgspec.convert({**values, "also": models}, Config)
    config = msgspec.structs.replace(config, overflow=tuple(servers))
    check(config)
    return Resolved(config, provenance, _notes(config, provenance))


def convert(key: Key, value: Any, origin: str, is_text: bool) -> Any:
    """One value to its key's type and range, or a ConfigError with key, value, origin and what would be right."""
    if key.optional and (value is None or (is_text and str(value).strip().lower() in _NONE)):
        return None
    parsed = _parse(key, value, is_text)
    problem = "" if parsed is not None else _expected(key)
    if parsed is not None and key.choices and parsed not in key.choices:
        nearest = difflib.get_close_matches(str(parsed), key.choices, 1)
        problem = f"must be one of {', '.join(key.choices)}" + (f"; did you mean {nearest[0]}?" if nearest else "")
    elif parsed is not None and not _in_range(key, parsed):
        problem = _expected(key)
    if key.name == "transfer.verify" and parsed is False:
        problem = "must stay true"
    if problem:
        shown = "********" if key.name in SECRET_KEYS else repr(value)
        reason = f" ({REFUSALS[key.name]})" if key.name in REFUSALS else ""
        raise ConfigError(f"{key.name} = {shown} ({origin}): it {problem}{reason}", param=key.name)
    return parsed


def unknown_key(key: str, origin: str) -> ConfigError:
    """The error for a key that does not exist; it names the nearest one that does."""
    section, _, name = key.partition(".")
    names = list(KEYS)
    found = difflib.get_close_matches(key, names, 1, 0.6)
    if not found:  # the right name under the wrong section, or without one
        by_name = {k.split(".")[1]: k for k in names}
        close = difflib.get_close_matches(name or section, list(by_name), 1, 0.6)
        found = [by_name[close[0]]] if close else []
    hint = f"; did you mean {found[0]}?" if found else f"; the sections are {', '.join(SECTIONS)}, the lists {' and '.join(LISTS)}."
    return ConfigError(f"unknown key {key} ({origin}){hint} `tandem config show` lists every key", param=key)


# ---- text and types --------------------------------------------------------------------------------------------------


def _parse(key: Key, value: Any, is_text: bool) -> Any:
    """The typed value, or None when it is not one."""
    if key.kind == "bool":
        if isinstance(value, bool):
            return value
        text = str(value).strip().lower() if is_text else ""
        return True if text in _TRUE else False if text in _FALSE else None
    if key.kind == "str":
        return value if isinstance(value, str) else None
    if key.name in BYTE_KEYS and isinstance(value, str):
        return num_bytes(value)
    if key.name in AUTO_KEYS and value == "auto":
        return 0
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and is_text:
        try:
            value = int(value, 10) if key.kind == "int" else float(value)
        except ValueError:
            return None
    if key.kind == "int":
        return value if isinstance(value, int) else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def num_bytes(text: str) -> int | None:
    """ "512MiB" or "24GB" or plain digits; None for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    return int(float(found[1]) * _UNITS[found[2] or ""]) if found else None


def _in_range(key: Key, value: Any) -> bool:
    if isinstance(value, str):
        return len(value) >= (key.min_length or 0)
    if isinstance(value, bool):
        return True
    above = (key.ge is None or value >= key.ge) and (key.gt is None or value > key.gt)
    return above and (key.le is None or value <= key.le)


def _expected(key: Key) -> str:
    if key.kind == "str":
        return "must be a non-empty string" if key.min_length else "must be a string"
    kind = {"int": "an integer", "float": "a number", "bool": "true or false"}[key.kind]
    if key.name in BYTE_KEYS:
        kind = "a number of bytes, such as 536870912 or 512MiB"
    if key.name in AUTO_KEYS:
        kind = "auto or an integer"
    return f"must be {kind}" + (f" of {key.range}" if key.range else "") + (", or none" if key.optional else "")


# ---- the five layers -------------------------------------------------------------------------------------------------


def _from_preset(name: str) -> dict[str, Raw]:
    known = presets()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ConfigError(f"no preset is called {name!r}: there are {', '.join(known)}{hint}", param="--preset")
    text = resources.files("configs").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return {key: (value, f"preset {name}", False) for key, (value, _) in _read_yaml(text, f"preset {name}").items()}


def _from_file(path: Path, lists: dict[str, list[Item]]) -> dict[str, Raw]:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"cannot read the configuration file {path}: {reason}", param="--config") from None
    found = _read_yaml(text, f"file {path}")
    for name in LISTS:
        lists[name] += items_in(text, name, str(path))
    return {key: (value, f"file {path}:{line}", False) for key, (value, line) in found.items()}


def _read_yaml(text: str, where: str) -> dict[str, tuple[Any, int]]:
    """key -> (value, line) of a document of the form `section: {name: value}`."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return {}
        found: dict[str, tuple[Any, int]] = {}
        for section, body in _pairs(root, where):
            if section.value in LISTS:
                continue
            if section.value not in SECTIONS:
                raise unknown_key(str(section.value), f"{where}:{section.start_mark.line + 1}")
            if isinstance(body, yaml.ScalarNode) and body.tag == "tag:yaml.org,2002:null":
                continue
            for name, node in _pairs(body, where):
                key, line = f"{section.value}.{name.value}", name.start_mark.line + 1
                if key not in KEYS:
                    raise unknown_key(key, f"{where}:{line}")
                if key in found:
                    raise ConfigError(f"{key} stands twice in {where}: lines {found[key][1]} and {line}", param=key)
                found[key] = (_plain(node), line)
        return found
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ConfigError(f"{where}:{line} is not YAML: {problem}", param="--config") from None


def _pairs(node: yaml.Node, where: str) -> list[tuple[yaml.Node, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{where}:{node.start_mark.line + 1} must be of the form `section:` and, indented below it, `name: value`",
            param="--config",
        )
    return list(node.value)


def _plain(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _from_env(env: Mapping[str, str]) -> dict[str, Raw]:
    by_name = {env_name(key): key for key in KEYS}
    found: dict[str, Raw] = {}
    for name in sorted(env):
        if not name.startswith(ENV_PREFIX) or name in ENV_OTHERS:
            continue
        if _SERVICE_LINK_NAME.search(name) or _SERVICE_LINK_VALUE.match(env[name]):
            continue
        if name in by_name:
            found[by_name[name]] = (env[name], f"env {name}", True)
            continue
        # Other programs may have variables of this prefix; one that looks like a key of ours is a slip.
        nearest = difflib.get_close_matches(name, list(by_name), 1, 0.85)
        if nearest or name.split("_")[1].lower() in SECTIONS:
            hint = nearest or difflib.get_close_matches(name, list(by_name), 1, 0.5)
            did = f"; did you mean {hint[0]}?" if hint else ""
            raise ConfigError(f"unknown environment variable {name}{did}", param=name)
    return found


def _from_flags(flags: Mapping[str, Any]) -> dict[str, Raw]:
    found: dict[str, Raw] = {}
    for key, value in flags.items():
        if key not in KEYS:
            raise unknown_key(key, "flag")
        flag = BY_KEY.get(key)
        name = flag.flag if flag is not None else key
        if flag is not None and flag.negative is not None and value is False:
            name = flag.negative
        origin = "argument MODEL" if key == "model.name" else f"flag {name}"
        found[key] = (value, origin, isinstance(value, str))
    return found


def _from_sets(sets: Iterable[str]) -> dict[str, Raw]:
    found: dict[str, Raw] = {}
    for item in sets:
        key, equals, value = item.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(f"--set {item}: it must be of the form section.name=value", param="--set")
        if key not in KEYS:
            raise unknown_key(key, "--set")
        found[key] = (value.strip(), "--set", True)
    return found


def _notes(config: Config, provenance: Mapping[str, str]) -> tuple[str, ...]:
    """Values that somebody gave and that do nothing here."""
    notes = []

    def given(key: str) -> bool:
        return not provenance[key].startswith(("default", "preset"))

    if config.prefill.replicas == 0:
        notes += [
            f"{key} does nothing with prefill.replicas = 0; decode.{key.split('.')[1]} is the one"
            for key in KEYS
            if key.startswith("prefill.") and key != "prefill.replicas" and given(key)
        ]
        for key in (
            "transfer.transport",
            "transfer.lease_s",
            "transfer.timeout_s",
            "scheduler.disaggregation_threshold",
        ):
            if given(key):
                notes.append(f"{key} does nothing with prefill.replicas = 0")
    if config.model.device == "cpu" and given("model.gpu_memory_utilization"):
        notes.append("model.gpu_memory_utilization does nothing on a CPU; model.kv_cache_bytes sizes the KV pool there")
    if config.model.num_blocks_override is not None and given("model.kv_cache_bytes"):
        notes.append("model.kv_cache_bytes does nothing beside model.num_blocks_override")
    return tuple(notes)
