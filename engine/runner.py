"""One engine step: chunks in, KV written, tokens out. It decides nothing and changes no Sequence.

`ModelRunner.run` is called by the loops of prefill/worker.py and decode/worker.py, which apply the result to their sequences.
In a worker of several ranks that is the leader's; it tells the others the step in plain integers, and their `follow`, called by
engine/follower.py, does the same work on their own layers and heads. Every rank calls the same collectives in the same order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import msgspec
import torch
from torch import Tensor

from engine.batch import Batch, Chunk, Wanted, build_batch, plan_step
from engine.group import Group
from engine.sampler import Sample, sample, score
from engine.sequence import Sequence
from engine.stats import StepStats
from engine.step import NOTHING, Extras, Idle, Step, Stop
from engine.verify import verified
from kernels import cpu
from kvtransfer.layout import rank_layout
from models.load import LoadedModel
from protocol.errors import GroupBroken
from protocol.events import TokenLogprobs
from protocol.kv import KVLayout
from protocol.parallel import ALONE

OnLayer = Callable[[int], None]
_NO_STEP = Step([], [], [], [], [], [])


class StepResult(msgspec.Struct, frozen=True):
    """samples: in the order of the chunks' samples; for a chunk with a draft one for each guess that was right, and the one after
    them. prompt_logprobs[request_id]: the entries of the prompt positions that this step scored, position 0 as None. Over all
    chunks of a prompt they are prompt_len entries, in order."""

    samples: list[Sample]
    prompt_logprobs: dict[str, list[TokenLogprobs | None]]
    stats: StepStats


class ModelRunner:
    """loaded on kv, this rank's pool [own layers, num_blocks, 2, own KV heads, block_size, head_dim].

    layout: of the whole model, whatever the rank. group: None for a worker of one rank.
    num_threads: how many threads a step may use, in the thread that calls run(); None leaves torch's own choice. It may be
    changed between steps.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        kv: Tensor,
        layout: KVLayout,
        num_threads: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
        group: Group | None = None,
    ) -> None:
        shard = loaded.shard
        assert shard.parallel == (group.parallel if group else ALONE), f"weights for {shard}, but the group is another"
        assert group is None or group.rank == shard.rank, f"weights of rank {shard.rank} on rank {group and group.rank}"
        own = rank_layout(layout, shard.parallel, shard.rank)
        expected = (own.num_layers, 2, own.num_kv_heads, own.block_size, own.head_dim)
        assert (kv.shape[0], *kv.shape[2:]) == expected, f"pool {tuple(kv.shape)} is not of {own}"
        assert loaded.model_hash == layout.model_hash, "the pool belongs to another model"
        assert str(kv.dtype) == f"torch.{layout.dtype}", f"pool dtype {kv.dtype}, layout {layout.dtype}"
        self.loaded = loaded
        self.kv = kv
        self.layout = layout
        self.own_layout = own
        self.group = group
        self.num_threads = num_threads
        self._clock = clock
        self._threads_of: dict[int, int] = {}  # by calling thread: what was set there
        if loaded.device.type == "cpu" and loaded.dtype is torch.float32:
            cpu.load()  # seconds, on a machine's first time: not at the first request's expense
        self._in_step = threading.Lock()  # idle() may come from another thread than run()

    # ---- leader ----------------------------------------------------------------------------------------------------

    def run(self, chunks: SequenceOf[Chunk], on_layer: OnLayer | None = None, extras: Extras = NOTHING) -> StepResult:
        """Compute the chunks in one forward pass and sample where they ask for it.

        on_layer(own layer) is called in this thread as soon as the layer's KV of this batch is in the pool. extras are done by
        every rank; its pushes are for the other ranks, on_layer is this one's. A sequence whose logits are not finite gets a
        Sample with an error; the others are not touched by it. Raises GroupBroken when another rank died or was silent past
        the deadline, or when this one failed amid a step: there is no step after that one.
        """
        assert chunks, "a step without work"
        self._own_threads()
        with self._in_step, torch.inference_mode():
            started = self._clock()
            step, wanted = plan_step(chunks, self.layout.block_size, extras)
            batch = build_batch(step, self.own_layout, self.loaded.device)
            self._tell(step)  # what can go wrong with the chunks themselves has gone wrong before it
            hook = _Deferred(on_layer) if self.group is not None and on_layer is not None else on_layer
            rows = self._compute(step, batch, hook)
            computed = self._clock()
            samples, scores = self._read_logits(step, wanted, rows)
            ended = self._clock()
        if isinstance(hook, _Deferred) and hook.error is not None:
            raise hook.error
        return StepResult(samples, scores, _stats(chunks, samples, ended - started, computed - started, ended - computed))

    def idle(self) -> bool:
        """Leader of a group: a step of nothing, so that the others' wait stays below its deadline. To be called once no step
        was made for a third of group.timeout_s; does nothing (False) while one is being made. Raises GroupBroken."""
        if self.group is None or not self._in_step.acquire(blocking=False):
            return False
        try:
            self.group.broadcast(Idle(), flush=True)
        finally:
            self._in_step.release()
        return True

    def stop(self) -> None:
        """Leader of a group: let the others' Follower.run() return, and leave. Idempotent, and quiet about a broken group."""
        if self.group is None:
            return
        with self._in_step:
            try:
                if not self.group.is_broken:
                    self.group.broadcast(Stop(), flush=True)
            except GroupBroken:  # whoever is left finds out by itself
                return
            finally:
                self.group.close()

    def warm_up(self) -> None:
        """Run one token through block 0 once, so that the first request does not pay for threads and lazy libraries.

        Only before the pool is in use: block 0 is zeroed afterwards.
        """
        from protocol.request import Request, SamplingParams

        request = Request(request_id="warm-up", model="", prompt_token_ids=(0,), sampling=SamplingParams(temperature=0.0))
        sequence = Sequence(request)
        sequence.blocks = [0]
        self.run([Chunk(sequence, 1, (sequence,))])
        self.fill_block(0, 0.0)

    def copy_block(self, source: int, target: int) -> None:
        """All layers of one block, on every rank, as a step of its own. Extras.copies is the way to do it with a step."""
        self._only(msgspec.structs.replace(_NO_STEP, extras=Extras(copies=((source, target),))))

    def fill_block(self, block: int, value: float) -> None:
        """Overwrite one block on every rank; for tests that poison KV, with NaN where the dtype has one."""
        self._only(msgspec.structs.replace(_NO_STEP, fills=((block, value),)))

    def _only(self, step: Step) -> None:
        with self._in_step, torch.inference_mode():
            self._tell(step)
            self._prepare(step)

    def _tell(self, step: Step) -> None:
        if self.group is not None:
            self.group.broadcast(step)

    # ---- another rank ----------------------------------------------------------------------------------------------

    def follow(self, step: Step, on_layer: OnLayer | None = None) -> None:
        """This rank's part of a step that the leader runs. Raises GroupBroken, or whatever went wrong here."""
        self._own_threads()
        with torch.inference_mode():
            if not step.token_ids:
                self._prepare(step)
                return
            batch = build_batch(step, self.own_layout, self.loaded.device)
            rows = self._compute(step, batch, on_layer)
            if self.loaded.shard.is_first_stage:
                for call in step.logits:
                    self.loaded.model.logits(_pick(rows, call))

    # ---- all ranks -------------------------------------------------------------------------------------------------

    def _prepare(self, step: Step) -> None:
        for source, target in step.extras.copies:
            self.kv[:, target].copy_(self.kv[:, source])
        for block, value in step.fills:
            self.kv[:, block].fill_(value)

    def _compute(self, step: Step, batch: Batch, on_layer: OnLayer | None) -> Tensor:
        """This stage's layers. Returns the wanted rows of the last stage's hidden states on the first stage (elsewhere they
        mean nothing)."""
        try:
            return self._through_stages(step, batch, on_layer)
        except Exception as error:
            self._leave(error)
            raise

    def _through_stages(self, step: Step, batch: Batch, on_layer: OnLayer | None) -> Tensor:
        self._prepare(step)
        model, shard, group = self.loaded.model, self.loaded.shard, self.group
        if shard.is_first_stage:
            hidden = model.embed(batch)
        else:
            assert group is not None
            hidden = group.take_over(model.new_hidden(len(step.token_ids)))
        hidden = model.forward(batch, hidden, self.kv, on_layer)
        # Rows go back also where none is wanted: once they are here, the step's KV is in every rank's pool.
        comes_back = bool(step.logits) or not step.extras.overlaps
        if shard.is_last_stage:
            rows = hidden[batch.logit_rows] if len(step.logit_rows) != len(hidden) else hidden
            if group is not None and not shard.is_first_stage and comes_back:
                group.send_on(rows if len(rows) else hidden[:1])
            return rows
        assert group is not None
        group.send_on(hidden)
        if shard.is_first_stage and comes_back:
            return group.take_over(model.new_hidden(max(1, len(step.logit_rows))))
        return hidden

    def _leave(self, error: Exception) -> None:
        """An error amid a step is the end of the group, if there is one: its ranks are no longer in step."""
        if self.group is None or isinstance(error, GroupBroken):
            return
        self.group.close()
        where = f"rank {self.group.rank} of {self.group.parallel}"
        raise GroupBroken(f"{where} failed amid a step: {type(error).__name__}: {error}") from error

    def _own_threads(self) -> None:
        # OpenMP's thread count belongs to the calling thread, so it is set where run() is called, not where we were built.
        current = threading.get_ident()
        if self.num_threads is not None and self._threads_of.get(current) != self.num_threads:
            torch.set_num_threads(self.num_threads)
            self._threads_of = {current: self.num_threads}

    # ---- logits to tokens, on the leader -----------------------------------------------------------------------------

    def _read_logits(self, step: Step, wanted: Wanted, rows: Tensor) -> tuple[list[Sample], dict[str, list[TokenLogprobs | None]]]:
        """One call of Model.logits() after the other: the first is for the sequences that sample, if any does, the others for
        prompts. An error of the sampler waits until the last call: the other ranks make them all."""
        samples: list[Sample] = []
        scores: dict[str, list[TokenLogprobs | None]] = {
            sequence.request.request_id: [None] if sequence.num_computed == 0 else [] for sequence in wanted.scoring
        }
        failed: Exception | None = None
        scored = iter(wanted.scored)
        for index, call in enumerate(step.logits):
            logits = self._logits(rows, call)
            if failed is not None:
                continue
            try:
                if index == 0 and wanted.samples:
                    samples = _sample(logits, wanted)
                else:
                    part = next(scored)
                    request = part.sequence.request
                    scores[request.request_id] += score(logits, part.tokens, request.sampling.prompt_logprobs or 0)
            except Exception as error:
                failed = error
        if failed is not None:
            raise failed
        return samples, scores

    def _logits(self, rows: Tensor, call: list[int]) -> Tensor:
        try:
            logits = self.loaded.model.logits(_pick(rows, call))
        except Exception as error:
            self._leave(error)
            raise
        assert logits is not None, "the leader is tensor rank 0 of the first stage"
        return logits


