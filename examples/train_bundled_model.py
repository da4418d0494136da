"""Train the bundled demo model again, from nothing but this machine's Python.

The bundled model (``models/bundled``) is a Llama of about three million parameters, so that Tandem
can be tried offline, on two CPU cores, with real weights, a real tokenizer and a real chat
template. This script makes it in six stages, each of which leaves its result in a scratch folder
and can be run by itself with ``--stage``:

1. ``data``      collect the source of Python's standard library (and its bundled help topics);
                 every file goes to the training or to the held-out part by the hash of its text
2. ``tokenizer`` train a byte-level BPE tokenizer of 4,096 entries and encode the corpus
3. ``pretrain``  next-token prediction, for ``--pretrain-minutes``
4. ``tune``      questions and answers about Tandem (``bundled_chat.jsonl``), loss on the answers
                 only, mixed with pretraining data, for ``--tune-minutes``
5. ``evaluate``  held-out loss of the weights as they are shipped (rounded to bfloat16), and the
                 answers to reworded questions that were kept out of the tuning
6. ``export``    write the Hugging Face files and the model card; each file is replaced atomically

    python examples/train_bundled_model.py --out models/bundled
    python examples/train_bundled_model.py --stage export --out /tmp/model   # what there is so far

Learning rates follow the wall clock, not a step count: the run ends on time on a slow or a busy
machine, with fewer tokens seen. A run that was stopped goes on from its last checkpoint (start
afresh with another ``--work-dir``). Weights are float32 while training, matrix products bfloat16
(``--precision float32`` turns that off). Needs torch, transformers, tokenizers, safetensors and
jinja2, none of which Tandem's own engine calls in this way: nothing else imports this file.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import platform
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import safetensors.torch
import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM

EXAMPLES = Path(__file__).resolve().parent
STAGES = ("data", "tokenizer", "pretrain", "tune", "evaluate", "export")

# ----------------------------------------------------------------------------------------------
# The model and its text format

END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END = SPECIAL_TOKENS = (
    "<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip
# ids are 0..5, in this order

VOCAB_SIZE = 4096
CONTEXT_LEN = 2048

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% set role = 'system' if message['role'] == 'developer' else message['role'] %}"
    "{{ '<|' + role + '|>\n' + message['content'] | trim + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# The standard library hardly ever says these words, and answers about Tandem are made of them: a
# few repetitions in the tokenizer's corpus give each an entry of its own.
DOMAIN_WORDS = (
    "Tandem prefill decode KV cache block blocks worker workers rank request sequence ticket grant "
    "manifest epoch incarnation lease scheduler gateway admission tenant tenants token tokens "
    "latency throughput TTFT TPOT SLO Ray Serve GPU GPUs CPU CUDA NCCL Triton PyTorch Helm cluster "
    "Kubernetes OpenAI HTTP API streaming model models layer layers transport transfer digest "
    "verified batching preemption quarantined sealed reserved Retry-After cuda_ipc shm tcp nccl "
    "xxh3 memfd Philox sampling greedy laptop demo parameters deadline placement disaggregation"
)


def model_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=512,
        max_position_embeddings=CONTEXT_LEN,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=0,
        eos_token_id=[5, 0],
        pad_token_id=1,
        dtype="bfloat16",
        attn_implementation="sdpa",
    )


def render_chat(messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """The chat template, rendered as Hugging Face and Tandem's gateway render it."""
    env = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = env.from_string(CHAT_TEMPLATE)
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


# ----------------------------------------------------------------------------------------------
# Stage 1: data

SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings",
    "_bundled", "pydoc_data",
}  # fmt: skip
SKIPPED_FILES = {"html/entities.py", "locale.py", "stringprep.py", "_aix_support.py"}
HELD_OUT_PERCENT = 4


