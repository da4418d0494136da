"""Who may ask for what, and what they were promised: classes and tenants, as one YAML file says it.

Frozen and pure: `read_tenants` turns the file's text into `Tenants` or refuses it with line and reason; who reads the file again
when it changes is `cluster/`'s. The scheduler takes weights, bands, buckets and shares from here, the gateways keys and rights.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

DEFAULT_TENANT = "default"
DEFAULT_CLASS = "standard"
MAX_TENANTS = 10_000

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
