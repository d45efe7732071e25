"""An encoder that a fleet of Tritons runs: `triton://host:port,host2:port/model`.

Rules:
    Decoding happens here; uint8 tensors cross the wire.
    Fingerprint and preprocessing are those that `train.export.triton` wrote into the model's
    configuration. A model without them is refused: its vectors could be anybody's.
    Every endpoint is asked who it is before its first request, after every failure, and every
    `RECHECK_S`: one that serves another encoder is never used. A server that says so in its
    replies, as Horace does, is held to it by every reply.
    What fails goes to another endpoint, within the time of the call; `models.endpoints`
    decides to which. Embedding twice does no harm. A request that is itself wrong is not
    tried again.

The engine calls `encode` from as many threads as it has instances; that is what keeps
several endpoints busy.

Source: Triton's grpc_service.proto, as the wheel of tritonclient has it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import grpc
import numpy as np
from numpy.typing import NDArray

from models.endpoints import Endpoint, Endpoints, has_port
from models.errors import EncoderError, FingerprintMismatchError, HoraceError
from models.preprocess import PreprocessSpec, check_batch, preprocess
from models.triton_connection import Connection, Failure, read_answer, translate
from models.triton_wire import TritonModel, read_reply, write_request

log = logging.getLogger("horace.triton")

TIMEOUT_S = 30.0
"""Of one `encode`, every part and attempt included: well before a server takes the thread that
calls it for stuck."""

ATTEMPT_TIMEOUT_S = 10.0
"""Of one attempt: an endpoint that hangs must leave time for another."""

OPEN_TIMEOUT_S = 5.0
"""Of asking an endpoint what it serves."""

RECHECK_S = 10.0
"""How old what an endpoint said of itself may be: Triton's replies do not name the encoder,
and its repository may be changed under it."""

BUSY_PAUSE_S = 0.05


class TritonEncoder:
    """One model of one or more Tritons. Safe to call from several threads."""

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = TIMEOUT_S,
        attempt_timeout_s: float = ATTEMPT_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect to `host:port/model`, or to several as `host:port,host2:port/model`.

        Endpoints that do not answer now are asked again later; one must.

        Args:
            target: where, and which model.
            timeout_s: of one `encode`, of however many requests.
            attempt_timeout_s: of one attempt of a request.
            clock: monotonic seconds.

        Raises:
            EncoderError: no endpoint answers, or has that model, or the model's configuration
                does not say what it is.
            FingerprintMismatchError: the endpoints serve different encoders.
        """
        addresses, self.name = _read_target(target)
        self._uri = f"triton://{target}"
        self._timeout_s, self._attempt_timeout_s = timeout_s, attempt_timeout_s
        self._clock = clock
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._endpoints = Endpoints(addresses)
        self._connections = {
            endpoint: Connection(endpoint.address) for endpoint in self._endpoints.all
        }
        try:
            self._model = self._open()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<TritonEncoder {self._uri} {list(self._endpoints.all)}>"

    @property
    def fingerprint(self) -> str:
        """The fingerprint that every endpoint has to have."""
        return self._model.fingerprint

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._model.dim

    @property
    def preprocessing(self) -> PreprocessSpec:
        """How bytes become what `encode` takes."""
        return self._model.preprocessing

    def preprocess(self, data: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Decode and fit one image to (H, W, C) uint8, here.

        Raises:
            ImageError: this image cannot be used.
        """
        return preprocess(data, self.preprocessing)

    def encode(self, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed (N, H, W, C) uint8 as (N, D) float32 there, not normalised.

        Raises:
            EncoderError: the batch is of the wrong shape, or no endpoint could embed it.
            EncoderUnavailableError: no endpoint answered in time.
            FingerprintMismatchError: the endpoints have changed their model.
        """
        check_batch(images_NHWC, self.preprocessing)
        step = self._model.max_batch_size
        deadline_s = self._clock() + self._timeout_s
        parts = [
            self._encode(images_NHWC[n : n + step], deadline_s)
            for n in range(0, len(images_NHWC), step)
        ]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([np.empty((0, self.dim), np.float32), *parts])

    def close(self) -> None:
        """Close the connections; what waits to try again gives up."""
        self._closed.set()
        for connection in self._connections.values():
            connection.close()

    # Opening.

    def _open(self) -> TritonModel:
        """Ask every endpoint what it serves; all that answer must serve one encoder."""
        models: dict[Endpoint, TritonModel] = {}
        errors: list[HoraceError] = []
        asked = [
            (endpoint, self._connections[endpoint].ask(self.name, OPEN_TIMEOUT_S))
            for endpoint in self._endpoints.all
        ]  # all at once: one that hangs costs its time once
        for endpoint, answer in asked:
            try:
                models[endpoint] = read_answer(answer, self._label(endpoint), self.name)
            except Failure as failure:
                errors.append(failure.error)
                endpoint.in_flight += 1
                self._endpoints.failed(endpoint, self._clock())
        if not models:
            raise errors[0]
        first = next(iter(models.values()))
        for endpoint, model in models.items():
            self._connections[endpoint].note(model, self._clock())
            if model.fingerprint != first.fingerprint:
                raise self._mismatch(first.fingerprint, model.fingerprint, endpoint)
        for error in errors:
            log.warning("%s; it is asked again later", error)
        return min(models.values(), key=lambda model: model.max_batch_size)

    # Encoding.

    def _encode(self, images_NHWC: NDArray[np.uint8], deadline_s: float) -> NDArray[np.float32]:
        """Embed one request's worth of images, on whichever endpoint can."""
        tried: set[Endpoint] = set()
        while True:
            with self._lock:
                endpoint = self._endpoints.take(self._clock(), tried=tried)
            try:
                vectors_ND = self._attempt(endpoint, images_NHWC, deadline_s)
            except Failure as failure:
                tried.add(endpoint)
                all_tried = len(tried) == len(self._endpoints.all)
                pause_s = self._note(endpoint, failure, tried)
                in_vain = failure.is_final or (failure.is_lasting and all_tried)
                late = self._clock() + pause_s >= deadline_s
                if in_vain or late or self._closed.wait(pause_s):
                    raise failure.error from failure.__cause__
            except BaseException:
                with self._lock:
                    self._endpoints.give_back(endpoint)
                raise
            else:
                with self._lock:
                    self._endpoints.succeeded(endpoint)
                return vectors_ND

    def _attempt(
        self, endpoint: Endpoint, images_NHWC: NDArray[np.uint8], deadline_s: float
    ) -> NDArray[np.float32]:
        """Embed on one endpoint, which is known to serve the right encoder.

        One that was away on opening, or was set up anew, may take fewer images at once.

        Raises:
            Failure: it did not.
        """
        connection = self._connections[endpoint]
        self._check_identity(endpoint, connection, deadline_s)
        step = connection.max_batch_size
        parts = [
            self._infer(endpoint, connection, images_NHWC[n : n + step], deadline_s)
            for n in range(0, len(images_NHWC), step)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _infer(
        self,
        endpoint: Endpoint,
        connection: Connection,
        images_NHWC: NDArray[np.uint8],
        deadline_s: float,
    ) -> NDArray[np.float32]:
        """Send one request.

        Raises:
            Failure: it came to nothing, or its vectors are another encoder's.
        """
        request = write_request(self.name, images_NHWC)
        try:
            reply = connection.stub.ModelInfer(request, timeout=self._left_s(deadline_s))
        except (grpc.RpcError, ValueError) as error:  # ValueError: the channel is closed
            connection.checked_s = None
            raise translate(error, self._label(endpoint)) from error
        said = reply.parameters["fingerprint"].string_param if reply.parameters else ""
        if said and said != self.fingerprint:
            connection.checked_s = None
            raise Failure(self._mismatch(self.fingerprint, said, endpoint), is_lasting=True)
        try:
            return read_reply(reply, len(images_NHWC), self.dim, self._label(endpoint))
        except EncoderError as error:
            raise Failure(error, is_lasting=True) from error

    def _check_identity(
        self, endpoint: Endpoint, connection: Connection, deadline_s: float
    ) -> None:
        """Ask an endpoint what it serves, if that was not done lately.

        Raises:
            Failure: it does not answer, or serves another encoder.
        """
        now_s = self._clock()
        if connection.checked_s is not None and now_s < connection.checked_s + RECHECK_S:
            return
        timeout_s = min(OPEN_TIMEOUT_S, self._left_s(deadline_s))
        answer = connection.ask(self.name, timeout_s)
        found = read_answer(answer, self._label(endpoint), self.name)
        if found.fingerprint != self.fingerprint:
            error = self._mismatch(self.fingerprint, found.fingerprint, endpoint)
            raise Failure(error, is_lasting=True)
        connection.note(found, now_s)

    def _note(self, endpoint: Endpoint, failure: Failure, tried: set[Endpoint]) -> float:
        """Keep account of a failure; give how long to wait before the next attempt."""
        with self._lock:
            now_s = self._clock()
            if failure.is_final or failure.is_busy:
                self._endpoints.give_back(endpoint)
            elif self._endpoints.failed(endpoint, now_s):
                log.warning("%s; it is left out for a while", failure.error)
            if self._endpoints.has_other(now_s, tried=tried):
                return 0.0
            return max(self._endpoints.wait_s(now_s), BUSY_PAUSE_S if failure.is_busy else 0.0)

    def _left_s(self, deadline_s: float) -> float:
        """Give the time that one attempt may take."""
        return max(0.001, min(self._attempt_timeout_s, deadline_s - self._clock()))

    def _label(self, endpoint: Endpoint) -> str:
        """Name one endpoint in messages."""
        return f"triton://{endpoint.address}/{self.name}"

    def _mismatch(self, expected: str, found: str, endpoint: Endpoint) -> FingerprintMismatchError:
        """Say that an endpoint serves another encoder."""
        return FingerprintMismatchError(
            self._label(endpoint),
            expected=expected,
            found=found,
            mend="have every endpoint serve one encoder, then open it again",
        )


def _read_target(target: str) -> tuple[list[str], str]:
    """Take `host:port,host2:port/model` apart.

    Raises:
        EncoderError: it is not of that form.
    """
    addresses, _, model = target.partition("/")
    hosts = addresses.split(",")
    if not model or not all(map(has_port, hosts)) or len(set(hosts)) < len(hosts):
        raise EncoderError(
            f"triton://{target}", expected="triton://HOST:PORT[,HOST2:PORT...]/MODEL", found=target
        )
    return hosts, model
