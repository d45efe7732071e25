"""The HTTP door of one server: nothing where it is not asked for, no library loaded either."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve.http.doorman import Doorman
from serve.http.options import HttpOptions
from serve.security.files import Reloadable
from serve.security.tls import Certificates

if TYPE_CHECKING:
    from serve.http.server import HttpServer


class HttpDoor:
    """Opens and closes HTTP beside gRPC, if `--http.port` says so. Of one event loop."""

    def __init__(
        self,
        options: HttpOptions,
        *,
        doorman: Doorman,
        host: str,
        max_connections: int,
        reuse_port: bool,
        certificates: Reloadable[Certificates] | None,
    ) -> None:
        """Prepare; nothing is opened yet.

        Args:
            options: whether, where, and within which bounds.
            doorman: knows the server.
            host: where to listen unless the options say it.
            max_connections: see `HttpServer`; so are the rest.
            reuse_port: see `HttpServer`.
            certificates: for TLS; in the clear where None.
        """
        self._options = options
        self._doorman = doorman
        self._host = options.host or host
        self._server: HttpServer | None = None
        if options.port is not None:
            from serve.http.server import HttpServer
            from serve.http.tls import make_context

            tls = None if certificates is None else make_context(certificates)
            self._server = HttpServer(
                max_connections=max_connections, reuse_port=reuse_port, tls=tls
            )

    def __repr__(self) -> str:
        return f"<HttpDoor {self.url or 'closed'}>"

    @property
    def port(self) -> int:
        """The number of its port; 0 where there is no HTTP."""
        return 0 if self._server is None else self._server.port

    @property
    def url(self) -> str | None:
        """Where it answers; None where there is no HTTP."""
        return None if self._server is None else self._server.url

    def listen(self) -> None:
        """Take the port.

        Raises:
            StartError: it cannot be had.
        """
        if self._server is not None:
            assert self._options.port is not None
            self._server.listen(self._host, self._options.port)

    async def start(self) -> None:
        """Answer from now on.

        Raises:
            StartError: it does not start.
        """
        if self._server is not None:
            from serve.http.app import make_app

            await self._server.start(make_app(self._doorman))

    async def stop(self, *, cut_off: bool = False) -> None:
        """Send the replies under way, unless they are cut off, and close."""
        if self._server is not None:
            await self._server.stop(cut_off=cut_off)
