"""The one table of command-line flags. A flag is an alias of exactly one key; type, help and choices are the key's own.

vLLM's names where vLLM has them. The command line (`cluster/cli.py`) and the documentation are generated from this
table; a key without a flag is set with `--set section.name=value`, in a file, or as TANDEM_SECTION_NAME.
"""

from __future__ import annotations

from typing import NamedTuple

from configs.schema import KEYS, Key


class Flag(NamedTuple):
    """One row. A boolean key also has the form `--no-...`."""

    key: str
    flag: str
    metavar: str = ""
    also: str = ""  # said after the key's own help

    @property
    def schema(self) -> Key:
        return KEYS[self.key]

    @property
    def type(self) -> str:
        return self.schema.kind

    @property
    def choices(self) -> tuple[str, ...]:
        return self.schema.choices

    @property
    def help(self) -> str:
        return self.schema.help + (f"; {self.also}" if self.also else "")

    @property
    def negative(self) -> str | None:
        return f"--no-{self.flag[2:]}" if self.type == "bool" else None

    @property
    def dest(self) -> str:
        return self.flag[2:].replace("-", "_")


FLAGS: tuple[Flag, ...] = (
    # model
    Flag("model.served_name", "--served-model-name", "NAME"),
    Flag("model.revision", "--revision", "REV"),
    Flag("model.max_len", "--max-model-len", "TOKENS"),
    Flag("model.dtype", "--dtype"),
    Flag("model.device", "--device"),
    Flag("model.block_size", "--block-size", "TOKENS"),
    Flag("model.num_blocks_override", "--num-gpu-blocks-override", "BLOCKS"),
    Flag("model.kv_cache_bytes", "--kv-cache-memory-bytes", "BYTES"),
    Flag("model.host_cache_bytes", "--host-cache-bytes", "BYTES"),
    Flag("model.gpu_memory_utilization", "--gpu-memory-utilization", "SHARE"),
    Flag("model.enable_prefix_caching", "--enable-prefix-caching"),
    Flag("model.seed", "--seed", "N"),
    Flag("model.quantization", "--quantization"),
    Flag("model.cpu_sharing", "--cpu-sharing"),
    Flag("model.chat_template", "--chat-template", "FILE"),
    Flag("model.step_log", "--step-log", "FILE"),
    # pools
    Flag("prefill.replicas", "--prefill", "N"),
    Flag("decode.replicas", "--decode", "N"),
    Flag("prefill.tp", "--prefill-tp", "N"),
    Flag("prefill.pp", "--prefill-pp", "N"),
    Flag("decode.tp", "--decode-tp", "N"),
    Flag("decode.pp", "--decode-pp", "N"),
    Flag("decode.max_num_seqs", "--max-num-seqs", "N"),
    Flag(
        "prefill.max_num_batched_tokens",
        "--max-num-batched-tokens",
        "TOKENS",
        "what a decode worker mixes in is decode.max_num_batched_tokens",
    ),
    Flag("decode.enable_chunked_prefill", "--enable-chunked-prefill"),
    Flag("decode.preemption_mode", "--preemption-mode"),
    Flag("decode.speculative_method", "--speculative-method"),
    Flag("decode.speculative_model", "--speculative-model", "MODEL"),
    Flag("decode.num_speculative_tokens", "--num-speculative-tokens", "TOKENS"),
    Flag("decode.prompt_lookup_max", "--prompt-lookup-max", "TOKENS"),
    Flag("decode.prompt_lookup_min", "--prompt-lookup-min", "TOKENS"),
    # doors
    Flag("gateway.host", "--host", "ADDRESS"),
    Flag("gateway.port", "--port", "PORT"),
    Flag("gateway.api_key", "--api-key", "KEY"),
    # scheduler
    Flag("scheduler.policy", "--scheduling-policy"),
    Flag("scheduler.tenants_file", "--tenants", "FILE"),
    # transfer
    Flag("transfer.transport", "--kv-transport"),
    Flag("transfer.bind_host", "--bind-host", "ADDRESS"),
    Flag("transfer.port_range", "--port-range", "LOW-HIGH"),
)
BY_KEY: dict[str, Flag] = {flag.key: flag for flag in FLAGS}

# Flags of other systems that set what here is two keys, one for each pool, or another unit; the command line names ours instead.
ELSEWHERE: dict[str, str] = {
    "--tensor-parallel-size": "tensor ranks are set for each pool: --prefill-tp and --decode-tp",
    "-tp": "tensor ranks are set for each pool: --prefill-tp and --decode-tp",
    "--pipeline-parallel-size": "pipeline stages are set for each pool: --prefill-pp and --decode-pp",
    "--kv-offloading-size": "evicted prefixes go to host memory with --host-cache-bytes, for example 4GiB, for each worker",
    "--speculative-config": "its parts are options here: --speculative-method ngram or draft, --speculative-model, "
    "--num-speculative-tokens, --prompt-lookup-max, --prompt-lookup-min",
    "--swap-space": "preempted sequences go to host memory with --preemption-mode swap and --host-cache-bytes, for each worker",
    "-pp": "pipeline stages are set for each pool: --prefill-pp and --decode-pp",
}
