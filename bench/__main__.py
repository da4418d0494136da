"""`python -m bench NAME` (or `tandem bench NAME`): one measurement, its figures on stdout and, with --json, in a file."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

from bench import (
    ablate,
    capacity,
    engine,
    fairness,
    fidelity,
    gateway,
    http,
    kernels,
    kv,
    observing,
    perplexity,
    promises,
    scheduler,
    serve,
    simulator,
    speculation,
    startup,
    steps,
)


def main(argv: list[str] | None = None, prog: str = "python -m bench") -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, module in (
        ("startup", startup),
        ("steps", steps),
        ("http", http),
        ("gateway", gateway),
        ("engine", engine),
        ("ablate", ablate),
        ("kv", kv),
        ("kernels", kernels),
        ("serve", serve),
        ("observing", observing),
        ("fairness", fairness),
        ("capacity", capacity),
        ("fidelity", fidelity),
        ("simulator", simulator),
        ("speculation", speculation),
        ("promises", promises),
        ("perplexity", perplexity),
        ("scheduler", scheduler),
    ):
        assert module.__doc__ is not None
        command = commands.add_parser(
            name,
            help=module.__doc__.splitlines()[0].replace("%", "%%"),
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--json", type=Path, help="write every sample here")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    result = args.run(args)
    if args.json:
        machine = {"platform": platform.platform(), "python": platform.python_version()}
        args.json.write_text(json.dumps({"bench": args.name, "machine": machine, **result}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
