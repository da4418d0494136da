"""Who may ask for what, and what they were promised: classes and tenants, as one YAML file says it.

`read_tenants` turns the file's text into a frozen `Tenants`, or refuses all of it with line and reason. It is called by `tandem
tenants check`, by `tandem serve` before it starts anything, and by `cluster/tenants_file.py`, which reads the file again when it
changes. The scheduler takes weights, bands, buckets and shares from here, the gateways keys and rights.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import msgspec
import yaml
from msgspec import Meta

from protocol.errors import ConfigError

DEFAULT_TENANT = "default"
DEFAULT_CLASS = "standard"
MAX_TENANTS = 10_000
MAX_CLASSES = 64
MAX_FILE_BYTES = 4 << 20
PARAM = "scheduler.tenants_file"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")

Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Positive = Annotated[float, Meta(gt=0, le=10**9)]
Share = Annotated[float, Meta(gt=0, le=1)]


class SloClass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A promise: seconds to the first token, seconds for each further one, and the share of requests that keep both.

    band: strict priority, 0 first. when_late: what happens to a request whose promise cannot be kept any more and that no
    step of `degrade` helps: "refuse" (429 with a computed Retry-After) or "queue" (serve it late). degrade_*: tried in the order
    model, max_tokens, demotion; each only where it is set and makes the promise (or the other class's) hold again.
    """

    ttft_s: Positive
    tpot_s: Positive
    attainment: Annotated[float, Meta(gt=0, le=0.99999)] = 0.99
    band: Annotated[int, Meta(ge=0, le=15)] = 1
    when_late: Literal["refuse", "queue"] = "refuse"
    degrade_to_class: Name | None = None
    degrade_max_tokens: Annotated[int, Meta(ge=1)] | None = None
    degrade_to_model: Annotated[str, Meta(min_length=1)] | None = None

    @property
    def may_degrade(self) -> bool:
        """Whether an answer of this class may be less than what was asked for."""
        return any(step is not None for step in (self.degrade_to_class, self.degrade_max_tokens, self.degrade_to_model))


