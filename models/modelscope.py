"""Downloads from ModelScope over its plain HTTP interface, with resumable, verified files. Called by models/locate.py."""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from protocol.errors import ModelError

WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
TIMEOUT_S = 30.0
PIECE_NBYTES = 1 << 20
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def download(model_id: str, revision: str | None = None) -> Path:
    """The directory of model_id in the cache (MODELSCOPE_CACHE, else ~/.cache/modelscope), fetched where it is missing.

    MODELSCOPE_ENDPOINT names another server. Raises ModelError.
    """
    if not _ID.fullmatch(model_id) or ".." in model_id:
        raise ModelError(f"modelscope:{model_id} is no id like modelscope:Qwen/Qwen3-0.6B")
    endpoint = os.environ.get("MODELSCOPE_ENDPOINT", "https://modelscope.cn").rstrip("/")
    revision = revision or "master"
    cache = Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope")
    folder = cache / "tandem" / model_id / re.sub(r"[^\w.-]", "_", revision)
    done = folder / ".complete"
    if done.exists():
        return folder
    base = f"{endpoint}/api/v1/models/{model_id}/repo"
    try:
        listing = _json(f"{base}/files?{urllib.parse.urlencode({'Revision': revision, 'Recursive': 'true'})}")
        files = [entry for entry in (listing.get("Data") or {}).get("Files") or [] if _is_wanted(entry)]
        if not files:
            raise ModelError(f"modelscope:{model_id} at {endpoint} lists no safetensors: {listing.get('Message')}")
        for entry in files:
            query = urllib.parse.urlencode({"Revision": revision, "FilePath": entry["Path"]})
            _fetch(f"{base}?{query}", folder / entry["Path"], entry.get("Sha256") or "")
    except (urllib.error.URLError, OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"modelscope:{model_id} could not be downloaded from {endpoint} ({error}); check the id, the network and "
            "MODELSCOPE_ENDPOINT, or give a directory"
        ) from error
    done.touch()
    return folder


def _is_wanted(entry: dict[str, Any]) -> bool:
    path = str(entry.get("Path", ""))
    # Top-level files only: that also keeps a listing from naming a place outside the folder.
    return entry.get("Type") != "tree" and "/" not in path and any(fnmatch(path, pattern) for pattern in WANTED)


def _json(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
        value = json.load(answer)
    if not isinstance(value, dict):
        raise ValueError("the listing is no JSON object")
    return value


def _fetch(url: str, target: Path, sha256: str) -> None:
    """Into a .part file that goes on where it stopped, renamed once its digest is right."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with (
            urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer,
            open(part, "ab" if answer.status == 206 else "wb") as file,
        ):
            while piece := answer.read(PIECE_NBYTES):
                file.write(piece)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the part is whole already
            raise
    if sha256:
        with open(part, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256.lower():
            part.unlink()
            raise ValueError(f"{target.name} arrived with sha256 {found[:12]}, expected {sha256[:12]}; start again")
    part.rename(target)
