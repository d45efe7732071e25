"""Images as files, and a client of the HTTP door of a server in this process."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import numpy as np
import pytest
from PIL import Image

from serve.http.options import HttpOptions
from serve.security.options import KeyOptions
from serve.security.ring import hash_token
from serve.server import Server


@pytest.fixture
def frontend() -> str:
    """The front end of gRPC, which HTTP does not pass: once is enough."""
    return "auto"


@pytest.fixture
def png() -> Callable[[int], bytes]:
    """A function that makes a file of one value, of the fake encoder's size."""

    def make(value: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(file, "PNG")
        return file.getvalue()

    return make


@pytest.fixture
def http_serving(serving):
    """An async context manager: a server with HTTP, and an HTTP client of it."""

    @asynccontextmanager
    async def run(
        *encoders: object, http: HttpOptions | None = None, **options: object
    ) -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
        http = http or HttpOptions(port=0)
        async with (
            serving(*encoders, http=http, **options) as server,
            httpx.AsyncClient(base_url=server.http.url, timeout=30) as client,
        ):
            yield server, client

    return run


@pytest.fixture
def keys(tmp_path):
    """A key file with the key `sesame` of `alice`, who may ask for four images a second."""
    path = tmp_path / "keys"
    path.write_text(f"alice:{hash_token('sesame').hex()}:images=4\n")
    return KeyOptions(file=str(path))
