"""Hugging Face transformers as the judge: tiny random checkpoints of each family, and its float32 greedy output with gaps.

Shared by the tests of models/, engine/ and the whole system. A divergence from the judge is forgiven only where its own two
best logits are closer than NEAR_TIE.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NEAR_TIE = 1e-4
FAMILIES = ("llama", "llama3-rope", "linear-rope", "mistral", "mistral-window", "qwen2", "qwen3")
VOCAB_SIZE = 199


def make_checkpoint(
    family: str, folder: Path, *, seed: int = 0, shards: bool = False, dtype: str = "float32", **changes: Any
) -> Path:
    """A tiny random checkpoint in Hugging Face's layout, written by transformers itself; returns folder.

    Weights are spread widely, so that greedy output wanders instead of repeating one token.
    """
    import torch
    import transformers

    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": family in ("llama3-rope", "qwen2"),
        "initializer_range": 0.25,
    }
    rope = {"rope_theta": 10_000.0, "rope_type": "default"}
    match family:
        case "llama3-rope":
            rope = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
        case "linear-rope":
            rope = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
        case "mistral" | "mistral-window":
            shape["sliding_window"] = 24 if family == "mistral-window" else None
        case "qwen3":
            shape["head_dim"] = 16
    shape |= {"rope_parameters": rope, **changes}
    kind = {"mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}.get(family.split("-")[0], "Llama")
    config = getattr(transformers, f"{kind}Config")(**shape)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # transformers starts them at 0 and 1, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="60KB" if shards else "1GB")
    assert shards == (folder / "model.safetensors.index.json").exists()
    return folder


def make_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> Path:
    """A word-level tokenizer.json for such a checkpoint, so that it can be served: token i is the word "wI"."""
    vocab = {f"w{i}": i for i in range(vocab_size)}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def ragged_prompts(
    count: int, block_size: int, vocab_size: int = VOCAB_SIZE, *, seed: int = 0, longest: int = 100
) -> list[list[int]]:
    """One token, block size and its neighbours, several blocks, and random lengths; token ids are random."""
    import random

    rng = random.Random(seed)
    lengths = [1, 2, block_size - 1, block_size, block_size + 1, 2 * block_size, 2 * block_size + 1, longest]
    lengths += [rng.randint(1, longest) for _ in range(count)]
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for length in lengths[:count]]


@dataclass(frozen=True)
class Answer:
    """token_ids: the greedy continuation. gaps[i]: best minus second best logit where token i was chosen."""

    token_ids: list[int]
    gaps: list[float]


@dataclass
class Judge:
    """transformers in float32, eager attention, one prompt at a time."""

    folder: Path
    model: Any = field(init=False)

    def __post_init__(self) -> None:
        import torch
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def greedy(self, prompt: list[int], num_tokens: int) -> Answer:
        """num_tokens tokens, EOS ignored."""
        import torch

        token_ids, gaps = [], []
        cache, step = None, torch.tensor([prompt])
        with torch.inference_mode():
            for _ in range(num_tokens):
                result = self.model(input_ids=step, past_key_values=cache, use_cache=True)
                cache = result.past_key_values
                best = result.logits[0, -1].topk(2)
                token_ids.append(int(best.indices[0]))
                gaps.append(float(best.values[0] - best.values[1]))
                step = best.indices[:1][None]
        return Answer(token_ids, gaps)

    def logprobs(self, token_ids: list[int]) -> Any:
        """float32 [len(token_ids), vocab_size]: row p is about token p + 1."""
        import torch

        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([token_ids])).logits[0].log_softmax(-1)


def first_divergence(answer: Answer, token_ids: list[int]) -> str | None:
    """None if token_ids equals the answer, or departs from it at a near-tie (which is printed); else a sentence."""
    for index, (wanted, found) in enumerate(zip(answer.token_ids, token_ids, strict=True)):
        if wanted != found:
            story = f"token {index}: {found} instead of {wanted}, logit gap {answer.gaps[index]:.2e}"
            if answer.gaps[index] <= NEAR_TIE:
                print(f"near-tie: {story}")
                return None
            return story
    return None
