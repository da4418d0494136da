"""`python -m cluster`: the same as the `tandem` script, from any directory.

Python puts the working directory first on the path for `-m`, and whatever `api/` or `models/` lies there would be taken
for ours; so it is taken off again before anything else of the project is imported.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def leave_working_directory() -> None:
    """Drop what `-m` put first on the path, unless it is where this project lives."""
    root = Path(__file__).resolve().parents[1]
    first = sys.path[0] if sys.path else None
    if first is not None and first in ("", os.getcwd()) and Path(first or ".").resolve() != root:
        del sys.path[0]


if __name__ == "__main__":
    leave_working_directory()
    from cluster.cli import main

    sys.exit(main())
