"""Describes the interface as OpenAPI 3.1, from the same limits and names that are enforced."""

from __future__ import annotations

from collections.abc import Sequence

from models.wire import DTYPES
from protos import horace_pb2 as pb
from serve.http.body import MAX_TEXT
from serve.http.fields import ENCODINGS, MAX_UINT32
from serve.http.replies import Json
from serve.searching import MAX_EFFORT
from serve.services import RequestLimits
from serve.tickets import LOWEST_PRIORITY

VERSION = "1.0"

REFUSALS = {
    "400": "a request that cannot be meant",
    "401": "no API key, or a wrong one",
    "404": "no such model or collection",
    "412": "a request that this server, as it is set up, cannot serve",
    "413": "a body that is too long",
    "415": "a body that is neither JSON nor a form",
    "429": "no room now; retry-after says when to come back",
    "499": "the caller has gone",
    "500": "a fault of the server; its log has the incident",
    "503": "the server is stopping, or not ready; retry-after says when to come back",
    "504": "the deadline passed",
}

BASE64: Json = {
    "type": "string",
    "description": "base64 of a JPEG, PNG, WebP, GIF, BMP or TIFF file; a data: URL is read, too",
}
STRING: Json = {"type": "string"}
NUMBER: Json = {"type": "number"}
INTEGER: Json = {"type": "integer"}
ID: Json = {
    "anyOf": [
        {"type": "string", "pattern": "^[0-9]{1,19}$"},
        {"type": "integer", "minimum": 0, "maximum": (1 << 63) - 1},
    ]
}
VECTOR: Json = {"type": "array", "items": NUMBER, "minItems": 1}


