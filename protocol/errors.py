"""The world's faults, each with an HTTP status, whether a retry may help, and a message that names the knob to turn.

Our own broken invariants are `assert`s, not these. An error crosses a process boundary as a `Failure` and becomes the
same class again on the other side (`to_failure`, `from_failure`). `api/` maps them to HTTP in one place.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    """An error on the wire. `kind` is the class name; `retry_after` is in seconds; `reason` is one of the scheduler's words."""

    kind: str
    message: str
    param: str | None = None
    retry_after: float | None = None
    reason: str = ""


class TandemError(Exception):
    """Base of every fault that a user or a peer can meet.

    http_status: what a client sees. retryable: the same request may succeed elsewhere or later.
    param: the field, flag or configuration key at fault. retry_after: seconds, computed, never a constant guess.
    reason: why the scheduler refused, one word of `cluster.metric_table.REJECTIONS`; "" where it did not.
    """

    http_status: ClassVar[int] = 500
    error_type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.reason = ""


class InvalidRequest(TandemError):
    """The client's input is wrong; `param` names the field."""

    http_status = 400
    error_type = "invalid_request_error"


class PromptTooLong(InvalidRequest):
    """The prompt and what it asks for do not fit into the model's context."""

    code = "context_length_exceeded"


class Unauthorized(TandemError):
    """No key, or a wrong one."""

    http_status = 401
    error_type = "authentication_error"
    code = "invalid_api_key"


class NotFound(TandemError):
    """No such model or route."""

    http_status = 404
    error_type = "invalid_request_error"
    code = "model_not_found"


class Forbidden(InvalidRequest):
    """403: the key is good, and not for this."""

    http_status = 403
    code = "forbidden"
    error_type = "permission_error"


class ModelForbidden(Forbidden):
    """403: the model is served here, and not to this tenant."""

    code = "model_not_found"  # as OpenAI has it


class BodyTooLarge(TandemError):
    """The body is larger than gateway.max_body_bytes."""

    http_status = 413
    error_type = "invalid_request_error"
    code = "request_too_large"


class TenantOverLimit(TandemError):
    """429: this tenant or class is over its share, or its promise would be missed. Carries a computed retry_after."""

    http_status = 429
    error_type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retryable = True


class TenantsChanged(TandemError):
    """503: the tenants file changed while this request was on its way; it is judged once more, under the new one."""

    http_status = 503
    code = "tenants_changed"
    retryable = True


class Unsupported(TandemError):
    """501: the field is known, the feature is not built or not switched on."""

    http_status = 501
    error_type = "not_implemented_error"


class Overloaded(TandemError):
    """503: nobody could be served now; the queue is full. Carries a computed retry_after."""

    http_status = 503
    error_type = "overloaded_error"
    code = "overloaded"
    retryable = True


class NoWorker(Overloaded):
    """503: no worker of the needed role is alive."""

    code = "no_worker"


class DeadlineExceeded(TandemError):
    """504: a wait between processes, or the request as a whole, ran past its deadline."""

    http_status = 504
    error_type = "timeout_error"
    code = "deadline_exceeded"
    retryable = True


class WorkerLost(TandemError):
    """The worker that held this request died, or its connection broke."""

    http_status = 503
    code = "worker_lost"
    retryable = True


class GroupBroken(WorkerLost):
    """A rank of this worker died, failed in a step or was silent past the deadline: the whole group is over, and so is its
    worker."""


class ReservationRefused(TandemError):
    """The decode worker has no room for this request now; the scheduler places it again at the same queue position."""

    http_status = 503
    code = "reservation_refused"
    retryable = True


class Draining(ReservationRefused):
    """This worker is about to go and takes nothing new; another one does, at once."""

    code = "worker_draining"


class CannotServe(Draining):
    """501: this worker can never serve such a request (an overflow server without that sampling parameter); another one may."""

    http_status = 501
    error_type = "not_implemented_error"
    code = "worker_cannot"


class TransferFailed(TandemError):
    """KV did not arrive whole: digest mismatch, expired lease, stale epoch, broken link."""

    http_status = 503
    code = "kv_transfer_failed"
    retryable = True


class DamagedKV(TransferFailed):
    """Bytes arrived that differ from their digests."""


class HandshakeRefused(TandemError):
    """Two workers cannot exchange KV: the message holds both values of what differs."""

    http_status = 503
    code = "handshake_refused"


class IncompatibleWorkers(HandshakeRefused):
    """They were built or configured differently, so that no second hand-shake of these two lives can end otherwise."""


class InternalError(TandemError):
    """A bug of ours, caught at the boundary of one request."""

    code = "internal_error"


class ConfigError(TandemError):
    """A configuration key, flag, environment variable or file is wrong; start-up stops with this sentence."""

    http_status = 500
    code = "config_error"


class ModelError(TandemError):
    """A model cannot be loaded; the message names the file and what to do."""

    http_status = 500
    code = "model_error"


def _subclasses(cls: type[TandemError]) -> list[type[TandemError]]:
    found = [cls]
    for child in cls.__subclasses__():
        found += _subclasses(child)
    return found


_BY_NAME = {cls.__name__: cls for cls in _subclasses(TandemError)}


def to_failure(error: BaseException) -> Failure:
    """The wire form. An exception that is not ours becomes an InternalError without its text: it may hold a prompt.

    A subclass that another module made for itself travels as the class of this module that it is.
    """
    if isinstance(error, TandemError):
        kind = next(cls.__name__ for cls in type(error).__mro__ if _BY_NAME.get(cls.__name__) is cls)
        return Failure(kind, error.message, error.param, error.retry_after, error.reason)
    return Failure("InternalError", f"internal error ({type(error).__name__}); the worker's log has the details")


def from_failure(failure: Failure) -> TandemError:
    cls = _BY_NAME.get(failure.kind, InternalError)
    error = cls(failure.message, param=failure.param, retry_after=failure.retry_after)
    error.reason = failure.reason
    return error
