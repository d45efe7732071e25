"""How a tensor says that it lies in shared memory.

Source: Triton's shared-memory extension of KServe v2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve.errors import RequestError
from serve.kserve.regions import OwnRegions, Slice

REGION = "shared_memory_region"
OFFSET = "shared_memory_offset"
BYTE_SIZE = "shared_memory_byte_size"


def find_slice(parameters: Mapping[str, Any], regions: OwnRegions) -> Slice | None:
    """Find the part of a region that a tensor's parameters name; None where they name none.

    Raises:
        UnknownNameError: the caller has registered no such region.
        PreconditionError: the caller may use none.
        RequestError: the part is not within the region.
    """
    if not parameters or REGION not in parameters:
        return None
    if BYTE_SIZE not in parameters:
        raise RequestError("tensor in shared memory", expected=BYTE_SIZE, found="none")
    region = regions.find(parameters[REGION].string_param)
    offset = parameters[OFFSET].int64_param if OFFSET in parameters else 0
    return region.slice(offset, parameters[BYTE_SIZE].int64_param)


def note_slice(part: Slice, byte_size: int, parameters: Mapping[str, Any]) -> None:
    """Say in a reply's tensor where it lies."""
    parameters[REGION].string_param = part.region.name
    parameters[BYTE_SIZE].int64_param = byte_size
    if part.offset:
        parameters[OFFSET].int64_param = part.offset
