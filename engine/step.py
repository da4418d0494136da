"""One engine step in plain integers: what the leader of a group broadcasts, and what every rank builds the same tensors from.

The leader makes it in `engine/batch.py` and sends it in `engine/group.py`; `engine/runner.py` and `engine/follower.py` do it.
No sequence, no request and no prompt text is in it, and nothing that a rank would have to look up.
"""

from __future__ import annotations

import msgspec

Pairs = tuple[tuple[int, int], ...]


class Extras(msgspec.Struct, frozen=True, array_like=True):
    """What a step does beside its tokens, on every rank's own pool.

    copies: (source block, target block), done before anything else: copy on write. pushes: (grant_id, ((block, index in the
    grant), ...)): blocks that this step completes and that leave, layer by layer, for that grant's decode worker. overlaps: a
    step that nobody wants logits of need not be done on the later stages when ModelRunner.run() returns, so that they
    compute one chunk of a prompt while the first one computes the next. Steps stay in order on every rank; but whoever lets
    others than these ranks write to the pool waits.
    """

    copies: Pairs = ()
    pushes: tuple[tuple[str, Pairs], ...] = ()
    overlaps: bool = False


NOTHING = Extras()


class Step(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """Span i is lengths[i] tokens of one sequence that follow its contexts[i] computed ones and lie in blocks[i].

    logit_rows: the rows of the batch whose hidden states are wanted, ascending. logits: one entry per call of Model.logits(),
    in order: indexes into logit_rows. fills: (block, value), for a pool that is to be clean or poisoned. All lists are empty
    where a step only copies or fills.
    """

    token_ids: list[int]
    lengths: list[int]
    contexts: list[int]
    blocks: list[list[int]]
    logit_rows: list[int]
    logits: list[list[int]]
    extras: Extras = NOTHING
    fills: tuple[tuple[int, float], ...] = ()


class Idle(msgspec.Struct, frozen=True, array_like=True, tag="idle"):
    """Nothing to do; it only keeps the others' wait below its deadline."""


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """The end: Follower.run() returns."""


Message = Step | Idle | Stop

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> Message:
    return _decoder.decode(data)
