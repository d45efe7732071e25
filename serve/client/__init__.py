"""Calls a Horace server: `Client` blocks, `AsyncClient` is for asyncio; they do the same.

    with Client("127.0.0.1:50051") as client:
        result = client.embed([open("cat.jpg", "rb").read()])
        hits = client.search(vectors=result).hits[0]

Rules:
    Every operation has a deadline. A server that does not answer, or has no room, is tried
    again within it, with growing random pauses.
    More images than a request may hold go in several; the caller sees one result.
    An image that fails has a status; an error is raised only for what concerns all.
    What decides is in `serve.client.plans`; here it is performed.
"""

from __future__ import annotations

from serve.client.async_client import AsyncClient
from serve.client.blocking import Client
from serve.client.combining import Combination
from serve.client.connection import ClientTls
from serve.client.items import EmbeddedItem
from serve.client.results import (
    CollectionInfo,
    EmbedResult,
    Hit,
    ItemStatus,
    ModelInfo,
    SearchResult,
    Timings,
)
from serve.client.retry import RetryPolicy
from serve.errors import ServeError

__all__ = [
    "AsyncClient",
    "Client",
    "ClientTls",
    "CollectionInfo",
    "Combination",
    "EmbedResult",
    "EmbeddedItem",
    "Hit",
    "ItemStatus",
    "ModelInfo",
    "RetryPolicy",
    "SearchResult",
    "ServeError",
    "Timings",
]
