"""`python -m simulation COMMAND`, which `tandem simulate`, `tandem plan` and `tandem calibrate` run."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from protocol.errors import ConfigError, TandemError
from simulation import calibrate, plan, run

COMMANDS = {"simulate": run, "calibrate": calibrate, "plan": plan}


class _Parser(argparse.ArgumentParser):
    """One sentence instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` says more")


def main(argv: list[str] | None = None, prog: str = "python -m simulation") -> int:
    """Exit status 0 well, 1 it failed, 2 what was asked for is wrong."""
    parser = _Parser(prog=prog, description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        assert module.__doc__ is not None
        command = commands.add_parser(
            name,
            help=module.__doc__.splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    try:
        args = parser.parse_args(argv)
        return int(args.run(args))
    except ConfigError as error:
        print(f"tandem: {error.message}", file=sys.stderr)
        return 2
    except TandemError as error:
        print(f"tandem: {error.message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
