"""configs/ray/on-premises.yaml for the machines of machines.sh: with this checkout and interpreter instead of copies of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]


def cluster_file(folder: Path, key: Path) -> Path:
    """Head on machine 1; machine 2 takes prefill and decode, machine 3 decode."""
    text = (ROOT / "configs" / "ray" / "on-premises.yaml").read_text()
    for old, new in (
        ("~/tandem/.venv/bin/python", f"env PYTHONPATH={ROOT} {sys.executable}"),
        ("~/tandem/.venv/bin/ray", str(Path(sys.executable).with_name("ray"))),
        ("--prefill 10.0.0.2 --decode 10.0.0.3", "--prefill 10.0.0.2 --decode 10.0.0.2,10.0.0.3"),
        ("10.0.0.", "10.78.0."),
        ("ssh_user: ubuntu", "ssh_user: root"),
        ("~/.ssh/id_ed25519", str(key)),
    ):
        assert old in text, f"{old} is not in the file any more"
        text = text.replace(old, new)
    raw: dict[str, Any] = yaml.safe_load(text)
    del raw["file_mounts"]["~/tandem"]  # it is on every machine already, and so is what it needs
    raw["setup_commands"] = []
    path = folder / "three.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


if __name__ == "__main__":
    print(cluster_file(Path(sys.argv[1]), Path(sys.argv[1]) / "id"))
