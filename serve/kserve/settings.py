"""Triton's settings of traces and logs: told to who asks, changed by nobody over the wire.

What a server logs and traces is its operator's matter (`--log-level`, `--tracing`), and every key
that may embed could otherwise silence the log.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from tritonclient.grpc import service_pb2 as kserve

from serve.errors import PreconditionError


def trace_settings() -> Any:
    """Say that traces are none of Triton's."""
    response = kserve.TraceSettingResponse()
    for name, value in {"trace_level": "OFF", "trace_rate": "0", "trace_count": "0"}.items():
        response.settings[name].value.append(value)
    return response


def log_settings() -> Any:
    """Say what is logged."""
    log = logging.getLogger("horace")
    response = kserve.LogSettingsResponse()
    for name, level in {
        "log_info": logging.INFO,
        "log_warning": logging.WARNING,
        "log_error": logging.ERROR,
    }.items():
        response.settings[name].bool_param = log.isEnabledFor(level)
    response.settings["log_verbose_level"].uint32_param = int(log.isEnabledFor(logging.DEBUG))
    return response


def refuse_changes(what: str, settings: Mapping[str, Any]) -> None:
    """Refuse to change settings; to ask for them is to send none.

    Raises:
        PreconditionError: there are some.
    """
    if settings:
        raise PreconditionError(
            f"{what} settings",
            expected="to be asked for: they are changed on the server's command line alone",
            found=f"a change of {', '.join(name[:80] for name in sorted(settings))[:200]}",
        )
