"""Every key there is: one frozen struct per section, its type, its range and what it does in one sentence.

A key is named `section.name`. Defaults stand here; the presets (`*.yaml`) say only where they differ from each other.
Nothing else describes a key: the command line, `tandem config show` and the messages of errors are derived from this.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from protocol.parallel import Parallel

SECRET_KEYS = frozenset({"gateway.api_key"})  # never printed
# These also take "512MiB".
BYTE_KEYS = frozenset({"model.kv_cache_bytes", "model.host_cache_bytes", "gateway.max_body_bytes", "scheduler.max_queue_bytes"})
AUTO_KEYS = frozenset({"prefill.max_num_batched_tokens", "decode.max_num_batched_tokens"})  # these take "auto", which is 0
MAX_AUTO_TOKENS = 2048  # of a step whose size is left to its worker

Count = Annotated[int, Meta(ge=1, le=2**24)]
GroupSize = Annotated[int, Meta(ge=1, le=256)]
CountOrAuto = Annotated[int, Meta(ge=0, le=2**24)]
Bytes = Annotated[int, Meta(ge=1024, le=2**50)]
Price = Annotated[float, Meta(ge=0, le=10**9)]
Seconds = Annotated[float, Meta(gt=0, le=10**7)]
Text = Annotated[str, Meta(min_length=1)]


def says(text: str) -> Meta:
    """What a key does, in one sentence."""
    return Meta(description=text)


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is served, and the KV pool of each worker."""

    name: Annotated[Text, says('"bundled", "toy", a directory, a hub id, or "modelscope:ID"')] = "bundled"
    served_name: Annotated[str | None, says("the name clients use; none: the model's own")] = None
    revision: Annotated[str | None, says("branch, tag or commit of a hub model")] = None
    max_len: Annotated[Count | None, says("tokens of prompt and output together; none: what the model allows")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        says("of weights and KV; auto: float32 on a CPU, else what the checkpoint has"),
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], says("where workers compute")] = "auto"
    block_size: Annotated[CountOrAuto, says("tokens in a KV block; 0: 16 on a GPU, larger on a CPU")] = 0
    num_blocks_override: Annotated[Count | None, says("KV blocks of each worker, instead of what fits")] = None
    kv_cache_bytes: Annotated[int, Meta(ge=0, le=2**50), says("KV pool of each worker on a CPU; 0: a share of free memory")] = 0
    host_cache_bytes: Annotated[
        int, Meta(ge=0, le=2**50), says("host memory of each worker for prefix KV that its pool evicts; 0: none")
    ] = 0
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1), says("share of a GPU's memory that a worker may fill")] = 0.9
    enable_prefix_caching: Annotated[bool, says("keep KV of finished prompts and reuse equal prefixes")] = True
    seed: Annotated[
        Annotated[int, Meta(ge=0, le=2**63 - 1)] | None,
        says("seeds of requests without one are drawn from it, in their order at each gateway; none: at random"),
    ] = None
    quantization: Annotated[
        Literal["auto", "none", "int8", "int4"],
        says("weights as they are loaded: int8 or int4 with sums in float32, none: floats, auto: as the checkpoint is"),
    ] = "auto"
    step_log: Annotated[
        str | None, says("a line of JSON for each step goes to FILE.WORKER, as steps.decode-0.jsonl for steps.jsonl")
    ] = None
    cpu_sharing: Annotated[
        Literal["lend", "shared", "pinned"],
        says(
            "how workers on one host share its cores: each has its share and borrows idle ones; each uses all of them; each is "
            "kept on its share"
        ),
    ] = "pinned"
    chat_template: Annotated[str | None, says("a Jinja file, instead of the model's own template")] = None


class PrefillConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The prefill pool."""

    min_replicas: Annotated[
        CountOrAuto | None, says("fewest prefill workers when pools are sized to their load; none: replicas")
    ] = None
    max_replicas: Annotated[CountOrAuto | None, says("most of them; none: replicas, so the pool keeps its size")] = None
    price_per_hour: Annotated[Price, says("money for an hour of a prefill worker")] = 0.0
    is_spot: Annotated[bool, says("prefill workers may be taken away at short notice")] = False
    replicas: Annotated[CountOrAuto, says("prefill workers; 0: decode workers prefill for themselves")] = 1
    max_num_batched_tokens: Annotated[
        CountOrAuto, says("prompt tokens in one prefill step; auto (or 0): as many as keep it below the strictest TPOT promise")
    ] = 512
    max_num_seqs: Annotated[Count, says("prompts in one prefill step")] = 16
    tp: Annotated[GroupSize, says("tensor ranks of a prefill worker: so many processes share each layer's heads")] = 1
    pp: Annotated[GroupSize, says("pipeline stages of a prefill worker: so many groups of tensor ranks share the layers")] = 1
    num_threads: Annotated[CountOrAuto, says("CPU threads of each rank of a prefill worker; 0: its share of the cores")] = 0

    @property
    def parallel(self) -> Parallel:
        return Parallel(self.tp, self.pp)

    @property
    def fewest(self) -> int:
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def most(self) -> int:
        return self.replicas if self.max_replicas is None else self.max_replicas


class DecodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The decode pool."""

    min_replicas: Annotated[
        CountOrAuto | None, says("fewest decode workers when pools are sized to their load; none: replicas")
    ] = None
    max_replicas: Annotated[CountOrAuto | None, says("most of them; none: replicas, so the pool keeps its size")] = None
    price_per_hour: Annotated[Price, says("money for an hour of a decode worker")] = 0.0
    is_spot: Annotated[bool, says("decode workers may be taken away at short notice")] = False
    replicas: Annotated[Count, says("decode workers")] = 1
    max_num_seqs: Annotated[Count, says("sequences in one decode step")] = 64
    max_num_batched_tokens: Annotated[
        CountOrAuto, says("tokens in one decode step, prompts it prefills itself included; auto (or 0): as for prefill")
    ] = 256
    enable_chunked_prefill: Annotated[bool, says("a decode worker prefills in pieces, between others' tokens")] = True
    preemption_mode: Annotated[
        Literal["recompute", "swap"],
        says(
            "the KV of a sequence that gives up its blocks; swap: host memory keeps it, model.host_cache_bytes or, where that is "
            "0, as much as the pool but 4 GiB at most"
        ),
    ] = "recompute"
    speculative_method: Annotated[
        Literal["ngram", "draft"] | None,
        says("who guesses tokens that a step then verifies; ngram: the text; draft: speculative_model, which implies it"),
    ] = None
    speculative_model: Annotated[
        str | None, says("the draft model, beside each decode worker: a directory or a hub id, of the same tokenizer")
    ] = None
    num_speculative_tokens: Annotated[int, Meta(ge=1, le=32), says("the most tokens that are guessed at once")] = 4
    prompt_lookup_max: Annotated[int, Meta(ge=1, le=64), says("ngram: as many of the last tokens are looked for")] = 4
    prompt_lookup_min: Annotated[int, Meta(ge=1, le=64), says("ngram: with fewer of them found nothing is guessed")] = 2
    adapt_speculation: Annotated[bool, says("guess only as far as it was measured to pay; false: always all of them")] = True
    without: Annotated[
        Literal["nothing", "continuous-batching", "paging"],
        says("for `bench ablate`: a batch runs to its end before another begins, or a sequence holds blocks for model.max_len"),
    ] = "nothing"
    tp: Annotated[GroupSize, says("tensor ranks of a decode worker: so many processes share each layer's heads")] = 1
    pp: Annotated[GroupSize, says("pipeline stages of a decode worker: so many groups of tensor ranks share the layers")] = 1
    num_threads: Annotated[CountOrAuto, says("CPU threads of each rank of a decode worker; 0: its share of the cores")] = 0

    @property
    def speculation(self) -> str | None:
        """The method in force: a draft model alone says what it is for."""
        return "draft" if self.speculative_method is None and self.speculative_model is not None else self.speculative_method

    @property
    def parallel(self) -> Parallel:
        return Parallel(self.tp, self.pp)

    @property
    def fewest(self) -> int:
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def most(self) -> int:
        return self.replicas if self.max_replicas is None else self.max_replicas


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP door and its deadlines."""

    host: Annotated[Text, says("address to listen on; beyond loopback only with gateway.api_key")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535), says("port of the OpenAI-compatible endpoint")] = 8000
    replicas: Annotated[Count, says("gateway processes")] = 1
    api_key: Annotated[str | None, says("clients send it as bearer token; in TANDEM_GATEWAY_API_KEY `ps` cannot see it")] = None
    max_body_bytes: Annotated[Bytes, says("largest HTTP body")] = 32 * 2**20
    request_timeout_s: Annotated[Seconds, says("a request, door to door, then 504")] = 3600.0
    keep_alive_s: Annotated[Seconds, says("an idle HTTP connection stays open")] = 30.0
    prefill_timeout_s: Annotated[Seconds, says("reservation to first token, then another attempt")] = 300.0
    token_timeout_s: Annotated[Seconds, says("silence between two tokens, then another attempt")] = 60.0
    recovery_timeout_s: Annotated[Seconds, says("how long to look for a scheduler that comes back")] = 30.0
    timelines: Annotated[bool, says("keep the marks of every request, for `tandem trace` and the dashboard")] = True
    ray_metrics: Annotated[bool, says("tell of requests through ray.util.metrics too, as Ray's Serve LLM dashboard reads them")] = (
        False
    )
    otlp_endpoint: Annotated[
        str | None, says("where spans go, OTLP over HTTP; none: as OTEL_EXPORTER_OTLP_ENDPOINT says, or nowhere")
    ] = None


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Order, admission, placement, liveness, and the promise."""

    policy: Annotated[
        Literal["fcfs", "priority", "fair", "slo"],
        says("order of the queue: arrival; bands; bands, then tenants' fair shares; the same, then deadlines that can be kept"),
    ] = "slo"
    admission: Annotated[
        bool, says("promises, buckets and retries may refuse a request; false, for `bench ablate`: only full queues do")
    ] = True
    tenants_file: Annotated[str | None, says("YAML with classes and tenants, read again when it changes; none: one of each")] = None
    max_queue_requests: Annotated[Count, says("waiting requests, then 429 or 503")] = 1024
    max_queue_tokens: Annotated[int, Meta(ge=1, le=10**12), says("prompt tokens waiting, then 429 or 503")] = 4_000_000
    max_queue_bytes: Annotated[Bytes, says("memory of what waits, then 429 or 503")] = 256 * 2**20
    queue_timeout_s: Annotated[Seconds, says("a request waits so long to be placed, then 504")] = 300.0
    disaggregation_threshold: Annotated[
        CountOrAuto, says("a prompt with fewer uncached tokens is prefilled by its decode worker")
    ] = 16
    heartbeat_s: Annotated[float, Meta(gt=0, le=60), says("period of the workers' heartbeats")] = 1.0
    heartbeat_misses: Annotated[int, Meta(ge=2, le=1000), says("missed heartbeats, then a worker counts as dead")] = 3
    recovery_s: Annotated[Seconds, says("requests wait so long for a worker while none is alive, then 503")] = 60.0
    drain_s: Annotated[
        Seconds, says("a worker that is to go lets its requests end for so long; what still runs then goes on elsewhere")
    ] = 20.0
    ttft_target_s: Annotated[Seconds, says("the promise: time to first token")] = 2.0
    tpot_target_s: Annotated[Seconds, says("the promise: time per output token; decode workers are filled up to it")] = 0.2
    retry_budget: Annotated[
        float, Meta(ge=0, le=1), says("share of admitted requests that may be clients' own retries while requests are refused")
    ] = 0.2
    max_deflected_share: Annotated[
        float, Meta(ge=0, le=1), says("share of a decode worker's step time that prompts deflected to it may take; 0: none are")
    ] = 0.5
    max_decisions: Annotated[Count, says("decisions kept for `tandem explain`")] = 10_000
    scale_up_s: Annotated[Seconds, says("a sized pool grows when it has been short for so long")] = 5.0
    scale_down_s: Annotated[Seconds, says("a sized pool shrinks to the most it needed within so long")] = 120.0
    switch_roles: Annotated[bool, says("let a worker change its role when one pool is short for long and the other is not")] = False
    switch_cooldown_s: Annotated[Seconds, says("between two changes of roles")] = 60.0
    attainment_target: Annotated[float, Meta(gt=0, le=0.99999), says("the promise: share of requests that keep both times")] = 0.99
    input_price: Annotated[Price | None, says("money for a million prompt tokens, in SLA reports; none: no cost is shown")] = None
    cached_price: Annotated[Price | None, says("the same for prompt tokens from a cache; none: as others")] = None
    output_price: Annotated[Price | None, says("money for a million output tokens, in SLA reports")] = None


class TransferConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How KV travels from prefill to decode."""

    transport: Annotated[
        Literal["auto", "shm", "tcp", "cuda_ipc", "nccl"],
        says("auto: shm (GPUs: cuda_ipc) on one host, tcp (GPUs: nccl, then tcp) between hosts"),
    ] = "auto"
    lease_s: Annotated[Seconds, says("decode holds reserved blocks so long for a prefill")] = 30.0
    timeout_s: Annotated[Seconds, says("one transfer, from its last block computed to verified")] = 30.0
    bind_host: Annotated[
        Text, says("address of KV and control sockets, or a network (10.0.0.0/16) or interface in which each host has one")
    ] = "127.0.0.1"
    port_range: Annotated[
        str | None, says("ports of KV and control sockets, as 20000-20999, for firewalls; none: any free ones")
    ] = None
    verify: Annotated[Literal[True], says("check every block's digest before decode reads it")] = True


class AlsoConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A further model on the same cluster, with pools of its own. What it does not say is as for the first, where `INHERITED` has
    it."""

    model: ModelConfig
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()


class OverflowConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An OpenAI-compatible server (vLLM, SGLang, Ollama...) that takes what this cluster's own workers cannot take in time."""

    url: Annotated[Text, says("up to and with /v1, as OpenAI clients take it")]
    model: Annotated[str | None, says("its name there; none: as here")] = None
    serves: Annotated[str | None, says("which of the models here it stands in for; none: the first")] = None
    key_env: Annotated[str | None, says("the environment variable that holds its API key, on every machine")] = None
    max_num_seqs: Annotated[Count, says("requests that it is given at once")] = 8
    max_len: Annotated[Count | None, says("tokens of prompt and output together; none: as here")] = None
    price_per_hour: Annotated[Price, says("money for an hour of it")] = 0.0
    timeout_s: Annotated[Seconds, says("silence of it, then the request is tried elsewhere")] = 30.0


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be set. Frozen; sent to every process as it is.

    A process that serves one of several models gets `each()`'s configuration of it: that model's sections stand first, and the
    others in `also`, because all of them share the machine.
    """

    model: ModelConfig = ModelConfig()
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()
    gateway: GatewayConfig = GatewayConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    transfer: TransferConfig = TransferConfig()
    also: tuple[AlsoConfig, ...] = ()
    overflow: tuple[OverflowConfig, ...] = ()

    def get(self, key: str) -> Any:
        """The value of `section.name`."""
        section, name = key.split(".")
        return getattr(getattr(self, section), name)

    def parallel(self, role: str) -> Parallel:
        """The sizes of the group of ranks that one worker of this role is."""
        return self.decode.parallel if role == "decode" else self.prefill.parallel

    # ---- models and pools ----

    def each(self) -> tuple[Config, ...]:
        """One configuration for each model, the first one's first."""
        if not self.also:
            return (self,)
        mine = AlsoConfig(model=self.model, prefill=self.prefill, decode=self.decode)
        everybody = (mine, *self.also)
        return tuple(
            msgspec.structs.replace(
                self, model=one.model, prefill=one.prefill, decode=one.decode, also=everybody[:i] + everybody[i + 1 :]
            )
            for i, one in enumerate(everybody)
        )

    @property
    def served_name(self) -> str:
        """What clients call this model, and what its workers register."""
        return self.model.served_name or self.model.name

    @property
    def label(self) -> str:
        """The same, short enough for names of workers and deployments."""
        return label_of(self.model)

    @property
    def prefix(self) -> str:
        """Before the names of this model's workers; nothing where there is one model."""
        return f"{self.label}/" if self.also else ""

    def pool(self, role: str) -> PrefillConfig | DecodeConfig:
        return self.decode if role == "decode" else self.prefill

    @property
    def roles(self) -> tuple[str, ...]:
        """Those of this model that have a worker, now or when the pool grows."""
        return ("decode", "prefill") if self.prefill.most else ("decode",)

    @property
    def is_sized(self) -> bool:
        """Some pool of some model follows its load."""
        return any(pool.fewest < pool.most for one in self.each() for pool in (one.prefill, one.decode))

    @property
    def num_workers(self) -> int:
        """Of all models, when every pool is as large as it may be: so many share the machine."""
        return self.prefill.most + self.decode.most + sum(one.prefill.most + one.decode.most for one in self.also)

    @property
    def num_ranks(self) -> int:
        """Processes of all those workers."""
        pools = [(self.prefill, self.decode), *((one.prefill, one.decode) for one in self.also)]
        return sum(pool.most * pool.parallel.num_ranks for pair in pools for pool in pair)


