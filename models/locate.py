"""Where a model's files are: the bundled one, the toy, a directory, a Hugging Face hub id, or "modelscope:ID".

Downloads only what serving needs (json, safetensors, chat template), into the hub's own cache. No torch, and
huggingface_hub only when there is something to download. Called by models/load.py and, for tokenizer and configuration, by
cluster/ and tandem.py.
"""

from __future__ import annotations

import re
from pathlib import Path

from protocol.errors import ModelError

HERE = Path(__file__).resolve().parent
BUILT_IN = {"bundled": HERE / "bundled", "toy": HERE / "toy_files"}
WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
UNWANTED = ["original/*", "consolidated*", "onnx/*"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
MODELSCOPE = "modelscope:"


def locate(name: str, revision: str | None = None) -> Path:
    """A directory with config.json, tokenizer files and weights. Raises ModelError with what to do."""
    if name in BUILT_IN:
        return _whole(BUILT_IN[name])
    if name.startswith(MODELSCOPE):
        from models.modelscope import download

        return _whole(download(name.removeprefix(MODELSCOPE), revision))
    try:
        path = Path(name).expanduser()
        is_dir, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # no permission to look, no such home
        raise ModelError(f"cannot look at {name!r}: {getattr(error, 'strerror', None) or error}") from None
    if is_dir:
        return _whole(path.resolve())
    if exists:
        raise ModelError(f"{path} is a file; a model is a directory with config.json, tokenizer.json and *.safetensors")
    if path.is_absolute() or name.startswith((".", "~")) or not HUB_ID.fullmatch(name):
        raise ModelError(
            f"{name!r} is no directory, and no hub id like Qwen/Qwen3-0.6B either; without a name the bundled model is served"
        )
    return _whole(_from_hub(name, revision))


def _whole(path: Path) -> Path:
    try:
        is_there = (path / "config.json").exists()
    except OSError as error:
        raise ModelError(f"cannot look into {path}: {error.strerror}; correct its permissions") from None
    if not is_there:
        raise ModelError(f"{path} has no config.json; a model is a directory with config.json, tokenizer.json and *.safetensors")
    return path


def _from_hub(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    advice = (
        f"check the network, HF_ENDPOINT (now {constants.ENDPOINT}) and HF_TOKEN, or download it elsewhere and give its directory"
    )
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its licence at {constants.ENDPOINT}/{name} and set HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"{constants.ENDPOINT} has no model {name}, or it is private: correct the name or set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision!r} at {constants.ENDPOINT}") from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(f"{name} is not in the local cache and could not be downloaded; {advice}") from error
    except Exception as error:  # whatever the hub's http client raises: it differs between its versions
        raise ModelError(f"{name} could not be downloaded ({type(error).__name__}: {_first_line(error)}); {advice}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no details"
