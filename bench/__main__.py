"""`python -m bench NAME`: one measurement, its figures on stdout and, with --json, in a file."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

from bench import http, kv, startup


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, module in (("startup", startup), ("http", http), ("kv", kv)):
        assert module.__doc__ is not None
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
        command.add_argument("--json", type=Path, help="write every sample here")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args()
    result = args.run(args)
    if args.json:
        machine = {"platform": platform.platform(), "python": platform.python_version()}
        args.json.write_text(json.dumps({"bench": args.name, "machine": machine, **result}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
