"""The product with one safeguard taken out, for each safeguard: what the fault tests must notice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import cluster.gateway
import cluster.scheduler_service
import cluster.walk
import decode.handover
import decode.sequences
import decode.worker
import decode.writers
import kvtransfer.handoff
import kvtransfer.receiving
import prefill.handover
import prefill.links
import prefill.worker
from kvtransfer.handoff import Effect
from protocol.errors import Failure, InternalError
from protocol.messages import Ok, Outcome, TokenFrame
from protocol.ticket import Landed
from tests.faults import stores, wire


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def digest_check_skipped() -> Any:
    return _replaced(kvtransfer.receiving, "verify", lambda *_: [])


def quarantine_skipped() -> Any:
    """A receiver of mapped memory that claims to refuse late stores."""

    def forget(receiver: Any, grant_id: str) -> bool:
        receiver._live.pop(grant_id, None)
        return True

    return _replaced(stores.VirtualReceiver, "forget", forget)


def released_without_the_writers_word() -> Any:
    """A quarantine that ends when asking for the acknowledgement failed."""

    async def ask(handover: Any, peer: Any, grant_id: str) -> None:
        try:
            with contextlib.suppress(Exception):
                await peer.call(decode.handover.StopWriting(grant_id), 0.05)
            handover._end(grant_id, handover._inbound.writer_done(grant_id), None)
        finally:
            del handover._asking[grant_id]

    return _replaced(decode.handover.Handover, "_ask_to_stop", ask)


def acknowledged_before_it_stopped() -> Any:
    """A prefill worker that answers StopWriting while a store of its may be under way."""

    async def stop_writing(handover: Any, message: Any) -> Ok:
        handover._void(message.grant_id)
        return Ok()

    return _replaced(prefill.handover.Handover, "stop_writing", stop_writing)


def source_released_before_it_was_read() -> Any:
    """A prefill worker that gives a prompt's blocks back when its token is out."""
    first_tokens = prefill.worker.PrefillWorker._first_tokens

    def early(worker: Any, job: Any, sampled: list[Any]) -> None:
        first_tokens(worker, job, sampled)
        worker.pool.release(job.sequence.blocks)
        job.sequence.blocks = []

    return _replaced(prefill.worker.PrefillWorker, "_first_tokens", early)


def silence_taken_for_death() -> Any:
    return _replaced(decode.writers.Writer, "is_dead", property(lambda writer: writer.peer.is_closed))


def epoch_ignored_at_the_gateway() -> Any:
    async def handle(gateway: Any, peer: Any, message: Any) -> None:
        updates = message.updates if isinstance(message, TokenFrame) else (message,)
        for update in updates:
            walk = gateway._walks.get(update.request_id)
            if walk is not None:
                walk.inbox.put(update)

    return _replaced(cluster.gateway.Gateway, "handle", handle)


def gap_not_held() -> Any:
    """Tokens are delivered in the order in which they come."""

    def merge(walk: Any, update: Any, now: float) -> list[Any]:
        choice = walk.choices[update.choice]
        skip = max(0, len(choice.token_ids) - update.index)
        if choice.finish_reason is not None or skip >= len(update.tokens):
            return []
        walk.first_token_at = walk.first_token_at or now
        walk.last_progress_at = now
        return [walk._deliver(choice, update, skip)]

    return _replaced(cluster.walk.Walk, "_merge", merge)


def repeat_delivered() -> Any:
    """What was delivered before a resumption is not skipped."""
    deliver = cluster.walk.Walk._deliver
    return _replaced(cluster.walk.Walk, "_deliver", lambda walk, choice, update, skip: deliver(walk, choice, update, 0))


def outcome_dropped() -> Any:
    tell = cluster.gateway.Gateway._tell_scheduler

    def forgetful(gateway: Any, message: Any) -> Any:
        return tell(gateway, Ok() if isinstance(message, Outcome) else message)

    return _replaced(cluster.gateway.Gateway, "_tell_scheduler", forgetful)


def copy_on_write_skipped() -> Any:
    take = decode.sequences.Sequences.take_copies

    def take_copies(sequences: Any, chunks: Any) -> list[tuple[int, int]]:
        sequences._pool.release([shared for shared, _ in take(sequences, chunks)])
        return []

    return _replaced(decode.sequences.Sequences, "take_copies", take_copies)


def manifest_used_twice() -> Any:
    """A grant is not remembered as over, nor its epoch."""
    return _replaced(kvtransfer.handoff.Inbound, "check_seal", lambda *_: None)


def lost_link_not_owed() -> Any:
    """What a prefill worker said over a link that broke is taken as heard."""
    return _replaced(prefill.links.Links, "_owe", lambda *_: None)


def leases_never_end() -> Any:
    return _replaced(kvtransfer.handoff.Inbound, "expired", lambda *_: [])


def dead_gateways_work_goes_on() -> Any:
    return _replaced(decode.worker.DecodeWorker, "on_lost", lambda worker, peer: worker.handover.tick())


def cancel_not_sent() -> Any:
    return _replaced(cluster.gateway.Gateway, "_cancel", lambda *_: None)


