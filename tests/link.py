"""A link between a caller and a server, which may be lost as where a machine is gone."""

from __future__ import annotations

import contextlib
import socket
import threading


class Link:
    """Passes on what a caller and the server at a port of this machine say; close `listener`."""

    def __init__(self, port: int) -> None:
        self._port, self._connections, self._lost = port, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.listener.getsockname()[1]}"

    def lose(self) -> None:
        """Pass nothing more on by the connections that there are; neither side hears of it."""
        self._lost = self._connections

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                self._connections += 1
                for way in ((near, far), (far, near)):
                    arguments = (self._connections, *way)
                    threading.Thread(target=self._pass_on, args=arguments, daemon=True).start()

    def _pass_on(self, number: int, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError), source:
            while data := source.recv(1 << 16):
                if number > self._lost:
                    target.sendall(data)
            target.shutdown(socket.SHUT_WR)
