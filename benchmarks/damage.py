"""Ways in which a file may be damaged, cut, swapped or forged, for `benchmarks.index_fuzz`.

Every way gives other bytes than the file has; what gives the same is passed over.
"""

from __future__ import annotations

import io
import pickle
import random
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MASKS = (0x01, 0x80, 0xFF)
HUGE = (1 << 31, 1 << 40, (1 << 63) - 1)
"""Lengths that no file here has."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A damaged file.

    Attributes:
        how: in words.
        kind: flip, truncate, append, swap, foreign or huge.
        content: its bytes.
    """

    how: str
    kind: str
    content: bytes


def damages(
    name: str, content: bytes, other: bytes | None, *, flips: int, draw: random.Random
) -> Iterator[Damage]:
    """Damage a file in every way.

    Args:
        name: of the file; its ending says what it is.
        content: as it was written.
        other: the file of that name in another collection, where there is one.
        flips: offsets at which a byte is flipped, the ends and places between.
        draw: chooses some of them, and the bits.
    """
    ways = (
        _flips(content, flips, draw),
        _truncations(content, draw),
        _appended(content),
        _swapped(other),
        _foreign(name),
        _huge(name, content, flips, draw),
    )
    for way in ways:
        for damage in way:
            if damage.content != content:
                yield damage


def _flips(content: bytes, count: int, draw: random.Random) -> Iterator[Damage]:
    """Flip one byte at many places."""
    last = len(content) - 1
    if last < 0:
        return
    even = np.linspace(0, last, min(count, len(content))).astype(int).tolist()
    for at in sorted({*even, *(draw.randint(0, last) for _ in range(count // 2))}):
        mask = draw.choice(MASKS)
        damaged = bytearray(content)
        damaged[at] ^= mask
        yield Damage(how=f"byte {at} ^ {mask:#04x}", kind="flip", content=bytes(damaged))


def _truncations(content: bytes, draw: random.Random) -> Iterator[Damage]:
    """Cut the file off at its ends, in its middle, and somewhere."""
    for size in sorted({0, 1, 64, 128, len(content) // 2, len(content) - 1, *_some(content, draw)}):
        if 0 <= size < len(content):
            yield Damage(how=f"the first {size} bytes", kind="truncate", content=content[:size])


def _some(content: bytes, draw: random.Random) -> list[int]:
    """Draw some places in a file."""
    return [draw.randint(0, max(0, len(content) - 1)) for _ in range(4)]


def _appended(content: bytes) -> Iterator[Damage]:
    """Put more behind it."""
    for more in (b"\0", b"\n", bytes(4096), content):
        yield Damage(how=f"{len(more)} bytes more", kind="append", content=content + more)


def _swapped(other: bytes | None) -> Iterator[Damage]:
    """Take the file of another collection."""
    if other is not None:
        yield Damage(how="that of another collection", kind="swap", content=other)


def _foreign(name: str) -> Iterator[Damage]:
    """Take a sound file of another kind."""
    yield Damage(how="a text", kind="foreign", content=b"no such file\n")
    if name.endswith(".faiss"):
        for factory in ("Flat", "HNSW16", "IVF4,Flat", "PQ4x4", "IDMap,Flat", "PCA4,Flat", "LSH"):
            content = _faiss_file(factory)
            yield Damage(how=f"an index of {factory}", kind="foreign", content=content)
    elif name.endswith(".npy"):
        for array in (np.zeros(3), np.array(["a"]), np.array([{}], object), np.zeros((2, 2, 2))):
            file = io.BytesIO()
            np.save(file, array, allow_pickle=True)
            what = f"{array.dtype} {array.shape}"
            yield Damage(how=f"an array of {what}", kind="foreign", content=file.getvalue())
        yield Damage(how="a pickle", kind="foreign", content=pickle.dumps(np.zeros(3)))
    elif name.endswith(".parquet"):
        sink = io.BytesIO()
        pq.write_table(pa.table({"id": [1, 2]}), sink)
        yield Damage(how="another table", kind="foreign", content=sink.getvalue())
    elif name.endswith(".json"):
        for text in ("{}", "[]", "1e999", "null", "[" * 100_000, '{"schema_version": 2}'):
            yield Damage(how=f"JSON {text[:24]}", kind="foreign", content=text.encode())


def _huge(name: str, content: bytes, count: int, draw: random.Random) -> Iterator[Damage]:
    """Let a header speak of more than there is."""
    if name.endswith(".npy"):
        for huge in HUGE:
            changed = re.sub(rb"\(\d+,", b"(%d," % huge, content[:128], count=1)
            head = changed.rstrip(b"\n ")[:127].ljust(127) + b"\n"
            yield Damage(how=f"{huge} rows", kind="huge", content=head + content[128:])
        return
    places = {*range(0, min(len(content) - 8, 256), 4), *range(0, len(content) - 8, 8)}
    for at in sorted(draw.sample(sorted(places), min(len(places), 2 * count))):
        huge = draw.choice(HUGE)
        damaged = content[:at] + struct.pack("<Q", huge) + content[at + 8 :]
        yield Damage(how=f"{huge} at byte {at}", kind="huge", content=damaged)


def _faiss_file(factory: str) -> bytes:
    """Write an index that is no collection's."""
    rows = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    index = faiss.index_factory(16, factory)
    index.train(rows)
    index.add_with_ids(rows, np.arange(64)) if "IDMap" in factory else index.add(rows)
    return bytes(faiss.serialize_index(index))
