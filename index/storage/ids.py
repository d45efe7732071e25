"""The ids of images: hashes of their keys, which outlive a rebuild and fit an int64."""

from __future__ import annotations

import hashlib


def id_of(key: str) -> int:
    """Give the id of an image: the first 63 bits of the BLAKE2b hash of its key."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
