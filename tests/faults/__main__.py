"""Replay one seed, or run many.

python -m tests.faults --seed 1234 --verbose
python -m tests.faults --first 0 --count 20000
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.faults.plans import plan
from tests.faults.scenario import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Replay one seed, or run many.")
    parser.add_argument("--seed", type=int, help="replay this one")
    parser.add_argument("--verbose", action="store_true", help="print every event of it")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--stop-after", type=int, default=20, help="failing seeds")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        result = run(arguments.seed, keep_history=True)
        print(plan(arguments.seed))
        print("\n".join(result.history) if arguments.verbose else "")
        print("\n".join(result.problems) or "no problems", dict(result.numbers), sep="\n")
        return bool(result.problems)
    return many(arguments.first, arguments.count, arguments.stop_after)


def many(first: int, count: int, stop_after: int) -> int:
    started, failing, totals, virtual_s = time.process_time(), [], Counter[str](), 0.0
    for seed in range(first, first + count):
        result = run(seed)
        totals.update(result.numbers)
        virtual_s += result.virtual_s
        if (seed - first) % 1000 == 999:
            print(f"{seed - first + 1} seeds, {time.process_time() - started:.0f} s of CPU", flush=True)
        if result.problems:
            failing.append(seed)
            print(f"seed {seed}: {len(result.problems)} problems, the first: {result.problems[0]}", flush=True)
            if len(failing) >= stop_after:
                count = seed - first + 1
                break
    seconds = time.process_time() - started
    print(f"{count} seeds, {len(failing)} failing {failing}; {seconds:.1f} s of CPU, {1e3 * seconds / count:.1f} ms a seed")
    print(f"{virtual_s / count:.1f} virtual s a seed; {dict(totals)}")
    return bool(failing)


if __name__ == "__main__":
    sys.exit(main())
