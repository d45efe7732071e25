"""What may be asked for of metrics, traces and logs, and what makes no sense."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from models.errors import UsageError

LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, kw_only=True)
class MetricsOptions:
    """Prometheus and health over HTTP, on a port of their own that asks for no key."""

    port: int | None = None
    """Port of /metrics, /healthz and /readyz; 0 takes a free one, which the log names. None
    is opened where not given."""

    host: str = "127.0.0.1"
    """Address that this port listens on; 0.0.0.0 or [::] for every interface."""

    def __post_init__(self) -> None:
        """Check the port.

        Raises:
            UsageError: there is none of that number.
        """
        if self.port is not None and not 0 <= self.port <= 65535:
            raise UsageError("--metrics.port", expected="0 to 65535", found=str(self.port))


@dataclass(frozen=True, kw_only=True)
class TracingOptions:
    """Traces by OpenTelemetry's protocol; needs the extra `otel`."""

    endpoint: str | None = None
    """[http://|https://]HOST:PORT of an OTLP collector's gRPC port, often 4317. No trace is
    made where not given."""

    ratio: float = 0.1
    """Share of the requests that are traced, of those whose caller decided nothing: one that
    comes with a traceparent is traced as that says."""

    def __post_init__(self) -> None:
        """Check the address and the share.

        Raises:
            UsageError: one of them makes no sense.
        """
        if not 0 <= self.ratio <= 1:
            raise UsageError("--tracing.ratio", expected="0 to 1", found=f"{self.ratio:g}")
        address = r"(https?://)?([\w.-]+|\[[0-9A-Fa-f:]+\]):\d{1,5}/?"
        if self.endpoint is not None and not re.fullmatch(address, self.endpoint):
            raise UsageError(
                "--tracing.endpoint",
                expected="[http://|https://]HOST:PORT",
                found=repr(self.endpoint),
            )


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """What the log on stderr says, and how."""

    log_format: Literal["text", "json"] = "text"
    """Lines for people, or an object a line for machines."""

    log_level: LogLevel = "info"
    """The least that is worth a line. At info a request that failed or was slow has one; at
    debug every request has."""

    log_slow_s: float = 1.0
    """From how many seconds on a request counts as slow."""

    def __post_init__(self) -> None:
        """Check the time.

        Raises:
            UsageError: it makes no sense.
        """
        if not 0 < self.log_slow_s <= 3600:
            found = f"{self.log_slow_s:g}"
            raise UsageError("--log-slow-s", expected="above 0, up to 3600", found=found)
