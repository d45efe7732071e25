"""The options of keys and of callers' limits; those of TLS are in `serve.security.tls`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from models.errors import UsageError
from serve.security.buckets import Quota


@dataclass(frozen=True, kw_only=True)
class KeyOptions:
    """API keys; without a file there are none, and everyone may call."""

    file: str | None = None
    """File of hashed keys, which python -m serve.security.keys writes; read again when it
    changes. Callers send theirs as metadata, authorization: Bearer KEY or x-api-key: KEY."""

    open_reflection: bool = False
    """Whether the services may be listed without a key; health may always be asked."""


@dataclass(frozen=True, kw_only=True)
class CallerLimits:
    """What each caller may ask for, by key, certificate or address.

    A worker process keeps its own account. Lines of the key file may say otherwise for theirs.
    """

    requests_per_s: float | None = None
    """Requests a second, a stream's messages among them; no limit where not given."""

    images_per_s: float | None = None
    """Images, and queries or their examples, a second; no limit where not given."""

    burst_s: float = 1.0
    """Seconds' worth of both that a caller may ask for at once after it was idle."""

    calls_per_client: int | None = None
    """Calls and streams of one caller that are open at once; no limit where not given."""

    calls_per_connection: int = 256
    """The same of one connection; gRPC's clients wait for their turn."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UsageError: a value makes no sense.
        """
        for name in ("requests_per_s", "images_per_s", "burst_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1e9:
                raise UsageError(_option(name), expected="above 0, to 1e9", found=str(value))
        for name in ("calls_per_client", "calls_per_connection"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 1e9:
                expected = "at least 1" if value < 1 else "at most 1e9"
                raise UsageError(_option(name), expected=expected, found=str(value))

    @property
    def quota(self) -> Quota:
        """What one caller may ask for."""
        return Quota(
            requests_per_s=self.requests_per_s or math.inf,
            images_per_s=self.images_per_s or math.inf,
            calls=self.calls_per_client or math.inf,
            burst_s=self.burst_s,
        )


def _option(name: str) -> str:
    """Write an option as people type it."""
    return "--limits." + name.replace("_", "-")
