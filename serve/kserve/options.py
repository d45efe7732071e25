"""The options of KServe v2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.errors import UsageError

MAX_REGIONS = 4096


@dataclass(frozen=True, kw_only=True)
class KserveOptions:
    """KServe v2, which Triton's clients speak, on the same port."""

    shared_memory: Literal["local", "off"] = "local"
    """Whether callers on this machine may register system shared memory, from which images
    are read and to which vectors are written. Behind a proxy on this machine everybody calls
    from it: switch it off there."""

    max_regions: int = 256
    """Regions of shared memory that are registered at once; each is an open file."""

    stream_requests: int = 64
    """Requests of one stream that are under way at once."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UsageError: a value makes no sense.
        """
        for name, value, most in (
            ("max-regions", self.max_regions, MAX_REGIONS),
            ("stream-requests", self.stream_requests, MAX_REGIONS),
        ):
            if not 1 <= value <= most:
                raise UsageError(f"--kserve.{name}", expected=f"1 to {most}", found=str(value))
