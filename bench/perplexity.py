"""What rounding the weights costs: perplexity on text the model never saw, for float weights, int8 and int4.

The text: what of this Python's standard library its training script held out (examples/train_bundled_model.py: by the hash of each
file's text), in windows that do not overlap; or files of your own (--text). The bundled model's card names its loss on the former,
for the Python it was trained on; another Python's library is partly new and partly seen.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

WINDOW_LEN = 1024
BLOCK_SIZE = 32
HELD_OUT_PERCENT = 4
# As the training script chooses its documents; a test compares the two.
SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "_bundled", "pydoc_data")
)
SKIPPED_FILES = frozenset(("html/entities.py", "locale.py", "stringprep.py", "_aix_support.py"))


class Loss(msgspec.Struct, frozen=True):
    """nats: mean negative log-likelihood of a token, given those before it in its window."""

    quantization: str
    nats: float
    num_tokens: int
    weight_bytes: int
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="bundled", help="a name or a directory (default: bundled)")
    parser.add_argument("--quantization", default="none,int8,int4", help="the first is what the others are compared with")
    parser.add_argument("--text", nargs="*", type=Path, default=[], help="files instead of the held-out documents")
    parser.add_argument("--windows", type=int, default=0, help="so many, evenly chosen; 0: all (default)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    documents = [path.read_text(encoding="utf-8") for path in args.text] or list(held_out())
    losses = measure(args.model, args.quantization.split(","), documents, args.windows)
    base = losses[0]
    print(f"{args.model}: {len(documents)} documents, {base.num_tokens:,} tokens predicted")
    for loss in losses:
        worse = (loss.perplexity / base.perplexity - 1) * 100
        print(
            f"  {loss.quantization:5} {loss.nats:.4f} nats per token, perplexity {loss.perplexity:.3f} ({worse:+.2f} %), "
            f"weights {loss.weight_bytes / 1e6:.2f} MB, {loss.seconds:.0f} s"
        )
    return {"losses": [msgspec.to_builtins(loss) | {"perplexity": loss.perplexity} for loss in losses]}


def held_out() -> Iterator[str]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib)
        generated = path.name.startswith("_sysconfigdata") or name.as_posix() in SKIPPED_FILES
        if generated or SKIPPED_FOLDERS.intersection(name.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) <= 200:
            continue
        text = text.replace("\r\n", "\n")
        if text not in seen and is_held_out(text):
            yield text
        seen.add(text)


def is_held_out(text: str) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def windows(folder: Path, documents: Iterable[str], separator: int, window_len: int, count: int) -> list[list[int]]:
    """All documents as one row of tokens, each after a separator, cut; `count` of the cuts evenly chosen, 0: all."""
    from api.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder)
    row = [token for text in documents for token in (separator, *tokenizer.encode(text))]
    cuts = [row[at : at + window_len] for at in range(0, len(row), window_len)]
    cuts = [cut for cut in cuts if len(cut) > 1]
    return cuts[:: max(1, len(cuts) // count)][:count] if count else cuts


def measure(model: str, quantizations: Sequence[str], documents: Iterable[str], count: int = 0) -> list[Loss]:
    """Every prompt is read as the engine reads it: through a KV pool, in one chunk."""
    from models.load import load_model
    from models.locate import locate

    cuts: list[list[int]] = []
    found = []
    for quantization in quantizations:
        loaded = load_model(model, device="cpu", quantization=quantization)
        if not cuts:
            separator = loaded.config.bos_token_id or 0
            length = min(WINDOW_LEN, loaded.config.max_position_embeddings)
            cuts = windows(locate(model), documents, separator, length, count)
        started = time.perf_counter()
        nats = sum(_nats(loaded, cut) for cut in cuts)
        predicted = sum(len(cut) - 1 for cut in cuts)
        found.append(Loss(quantization, nats / predicted, predicted, loaded.model.weight_nbytes(), time.perf_counter() - started))
    return found


def _nats(loaded: Any, token_ids: list[int]) -> float:
    """The sum over a window, which is read in one chunk."""
    import torch

    from engine.batch import Chunk
    from engine.runner import ModelRunner
    from engine.sequence import Sequence as EngineSequence
    from kvtransfer.layout import rank_layout
    from protocol.parallel import ALONE
    from protocol.request import Request, SamplingParams

    layout = loaded.kv_layout(BLOCK_SIZE)
    own = rank_layout(layout, ALONE, 0)
    num_blocks = -(-len(token_ids) // BLOCK_SIZE)
    shape = (own.num_layers, num_blocks, 2, own.num_kv_heads, own.block_size, own.head_dim)
    runner = ModelRunner(loaded, torch.zeros(shape, dtype=loaded.dtype), layout)
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=0)
    sequence = EngineSequence(Request(request_id="text", model="", prompt_token_ids=tuple(token_ids), sampling=sampling))
    sequence.blocks = list(range(num_blocks))
    entries = runner.run([Chunk(sequence, len(token_ids), ())]).prompt_logprobs["text"]
    return -sum(entry.logprob for entry in entries if entry is not None)
