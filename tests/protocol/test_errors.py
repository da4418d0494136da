"""Errors over the wire: the same class on the other side, or the nearest one that the other side knows."""

from __future__ import annotations

import pytest

from prefill.links import GoneAway
from protocol.errors import DeadlineExceeded, InternalError, Overloaded, TransferFailed, WorkerLost, from_failure, to_failure


@pytest.mark.parametrize("cls", [WorkerLost, TransferFailed, DeadlineExceeded, Overloaded])
def test_an_error_is_itself_on_the_other_side(cls):
    error = from_failure(to_failure(cls("why", param="which", retry_after=2.0)))
    assert (type(error), error.message, error.param, error.retry_after) == (cls, "why", "which", 2.0)


def test_a_modules_own_subclass_travels_as_what_it_is_a_case_of():
    """It became an InternalError: a request that a retry would have saved failed instead."""
    assert type(from_failure(to_failure(GoneAway("another life")))) is TransferFailed


def test_a_stranger_is_an_internal_error_without_its_text():
    error = from_failure(to_failure(ValueError("the prompt")))
    assert type(error) is InternalError
    assert "the prompt" not in error.message