def label_of(model: ModelConfig) -> str:
    name = (model.served_name or model.name).rstrip("/").rsplit("/", 1)[-1].removeprefix("modelscope:")
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name)[:32].strip("-") or "model"


# Keys of a further model that are as the first one's where it does not say otherwise: what the machine and its owner are like, not
# what the model is or how large its pools are.
INHERITED = frozenset(
    {
        *(f"model.{name}" for name in ("device", "block_size", "kv_cache_bytes", "host_cache_bytes", "gpu_memory_utilization")),
        "model.cpu_sharing",
        *(f"model.{name}" for name in ("enable_prefix_caching", "seed")),
        *(f"{role}.{name}" for role in ("prefill", "decode") for name in ("max_num_batched_tokens", "max_num_seqs")),
        *(f"{role}.{name}" for role in ("prefill", "decode") for name in ("num_threads", "price_per_hour", "is_spot")),
        "decode.enable_chunked_prefill",
        "decode.preemption_mode",
    }
)


def with_inherited(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The raw document of a configuration, its further models filled up from the first."""
    also = []
    for one in raw.get("also") or ():
        if not isinstance(one, dict):
            return dict(raw)  # whoever converts it says what is wrong
        filled = dict(one)
        for section in ("model", "prefill", "decode"):
            first, own = raw.get(section) or {}, one.get(section) or {}
            filled[section] = {name: value for name, value in first.items() if f"{section}.{name}" in INHERITED} | own
        also.append(filled)
    return {**raw, "also": also} if also else dict(raw)


# Known values of other systems that are refused with a reason rather than a list of choices.
REFUSALS = {
    "model.quantization": "int8 and int4 are made at load, GPTQ and AWQ checkpoints are recognised by themselves; others are not "
    "built yet",
    "transfer.verify": "KV that nobody verified is never read, so this cannot be switched off",
}


class Key(msgspec.Struct, frozen=True):
    """One key as the command line and the documentation see it. kind: "int" | "float" | "str" | "bool"."""

    name: str
    kind: str
    optional: bool
    choices: tuple[str, ...]
    help: str
    default: Any
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    min_length: int | None = None

    @property
    def range(self) -> str:
        """In words, for messages; empty where anything goes."""
        low = f"at least {self.ge:,}" if self.ge is not None else f"above {self.gt:,}" if self.gt is not None else ""
        high = f"at most {self.le:,}" if self.le is not None else ""
        return " and ".join(part for part in (low, high) if part)


_KINDS: dict[Any, str] = {
    msgspec.inspect.IntType: "int",
    msgspec.inspect.FloatType: "float",
    msgspec.inspect.StrType: "str",
    msgspec.inspect.BoolType: "bool",
}


def _describe(section: str, field: msgspec.inspect.Field) -> Key:
    kind: Any = field.type
    text = ""
    while isinstance(kind, msgspec.inspect.Metadata):
        text = text or (kind.extra_json_schema or {}).get("description", "")
        kind = kind.type
    optional = False
    if isinstance(kind, msgspec.inspect.UnionType):
        optional = True
        kind = next(t for t in kind.types if not isinstance(t, msgspec.inspect.NoneType))
    if isinstance(kind, msgspec.inspect.LiteralType):
        is_bool = all(isinstance(v, bool) for v in kind.values)
        choices = () if is_bool else tuple(str(v) for v in kind.values)
        return Key(f"{section}.{field.name}", "bool" if is_bool else "str", optional, choices, text, field.default)
    return Key(
        f"{section}.{field.name}",
        _KINDS[type(kind)],
        optional,
        (),
        text,
        field.default,
        ge=getattr(kind, "ge", None),
        gt=getattr(kind, "gt", None),
        le=getattr(kind, "le", None),
        min_length=getattr(kind, "min_length", None),
    )


def _all_keys() -> dict[str, Key]:
    keys: dict[str, Key] = {}
    root: Any = msgspec.inspect.type_info(Config)
    for section in root.fields:
        if section.name in LISTS:
            continue
        for field in section.type.fields:
            key = _describe(section.name, field)
            keys[key.name] = key
    return keys


LISTS = ("also", "overflow")  # of the document: not sections with keys, but lists
KEYS: dict[str, Key] = _all_keys()
SECTIONS: tuple[str, ...] = tuple(name for name in Config.__struct_fields__ if name not in LISTS)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it. A name other than localhost may resolve to anything, so it is not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