def dead_workers_still_placed() -> Any:
    """A scheduler that notices no broken connection and no missing heartbeat."""
    service = cluster.scheduler_service.SchedulerService

    @contextlib.contextmanager
    def both() -> Iterator[None]:
        import scheduler.scheduler

        with _replaced(service, "on_lost", lambda *_: None), _replaced(scheduler.scheduler.Scheduler, "tick", lambda *_: []):
            yield

    return both()


def verifying_blocks_released_on_cancel() -> Any:
    """A cancellation gives blocks back while a verification still reads them."""
    cancelled = kvtransfer.handoff.Inbound.cancelled

    def released(inbound: Any, grant_id: str, *, writer_stopped: bool = False) -> Effect:
        held = inbound._held.get(grant_id)
        if held is not None and held.phase is kvtransfer.handoff.InboundPhase.VERIFYING:
            cancelled(inbound, grant_id, writer_stopped=writer_stopped)
            return Effect.RELEASE
        return cancelled(inbound, grant_id, writer_stopped=writer_stopped)

    return _replaced(kvtransfer.handoff.Inbound, "cancelled", released)


def admission_asked_once() -> Any:
    return _replaced(cluster.gateway, "ASK_AGAIN_S", 1e9)


def own_errors_unknown_to_others() -> Any:
    """A module's own subclass of an error crosses the wire under a name that nobody else knows."""

    def by_name(error: BaseException) -> Failure:
        return Failure(type(error).__name__, getattr(error, "message", ""))

    return _replaced(wire, "to_failure", by_name)


def unfinished_handshake_not_owed() -> Any:
    """A hand-shake that failed halfway is forgotten, though decode may have taken us for its writer."""
    owe = prefill.links.Links._owe

    def only_with_something_to_say(links: Any, incarnation: str, address: str, grant_ids: Any) -> None:
        if grant_ids != ():
            owe(links, incarnation, address, grant_ids)

    return _replaced(prefill.links.Links, "_owe", only_with_something_to_say)


def claims_believed() -> Any:
    """What a lost writer said of its blocks is kept without being read again."""

    async def believed(receivers: Any, grant: Any, manifest: Any) -> list[tuple[int, int]]:
        return [] if grant.grant_id.endswith("/kept") else await verify(receivers, grant, manifest)

    verify = kvtransfer.receiving.GroupReceivers.verify
    return _replaced(kvtransfer.receiving.GroupReceivers, "verify", believed)


def kept_under_another_hash() -> Any:
    """The blocks that the decode worker had cached are not counted when hashes are given to those that it keeps."""
    give_back = decode.handover.Handover._give_back

    def shifted(handover: Any, grant_id: str, effect: Any, hashes: Any) -> None:
        give_back(handover, grant_id, effect, [*hashes[1:], *hashes[:1]])

    return _replaced(decode.handover.Handover, "_give_back", shifted)


def told_digests_believed() -> Any:
    """Instead of reading what has landed, the decode worker takes the digests that it was told."""

    def believe(pool: Any, arrivals: Any, landed: Any) -> None:
        for i in range(landed.num_rows):
            width = landed.count * 16
            arrivals.put(landed.row + i, landed.first, landed.digests[i * width : (i + 1) * width])

    return _replaced(kvtransfer.receiving, "hash_landed", believe)


def hashed_is_good() -> Any:
    """Sealing looks whether every run has been hashed, not at the digests."""
    return _replaced(kvtransfer.receiving, "is_known_good", lambda arrivals, manifest: arrivals.is_complete)


def forged_papers_taken() -> Any:
    """Whoever reaches the control socket may say what has landed."""
    is_authentic = kvtransfer.handoff.is_authentic
    return _replaced(
        kvtransfer.handoff, "is_authentic", lambda paper, secret: isinstance(paper, Landed) or is_authentic(paper, secret)
    )


def draining_is_the_requests_fault() -> Any:
    """What a drain interrupts is failed with an error that nobody tries again."""
    return _replaced(decode.worker, "WorkerLost", InternalError)


def drained_prompts_fail() -> Any:
    return _replaced(prefill.worker, "WorkerLost", InternalError)


def draining_worker_refuses_for_good() -> Any:
    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with _replaced(decode.worker, "Draining", InternalError), _replaced(prefill.worker, "Draining", InternalError):
            yield

    return both()


MUTANTS: dict[str, Callable[[], Any]] = {
    made.__name__: made
    for made in (
        digest_check_skipped,
        quarantine_skipped,
        released_without_the_writers_word,
        acknowledged_before_it_stopped,
        source_released_before_it_was_read,
        silence_taken_for_death,
        epoch_ignored_at_the_gateway,
        gap_not_held,
        repeat_delivered,
        outcome_dropped,
        copy_on_write_skipped,
        manifest_used_twice,
        lost_link_not_owed,
        leases_never_end,
        dead_gateways_work_goes_on,
        cancel_not_sent,
        dead_workers_still_placed,
        verifying_blocks_released_on_cancel,
        admission_asked_once,
        own_errors_unknown_to_others,
        unfinished_handshake_not_owed,
        claims_believed,
        kept_under_another_hash,
        told_digests_believed,
        hashed_is_good,
        forged_papers_taken,
        draining_is_the_requests_fault,
        drained_prompts_fail,
        draining_worker_refuses_for_good,
    )
}