class _Deferred:
    """The leader's on_layer in a group: its first error is kept for the end of the step, which the other ranks still share."""

    def __init__(self, on_layer: OnLayer) -> None:
        self.error: Exception | None = None
        self._on_layer = on_layer

    def __call__(self, layer: int) -> None:
        if self.error is not None:
            return
        try:
            self._on_layer(layer)
        except Exception as error:
            self.error = error


def _pick(rows: Tensor, call: list[int]) -> Tensor:
    """The rows of one call; they are distinct and ascending, so as many as there are means all."""
    return rows if len(call) == len(rows) else rows[torch.tensor(call, device=rows.device)]


def _sample(logits: Tensor, wanted: Wanted) -> list[Sample]:
    indices = [row for _, row in wanted.samples]
    if indices != list(range(len(logits))):  # siblings of one prompt draw from the same row
        logits = logits[torch.tensor(indices, device=logits.device)]
    return verified(sample(logits, [sequence for sequence, _ in wanted.samples]))


def _stats(chunks: SequenceOf[Chunk], samples: SequenceOf[Sample], seconds: float, forward_s: float, sample_s: float) -> StepStats:
    prefill_tokens = prefill_pairs = num_decode = decode_context = 0
    for chunk in chunks:
        sequence, length = chunk.sequence, chunk.num_tokens
        begin = sequence.num_computed
        if sequence.chunk is chunk or length == 1 and begin >= sequence.prompt_len:
            num_decode += 1
            decode_context += begin + 1
        else:
            prefill_tokens += length
            prefill_pairs += length * begin + length * (length + 1) // 2
    return StepStats(
        num_prefill_tokens=prefill_tokens,
        num_decode=num_decode,
        prefill_pairs=prefill_pairs,
        decode_context=decode_context,
        num_samples=len(samples),
        num_draft=sum(len(chunk.draft) for chunk in chunks),
        seconds=seconds,
        forward_s=forward_s,
        sample_s=sample_s,
    )
