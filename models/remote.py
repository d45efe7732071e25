"""An encoder that runs behind another Horace server: `horace://host:port/model`.

Decoding happens here, on the machine that has the images; uint8 tensors cross the wire.
The server's fingerprint and preprocessing are read once, on opening; a server that answers
with another fingerprint later has changed its model, and that is an error, not a vector.

`horaces://` connects by TLS, with the authorities of this system or those of the PEM file that
the variable HORACE_TLS_CA names. An API key is in the variable HORACE_API_KEY: a URI is written
into what is built with it, and a key must not be.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray

from models.endpoints import has_port
from models.errors import (
    EncoderError,
    EncoderUnavailableError,
    FingerprintMismatchError,
    HoraceError,
    reason_of,
)
from models.preprocess import PreprocessSpec, check_batch, preprocess
from models.wire import image_to_wire, vectors_from_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc

TIMEOUT_S = 30.0
"""Of one `encode`, every request and attempt included: a batch of a large encoder takes seconds
on a CPU, and a server takes the thread that calls this for stuck after a minute."""

AWAY = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,  # a stopping gRPC server ends so what it has not looked at
    }
)
"""What a server says, or gRPC for it, that may answer later."""

RETRY = {
    "maxAttempts": 5,
    "initialBackoff": "0.2s",
    "maxBackoff": "5s",
    "backoffMultiplier": 3,
    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
}
"""gRPC tries again by itself, within the deadline: a server that restarts, or has no room for
a moment, must not end a build of hours."""

RETRIED_METHOD = {"service": "horace.v1.Horace", "method": "Embed"}
"""Opening is not tried again: a wrong address should be told at once."""

MAX_RETRIED_BYTES = (1 << 31) - 1
"""Of a request: as many as gRPC can be told, and as a message can have."""

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    # What is larger is not tried again; by default 256 KiB, less than two images of 224 x 224.
    ("grpc.per_rpc_retry_buffer_size", MAX_RETRIED_BYTES),
    ("grpc.lb_policy_name", "round_robin"),  # over all servers that a name stands for
    # A machine that is gone says no farewell, and the kernel waits a quarter of an hour for it: a
    # connection that says nothing is asked whether it lives, and both take less than a batch may.
    # grpcio 1.85 goes by `grpc.http2.ping_timeout_ms`, a minute where not given.
    ("grpc.keepalive_time_ms", 15_000),  # while a call waits: a server ends who asks idly so often
    ("grpc.http2.ping_timeout_ms", 10_000),
    (
        "grpc.service_config",
        json.dumps({"methodConfig": [{"name": [RETRIED_METHOD], "retryPolicy": RETRY}]}),
    ),
)

KEY_VARIABLE, CA_VARIABLE = "HORACE_API_KEY", "HORACE_TLS_CA"

IMAGE_OVERHEAD_BYTES = 64
"""What an image takes in a message beside its pixels, generously."""


class RemoteEncoder:
    """One model of a Horace server. Safe to call from several threads."""

    def __init__(
        self,
        target: str,
        *,
        tls: bool = False,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect to `host:port/model`, or to the default model of `host:port`.

        Args:
            target: where, and which model.
            tls: whether the connection is secured.
            timeout_s: of one `encode`, of however many requests; and of opening.
            clock: monotonic seconds.

        Raises:
            EncoderError: the server does not answer, or serves no such model, or a variable
                holds something that cannot be used.
        """
        address, _, model = target.partition("/")
        self._uri = f"horace{'s' if tls else ''}://{target}"
        if not has_port(address):
            raise EncoderError(
                self._uri, expected="HOST:PORT[/MODEL], a port of 1 to 65535", found=address
            )
        self._timeout_s, self._clock = timeout_s, clock
        self._metadata = _read_key(os.environ.get(KEY_VARIABLE, ""))
        if tls:
            credentials = grpc.ssl_channel_credentials(_read_ca(os.environ.get(CA_VARIABLE, "")))
            self._channel = grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = pb_grpc.HoraceStub(self._channel)
        try:
            self._model = self._find_model(model)
            spec = json.loads(self._model.preprocessing_json)
            self.preprocessing = PreprocessSpec.from_json(spec)
        except (HoraceError, ValueError):
            self._channel.close()
            raise

    def __repr__(self) -> str:
        return f"<RemoteEncoder {self._uri}>"

    @property
    def name(self) -> str:
        """The model's name on its server."""
        return self._model.name

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the model that the server had when this was opened."""
        return self._model.fingerprint

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._model.dim

    def preprocess(self, data: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Decode and fit one image to (H, W, C) uint8, here.

        Raises:
            ImageError: this image cannot be used.
        """
        return preprocess(data, self.preprocessing)

    def encode(self, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed (N, H, W, C) uint8 as (N, D) float32 there, not normalised.

        Raises:
            EncoderError: the batch is of the wrong shape, or the server failed.
            EncoderUnavailableError: it does not answer, or has no room, for now.
            FingerprintMismatchError: the server has changed its model.
        """
        check_batch(images_NHWC, self.preprocessing)
        step = self._images_per_request()
        deadline_s = self._clock() + self._timeout_s
        parts = [
            self._encode(images_NHWC[n : n + step], deadline_s)
            for n in range(0, len(images_NHWC), step)
        ]
        return np.concatenate([np.empty((0, self.dim), np.float32), *parts])

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def _images_per_request(self) -> int:
        """Keep within what the server takes, in images and in bytes."""
        spec = self.preprocessing
        image_bytes = spec.height * spec.width * spec.channels + IMAGE_OVERHEAD_BYTES
        by_bytes = self._model.max_request_bytes // image_bytes
        return max(1, min(self._model.max_images_per_request, by_bytes))

    def _encode(self, images_NHWC: NDArray[np.uint8], deadline_s: float) -> NDArray[np.float32]:
        """Embed one request's worth of images."""
        request = pb.EmbedRequest(
            model=self.name,
            images=[image_to_wire(image) for image in images_NHWC],
            skip_normalize=True,
        )
        left_s = max(0.001, deadline_s - self._clock())
        try:
            reply = self._stub.Embed(request, timeout=left_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._translate(error) from error
        if reply.fingerprint != self.fingerprint:
            raise FingerprintMismatchError(
                self._uri,
                expected=self.fingerprint,
                found=reply.fingerprint,
                mend="the server has changed its model: open it again and start anew",
            )
        failed = [status.message for status in reply.statuses if status.code != pb.OK]
        if failed:
            raise EncoderError(f"{self._uri} refused {len(failed)} images: {failed[0]}")
        return vectors_from_wire(reply.vectors)

    def _find_model(self, name: str) -> pb.Model:
        """Ask the server for the model of that name, or for its default where it is empty."""
        try:
            reply = self._stub.ListModels(
                pb.ListModelsRequest(), timeout=self._timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise self._translate(error) from error
        models: list[pb.Model] = list(reply.models)
        for model in models:
            if model.name == name or (not name and model.is_default):
                return model
        raise EncoderError(
            self._uri,
            expected=f"a model named {name!r}" if name else "a default model",
            found=", ".join(model.name for model in models) or "no model",
        )

    def _translate(self, error: grpc.RpcError) -> EncoderError:
        """Turn gRPC's error into one line."""
        code = error.code().name if isinstance(error, grpc.Call) else type(error).__name__
        details = error.details() if isinstance(error, grpc.Call) else str(error)
        is_away = isinstance(error, grpc.Call) and error.code() in AWAY
        is_stranger = code == "UNAUTHENTICATED"
        return (EncoderUnavailableError if is_away else EncoderError)(
            self._uri,
            expected="a server that knows this caller"
            if is_stranger
            else "a Horace server that answers",
            found=f"{code}: {details}",
            mend=f"give a key of that server in {KEY_VARIABLE}"
            if is_stranger
            else "check that `python -m serve` runs there",
        )


def _read_key(key: str) -> tuple[tuple[str, str], ...]:
    """Give the metadata of a key; none where there is no key.

    Raises:
        EncoderError: no header can carry it; it is not shown.
    """
    if not key:
        return ()
    if not re.fullmatch("[!-~]+", key):
        raise EncoderError(
            KEY_VARIABLE, expected="visible ASCII without spaces", found="something else"
        )
    return (("authorization", f"Bearer {key}"),)


def _read_ca(path: str) -> bytes | None:
    """Read the authorities that may vouch for the server; None for those of the system.

    Raises:
        EncoderError: the file cannot be read.
    """
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        found = reason_of(error)
        raise EncoderError(
            f"{CA_VARIABLE} {path}", expected="a PEM file of authorities", found=found
        ) from error
