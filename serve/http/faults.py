"""How what went wrong is told over HTTP: one table from gRPC's codes, two errors of its own.

Rules:
    Every refusal is JSON: {"error": {"code": ..., "message": ...}}, the code being gRPC's name
    in lower case, so that an application handles both doors alike.
    The message is the one that gRPC carries; what is unknown is an incident number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import grpc
from starlette.responses import Response

from serve.errors import RETRY_AFTER_S, STATUS_CODES, ServeError, to_status
from serve.http.replies import json_response

Code = grpc.StatusCode


class BodyTooLargeError(ServeError):
    """A body with more bytes than a request may have."""


class MediaTypeError(ServeError):
    """A body in a form that is not read here."""


HTTP_STATUS: dict[grpc.StatusCode, int] = {
    Code.INVALID_ARGUMENT: 400,
    Code.UNAUTHENTICATED: 401,
    Code.NOT_FOUND: 404,
    Code.FAILED_PRECONDITION: 412,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.CANCELLED: 499,
    Code.INTERNAL: 500,
    Code.UNAVAILABLE: 503,
    Code.DEADLINE_EXCEEDED: 504,
}
"""What each of gRPC's codes is called in HTTP."""

OWN_STATUS: dict[type[ServeError], tuple[int, str]] = {
    BodyTooLargeError: (413, "body_too_large"),
    MediaTypeError: (415, "unsupported_media_type"),
}
"""What gRPC has no code for."""


class Aborted(Exception):
    """How a servicer ended a call.

    Attributes:
        code: gRPC's.
        message: for the caller.
        retry_after_s: when the call may do better, where that was said.
    """

    def __init__(
        self, code: grpc.StatusCode, message: str, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.retry_after_s = code, message, retry_after_s


def code_of(error: Exception) -> grpc.StatusCode:
    """Give gRPC's code of an error, for who counts them."""
    if isinstance(error, Aborted):
        return error.code
    for kind in type(error).__mro__:
        if code := STATUS_CODES.get(kind):
            return code
    return Code.INVALID_ARGUMENT if type(error) in OWN_STATUS else Code.INTERNAL


def refuse(error: Exception) -> Response:
    """Answer with what went wrong: a servicer's `Aborted`, or whatever was raised before."""
    if isinstance(error, Aborted):
        return _answer(error.code, error.message, error.retry_after_s)
    for kind, (status, code) in OWN_STATUS.items():
        if isinstance(error, kind):
            return refuse_with(status, code, str(error), {})
    grpc_code, message = to_status(error)
    return _answer(grpc_code, message, getattr(error, "retry_after_s", None))


def refuse_with(status: int, code: str, message: str, headers: Mapping[str, str]) -> Response:
    """Answer with a status, a code for programs and a message for people."""
    return json_response({"error": {"code": code, "message": message}}, status, headers)


def _answer(code: grpc.StatusCode, message: str, retry_after_s: float | None) -> Response:
    """Answer as the table has it."""
    status = HTTP_STATUS[code]
    headers = {}
    if status in (429, 503):
        wait_s = RETRY_AFTER_S if retry_after_s is None else retry_after_s
        if wait_s >= 0:
            headers["retry-after"] = str(math.ceil(wait_s))  # the header counts whole seconds
            headers["retry-after-ms"] = str(math.ceil(wait_s * 1e3))
    if status == 401:
        headers["www-authenticate"] = 'Bearer realm="horace"'
    return refuse_with(status, code.name.lower(), message, headers)


assert set(STATUS_CODES.values()) <= set(HTTP_STATUS), "an error without a status of HTTP"
