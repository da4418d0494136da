"""The `tandem` command. Quick and light: it parses, checks and explains; torch and Ray are imported by what it calls, late.

The options are generated from `configs/flags.py`, one table. Entry points: `tandem` (console script) and
`python -m cluster`. Exit status: 0 well, 1 it failed, 2 what was asked for is wrong.
"""

from __future__ import annotations

import argparse
import difflib
import getpass
import json
import os
import re
import runpy
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

from cluster.beforehand import check_nothing_shadows, check_port, url_of
from configs.flags import ELSEWHERE, FLAGS, Flag
from configs.load import Resolved, load, presets
from protocol.errors import ConfigError, TandemError
from protocol.parallel import Parallel

MIN_KEY_LEN = 16
SIMULATED = {
    "simulate": "One trace, two pools, one policy, in virtual time.",
    "calibrate": "A cost file for simulate and plan, fitted to a running cluster.",
    "plan": "Pool sizes, parallel sizes and threshold for a trace and a promise, by simulation.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Never raises for what a user can get wrong: one sentence on stderr and a status."""
    try:
        words = sys.argv[1:] if argv is None else list(argv)
        if words[:1] == ["bench"]:
            return run_bench(words[1:])
        if words and words[0] in SIMULATED:
            return run_simulation(words)
        parser = build_parser()
        args, unknown = parser.parse_known_args(words)
        if unknown:
            raise _unknown_option(unknown[0], args.command)
        if args.run is None:
            parser.print_help()
            return 2
        return int(args.run(args))
    except ConfigError as error:
        print(f"tandem: {error.message}", file=sys.stderr)
        return 2
    except TandemError as error:
        print(f"tandem: {error.message}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # tandem config show | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


# ---- options ---------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse's own way would be a page of usage, then what is wrong."""

    def error(self, message: str) -> NoReturn:
        found = re.match(r"argument COMMAND: invalid choice: '(.*)' \(choose from (.*)\)", message)
        if found is not None:
            nearest = difflib.get_close_matches(found[1], re.findall(r"\w+", found[2]), 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {found[2]}".replace("'", "")
            raise ConfigError(f"unknown command {found[1]}; {hint}")
        raise ConfigError(f"{message}; `{self.prog} --help` says more")


def build_parser() -> argparse.ArgumentParser:
    """All commands there are. What is not built is not listed."""
    parser = _Parser(
        prog="tandem",
        description="Serve a language model with prefill and decode on separate workers.",
        epilog="`tandem serve` alone serves the bundled model. `tandem COMMAND --help` says more.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=None, command=None)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")

    def command(name: str, run: Any, text: str, into: Any = commands) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = into.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(run=run, command=name)
        return made

    serve = command("serve", run_serve, "Start a cluster on this machine with an OpenAI-compatible endpoint.")
    _add_options(serve)
    deploy = command("deploy", run_deploy, "The same on a Ray cluster that is up already.")
    deploy.add_argument("--print", dest="only_print", action="store_true", help="only print the file that `serve deploy` takes")
    _add_options(deploy)
    up = command("up", run_up, "A cluster on several machines, by Ray's launcher: checks, starts, deploys.")
    up.add_argument("file", metavar="FILE", help="a cluster file, such as the repository's configs/ray/on-premises.yaml")
    up.add_argument("--check", action="store_true", help="only say what is in the way")
    _add_options(up)
    down = command("down", run_down, "The end of it: what runs may end, then every machine's Ray stops.")
    down.add_argument("file", metavar="FILE", help="the cluster file")
    config = command("config", None, "Look at the configuration.")
    config.set_defaults(run=lambda _: _help(config))
    inside = config.add_subparsers(metavar="COMMAND", title="commands")
    show = command("show", run_config_show, "Every value and where it came from.", inside)
    show.add_argument("--json", action="store_true", help="as JSON")
    _add_options(show)
    status = command("status", run_status, "What a running cluster is doing.")
    status.add_argument("--url", help="where it listens (default: gateway.host and gateway.port)")
    status.add_argument("--json", action="store_true", help="as JSON, all of it")
    _add_options(status)
    trace = command("trace", run_trace, "What one request went through, as a waterfall.")
    trace.add_argument("request_id", metavar="REQUEST_ID", help="its X-Request-Id, or the id of /dashboard/requests")
    trace.add_argument("--json", action="store_true", help="as JSON")
    _add_place(trace)
    explain = command("explain", run_explain, "One decision of the scheduler: candidates, predictions, choice, what came true.")
    explain.add_argument("request_id", metavar="REQUEST_ID", help="its X-Request-Id, or the id of /dashboard/requests")
    explain.add_argument("--json", action="store_true", help="as JSON")
    _add_place(explain)
    _add_tenants(command)
    sla = command("sla", None, "Promises and what was kept.")
    sla.set_defaults(run=lambda _: _help(sla))
    of_sla = sla.add_subparsers(metavar="COMMAND", title="commands")
    report = command("report", run_sla_report, "Per tenant and class, over a window of up to an hour.", of_sla)
    report.add_argument("--format", choices=("md", "csv", "json"), default="md", help="md, csv or json (default: md)")
    report.add_argument("--window", type=float, default=300.0, metavar="SECONDS", help="10 to 3600 (default: 300)")
    _add_place(report)
    top = command("top", run_top, "The dashboard in this terminal; Ctrl-C ends it.")
    top.add_argument("--once", action="store_true", help="one picture, then end")
    top.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between two pictures (default: 1)")
    _add_place(top)
    memory = command("memory", run_memory, "What a model takes, and how many sequences fit beside it.")
    memory.add_argument(
        "model", nargs="?", default="bundled", metavar="MODEL", help="a directory, or a config.json (default: bundled)"
    )
    memory.add_argument("--gpu", metavar="NAME|SIZE", help="h200, h100, a100, l40s ..., or a size like 24GiB: of each rank")
    for name, text in (("--tp", "tensor ranks"), ("--pp", "pipeline stages")):
        memory.add_argument(name, type=int, default=1, metavar="N", help=f"{text} (default: 1)")
    memory.add_argument("--dtype", help="of weights and KV (default: the checkpoint's)")
    memory.add_argument("--quantization", default="auto", help="int8 or int4 weights, as tandem serve rounds them (default: auto)")
    memory.add_argument("--max-model-len", type=int, metavar="TOKENS", help="of a full sequence (default: what the model allows)")
    memory.add_argument("--context", type=int, metavar="TOKENS", help="of a sequence as you expect them")
    memory.add_argument("--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE", help="(default: 0.9)")
    memory.add_argument("--json", action="store_true", help="as JSON")
    doctor = command("doctor", run_doctor, "What this machine has, lacks, and what to do about it.")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.add_argument("--cluster", action="store_true", help="of a Ray cluster: can every host reach every other?")
    _add_options(doctor)
    for name, text in SIMULATED.items():
        command(name, None, text)  # parsed where it is run, see main
    command("bench", None, "Measure a server: `tandem bench serve --help`.")  # parsed where it is run, see main
    command("version", run_version, "Versions of this and of what it stands on.")
    return parser


def _add_tenants(command: Any) -> None:
    tenants = command("tenants", None, "The file of classes and tenants (--tenants FILE).")
    tenants.set_defaults(run=lambda _: _help(tenants))
    inside = tenants.add_subparsers(metavar="COMMAND", title="commands")
    check = command("check", run_tenants_check, "Whether a file can be used: its line and the reason, or what is in it.", inside)
    check.add_argument("file", metavar="FILE", help="YAML with classes and tenants")
    command("hash-key", run_tenants_hash_key, "Reads a key from standard input, prints its line for the file.", inside)


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 2


def _add_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, the layers of configuration, and one option per row of the table of flags."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help='"bundled", "toy", a directory, a hub id, modelscope:ID')
    layers = parser.add_argument_group("configuration (preset < file < TANDEM_SECTION_NAME < option < --set)")
    layers.add_argument("--preset", metavar="NAME", help=f"one of {', '.join(presets())} (default: general)")
    layers.add_argument("--config", metavar="FILE", help="a YAML file of `section:` and, below, `name: value`")
    layers.add_argument(
        "--set", dest="sets", metavar="KEY=VALUE", action="append", default=[], help="any key of `tandem config show`"
    )
    layers.add_argument(
        "--also",
        metavar="MODEL[,KEY=VALUE...]",
        action="append",
        default=[],
        help="a further model with pools of its own (once for each), such as `--also toy,decode.replicas=2`",
    )
    layers.add_argument(
        "--overflow",
        metavar="URL[,NAME=VALUE...]",
        action="append",
        default=[],
        help="an OpenAI-compatible server that takes what the workers here cannot take in time, such as http://host:8000/v1,model=NAME",
    )
    options = parser.add_argument_group("options, each another name of one key")
    for flag in FLAGS:
        _add_option(options, flag)


def _add_place(parser: argparse.ArgumentParser) -> None:
    """Where a running cluster is, for commands that only ask it."""
    parser.add_argument("--url", help="where it listens (default: gateway.host and gateway.port)")
    for flag in FLAGS:
        if flag.key in ("gateway.host", "gateway.port", "gateway.api_key"):
            _add_option(parser, flag)
    parser.set_defaults(model=None, preset=None, config=None, sets=[], also=[], overflow=[])


def _add_option(group: Any, flag: Flag) -> None:
    # Values stay text: configs.load has one place, and one kind of sentence, for what is wrong with them.
    default = flag.schema.default
    shown = "none" if default is None else str(default).lower() if flag.type == "bool" else default
    text = f"{flag.help} [{flag.key}; default {shown}]".replace("%", "%%")
    if flag.negative is not None:
        group.add_argument(flag.flag, dest=flag.dest, action="store_true", default=None, help=text)
        group.add_argument(flag.negative, dest=flag.dest, action="store_false", default=None, help="the opposite")
        return
    metavar = "|".join(flag.choices) if flag.choices else flag.metavar
    group.add_argument(flag.flag, dest=flag.dest, metavar=metavar, default=None, help=text)


def _unknown_option(given: str, command: str | None) -> ConfigError:
    name = given.split("=")[0]
    if name in ELSEWHERE:
        return ConfigError(f"{name}: {ELSEWHERE[name]}", param=name)
    known = [flag.flag for flag in FLAGS] + [flag.negative for flag in FLAGS if flag.negative]
    known += ["--preset", "--config", "--set", "--also", "--overflow", "--json", "--help"]
    nearest = difflib.get_close_matches(name, known, 1, 0.6)
    hint = f"did you mean {nearest[0]}?" if nearest else f"`tandem {command or ''} --help` lists what there is".replace("  ", " ")
    what = "option" if name.startswith("-") else "argument"
    return ConfigError(f"unknown {what} {name}; {hint}", param=name)


def resolve(args: argparse.Namespace, env: dict[str, str] | None = None) -> Resolved:
    """The configuration that these arguments and this environment ask for. Raises ConfigError."""
    flags = {flag.key: getattr(args, flag.dest) for flag in FLAGS if getattr(args, flag.dest, None) is not None}
    if args.model is not None:
        flags["model.name"] = args.model
    return load(args.preset, args.config, dict(os.environ) if env is None else env, flags, args.sets, args.also, args.overflow)


# ---- commands --------------------------------------------------------------------------------------------------------


def run_serve(args: argparse.Namespace) -> int:
    resolved = resolve(args)
    check_nothing_shadows()
    check_port(resolved.config.gateway.host, resolved.config.gateway.port)
    from cluster.preflight import examine

    examine(resolved.config)
    from cluster.launch import run

    return run(resolved)


def run_deploy(args: argparse.Namespace) -> int:
    resolved = resolve(args)
    check_nothing_shadows()
    from cluster.preflight import examine

    examine(resolved.config)
    from cluster.deploy import run

    return run(resolved, args.only_print)


def run_up(args: argparse.Namespace) -> int:
    check_nothing_shadows()
    from cluster.up import PLACEHOLDER, up

    # The key is made on the way, and stands in no document: here it only says that there will be one.
    return up(args.file, resolve(args, {"TANDEM_GATEWAY_API_KEY": PLACEHOLDER, **os.environ}), args.check)


def run_down(args: argparse.Namespace) -> int:
    from cluster.up import down

    return down(args.file)


def run_config_show(args: argparse.Namespace) -> int:
    resolved = resolve(args)
    if args.json:
        rows = {key: {"value": value, "from": origin} for key, value, origin in resolved.rows()}
        print(json.dumps(rows, indent=2))
        return 0
    rows_ = [(key, _as_text(value), origin) for key, value, origin in resolved.rows()]
    widths = [max(len(row[i]) for row in rows_) for i in (0, 1)]
    for key, value, origin in rows_:
        print(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {origin}")
    for note in resolved.notes:
        print(f"note: {note}")
    return 0


def _as_text(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def run_status(args: argparse.Namespace) -> int:
    from cluster.cluster_status import show

    config = resolve(args).config
    return show(args.url or url_of(config.gateway.host, config.gateway.port), config.gateway.api_key, args.json)


def _place(args: argparse.Namespace) -> tuple[str, str | None]:
    """(url, key) of the cluster that is asked."""
    gateway = resolve(args).config.gateway
    return args.url or url_of(gateway.host, gateway.port), gateway.api_key


def run_trace(args: argparse.Namespace) -> int:
    from cluster.trace_view import show

    return show(*_place(args), args.request_id, args.json)


def run_explain(args: argparse.Namespace) -> int:
    from cluster.explain import show

    return show(*_place(args), args.request_id, args.json)


def run_tenants_check(args: argparse.Namespace) -> int:
    from configs.tenants import read_file, version_of

    found = read_file(args.file)
    print(f"{args.file}: {len(found.classes)} classes, {len(found.tenants)} tenants, version {version_of(found)}")
    for name, one in found.classes.items():
        print(f"  class {name}: {one.ttft_s:g} s, {one.tpot_s:g} s a token, {one.attainment:.3%} of requests, band {one.band}")
    unreachable = [name for name, one in found.tenants.items() if not one.api_keys and name != "default"]
    if unreachable:
        print(f"  note: without a key, so that nobody can come as one of them: {', '.join(unreachable)}")
    if not any(one.api_keys for one in found.tenants.values()):
        print("  note: no tenant has a key; without gateway.api_key everybody comes in, as `default`")
    elif not any(one.is_operator for one in found.tenants.values()):
        print("  note: no tenant is an operator; without gateway.api_key nobody sees /admin and the dashboard's figures")
    return 0


def run_tenants_hash_key(args: argparse.Namespace) -> int:
    from configs.tenants import hash_key

    key = getpass.getpass("key: ") if sys.stdin.isatty() else sys.stdin.readline()
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(
            "a key is one line of printable ASCII on standard input, such as: openssl rand -hex 24 | tandem tenants hash-key"
        )
    if len(key) < MIN_KEY_LEN:
        raise ConfigError(f"a key of {len(key)} characters can be guessed; take at least {MIN_KEY_LEN}")
    print(f"api_keys: [{hash_key(key)}]")
    return 0


def run_sla_report(args: argparse.Namespace) -> int:
    from cluster.top import report

    return report(*_place(args), args.format, args.window)


def run_top(args: argparse.Namespace) -> int:
    from cluster.top import run

    return run(*_place(args), max(0.2, args.interval), args.once)


def run_memory(args: argparse.Namespace) -> int:
    from cluster import memory

    for name in ("tp", "pp", "max_model_len", "context"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} must be at least 1", param=option)
    if not 0 < args.gpu_memory_utilization <= 1:
        raise ConfigError("--gpu-memory-utilization must be above 0 and at most 1", param="--gpu-memory-utilization")
    asked = memory.Asked(
        memory.folder_of(args.model),
        args.model,
        Parallel(args.tp, args.pp),
        args.dtype,
        memory.gpu_bytes(args.gpu) if args.gpu else None,
        args.gpu_memory_utilization,
        args.max_model_len,
        args.context,
        args.quantization,
    )
    return memory.show(asked, args.json)


def run_doctor(args: argparse.Namespace) -> int:
    config = resolve(args).config
    if args.cluster:
        from cluster.doctor_cluster import examine as examine_cluster

        return examine_cluster(config, args.json)
    from cluster.doctor import examine

    return examine(config, args.json)


def run_bench(words: list[str]) -> int:
    """`python -m bench`, under another name. bench/ stands beside the product, which must not import it: it is run."""
    found = runpy.run_module("bench.__main__", run_name="bench.__main__")
    return int(found["main"](words, "tandem bench"))


def run_simulation(words: list[str]) -> int:
    """`python -m simulation`, under another name; beside the product as bench/ is."""
    found = runpy.run_module("simulation.__main__", run_name="simulation.__main__")
    return int(found["main"](words, "tandem"))


def run_version(args: argparse.Namespace) -> int:
    names = ("tandem-serve", "ray", "torch", "triton", "transformers", "tokenizers", "safetensors")
    for name in names:
        try:
            print(f"{name:<13} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name:<13} not installed")
    print(f"{'python':<13} {sys.version.split()[0]}")
    return 0
