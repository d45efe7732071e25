"""Lays the messages of Horace out as JSON.

Rules:
    One result an image or a query, in order, each with its status: nothing has to be counted
    off against a list of statuses.
    Ids are text: they have 63 bits, and a JSON number is exact to 53 in most readers.
    Numbers of a vector are written with the digits that float32 needs, no more.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.responses import Response

from models.wire import DTYPE_NAMES, vectors_from_wire
from protos import horace_pb2 as pb

Json = dict[str, Any]  # what orjson takes: texts, numbers, lists, arrays

VALUE_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}


def json_response(
    document: Json, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Answer with a document."""
    return Response(_write(document), status, headers, media_type="application/json")


def embed_reply(reply: pb.EmbedResponse, refused: Mapping[int, Json], *, as_base64: bool) -> Json:
    """Lay out a reply of Embed.

    Args:
        reply: of the servicer.
        refused: the status of images that never became one, by position.
        as_base64: whether vectors are the bytes of their dtype, instead of numbers.
    """
    vectors = _base64_rows(reply.vectors) if as_base64 else _number_rows(reply.vectors)
    results = []
    for n, status in enumerate(reply.statuses):
        result = refused.get(n) or status_of(status)
        if result["status"] == "ok":
            result |= next(vectors)
        results.append(result)
    return {
        "model": reply.model,
        "version": reply.version,
        "fingerprint": reply.fingerprint,
        "dim": reply.vectors.dim,
        "dtype": DTYPE_NAMES[reply.vectors.dtype],
        "results": results,
        "timings": _timings(reply.timings),
        "request_id": reply.request_id,
    }


async def search_reply(reply: pb.SearchResponse, refused: Mapping[int, Json]) -> Json:
    """Lay out a reply of Search, a query at a time: a large one takes long."""
    results = []
    for n, hits in enumerate(reply.results):
        result = {**(refused.get(n) or status_of(hits.status)), "hits": _hits(hits)}
        results.append(orjson.Fragment(_write(result)))
        await asyncio.sleep(0)  # others have their turn
    return {
        "collection": reply.collection,
        "version": reply.version,
        "fingerprint": reply.fingerprint,
        "results": results,
        "timings": _timings(reply.timings),
        "request_id": reply.request_id,
    }


def models_reply(reply: pb.ListModelsResponse) -> Json:
    """Lay out the models."""
    return {
        "models": [
            {
                "name": model.name,
                "version": model.version,
                "versions": list(model.versions),
                "fingerprint": model.fingerprint,
                "dim": model.dim,
                "preprocessing": orjson.loads(model.preprocessing_json),
                "is_default": model.is_default,
                "max_images_per_request": model.max_images_per_request,
                "max_request_bytes": model.max_request_bytes,
            }
            for model in reply.models
        ]
    }


def collections_reply(reply: pb.ListCollectionsResponse) -> Json:
    """Lay out the collections."""
    return {
        "collections": [
            {
                "name": collection.name,
                "version": collection.version,
                "fingerprint": collection.fingerprint,
                "dim": collection.dim,
                "count": collection.count,
                "metric": collection.metric,
                "index": collection.index,
                "model": collection.model,
            }
            for collection in reply.collections
        ]
    }


def status_of(status: pb.ItemStatus) -> Json:
    """Lay out what became of one image or query."""
    code = pb.ItemCode.Name(status.code).lower()
    return {"status": code, "message": status.message} if status.message else {"status": code}


def _write(document: Json) -> bytes:
    """Write a document down."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def _number_rows(vectors: pb.Vectors) -> Iterator[Json]:
    """Give each vector as numbers."""
    for row in _rows(vectors):
        yield {"vector": row}


def _base64_rows(vectors: pb.Vectors) -> Iterator[Json]:
    """Give each vector as the little-endian bytes of its dtype; INT8 with its scale."""
    name = DTYPE_NAMES[vectors.dtype]
    width = vectors.dim * VALUE_BYTES[name]
    data = vectors.data
    for n in range(vectors.rows):
        row: Json = {"vector": base64.b64encode(data[n * width : (n + 1) * width]).decode()}
        if name == "int8":
            row["scale"] = vectors.scales[n]
        yield row


def _rows(vectors: pb.Vectors) -> NDArray[np.float32]:
    """Give the rows of a message; none where it is empty."""
    return vectors_from_wire(vectors) if vectors.rows else np.empty((0, 0), np.float32)


def _hits(hits: pb.Hits) -> list[Json]:
    """Lay out the neighbours of one query."""
    found: list[Json] = [
        {
            "id": str(hit.id),
            "score": hit.score,
            "key": hit.key,
            "label": hit.label,
            "source": hit.source,
        }
        for hit in hits.hits
    ]
    for hit, message in zip(found, hits.hits, strict=True):
        if message.metadata:
            hit["metadata"] = orjson.loads(message.metadata)
    for hit, vector in zip(found, _rows(hits.vectors), strict=False):  # none unless asked for
        hit["vector"] = vector
    return found


def _timings(timings: pb.Timings) -> Json:
    """Lay out where the time went, in milliseconds, to the microsecond."""
    names = ("decode_ms", "queue_ms", "inference_ms", "search_ms", "total_ms")
    return {name: round(getattr(timings, name), 3) for name in names}