def describe(limits: RequestLimits) -> Json:
    """Write the document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Horace",
            "version": VERSION,
            "description": "Image embeddings and search. One bad image is a status of its own "
            "and never an error of the call. gRPC has the same services: protos/horace.proto.",
        },
        "security": [{}, {"bearer": []}, {"key": []}],
        "paths": {
            "/v1/embed": {"post": _embed(limits)},
            "/v1/search": {"post": _search(limits)},
            "/v1/models": {"get": _get("Which models there are, and what they take", "Models")},
            "/v1/collections": {"get": _get("Which collections there are", "Collections")},
            "/healthz": {"get": _probe("Whether the process lives")},
            "/readyz": {"get": _probe("Whether it serves", {"503": _json("Probe", "not ready")})},
            "/openapi.json": {"get": _document()},
        },
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
            "schemas": _schemas(),
        },
    }


def _embed(limits: RequestLimits) -> Json:
    """Describe `/v1/embed`."""
    options: Json = {
        "model": _described(STRING, "a served model; the default one where not given"),
        "version": _described(STRING, "one of its versions; the newest where not given"),
        "dims": _count("keep the first dimensions, before vectors are normalised", MAX_UINT32),
        "normalize": _described({"type": "boolean", "default": True}, "give vectors unit length"),
        "dtype": _described(_one_of(tuple(DTYPES)), "of vectors; others than fp32 as base64"),
        "encoding": _described(
            _one_of(ENCODINGS), "numbers, or base64 of the little-endian bytes of dtype"
        ),
        "request_id": _described(STRING, "comes back in the reply, and stands in the log"),
        "priority": _count("1 is served before 2 and 3; 2 where not given", LOWEST_PRIORITY),
    }
    document = _object({"images": _images(limits), **options}, ["images"])
    form = _object({"images": _files(limits), **options}, ["images"])
    for schema in (document, form):  # numbers are fp32
        schema["anyOf"] = [
            {"properties": {"dtype": {"const": "fp32"}}},
            {"properties": {"encoding": {"const": "base64"}}, "required": ["encoding"]},
        ]
    return {
        "summary": "Embed images",
        "operationId": "embed",
        "parameters": [_timeout(), _request_id()],
        "requestBody": _bodies(document, form),
        "responses": {"200": _json("Embedded", "a result for each image"), **_refusals()},
    }


def _search(limits: RequestLimits) -> Json:
    """Describe `/v1/search`."""
    queries: Json = {
        "images": _images(limits),
        "vectors": {
            "type": "array",
            "items": VECTOR,
            "minItems": 1,
            "description": "of the collection's own encoder; its fingerprint goes with them",
        },
        "ids": {
            "type": "array",
            "items": ID,
            "minItems": 1,
            "maxItems": limits.max_images,
            "description": "of stored images, as text or numbers; each is left out of its hits",
        },
        "combined": {
            "type": "array",
            "minItems": 1,
            "items": {"$ref": "#/components/schemas/Combination"},
            "description": "queries of several examples each, near the positives and far from "
            "the negatives",
        },
    }
    options: Json = {
        "collection": _described(STRING, "a served collection; the only one where not given"),
        "k": _count("neighbours a query", limits.max_neighbours),
        "exact": _described({"type": "boolean"}, "compare every vector, and ask no index"),
        "effort": _count("candidates that the index weighs for a query", MAX_EFFORT),
        "filter": _described(
            {"type": "string", "maxLength": MAX_TEXT},
            "which images may be hits, such as: label = 'Coat'",
        ),
        "min_score": _described(
            {"type": "number", "minimum": -1, "maximum": 1}, "the least cosine of a hit"
        ),
        "diversity": _described(
            {"type": "number", "minimum": 0, "maximum": 1},
            "0 for the nearest, up to 1 for what is also unlike one another",
        ),
        "include_vectors": _described({"type": "boolean"}, "send the vectors of hits, too"),
        "include_metadata": _described({"type": "boolean"}, "send what is known of hits besides"),
        "request_id": _described(STRING, "comes back in the reply, and stands in the log"),
        "priority": _count("1 is served before 2 and 3; 2 where not given", LOWEST_PRIORITY),
    }
    fingerprint = _described(STRING, "of the encoder that made the query vectors")
    document = _object({**queries, "fingerprint": fingerprint, **options}, [])
    document["oneOf"] = [{"required": [name]} for name in queries]
    return {
        "summary": "Find the nearest images of a collection",
        "description": "By images, by vectors (with their fingerprint), by ids of stored images, "
        "each of which is left out of its own neighbours, or by combinations of examples.",
        "operationId": "search",
        "parameters": [_timeout(), _request_id()],
        "requestBody": _bodies(
            document, _object({"images": _files(limits), **options}, ["images"])
        ),
        "responses": {"200": _json("Found", "a result for each query"), **_refusals()},
    }


def _schemas() -> Json:
    """Describe what comes back."""
    names = pb.ItemCode.keys()  # an enumeration of protobuf is no mapping
    codes = {"type": "string", "enum": [name.lower() for name in names]}
    status: Json = {"status": codes, "message": STRING}
    vector: Json = {"anyOf": [VECTOR, STRING], "description": "numbers, or base64"}
    times = ("decode_ms", "queue_ms", "inference_ms", "search_ms", "total_ms")
    timings = _object(dict.fromkeys(times, NUMBER), times)
    example = _object({"image": BASE64, "vector": VECTOR, "id": ID}, [])
    example["oneOf"] = [{"required": [name]} for name in ("image", "vector", "id")]
    examples: Json = {"type": "array", "items": example, "minItems": 1}
    hit = {
        "id": _described(STRING, "text: a JSON number is exact to 53 bits only"),
        "score": NUMBER,
        **dict.fromkeys(("key", "label", "source"), STRING),
    }
    asked_for: Json = {"vector": VECTOR, "metadata": {"type": "object"}}
    model: Json = {
        **dict.fromkeys(("name", "version", "fingerprint"), STRING),
        "versions": _list(STRING),
        "dim": INTEGER,
        "preprocessing": {"type": "object"},
        "is_default": {"type": "boolean"},
        **dict.fromkeys(("max_images_per_request", "max_request_bytes"), INTEGER),
    }
    collection: Json = {
        **dict.fromkeys(("name", "version", "fingerprint", "metric", "index", "model"), STRING),
        **dict.fromkeys(("dim", "count"), INTEGER),
    }
    embedded = {
        **dict.fromkeys(("model", "version", "fingerprint", "dtype", "request_id"), STRING),
        "dim": INTEGER,
        "results": _list(_object({**status, "vector": vector, "scale": NUMBER}, ["status"])),
        "timings": timings,
    }
    found = {
        **dict.fromkeys(("collection", "version", "fingerprint", "request_id"), STRING),
        "results": _list(
            _object(
                {**status, "hits": _list(_object({**hit, **asked_for}, list(hit)))},
                ["status", "hits"],
            )
        ),
        "timings": timings,
    }
    weight: Json = {"type": "number", "minimum": 0, "maximum": 10, "default": 0.5}
    return {
        "Embedded": _object(embedded, list(embedded)),
        "Found": _object(found, list(found)),
        "Combination": _object(
            {"positives": examples, "negatives": examples, "negative_weight": weight},
            ["positives"],
        ),
        "Models": _object({"models": _list(_object(model, list(model)))}, ["models"]),
        "Collections": _object(
            {"collections": _list(_object(collection, list(collection)))}, ["collections"]
        ),
        "Probe": _object({"status": STRING}, ["status"]),
        "Error": _object(
            {"error": _object({"code": STRING, "message": STRING}, ["code", "message"])}, ["error"]
        ),
    }


def _get(summary: str, schema: str) -> Json:
    """Describe a list."""
    return {
        "summary": summary,
        "operationId": schema.lower(),
        "parameters": [_timeout(), _request_id()],
        "responses": {"200": _json(schema, "all of them"), **_refusals()},
    }


def _probe(summary: str, more: Json | None = None) -> Json:
    """Describe a probe."""
    responses = {"200": _json("Probe", "it does"), **(more or {})}
    return {"summary": summary, "security": [], "responses": responses}


def _document() -> Json:
    """Describe this document."""
    content = {"application/json": {"schema": {"type": "object"}}}
    response = {"description": "this document", "content": content}
    return {"summary": "This document", "security": [], "responses": {"200": response}}


def _timeout() -> Json:
    """Describe the header of the deadline."""
    return {
        "name": "x-timeout-ms",
        "in": "header",
        "description": "how long the caller waits",
        "schema": {"type": "integer", "minimum": 1, "maximum": 999_999_999},
    }


def _request_id() -> Json:
    """Describe the header of the request id."""
    return {
        "name": "x-request-id",
        "in": "header",
        "description": "comes back, and stands in the log",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:/+=@-]{1,128}$"},
    }


def _bodies(document: Json, form: Json) -> Json:
    """Describe both forms of a body."""
    return {
        "required": True,
        "content": {
            "application/json": {"schema": document},
            "multipart/form-data": {
                "schema": form,
                "encoding": {"images": {"contentType": "image/*, application/octet-stream"}},
            },
        },
    }


def _refusals() -> Json:
    """Describe every refusal."""
    return {status: _json("Error", why) for status, why in REFUSALS.items()}


def _json(schema: str, description: str) -> Json:
    """Describe a reply."""
    reference = {"$ref": f"#/components/schemas/{schema}"}
    return {"description": description, "content": {"application/json": {"schema": reference}}}


def _images(limits: RequestLimits) -> Json:
    """Describe the images of a document."""
    return {"type": "array", "items": BASE64, "minItems": 1, "maxItems": limits.max_images}


def _files(limits: RequestLimits) -> Json:
    """Describe the images of a form."""
    file = {"type": "string", "format": "binary", "description": "image files"}
    return {"type": "array", "items": file, "minItems": 1, "maxItems": limits.max_images}


def _count(description: str, most: int) -> Json:
    """Describe a number that counts."""
    return {"type": "integer", "minimum": 1, "maximum": most, "description": description}


def _one_of(choices: Sequence[str]) -> Json:
    """Describe one of some words; the first is the default."""
    return {"type": "string", "enum": list(choices), "default": choices[0]}


def _described(schema: Json, description: str) -> Json:
    """Say what a value is for."""
    return {**schema, "description": description}


def _list(items: Json) -> Json:
    """Describe a list."""
    return {"type": "array", "items": items}


def _object(properties: Json, required: Sequence[str]) -> Json:
    """Describe an object that has no other parts."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }
