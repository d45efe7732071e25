from __future__ import annotations

import grpc
import pytest

from models.errors import BundleError, FingerprintMismatchError, UsageError
from serve.errors import (
    STATUS_CODES,
    InternalError,
    QueueFullError,
    ServeError,
    from_status,
    retry_after_ms,
    retry_metadata,
    to_status,
)


class FullerError(QueueFullError):
    """A kind that the table does not name, of a kind that it does."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("dims", found="0"), grpc.StatusCode.INVALID_ARGUMENT),
        (
            FingerprintMismatchError("c", expected="a", found="b", mend="m"),
            grpc.StatusCode.FAILED_PRECONDITION,
        ),
        (FullerError("queue"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_what_was_written_for_the_caller_reaches_the_caller(error, code):
    """The code is that of the nearest kind in the table, and the line is whole."""
    assert to_status(error) == (code, str(error))


@pytest.mark.parametrize("error", [BundleError("/srv/b: damaged"), KeyError("/etc/passwd")])
def test_what_was_not_written_for_the_caller_does_not(error, caplog):
    """A number instead, under which the log has the rest."""
    code, message = to_status(error)
    assert code is grpc.StatusCode.INTERNAL
    assert "/" not in message
    incident = message.split()[-1]
    assert f"incident {incident}: {type(error).__name__}" in caplog.text


@pytest.mark.parametrize("kind", [k for k in STATUS_CODES if issubclass(k, ServeError)])
def test_a_client_raises_what_the_server_raised(kind):
    """Over the wire and back every kind is itself, with its line."""
    error = from_status(*to_status(kind("the line")))
    assert type(error) is kind
    assert str(error) == "the line"


def test_a_code_that_we_never_send_is_named():
    """A proxy's answer is not hidden."""
    error = from_status(grpc.StatusCode.PERMISSION_DENIED, "go away")
    assert type(error) is InternalError
    assert str(error) == "PERMISSION_DENIED: go away"


def test_a_refusal_says_when_to_come_back():
    """In our own words and in those that gRPC's retries obey, never a moment too early."""
    full = QueueFullError("queue", retry_after_s=0.1234)
    assert retry_after_ms(full) == 124
    assert retry_metadata(full) == (("retry-after-ms", "124"), ("grpc-retry-pushback-ms", "124"))


@pytest.mark.parametrize("error", [QueueFullError("queue"), KeyError("k")])
def test_nothing_is_said_of_when_to_come_back_where_nobody_knows(error):
    """No number is made up."""
    assert retry_metadata(error) == ()