class Price(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Money for a million tokens. cached: of prompt tokens from a cache; none: as other prompt tokens."""

    input: Annotated[float, Meta(ge=0, le=10**9)] | None = None
    cached: Annotated[float, Meta(ge=0, le=10**9)] | None = None
    output: Annotated[float, Meta(ge=0, le=10**9)] | None = None


class Tenant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"slo_class": "class"}):
    """One customer. api_keys: SHA-256 of each key in hex. slo_class: of requests that name none; classes: those they may name
    (none: only slo_class). weight: its share of service among tenants that wait. Buckets are None where nothing limits them.
    kv_share, cache_share: of the KV blocks that run for it, of the prefix index that remembers its prompts.
    """

    api_keys: tuple[Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")], ...] = ()
    weight: Positive = 1.0
    slo_class: Name = DEFAULT_CLASS
    classes: tuple[Name, ...] = ()
    requests_per_min: Positive | None = None
    tokens_per_min: Positive | None = None
    kv_share: Share = 1.0
    cache_share: Share = 1.0
    models: tuple[str, ...] | None = None  # None: every model
    price: Price = Price()
    is_operator: bool = False  # its keys open /admin and everybody's figures

    @property
    def allowed_classes(self) -> tuple[str, ...]:
        return (self.slo_class, *(name for name in self.classes if name != self.slo_class))


class Tenants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. A tenant that it does not name is served as `default`."""

    classes: dict[Name, SloClass]
    tenants: dict[Name, Tenant]

    def tenant(self, name: str) -> Tenant:
        return self.tenants.get(name) or self.tenants.get(DEFAULT_TENANT) or Tenant()

    def slo_class(self, name: str) -> SloClass:
        """Of a name that some tenant may use; another's (a file that changed meanwhile) is the first band's last resort: the
        class with the lowest band."""
        found = self.classes.get(name)
        return found if found is not None else max(self.classes.values(), key=lambda one: one.band)


def without_file(ttft_s: float, tpot_s: float, attainment: float) -> Tenants:
    """What holds where no file was given: one class, whose promise is measured and refuses nobody, and one tenant."""
    only = SloClass(ttft_s=ttft_s, tpot_s=tpot_s, attainment=attainment, when_late="queue")
    return Tenants(classes={DEFAULT_CLASS: only}, tenants={DEFAULT_TENANT: Tenant()})


# ---- the file ------------------------------------------------------------------------------------------------------------

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml reads ten times as fast, where PyYAML was built with it
_NAMES = "a-z, 0-9, - and _, beginning with a letter or digit, at most 63 of them"
_NAME_LIST = "a list of names"

# What each field must be, in words. The types themselves are the structs'.
EXPECTED: dict[type, dict[str, str]] = {
    SloClass: {
        "ttft_s": "a number of seconds above 0",
        "tpot_s": "a number of seconds above 0",
        "attainment": "a share above 0 and at most 0.99999",
        "band": "an integer from 0 (served first) to 15",
        "when_late": "refuse or queue",
        "degrade_to_class": "the name of a class",
        "degrade_max_tokens": "an integer of at least 1",
        "degrade_to_model": "the name of a model",
    },
    Tenant: {
        "api_keys": "a list of SHA-256 digests of 64 hex digits (`tandem tenants hash-key` makes them; never the keys themselves)",
        "weight": "a number above 0",
        "class": "the name of a class",
        "classes": _NAME_LIST,
        "requests_per_min": "a number above 0",
        "tokens_per_min": "a number above 0",
        "kv_share": "a share above 0 and at most 1",
        "cache_share": "a share above 0 and at most 1",
        "models": _NAME_LIST,
        "price": "a mapping with input, cached, output",
        "is_operator": "true or false",
    },
    Price: {
        "input": "money for a million tokens, at least 0",
        "cached": "money for a million tokens, at least 0",
        "output": "money for a million tokens, at least 0",
    },
}


class TenantsError(ConfigError):
    """line: where in the file, from 1; 0 where no line is to blame."""

    def __init__(self, source: str, line: int, reason: str) -> None:
        where = f"{source}:{line}" if line else source
        super().__init__(f"tenants file {where}: {reason}", param=PARAM)
        self.line = line
        self.reason = reason


class _Place(NamedTuple):
    """A part of the file while it is read: its path in words, and where errors point."""

    source: str
    path: str

    def refuse(self, node: yaml.Node, reason: str) -> TenantsError:
        text = f"{self.path} {reason}" if self.path else reason
        return TenantsError(self.source, node.start_mark.line + 1, text)

    def below(self, name: str) -> _Place:
        return _Place(self.source, f"{self.path}.{name}" if self.path else name)


def read_file(path: str | Path, reserved: Mapping[str, str] | None = None) -> Tenants:
    """Read and check a file. Raises TenantsError (a ConfigError) with line and reason."""
    return read_tenants(text_of(path), str(path), reserved)


def text_of(path: str | Path) -> str:
    """The text of a file that is not too large. Raises TenantsError."""
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TenantsError(str(path), 0, f"it cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise TenantsError(str(path), 0, f"it has more than {MAX_FILE_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TenantsError(str(path), data.count(b"\n", 0, error.start) + 1, "it is not UTF-8 text") from None


def read_tenants(text: str, source: str, reserved: Mapping[str, str] | None = None) -> Tenants:
    """The whole file, or TenantsError with line and reason. source: its name, for messages.

    reserved: digests of keys that stand for something else already, and for what; no tenant but `default` may have one.
    A file that does not name `default` gets it: with the class `standard` if there is one, else with the class served last.
    """
    if len(text) > MAX_FILE_BYTES:
        raise TenantsError(source, 0, f"it has more than {MAX_FILE_BYTES >> 20} MiB")
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is None:
            raise TenantsError(source, 1, "it is empty; classes and tenants are to stand in it")
        return _tenants(root, _Place(source, ""), reserved or {})
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        line = max(1, min(line, len(text.splitlines())))  # what is missing at the end is told of the last line
        raise TenantsError(source, line, f"it is not YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise TenantsError(source, 1, "it is nested too deeply") from None


def version_of(tenants: Tenants) -> str:
    """Equal for equal contents, whatever the comments and the order of keys in the file."""
    return hashlib.sha256(msgspec.msgpack.encode(tenants, order="deterministic")).hexdigest()[:16]


def hash_key(key: str) -> str:
    """The form in which a key stands in the file."""
    return hashlib.sha256(key.encode()).hexdigest()


# ---- the tree --------------------------------------------------------------------------------------------------------


def _tenants(root: yaml.Node, here: _Place, reserved: Mapping[str, str]) -> Tenants:
    parts = {name: (key, body) for name, key, body in _pairs(root, here, ("classes", "tenants"))}
    if "classes" not in parts:
        raise here.refuse(root, "has no classes: at least one is to say what is promised")
    classes: dict[str, SloClass] = {}
    lines: dict[str, yaml.Node] = {}
    for name, key, body in _named(*parts["classes"], here.below("classes"), MAX_CLASSES):
        classes[name], nodes = _struct(SloClass, key, body, here.below(f"classes.{name}"))
        lines |= {f"{name}.{field}": node for field, node in nodes.items()}
    if not classes:
        raise here.below("classes").refuse(parts["classes"][0], "is empty: at least one class is to say what is promised")
    for name, one in classes.items():
        _check_degrading(name, one, classes, lines, here)
    tenants: dict[str, Tenant] = {}
    owners: dict[str, tuple[str, int]] = {}
    if "tenants" in parts:
        for name, key, body in _named(*parts["tenants"], here.below("tenants"), MAX_TENANTS):
            place = here.below(f"tenants.{name}")
            tenants[name], nodes = _struct(Tenant, key, body, place)
            _check_classes(tenants[name], nodes, key, classes, place)
            _check_keys(name, nodes.get("api_keys"), owners, reserved, place)
    if DEFAULT_TENANT not in tenants:
        last = max(classes, key=lambda name: classes[name].band)
        tenants[DEFAULT_TENANT] = Tenant(slo_class=DEFAULT_CLASS if DEFAULT_CLASS in classes else last)
    return Tenants(classes=classes, tenants=tenants)


def _pairs(node: yaml.Node, here: _Place, known: tuple[str, ...] | None = None) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """(name, its node, what stands there) of a mapping, whose keys are text and stand once."""
    if not isinstance(node, yaml.MappingNode):
        raise here.refuse(node, "must be a mapping: `name:` and, indented below it, what belongs to it")
    seen: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise here.refuse(key, "has a key that is no plain name")
        name, line = key.value, key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            raise here.refuse(key, "uses `<<`: what holds for a tenant is to stand there in full")
        if known is not None and name not in known:
            nearest = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}"
            raise here.refuse(key, f"has the unknown key {_shown(name)}; {hint}")
        if name in seen:
            raise here.refuse(key, f"has {_shown(name)} twice: lines {seen[name]} and {line}")
        seen[name] = line
        yield name, key, value


def _named(key: yaml.Node, body: yaml.Node, here: _Place, most: int) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """The entries of `classes` or `tenants`."""
    if _is_null(body):
        return
    for number, (name, node, value) in enumerate(_pairs(body, here), 1):
        if not NAME.fullmatch(name):
            raise here.refuse(node, f"has the name {_shown(name)}; a name has {_NAMES}")
        if number > most:
            raise here.refuse(node, f"has more than {most} entries")
        yield name, node, value


def _struct(kind: type[Any], key: yaml.Node, body: yaml.Node, here: _Place) -> tuple[Any, dict[str, yaml.Node]]:
    """One struct, field by field, and where each field stands. A field that is null counts as left away."""
    expected, (fields, hints) = EXPECTED[kind], _SHAPES[kind]
    values: dict[str, Any] = {}
    nodes: dict[str, yaml.Node] = {}
    for name, at, value in () if _is_null(body) else _pairs(body, here, tuple(expected)):
        if _is_null(value):
            continue
        nodes[name] = value
        if name == "price":
            values[name], _ = _struct(Price, at, value, here.below(name))
            continue
        plain = _texts(value) if name == "api_keys" else _plain(value, here.below(name))
        try:
            values[fields[name].name] = msgspec.convert(plain, hints[fields[name].name])
        except msgspec.ValidationError:
            blamed = _blamed(value, plain, hints[fields[name].name])
            shown = "" if name == "api_keys" else f"; got {_shown(blamed[1])}"  # somebody may have written the key itself
            raise here.below(name).refuse(blamed[0], f"must be {expected[name]}{shown}") from None
    for field in fields.values():
        if field.required and field.name not in values:
            raise here.refuse(key, f"has no {field.encode_name}: {expected[field.encode_name]}")
    return kind(**values), nodes


def _shape_of(kind: type[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields by their name in the file, types by their name in the struct."""
    return {info.encode_name: info for info in msgspec.structs.fields(kind)}, get_type_hints(kind, include_extras=True)


_SHAPES = {kind: _shape_of(kind) for kind in EXPECTED}


def _blamed(node: yaml.Node, plain: Any, hint: Any) -> tuple[yaml.Node, Any]:
    """The item of a list that does not fit, else the value itself."""
    if isinstance(node, yaml.SequenceNode) and isinstance(plain, list):
        for item, value in zip(node.value, plain, strict=True):
            try:
                msgspec.convert([value], hint)
            except msgspec.ValidationError:
                return item, value
    return node, plain


def _plain(node: yaml.Node, here: _Place) -> Any:
    try:
        value = yaml.constructor.SafeConstructor().construct_object(node, deep=True)
    except (ValueError, OverflowError) as error:  # a date of month 13, a number of too many digits
        raise here.refuse(node, f"cannot be read: {error}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise here.refuse(node, f"must be finite; got {value}")
    return value


def _texts(node: yaml.Node) -> Any:
    """Digests as they are written: one of nothing but digits would be a number."""
    if not isinstance(node, yaml.SequenceNode):
        return None
    return [item.value for item in node.value]


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _shown(value: Any) -> str:
    small = reprlib.Repr()
    small.maxlevel, small.maxstring, small.maxother = 2, 40, 40
    return small.repr(value)


# ---- what no field can tell alone ------------------------------------------------------------------------------------


def _no_class(name: str, classes: Mapping[str, SloClass]) -> str:
    nearest = difflib.get_close_matches(name, classes, 1, 0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(list(classes)[:20])}"
    return f"names the class {name!r}, which does not exist; {hint}"


def _check_classes(tenant: Tenant, nodes: dict[str, yaml.Node], key: yaml.Node, classes: dict[str, SloClass], here: _Place) -> None:
    if tenant.slo_class not in classes:
        raise here.below("class").refuse(nodes.get("class", key), _no_class(tenant.slo_class, classes))
    listed = nodes.get("classes")
    for name, node in zip(tenant.classes, listed.value if isinstance(listed, yaml.SequenceNode) else (), strict=True):
        if name not in classes:
            raise here.below("classes").refuse(node, _no_class(name, classes))


def _check_keys(
    tenant: str, listed: yaml.Node | None, owners: dict[str, tuple[str, int]], reserved: Mapping[str, str], here: _Place
) -> None:
    for node in listed.value if isinstance(listed, yaml.SequenceNode) else ():
        digest, line = node.value, node.start_mark.line + 1
        if digest in owners:
            other, at = owners[digest]
            raise here.below("api_keys").refuse(
                node, f"has a key that is {other}'s already (line {at}): a key stands for one tenant"
            )
        if digest in reserved and tenant != DEFAULT_TENANT:
            raise here.below("api_keys").refuse(node, f"has a key that is {reserved[digest]} already")
        owners[digest] = (tenant, line)


def _check_degrading(
    name: str, one: SloClass, classes: Mapping[str, SloClass], lines: Mapping[str, yaml.Node], here: _Place
) -> None:
    """Down the chain: each class exists, is no tighter and no earlier than the one before, and none comes twice."""
    target = one.degrade_to_class
    if target is None:
        return
    place, node = here.below(f"classes.{name}.degrade_to_class"), lines[f"{name}.degrade_to_class"]
    if target not in classes:
        raise place.refuse(node, _no_class(target, classes))
    chain = [name]
    while target is not None and target in classes:
        chain.append(target)
        if target in chain[:-1]:
            raise place.refuse(node, f"goes round in a circle: {' -> '.join(chain)}")
        target = classes[target].degrade_to_class
    to = classes[chain[1]]
    if to.ttft_s < one.ttft_s or to.tpot_s < one.tpot_s:
        raise place.refuse(node, f"promises more than {name} does, so it helps nobody whose promise cannot be kept")
    if to.band < one.band:
        raise place.refuse(node, f"is served before {name} (band {to.band} before {one.band}): being late would be an advantage")
