"""The options of the HTTP door: `--http.port` and what goes with it."""

from __future__ import annotations

from dataclasses import dataclass

from models.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """HTTP and JSON beside gRPC."""

    port: int | None = None
    """Port of HTTP; 0 takes a free one, which the line on stdout names. Without it there is no
    HTTP: nothing listens that nobody asked for."""

    host: str | None = None
    """Address of HTTP; that of gRPC where not given."""

    timeout_s: float = 60.0
    """The longest that a request may take, its body included; a caller may ask for less with
    the header x-timeout-ms."""

    max_body_mib: int = 256
    """MiB of request bodies that may be in memory at once; one beyond them is refused. While
    its images are read out of it, a body takes about twice its size."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UsageError: a value makes no sense.
        """
        if self.port is not None and not 0 <= self.port <= 65535:
            raise UsageError("--http.port", expected="0 to 65535", found=str(self.port))
        if self.host is not None and self.port is None:
            raise UsageError("--http.host", expected="--http.port beside it", found="none")
        if not 0 < self.timeout_s <= 3600:
            raise UsageError(
                "--http.timeout-s", expected="above 0 to 3600", found=str(self.timeout_s)
            )
        if self.max_body_mib < 1:
            raise UsageError(
                "--http.max-body-mib", expected="at least 1", found=str(self.max_body_mib)
            )