def library_documents(stdlib: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for every hand-written source file, then for every help topic."""
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib).as_posix()
        generated = path.name.startswith("_sysconfigdata") or name in SKIPPED_FILES
        if generated or SKIPPED_FOLDERS.intersection(path.relative_to(stdlib).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) > 200:
            yield name, text
    topics = stdlib / "pydoc_data" / "topics.py"
    if topics.exists():  # the language reference that help() prints: a dict of plain text
        tree = ast.parse(topics.read_text(encoding="utf-8"))
        value = next(node.value for node in tree.body if isinstance(node, ast.Assign))
        for topic, text in ast.literal_eval(value).items():
            yield f"pydoc_data/topics.py#{topic}", text


def is_held_out(text: str) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def collect_data(work_dir: Path) -> None:
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "heldout": []}
    seen: set[str] = set()
    for name, text in library_documents(Path(sysconfig.get_path("stdlib"))):
        text = text.replace("\r\n", "\n")
        if text not in seen:
            seen.add(text)
            parts["heldout" if is_held_out(text) else "train"].append((name, text))
    for part, documents in parts.items():
        write_atomically(work_dir / f"{part}.json", json.dumps(documents).encode())
        num_bytes = sum(len(text.encode()) for _, text in documents)
        log(f"{part}: {len(documents)} documents, {num_bytes / 1e6:.2f} MB")


# ----------------------------------------------------------------------------------------------
# Stage 2: tokenizer


def train_tokenizer(work_dir: Path) -> None:
    train = [text for _, text in json.loads((work_dir / "train.json").read_text())]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = " ".join([DOMAIN_WORDS] * 250)
    tokenizer.train_from_iterator([*train, words], trainer=trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"the corpus gave only {tokenizer.get_vocab_size()} entries")
    write_atomically(work_dir / "tokenizer.json", tokenizer.to_str(pretty=False).encode())

    rng = random.Random(0)
    for part in ("train", "heldout"):
        documents = json.loads((work_dir / f"{part}.json").read_text())
        rng.shuffle(documents)
        encode = tokenizer.encode_batch
        ids: list[int] = []
        for _, text in documents:
            pieces = cut(text, rng) if part == "train" else [text]
            ids += [0, *(token for encoding in encode(pieces) for token in encoding.ids)]
        write_atomically(work_dir / f"{part}.bin", np.array(ids, np.uint16).tobytes())
        num_bytes = sum(len(text.encode()) for _, text in documents)
        log(f"{part}: {len(ids)} tokens, {num_bytes / len(ids):.3f} bytes per token")


def cut(text: str, rng: random.Random) -> list[str]:
    """Cut a text where people end their prompts: after a space or a line, mostly, or within a word.

    The pieces are encoded one by one. A model that has only seen whole documents is lost after a prompt such as
    ``def `` whose last token is a lone space: in a document, that space belongs to the next word's token.
    """
    pieces, start = [], 0
    while start < len(text):
        at = start + rng.randint(20, 400)
        if rng.random() < 0.7:
            while at < len(text) and text[at - 1] != "\n" and not (text[at - 1] == " " != text[at]):
                at += 1
        pieces.append(text[start:at])
        start = at
    return pieces


def load_tokenizer(work_dir: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(work_dir / "tokenizer.json"))


def load_tokens(work_dir: Path, part: str) -> np.ndarray:
    return np.fromfile(work_dir / f"{part}.bin", dtype=np.uint16).astype(np.int64)


# ----------------------------------------------------------------------------------------------
# Stages 3 and 4: training

# Inputs and labels, both [num_rows, row_len]; a label of -100 has no loss.
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass
class Progress:
    """What a checkpoint stores beside weights and optimizer state."""

    seconds: float = 0.0  # of training, over all runs that shared the checkpoint
    steps: int = 0
    tokens: int = 0


class Optimizer:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms.

    Muon (Jordan et al., 2024) reaches the same loss as AdamW in markedly fewer tokens on a corpus
    this small; its updates are scaled to AdamW's size, so that both share one learning rate.
    """

    def __init__(self, model: LlamaForCausalLM, peak_lr: float) -> None:
        inner: list[torch.nn.Parameter] = []
        outer: list[torch.nn.Parameter] = []
        for name, parameter in model.named_parameters():
            is_matrix = parameter.ndim == 2 and "embed" not in name
            (inner if is_matrix else outer).append(parameter)
        self.peak_lr = peak_lr
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(inner, lr=peak_lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(outer, lr=peak_lr, weight_decay=0.0, betas=(0.9, 0.95)),
        ]

    def step(self, progress: float) -> None:
        """One update; ``progress`` in [0, 1] places it on a warm-up and a cosine to 2 %."""
        warmup = min(1.0, progress / 0.02 + 0.02)
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.peak_lr * warmup * cosine
            part.step()
            part.zero_grad(set_to_none=True)


def corpus_batch(tokens: np.ndarray, rng: np.random.Generator, rows: int, length: int) -> Batch:
    starts = rng.integers(0, len(tokens) - length - 1, size=rows)
    window = np.stack([tokens[start : start + length + 1] for start in starts])
    return torch.from_numpy(window[:, :-1]), torch.from_numpy(window[:, 1:])


def train(
    args: argparse.Namespace,
    model: LlamaForCausalLM,
    name: str,
    minutes: float,
    peak_lr: float,
    next_batch: Callable[[int, np.random.Generator], Batch],
) -> None:
    """Train ``model`` in place until ``minutes`` of training have passed, checkpointing."""
    checkpoint = args.work_dir / f"{name}.pt"
    optimizer, progress = Optimizer(model, peak_lr), Progress()
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for part, state in zip(optimizer.parts, saved["optimizer"], strict=True):
            part.load_state_dict(state)
        progress = Progress(**saved["progress"])
        log(f"{name}: going on after {progress.seconds / 60:.1f} minutes")
    heldout = load_tokens(args.work_dir, "heldout")[: 6 * 1024]  # a glance, not the measurement
    forward = torch.compile(model, dynamic=False) if args.compile else model
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bfloat16")
    budget = minutes * 60
    saved_at = time.monotonic()
    recent: list[float] = []
    model.train()

    def save() -> None:
        write_checkpoint(checkpoint, model, optimizer, progress)

    while progress.seconds < budget:
        started = time.monotonic()
        rng = np.random.default_rng((args.seed, progress.steps))
        inputs, labels = next_batch(progress.steps, rng)
        with autocast:
            logits = forward(input_ids=inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(progress.seconds / budget)
        recent.append(loss.item())
        progress.steps += 1
        progress.tokens += inputs.numel()
        progress.seconds += time.monotonic() - started
        if progress.steps % 20 == 0:
            log(
                f"{name}: {progress.seconds / 60:5.1f} min  step {progress.steps}  "
                f"{progress.tokens / 1e6:.2f} Mtok  "
                f"{progress.tokens / progress.seconds:.0f} tok/s  "
                f"loss {sum(recent) / len(recent):.3f}"
            )
            recent.clear()
        if time.monotonic() - saved_at > args.checkpoint_seconds:
            save()
            saved_at = time.monotonic()
            log(f"{name}: saved; held-out loss {corpus_loss(model, heldout):.4f}")
    save()


def write_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: Optimizer, progress: Progress) -> None:
    scratch = path.with_suffix(".tmp")
    state = {
        "model": model.state_dict(),
        "optimizer": [part.state_dict() for part in optimizer.parts],
        "progress": dataclasses.asdict(progress),
    }
    torch.save(state, scratch)
    os.replace(scratch, path)


def pretrain(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(model_config())
    tokens = load_tokens(args.work_dir, "train")
    log(f"parameters: {num_parameters(model)}; corpus: {len(tokens)} tokens")

    def next_batch(step: int, rng: np.random.Generator) -> Batch:
        length = CONTEXT_LEN if step % 8 == 7 else 512  # long rows keep far positions usable
        return corpus_batch(tokens, rng, args.batch_tokens // length, length)

    train(args, model, "pretrain", args.pretrain_minutes, args.pretrain_lr, next_batch)


# ----------------------------------------------------------------------------------------------
# Stage 4: chat


class ChatData:
    """Conversations drawn from ``bundled_chat.jsonl``, varied a little each time.

    A row of the file is one topic: its answer, the ways to ask for it (``questions``), and ways
    that only the evaluation asks (``reworded``).
    """

    PREFIXES = ("Hi, ", "Hello! ", "Please tell me: ", "Quick question: ", "So, ")  # half of the time
    SYSTEM_PROMPTS = (
        "You are a helpful assistant.",
        "You are a helpful assistant. Answer briefly.",
        "You answer questions about Tandem.",
    )

    def __init__(self, path: Path, tokenizer: tokenizers.Tokenizer) -> None:
        self.topics = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        self.tokenizer = tokenizer
        ids = {token: at for at, token in enumerate(SPECIAL_TOKENS)}
        self.assistant_id, self.end_id, self.pad_id = ids[ASSISTANT], ids[END], ids[PAD]

    def vary(self, question: str, rng: np.random.Generator) -> str:
        """The question as another person might type it."""
        if rng.random() < 0.5:
            question = self.PREFIXES[rng.integers(len(self.PREFIXES))] + question
        if rng.random() < 0.25:
            question = question.lower()
        if rng.random() < 0.2:
            question = question.rstrip("?.!")
        if rng.random() < 0.15 and len(question) > 12:
            at = int(rng.integers(1, len(question) - 2))
            swapped = question[at + 1] + question[at]
            question = question[:at] + ("" if rng.random() < 0.5 else swapped) + question[at + 2 :]
        return question

    def conversation(self, num_turns: int, rng: np.random.Generator) -> list[dict[str, str]]:
        messages = []
        if rng.random() < 0.2:
            prompt = self.SYSTEM_PROMPTS[rng.integers(len(self.SYSTEM_PROMPTS))]
            messages.append({"role": "system", "content": prompt})
        for _ in range(num_turns):
            topic = self.topics[rng.integers(len(self.topics))]
            question = topic["questions"][rng.integers(len(topic["questions"]))]
            messages.append({"role": "user", "content": self.vary(question, rng)})
            messages.append({"role": "assistant", "content": topic["answer"]})
        return messages

    def encode(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Token ids, and labels of the same length: only what the assistant says, and its end."""
        ids = self.tokenizer.encode(render_chat(messages)).ids
        labels, speaking = [-100] * len(ids), False
        for at in range(2, len(ids)):
            if ids[at - 2] == self.assistant_id:  # the role and its newline have passed
                speaking = True
            if speaking:
                labels[at] = ids[at]
                speaking = ids[at] != self.end_id
        return ids, labels

    def batch(self, rng: np.random.Generator, rows: int, length: int, num_turns: int) -> Batch:
        inputs = torch.full((rows, length), self.pad_id)
        targets = torch.full((rows, length), -100)
        for row in range(rows):
            ids, labels = self.encode(self.conversation(num_turns, rng))
            size = min(len(ids) - 1, length)
            inputs[row, :size] = torch.tensor(ids[:size])
            targets[row, :size] = torch.tensor(labels[1 : size + 1])
        return inputs, targets


def check_chat_format(chat: ChatData) -> None:
    """A prompt's tokens must be a prefix of the trained conversation's, or answers would drift."""
    for topic in chat.topics:
        user = {"role": "user", "content": topic["questions"][0]}
        answer = {"role": "assistant", "content": topic["answer"]}
        prompt = chat.tokenizer.encode(render_chat([user], add_generation_prompt=True)).ids
        whole, labels = chat.encode([user, answer])
        assert whole[: len(prompt)] == prompt, topic["topic"]
        said = [label for label in labels if label != -100]
        assert chat.tokenizer.decode(said, skip_special_tokens=False) == topic["answer"] + END


def tune(args: argparse.Namespace) -> None:
    model = load_weights(args.work_dir / "pretrain.pt")
    tokens = load_tokens(args.work_dir, "train")
    chat = ChatData(args.chat, load_tokenizer(args.work_dir))
    check_chat_format(chat)
    num_pairs = sum(len(topic["questions"]) for topic in chat.topics)
    log(f"chat: {len(chat.topics)} topics, {num_pairs} questions and answers")

    def next_batch(step: int, rng: np.random.Generator) -> Batch:
        batch_tokens = args.batch_tokens // 2  # more, smaller steps than before
        if step % 5 in (1, 3):  # two batches of five are plain corpus, so that it keeps its Python
            return corpus_batch(tokens, rng, batch_tokens // 512, 512)
        if step % 5 == 4:
            return chat.batch(rng, batch_tokens // 224, 224, num_turns=int(rng.integers(2, 4)))
        return chat.batch(rng, batch_tokens // 96, 96, num_turns=1)

    torch.manual_seed(args.seed)
    train(args, model, "tune", args.tune_minutes, args.tune_lr, next_batch)


# ----------------------------------------------------------------------------------------------
# Stage 5: evaluation


@torch.no_grad()
def corpus_loss(model: LlamaForCausalLM, tokens: np.ndarray, window: int = 1024) -> float:
    """Mean loss in nats per token, over windows that do not overlap (each starts cold)."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, window):
        piece = torch.from_numpy(tokens[start : start + window + 1])[None]
        if piece.shape[1] < 2:
            break
        logits = model(input_ids=piece[:, :-1], use_cache=False).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum").item()
        count += piece.shape[1] - 1
    model.train(was_training)
    return total / count


@torch.no_grad()
def complete(
    model: LlamaForCausalLM,
    tokenizer: tokenizers.Tokenizer,
    texts: list[str],
    max_tokens: int,
    temperature: float = 0.0,
) -> list[str]:
    """What the model says after each text, up to its end; special tokens are left out."""
    by_len: dict[int, list[tuple[int, list[int]]]] = {}  # rows of one length need no padding
    for at, text in enumerate(texts):
        ids = tokenizer.encode(text).ids
        by_len.setdefault(len(ids), []).append((at, ids))
    completions = [""] * len(texts)
    for prompt_len, rows in by_len.items():
        inputs = torch.tensor([ids for _, ids in rows])
        outputs = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_tokens,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=None,
            top_p=None,
            eos_token_id=[5, 0],
            pad_token_id=1,
        )
        for (at, _), output in zip(rows, outputs[:, prompt_len:].tolist(), strict=True):
            completions[at] = tokenizer.decode(output, skip_special_tokens=True)
    return completions


def ask(model: LlamaForCausalLM, tokenizer: tokenizers.Tokenizer, questions: list[str]) -> list[str]:
    """The greedy answer to each question, asked without a system prompt."""
    prompts = [render_chat([{"role": "user", "content": question}], add_generation_prompt=True) for question in questions]
    return complete(model, tokenizer, prompts, max_tokens=90)


def shipped_weights(checkpoint: Path) -> LlamaForCausalLM:
    """The checkpoint as it is exported: rounded to bfloat16, computed in float32."""
    return load_weights(checkpoint).to(torch.bfloat16).to(torch.float32).eval()


def evaluate(args: argparse.Namespace) -> None:
    model = shipped_weights(latest_checkpoint(args.work_dir))
    tokenizer = load_tokenizer(args.work_dir)
    documents = json.loads((args.work_dir / "heldout.json").read_text())
    tokens = load_tokens(args.work_dir, "heldout")
    num_bytes = sum(len(text.encode()) for _, text in documents)
    loss = corpus_loss(model, tokens)
    results: dict[str, Any] = {
        "heldout_files": len(documents),
        "heldout_bytes": num_bytes,
        "heldout_tokens": len(tokens),
        "train_tokens": len(load_tokens(args.work_dir, "train")),
        "loss_per_token": round(loss, 4),
        "bits_per_byte": round(loss * len(tokens) / math.log(2) / num_bytes, 4),
        "parameters": num_parameters(model),
        "vocab_size": VOCAB_SIZE,
        "python": platform.python_version(),
    }
    for stage in ("pretrain", "tune"):
        if (args.work_dir / f"{stage}.pt").exists():
            saved = torch.load(args.work_dir / f"{stage}.pt", weights_only=True)["progress"]
            results[f"{stage}_tokens"] = saved["tokens"]
            results[f"{stage}_minutes"] = round(saved["seconds"] / 60, 1)
    results["epochs"] = round(results["pretrain_tokens"] / results["train_tokens"], 1)
    pretrained = shipped_weights(args.work_dir / "pretrain.pt")
    results["loss_before_tuning"] = round(corpus_loss(pretrained, tokens), 4)
    if (args.work_dir / "tune.pt").exists():
        topics = ChatData(args.chat, tokenizer).topics
        results["topics"] = len(topics)
        for kind in ("questions", "reworded"):
            pairs = [(text, topic) for topic in topics for text in topic[kind]]
            answers = ask(model, tokenizer, [question for question, _ in pairs])
            hits = 0
            for (question, topic), answer in zip(pairs, answers, strict=True):
                hits += answer == topic["answer"]
                if answer != topic["answer"]:
                    log(f"  {kind}: {topic['topic']}: {question!r} -> {answer!r}")
            results[f"{kind}_asked"], results[f"{kind}_answered"] = len(pairs), hits
    for prompt in ("def ", "import os\n\n\ndef read_", "class Stack:"):
        for temperature in (0.0, 0.7):
            (text,) = complete(model, tokenizer, [prompt], 100, temperature)
            log(f"--- temperature {temperature}: {prompt}{text}")
            results.setdefault("sample", "def " + text.rstrip())  # the greedy one of the first
    write_atomically(args.work_dir / "results.json", json.dumps(results, indent=2).encode())
    log(json.dumps(results))


# ----------------------------------------------------------------------------------------------
# Stage 6: export


def export(args: argparse.Namespace) -> None:
    """Write every file of the model folder; a reader sees the old file or the new one."""
    args.out.mkdir(parents=True, exist_ok=True)
    model = load_weights(latest_checkpoint(args.work_dir))
    weights = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.config.vocab_size,
        "hidden_size": model.config.hidden_size,
        "intermediate_size": model.config.intermediate_size,
        "num_hidden_layers": model.config.num_hidden_layers,
        "num_attention_heads": model.config.num_attention_heads,
        "num_key_value_heads": model.config.num_key_value_heads,
        "head_dim": model.config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT_LEN,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-05,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": [5, 0],
        "pad_token_id": 1,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_LEN,
        "chat_template": CHAT_TEMPLATE,
    }
    generation_config = {
        "bos_token_id": 0,
        "eos_token_id": [5, 0],
        "pad_token_id": 1,
        "do_sample": True,
        "temperature": 0.7,
    }
    write_atomically(args.out / "model.safetensors", safetensors.torch.save(weights, {"format": "pt"}))
    for name, value in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
    ):
        write_atomically(args.out / name, (json.dumps(value, indent=2) + "\n").encode())
    write_atomically(args.out / "tokenizer.json", (args.work_dir / "tokenizer.json").read_bytes())
    results = args.work_dir / "results.json"
    if results.exists():
        card = (EXAMPLES / "bundled_model_card.md").read_text()
        for key, value in json.loads(results.read_text()).items():
            shown = f"{value:,}" if isinstance(value, int) else str(value)
            card = card.replace("{" + key + "}", shown)
        write_atomically(args.out / "README.md", card.encode())
    log(f"wrote {args.out}")


# ----------------------------------------------------------------------------------------------
# Files and the command line


def write_atomically(path: Path, data: bytes) -> None:
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_bytes(data)
    os.replace(scratch, path)


def latest_checkpoint(work_dir: Path) -> Path:
    tuned = work_dir / "tune.pt"
    return tuned if tuned.exists() else work_dir / "pretrain.pt"


def load_weights(checkpoint: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM(model_config())
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    return model


def num_parameters(model: LlamaForCausalLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def keep_freed_memory() -> None:
    """Tell glibc not to return the large tensors of every step to the kernel, only to fault them in again.

    Without this, a seventh of the time goes into page faults.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another system, another allocator
        return
    libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped by itself
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap keeps what was freed


def log(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--stage", choices=("all", *STAGES), default="all", help="default: all")
    parser.add_argument("--out", type=Path, default=Path("models/bundled"))
    parser.add_argument("--work-dir", type=Path, default=cache / "tandem" / "bundled-model")
    parser.add_argument("--chat", type=Path, default=EXAMPLES / "bundled_chat.jsonl")
    parser.add_argument("--pretrain-minutes", type=float, default=55)
    parser.add_argument("--tune-minutes", type=float, default=12)
    parser.add_argument("--pretrain-lr", type=float, default=4e-3)
    parser.add_argument("--tune-lr", type=float, default=1.2e-3)
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens per step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--checkpoint-seconds", type=float, default=100)
    return parser.parse_args(argv)


def main() -> int:
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    actions: dict[str, Callable[[], None]] = {
        "data": lambda: collect_data(args.work_dir),
        "tokenizer": lambda: train_tokenizer(args.work_dir),
        "pretrain": lambda: pretrain(args),
        "tune": lambda: tune(args),
        "evaluate": lambda: evaluate(args),
        "export": lambda: export(args),
    }
    done = {"data": "heldout.json", "tokenizer": "heldout.bin"}  # not done twice by `all`
    for stage in STAGES if args.stage == "all" else (args.stage,):
        if args.stage == "all" and stage in done and (args.work_dir / done[stage]).exists():
            continue
        log(f"stage {stage}")
        actions[stage]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
