"""The port for those who watch the server: /metrics, /healthz and /readyz over HTTP.

Rules:
    It asks for no key and says nothing about callers: it is meant for the operator's own
    network, and listens on the loopback address unless told otherwise.
    It runs on a thread and an event loop of its own: it answers while the server's loop is
    busy, and that the server's loop turns is what /healthz is about.
    /healthz is 200 while the process can go on: its loop turns and calls are read, and decoding,
    searches and opening each have a thread (restart it when it is not); /readyz is 200
    while it serves and its loop turns (send it nothing when it does not), and 503 while it
    starts and drains.
    A connection that asks for nothing is closed; a thread that dies is replaced, by the watchdog.
    It stays open until the drain is over, so that the last counts are scraped.

Source: https://kubernetes.io/docs/concepts/configuration/liveness-readiness-startup-probes/
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from serve.errors import StartError
from serve.http.protocol import ACCEPTS, PatientProtocol
from serve.operation.metrics import CONTENT_TYPE
from serve.port import bind_all

log = logging.getLogger("horace.serve")

MAX_CONNECTIONS = 64
"""Connections that are answered at once; a scraper and a prober need one each."""

HEAD_S = 5.0
"""How long a connection may take to ask; silent ones would keep probes out."""

CLOSE_TIMEOUT_S = 2.0


class Pages(Protocol):
    """What the endpoint shows; called on the endpoint's own loop."""

    async def metrics(self) -> bytes:
        """Lay out the metrics as text."""

    async def alive(self) -> bool:
        """Say whether the process can go on."""

    async def ready(self) -> bool:
        """Say whether it serves."""


class Endpoint:
    """Serves `Pages` on a thread; `close` it."""

    def __init__(self, pages: Pages, listeners: Sequence[socket.socket]) -> None:
        """Serve on `listeners`, which are bound already and closed by this.

        Args:
            pages: what to show.
            listeners: see `listen_on`.
        """
        self._application = make_application(pages)
        self._listeners = listeners
        self._closing = False
        self._start()

    def __repr__(self) -> str:
        return f"<Endpoint {self._listeners!r}>"

    def revive(self) -> None:
        """Answer again if the thread has died."""
        if not self._closing and not self._thread.is_alive():
            log.error("the metrics port has lost its thread and gets another")
            self._start()

    def close(self) -> None:
        """Stop answering."""
        self._closing = True
        self._server.should_exit = True
        self._thread.join(CLOSE_TIMEOUT_S)
        for listener in self._listeners:
            listener.close()

    def _start(self) -> None:
        """Serve on a thread."""
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._application,
                access_log=False,
                backlog=ACCEPTS,
                http=_Protocol,
                lifespan="off",
                limit_concurrency=MAX_CONNECTIONS,
                log_config=None,
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=1,
                ws="none",
            )
        )
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        """Serve until closed; the server goes on without this where it fails."""
        try:
            with ExitStack() as lent:  # uvicorn closes what it is given
                listeners = [lent.enter_context(one.dup()) for one in self._listeners]
                asyncio.run(self._server.serve(sockets=listeners))
        except Exception:
            log.exception("the metrics port failed")


class _Protocol(PatientProtocol):
    """Waits for less long than the port for callers: whoever asks here is near."""

    head_s = HEAD_S


def make_application(pages: Pages) -> Starlette:
    """Route requests to pages."""

    async def metrics(_: Request) -> Response:
        return Response(await pages.metrics(), headers={"Content-Type": CONTENT_TYPE})

    async def healthz(_: Request) -> Response:
        return _say(await pages.alive(), "alive")

    async def readyz(_: Request) -> Response:
        return _say(await pages.ready(), "ready")

    routes = [Route("/metrics", metrics), Route("/healthz", healthz), Route("/readyz", readyz)]
    return Starlette(routes=routes)


def listen_on(host: str, port: int) -> list[socket.socket]:
    """Take the port.

    Raises:
        StartError: it cannot be had.
    """
    try:
        return bind_all(host, port)
    except StartError as error:
        raise StartError(
            f"--metrics.port {port} of {host}",
            expected="a free port",
            found=error.found,
            mend="choose others with --metrics.port and --metrics.host",
        ) from error


def _say(good: bool, what: str) -> Response:
    """Answer a probe."""
    if good:
        return PlainTextResponse(f"{what}\n")
    return PlainTextResponse(f"not {what}\n", status_code=503)
