"""Vectors into a reply of KServe v2.

Rules:
    KServe has no status an image, so: an image without a vector has a row of NaN (of zeros
    as INT8, with a scale of NaN), and then the outputs `status` and `message` come with the
    reply, asked for or not. The call fails only if no image has a vector.
    Where no output is asked for, `embeddings` comes, and with it `scales` if it is INT8.
    Every output has a place in raw_output_contents, empty for one in shared memory: that is
    where Triton's clients look.
    Whether an output fits its shared memory is checked before anything is computed, as far
    as its size is known then.
    Every reply carries the encoder's fingerprint, as a parameter.

Shapes: N images, D dimensions kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as kserve

from models.vectors import pack_vectors
from protos import horace_pb2 as pb
from serve.embedding import finish
from serve.errors import InternalError, RequestError
from serve.job import Embedded
from serve.kserve.inputs import LENGTH
from serve.kserve.memory import find_slice, note_slice
from serve.kserve.parameters import Asked
from serve.kserve.regions import OwnRegions, Slice, check_fits
from serve.kserve.tensors import (
    DATATYPES,
    EMBEDDINGS,
    ITEM_BYTES,
    MESSAGE,
    SCALES,
    STATUS,
    VECTOR_DTYPES,
)

FLOATS = {"fp32": "<f4", "fp16": "<f2"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """An output that a caller asks for, and where it is to lie; in the reply where None."""

    name: str
    datatype: str
    part: Slice | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """What every reply of one version of a model says."""

    name: str
    version: str
    fingerprint: str


PLAIN = {datatype: (Wanted(EMBEDDINGS, datatype),) for datatype in ("FP32", "FP16")}
"""What most requests want: vectors alone, in the reply."""


def read_outputs(request: Any, asked: Asked, regions: OwnRegions) -> tuple[Wanted, ...]:
    """Read which outputs a request wants.

    Raises:
        RequestError: one is not known, or asked for twice, or as classes.
        UnknownNameError: one is to lie in shared memory that is not registered.
    """
    if len(request.outputs) > len(DATATYPES):
        found = str(len(request.outputs))
        raise RequestError("outputs", expected=f"at most {len(DATATYPES)}", found=found)
    outputs = request.outputs[:]
    plain = PLAIN.get(asked.datatype)
    if not outputs:
        return plain or (Wanted(EMBEDDINGS, asked.datatype), Wanted(SCALES, "FP32"))
    first = outputs[0]
    if plain and len(outputs) == 1 and first.name == EMBEDDINGS and not first.parameters:
        return plain
    if len({output.name for output in outputs}) != len(outputs):
        raise RequestError("outputs", expected="each name once", found="one twice")
    return tuple(_read_output(output, asked, regions) for output in outputs)


def _read_output(output: Any, asked: Asked, regions: OwnRegions) -> Wanted:
    """Read one output that is asked for."""
    name = output.name
    if name not in DATATYPES:
        raise RequestError("outputs", expected=" or ".join(DATATYPES), found=f"{name[:80]!r}")
    if output.parameters and "classification" in output.parameters:
        raise RequestError(
            f"output {name}", expected="the tensor: vectors have no classes", found="classification"
        )
    datatype = asked.datatype if name == EMBEDDINGS else DATATYPES[name]
    return Wanted(name, datatype, find_slice(output.parameters, regions))


def check_room(wanted: Sequence[Wanted], *, images: int, dims: int) -> None:
    """Refuse outputs that do not fit the shared memory that they are to lie in.

    Raises:
        RequestError: one does not.
    """
    for output in wanted:
        if output.part is not None and output.name != MESSAGE:
            width = 1 if output.name in (SCALES, STATUS) else dims
            check_fits(output.part, images * width * ITEM_BYTES[output.datatype])


def write_response(
    embedded: Embedded, wanted: tuple[Wanted, ...], asked: Asked, *, head: Head, request_id: str
) -> Any:
    """Write the reply that says what became of the images.

    Raises:
        RequestError: no image has a vector, by the caller's fault; or an output does not fit
            its shared memory.
        InternalError: no image has a vector, by the encoder's.
    """
    datatypes = {output.datatype for output in wanted}
    rows_ND, statuses = finish(
        embedded,
        dims=asked.dims,
        normalize=asked.normalize,
        dtype="fp16" if "FP16" in datatypes else "fp32",
    )
    response = kserve.ModelInferResponse()
    if wanted is PLAIN["FP32"] and len(rows_ND) == len(statuses):
        response.CopyFrom(_plain_head(head, *rows_ND.shape))
        response.raw_output_contents.append(rows_ND.tobytes())
    else:
        response.CopyFrom(_head(head))
        _write_outputs(response, rows_ND, statuses, wanted)
    response.id = request_id
    return response


def _write_outputs(
    response: Any,
    rows_ND: NDArray[np.float32],
    statuses: Sequence[pb.ItemStatus],
    wanted: tuple[Wanted, ...],
) -> None:
    """Write outputs of every kind, and the statuses where an image has no vector."""
    if len(rows_ND) < len(statuses):
        rows_ND = _spread(rows_ND, statuses)
        present = {output.name for output in wanted}
        faults = (Wanted(STATUS, DATATYPES[STATUS]), Wanted(MESSAGE, DATATYPES[MESSAGE]))
        wanted += tuple(output for output in faults if output.name not in present)
    for output in wanted:
        shape, data = _tensor(output, rows_ND, statuses)
        tensor = response.outputs.add(name=output.name, datatype=output.datatype, shape=shape)
        if output.part is not None:
            output.part.write(data)
            note_slice(output.part, len(data), tensor.parameters)
            data = b""
        response.raw_output_contents.append(data)


def _tensor(
    output: Wanted, rows_ND: NDArray[np.float32], statuses: Sequence[pb.ItemStatus]
) -> tuple[tuple[int, int], bytes]:
    """Give the shape and the bytes of one output."""
    n, dims = rows_ND.shape
    if output.name == STATUS:
        return (n, 1), np.array([status.code for status in statuses], "<i4").tobytes()
    if output.name == MESSAGE:
        return (n, 1), join_bytes([status.message.encode() for status in statuses])
    dtype = VECTOR_DTYPES[output.datatype]
    if output.name != SCALES and dtype in FLOATS:
        return (n, dims), rows_ND.astype(FLOATS[dtype], copy=False).tobytes()
    failed_N = np.isnan(rows_ND[:, 0])
    packed = pack_vectors(np.where(failed_N[:, None], np.float32(0), rows_ND), "int8")
    if output.name != SCALES:
        return (n, dims), packed.data
    scales_N = np.where(failed_N, np.float32(np.nan), np.asarray(packed.scales, np.float32))
    return (n, 1), scales_N.astype("<f4").tobytes()


def join_bytes(elements: Sequence[bytes]) -> bytes:
    """Write a BYTES tensor: every element after its length."""
    return b"".join(part for e in elements for part in (LENGTH.pack(len(e)), e))


def _spread(rows_ND: NDArray[np.float32], statuses: Sequence[pb.ItemStatus]) -> NDArray[np.float32]:
    """Give every image a row, of NaN where it has no vector.

    Raises:
        RequestError: none has one, by the caller's fault.
        InternalError: none has one, by the encoder's.
    """
    if not len(rows_ND):
        first = statuses[0]
        kind = InternalError if first.code == pb.NOT_FINITE else RequestError
        what = first.message if len(statuses) == 1 else f"no image has a vector: {first.message}"
        raise kind(what)
    spread_ND = np.full((len(statuses), rows_ND.shape[1]), np.nan, np.float32)
    spread_ND[[status.code == pb.OK for status in statuses]] = rows_ND
    return spread_ND


@lru_cache(maxsize=256)
def _head(head: Head) -> Any:
    """Write what every reply of a model begins with; it is copied, never changed."""
    response = kserve.ModelInferResponse(model_name=head.name, model_version=head.version)
    response.parameters["fingerprint"].string_param = head.fingerprint
    return response


@lru_cache(maxsize=256)
def _plain_head(head: Head, n: int, dims: int) -> Any:
    """Write all of a plain reply but its vectors: a copy takes a quarter of the time."""
    response = kserve.ModelInferResponse()
    response.CopyFrom(_head(head))
    response.outputs.add(name=EMBEDDINGS, datatype="FP32", shape=(n, dims))
    return response
