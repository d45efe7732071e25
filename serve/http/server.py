"""Runs the application in this process and event loop, by uvicorn.

Rules:
    The port is taken when the server's other port is, so that one in use is an error at once.
    uvicorn answers no signal here: who runs the server drains and stops it.
    A caller that takes nothing of its reply is cut off by the system (tcp(7), TCP_USER_TIMEOUT).
    On stopping no more connections are taken; replies under way have a moment. A drain has
    waited for them by then.

h11 reads the requests: it bounds the size of a request's head, which httptools does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from serve.errors import StartError
from serve.http.protocol import ACCEPTS, PatientProtocol
from serve.port import bind_all, join_address

BACKLOG = 2048
"""Connections that may wait to be taken."""

IDLE_CONNECTION_S = 75
"""How long a connection may wait for its next request."""

MAX_HEAD_BYTES = 32 << 10
"""Of request line and headers."""

UNREAD_S = 75
"""How long a caller may take no byte of its reply."""

STOP_S = 2
"""How long connections may take to end once the server stops. Not longer: over TLS each waits for
its caller's answer, and one that is kept in a pool has nobody who looks."""


class HttpServer:
    """Listens, answers by an application, stops. Belongs to one event loop."""

    def __init__(
        self,
        *,
        max_connections: int,
        reuse_port: bool,
        tls: ssl.SSLContext | None,
    ) -> None:
        """Prepare; nothing is opened yet.

        Args:
            max_connections: that are open at once; one more is refused unread.
            reuse_port: whether other processes share the port.
            tls: what the connection is secured by; in the clear where None. Certificates that
                are loaded into it later hold for connections made later.
        """
        self._max_connections = max_connections
        self._reuse_port = reuse_port
        self._tls = tls
        self._sockets: list[socket.socket] = []
        self._uvicorn: _Uvicorn | None = None
        self._running: asyncio.Task[None] | None = None
        self._host = ""
        self.port = 0

    def __repr__(self) -> str:
        return f"<HttpServer {self.url}>"

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"{'https' if self._tls else 'http'}://{join_address(self._host, self.port)}"

    def listen(self, host: str, port: int) -> int:
        """Take the port; give its number, which 0 leaves to the system.

        Raises:
            StartError: it cannot be had.
        """
        self._host = host
        self._sockets = bind_all(host, port, shared=self._reuse_port)
        for listener in self._sockets:  # which every connection has it from
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNREAD_S * 1e3))
        self.port = self._sockets[0].getsockname()[1]
        return self.port

    async def start(self, app: Starlette) -> None:
        """Answer from now on.

        Raises:
            StartError: uvicorn does not start.
        """
        config = uvicorn.Config(
            app,
            http=PatientProtocol,
            ws="none",
            lifespan="off",
            loop="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=ACCEPTS,
            limit_concurrency=self._max_connections,
            timeout_keep_alive=IDLE_CONNECTION_S,
            timeout_graceful_shutdown=STOP_S,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
        config.load()
        config.ssl = self._tls
        self._uvicorn = _Uvicorn(config)
        self._running = asyncio.create_task(self._uvicorn.serve(self._sockets))
        ready = asyncio.ensure_future(self._uvicorn.ready.wait())
        await asyncio.wait([ready, self._running], return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if not self._uvicorn.started:
            raise StartError("--http.port", expected="a server that starts", found="none")
        for listener in self._sockets:
            listener.listen(BACKLOG)  # the system's side of it, which uvicorn has made as small

    async def stop(self, *, cut_off: bool = False) -> None:
        """Take no more connections, and send the replies under way unless they are cut off.

        Idempotent; also of a server that never started.
        """
        if self._uvicorn is not None and self._running is not None:
            self._uvicorn.should_exit = True
            if cut_off:
                self._uvicorn.cut_off()
            await asyncio.wait([self._running])
        for listener in self._sockets:
            listener.close()
        self._sockets.clear()


class _Uvicorn(uvicorn.Server):
    """uvicorn's server, without its signal handlers, and with a way to wait for its start."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to whoever runs the server."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        self.ready.set()

    def cut_off(self) -> None:
        """Close every connection, whatever is under way on it."""
        self.force_exit = True
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
