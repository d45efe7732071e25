"""What a request of KServe v2 asks for beside its tensors.

Rules:
    Triton's own parameters mean what they mean there: `priority`, and `timeout` in
    microseconds, 0 for none. A timeout counts from the arrival, beside gRPC's deadline.
    Ours are `dims`, `normalize` and `dtype`, as in horace.v1.
    What is not known is refused, since a misspelt parameter would be one that is ignored;
    only what begins with `triton_` passes, because Triton's clients add it by themselves.
    A sequence is refused: an encoder has no state that a request could continue.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.errors import PreconditionError, RequestError
from serve.kserve.tensors import VECTOR_DTYPES

KNOWN = "dims, dtype, normalize, priority and timeout"
KINDS = {
    bool: ("bool_param",),
    int: ("int64_param", "uint64_param"),
    str: ("string_param",),
}
MAX_PARAMETERS = 32
NAMES: dict[type, str] = {bool: "a bool", int: "an integer", str: "a string"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The parameters of one request.

    Attributes:
        timeout_s: from its arrival until nobody waits for it.
        priority: 1 before 2 before 3; 0 is the default.
        dims: leading dimensions to keep; all where None.
        normalize: whether to scale vectors to unit length.
        datatype: of the output `embeddings`.
    """

    timeout_s: float = math.inf
    priority: int = 0
    dims: int | None = None
    normalize: bool = False
    datatype: str = "FP32"


NOTHING_ASKED = Asked()


def read_parameters(parameters: Mapping[str, Any], *, dim: int) -> Asked:
    """Read a request's parameters; `dim` is the length of the model's vectors.

    Raises:
        RequestError: one is not known, or has no value that can be meant.
        PreconditionError: the request is part of a sequence.
    """
    if not parameters:
        return NOTHING_ASKED
    if len(parameters) > MAX_PARAMETERS:
        found = str(len(parameters))
        raise RequestError("parameters", expected=f"at most {MAX_PARAMETERS}", found=found)
    read: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name.startswith("triton_"):
            continue
        if name.startswith("sequence_"):
            raise PreconditionError(
                "sequence",
                expected="requests that stand alone: an encoder keeps no state",
                found=f"parameter {name[:80]!r}",
                mend="leave out sequence_id, sequence_start and sequence_end",
            )
        match name:
            case "timeout":
                timeout_us = _value(name, parameter, int)
                read["timeout_s"] = timeout_us / 1e6 if timeout_us > 0 else math.inf
            case "priority":
                read["priority"] = _value(name, parameter, int)
            case "dims":
                read["dims"] = _read_dims(_value(name, parameter, int), dim)
            case "normalize":
                read["normalize"] = _value(name, parameter, bool)
            case "dtype":
                read["datatype"] = _read_datatype(_value(name, parameter, str))
            case _:
                raise RequestError("parameter", expected=KNOWN, found=f"{name[:80]!r}")
    return Asked(**read)


def _value(name: str, parameter: Any, kind: type) -> Any:
    """Give a parameter's value.

    Raises:
        RequestError: it has none, or one of another kind.
    """
    field = parameter.WhichOneof("parameter_choice")
    if field not in KINDS[kind]:
        raise RequestError(f"parameter {name}", expected=NAMES[kind], found=f"{field or 'nothing'}")
    return getattr(parameter, field)


def _read_dims(dims: int, dim: int) -> int | None:
    """Read how many dimensions to keep; 0 means all, as in horace.v1."""
    if not 0 <= dims <= dim:
        raise RequestError("parameter dims", expected=f"1 to {dim}", found=str(dims))
    return dims or None


def _read_datatype(text: str) -> str:
    """Read the datatype of vectors, in either case."""
    if text.upper() not in VECTOR_DTYPES:
        raise RequestError(
            "parameter dtype", expected=" or ".join(VECTOR_DTYPES), found=f"{text[:80]!r}"
        )
    return text.upper()
