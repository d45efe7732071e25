"""Everything of `serve.security` that one server has, put together from its options.

Rules:
    Files are read before the server listens: what is wrong with them is a line at the start.
    Later they are read again when they change, by a thread, and at once by a reload (SIGHUP).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc

from serve.errors import StartError
from serve.reloading import Reloads
from serve.security.files import Reloadable, RereadThread
from serve.security.guard import Guard
from serve.security.interceptor import GuardInterceptor
from serve.security.options import CallerLimits, KeyOptions
from serve.security.ring import KeyRing, read_ring
from serve.security.tls import Certificates, Tls, TlsOptions
from serve.valve import Refuses

log = logging.getLogger("horace.serve")


class Security:
    """TLS, keys and limits of one server; `close` it."""

    def __init__(
        self,
        *,
        tls: TlsOptions,
        keys: KeyOptions,
        limits: CallerLimits,
        max_images: int,
        max_in_flight_bytes: int,
        refuses: Refuses,
        on_turned_away: Callable[[grpc.StatusCode], None],
    ) -> None:
        """Read the files and watch them.

        Args:
            tls: of the gRPC port.
            keys: who may call.
            limits: how much each may ask for.
            max_images: the most that one request may ask for.
            max_in_flight_bytes: of all messages of calls that are under way.
            refuses: turns calls away unparsed, by the seconds that they have.
            on_turned_away: hears with which code a call ended that no service saw.

        Raises:
            StartError: a file is not right.
        """
        self._tls = Tls(tls) if tls.is_on else None
        self._ring: Reloadable[KeyRing] | None = None
        if (file := keys.file) is not None:
            self._ring = Reloadable("API keys", [file], partial(_read_keys, file))
            if not self._ring.value.names:
                raise StartError(
                    f"key file {file}",
                    expected="at least one key",
                    found="none",
                    mend=f"add one with python -m serve.security.keys new NAME --file {file}",
                )
        self.guard = Guard(
            ring=self._keys, open_reflection=keys.open_reflection, quota=limits.quota
        )
        self.interceptor = GuardInterceptor(
            self.guard,
            max_images=max_images,
            max_in_flight_bytes=max_in_flight_bytes,
            refuses=refuses,
            on_turned_away=on_turned_away,
        )
        self._files: list[Reloadable[Any]] = [
            file for file in (self.certificates, self._ring) if file is not None
        ]
        self._reread_thread = RereadThread(self._files) if self._files else None

    def __repr__(self) -> str:
        return f"<Security {self._tls!r} {self.guard!r}>"

    @property
    def credentials(self) -> grpc.ServerCredentials | None:
        """What the port listens with; None for a plain one."""
        return None if self._tls is None else self._tls.credentials

    @property
    def certificates(self) -> Reloadable[Certificates] | None:
        """What the files of TLS hold at the moment; None without TLS."""
        return None if self._tls is None else self._tls.files

    def register(self, reloads: Reloads) -> None:
        """Have every file read again at a reload, too."""
        for file in self._files:
            hook = partial(asyncio.to_thread, file.reload)
            reloads.register(file.what, hook, file.refusals)

    def close(self) -> None:
        """Stop watching."""
        if self._reread_thread is not None:
            self._reread_thread.close()

    def _keys(self) -> KeyRing | None:
        """Give the keys of the moment."""
        return None if self._ring is None else self._ring.value


def _read_keys(file: str) -> KeyRing:
    """Read the key file, from which the last key may have been taken.

    Raises:
        StartError: it cannot be read, is not right throughout, or is blank.
    """
    ring = read_ring(file, may_be_blank=False)
    if not ring.names:
        log.warning("key file %s has no key: nobody gets in", file)
    return ring
