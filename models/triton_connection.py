"""The channel to one Triton, and what its failures mean."""

from __future__ import annotations

from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from models.errors import EncoderError, EncoderUnavailableError, HoraceError
from models.triton_wire import TritonModel, read_config

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
)
"""Ejection has a backoff of its own; gRPC's must not make an endpoint's return later."""

OURS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
    }
)
"""What another endpoint would say, too."""

LASTING = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})
"""What an endpoint says whose model fails: it is no use to ask it the same again."""

BUSY = frozenset({grpc.StatusCode.RESOURCE_EXHAUSTED})
"""What an endpoint says that is well, and has no room now."""


class Failure(Exception):
    """An attempt that failed.

    Attributes:
        error: what the caller is told if there is no other attempt.
        is_final: whether another endpoint would say the same.
        is_lasting: whether this endpoint will say the same in a moment.
        is_busy: whether the endpoint is well, and has no room.
    """

    def __init__(
        self,
        error: HoraceError,
        *,
        is_final: bool = False,
        is_lasting: bool = False,
        is_busy: bool = False,
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.is_final, self.is_lasting, self.is_busy = is_final, is_lasting, is_busy


class Connection:
    """The channel to one endpoint, and what it said last of what it serves.

    Attributes:
        checked_s: when that was; None where it is to be asked.
        max_batch_size: images that it takes at once.
    """

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self.checked_s: float | None = None
        self.max_batch_size = 1

    def ask(self, name: str, timeout_s: float) -> Any:
        """Ask for a model's configuration; gives the future of the answer."""
        return self.stub.ModelConfig.future(
            service_pb2.ModelConfigRequest(name=name), timeout=timeout_s
        )

    def note(self, model: TritonModel, now_s: float) -> None:
        """Remember what it has said."""
        self.checked_s, self.max_batch_size = now_s, model.max_batch_size

    def close(self) -> None:
        """Close it; calls under way end."""
        self._channel.close()


def read_answer(answer: Any, label: str, name: str) -> TritonModel:
    """Read what an endpoint says that it serves.

    Raises:
        Failure: it does not answer, or the model is not one of ours.
    """
    try:
        return read_config(answer.result().config, label)
    except (grpc.RpcError, ValueError) as error:  # ValueError: the channel is closed
        raise translate(error, label) from error
    except HoraceError as error:
        raise Failure(error, is_lasting=True) from error


def translate(error: Exception, label: str) -> Failure:
    """Turn gRPC's error into one line, and say whether to try elsewhere."""
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNAVAILABLE
    details = error.details() if isinstance(error, grpc.Call) else str(error)
    lasts = code in OURS or code in LASTING
    line = (EncoderError if lasts else EncoderUnavailableError)(
        label,
        expected="a Triton that serves this model",
        found=f"{code.name}: {details or 'no reason given'}",
        mend="check that tritonserver runs there and has the model",
    )
    return Failure(line, is_final=code in OURS, is_lasting=code in LASTING, is_busy=code in BUSY)
