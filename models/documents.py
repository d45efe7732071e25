"""JSON files that carry a schema version and a checksum of themselves: bundles and collections.

Rules:
    Whatever is edited, damaged or of another schema is refused in one line; even white space is
    held against what was written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, cast

from models.errors import HoraceError
from models.files import canonical_json

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]

MAX_DOCUMENT_BYTES = 64 << 20
"""More is refused unread: a bundle takes some kilobytes, a collection some bytes a segment."""

MOST_SHOWN = 80
"""Characters of what a damaged document says that an error repeats."""


def document_bytes(document: Mapping[str, object]) -> bytes:
    """Give the content of a JSON file that carries a checksum of itself.

    Raises:
        ValueError: a number is none that JSON has.
    """
    whole = {**document, "checksum": checksum_of(document)}
    return (json.dumps(whole, indent=2, allow_nan=False) + "\n").encode()


def checksum_of(document: Mapping[str, object]) -> str:
    """Hash everything in such a document but the checksum itself.

    Raises:
        ValueError: a number is none that JSON has.
    """
    rest = {key: value for key, value in document.items() if key != "checksum"}
    return hashlib.sha256(canonical_json(rest)).hexdigest()


def read_document(
    content: BinaryIO,
    file: Path,
    *,
    schema_version: int,
    error: type[HoraceError],
    restore: str,
    again: str,
) -> dict[str, Json]:
    """Parse such a document, and check its schema version and that it is as it was written.

    Args:
        content: the open file.
        file: what errors call it.
        schema_version: the only one that is known.
        error: the kind that is raised.
        restore: how to mend a damaged one, as `copy the bundle again`.
        again: how to make it anew, as `export it again`.

    Raises:
        HoraceError: of that kind; it is too large, no such JSON, of another schema, or edited.
    """
    mend = f"the file is damaged or was edited: {restore}, or {again}"
    if (size_bytes := os.fstat(content.fileno()).st_size) > MAX_DOCUMENT_BYTES:
        raise error(
            str(file),
            expected=f"at most {MAX_DOCUMENT_BYTES} bytes",
            found=f"{size_bytes}",
            mend=mend,
        )
    text = content.read(size_bytes)
    try:
        document = json.loads(text)
        version, checksum = document["schema_version"], checksum_of(document)
        written = document_bytes(document)
    except (ValueError, KeyError, TypeError, RecursionError) as fault:
        raise error(
            str(file),
            expected="JSON with a schema_version, of finite numbers",
            found="something else",
            mend=mend,
        ) from fault
    if type(version) is not int or version != schema_version:
        raise error(
            str(file),
            expected=f"schema version {schema_version}",
            found=f"version {json.dumps(version)[:MOST_SHOWN]}",
            mend=f"open it with the Horace that wrote it, or {again}",
        )
    recorded = document.get("checksum")
    if checksum != recorded:
        shown = "of its own" if recorded is None else json.dumps(recorded).strip('"')[:MOST_SHOWN]
        raise error(str(file), expected=f"checksum {shown}", found=checksum, mend=mend)
    if written != text:  # white space, or a key that is there twice
        raise error(
            str(file),
            expected="the bytes that were written",
            found="others that say the same",
            mend=mend,
        )
    return cast(dict[str, Json], document)
