"""From the fields of a body to the messages of `protos/horace.proto`.

Rules:
    A field that is not known is refused by name: a misspelt option is never ignored.
    An image that is no base64 has a status of its own; an empty one goes in its place.
    What a field may be is checked here, what it may ask for by the services.
"""

from __future__ import annotations

import binascii
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray

from models.wire import DTYPES, vectors_to_wire
from protos import horace_pb2 as pb
from serve.errors import RequestError
from serve.http.body import Body, unknown_field
from serve.http.replies import Json
from serve.searching import FINGERPRINT

Message = TypeVar("Message", pb.EmbedRequest, pb.SearchRequest)

MAX_UINT32 = (1 << 32) - 1
MAX_UINT64 = (1 << 64) - 1
MAX_FLOAT32 = float(np.finfo(np.float32).max)

SHORT = reprlib.Repr()
"""Looks at no more of a value than it shows: a caller may send megabytes, or a thousand lists in
one another, of which `repr` is a RecursionError."""
SHORT.maxstring = SHORT.maxother = 60

ENCODINGS = ("float", "base64")

EMBED_FIELDS = (
    "images",
    "model",
    "version",
    "dims",
    "normalize",
    "dtype",
    "encoding",
    "request_id",
    "priority",
)
QUERY_FIELDS = ("images", "vectors", "ids", "combined")
SEARCH_FIELDS = (
    *QUERY_FIELDS,
    "fingerprint",
    "collection",
    "k",
    "exact",
    "effort",
    "filter",
    "min_score",
    "diversity",
    "include_vectors",
    "include_metadata",
    "request_id",
    "priority",
)


@dataclass(kw_only=True)
class Asked:
    """What a body asks for, beside the message.

    Attributes:
        refused: the status of images that never became one, by position.
        as_base64: whether vectors are to come as base64.
    """

    refused: dict[int, Json] = field(default_factory=dict)
    as_base64: bool = False


def read_embed(body: Body, request_id: str) -> tuple[pb.EmbedRequest, Asked]:
    """Read what `/v1/embed` is asked.

    Raises:
        RequestError: a field cannot be meant.
    """
    fields = Fields(body, EMBED_FIELDS)
    dtype = fields.choice("dtype", tuple(DTYPES))
    encoding = fields.choice("encoding", ENCODINGS)
    if encoding == "float" and dtype != "fp32":
        raise RequestError(
            "dtype", expected="fp32 where vectors are numbers", found=dtype, mend="ask for base64"
        )
    asked = Asked(as_base64=encoding == "base64")
    request = pb.EmbedRequest(
        model=fields.text("model"),
        version=fields.text("version"),
        images=fields.images(asked.refused),
        dims=fields.integer("dims"),
        skip_normalize=not fields.flag("normalize", default=True),
        dtype=DTYPES[dtype],
        request_id=fields.text("request_id") or request_id,
        priority=fields.integer("priority"),
    )
    return request, asked


def read_search(body: Body, request_id: str) -> tuple[pb.SearchRequest, Asked]:
    """Read what `/v1/search` is asked.

    Raises:
        RequestError: a field cannot be meant, or there is not one kind of query.
    """
    fields = Fields(body, SEARCH_FIELDS)
    asked = Asked()
    request = pb.SearchRequest(
        collection=fields.text("collection"),
        k=fields.integer("k"),
        exact=fields.flag("exact"),
        effort=fields.integer("effort"),
        filter=fields.text("filter"),
        min_score=fields.number("min_score"),
        diversity=fields.number("diversity"),
        include_vectors=fields.flag("include_vectors"),
        include_metadata=fields.flag("include_metadata"),
        request_id=fields.text("request_id") or request_id,
        priority=fields.integer("priority"),
    )
    given = [name for name in QUERY_FIELDS if fields.has(name)]
    if len(given) != 1:
        expected = "one of images, vectors, ids and combined"
        raise RequestError("queries", expected=expected, found=" and ".join(given) or "none")
    fingerprint = fields.fingerprint()
    match given[0]:
        case "images":
            request.images.images.extend(fields.images(asked.refused))
        case "vectors":
            vectors = vectors_to_wire(_rows("vectors", fields.items("vectors")))
            request.vectors.CopyFrom(pb.VectorQueries(vectors=vectors, fingerprint=fingerprint))
        case "ids":
            request.ids.ids.extend(_id("ids", value) for value in fields.items("ids"))
        case _:
            combinations = fields.items("combined")
            request.combined.queries.extend(_combination(c, fingerprint) for c in combinations)
    return request, asked


class Fields:
    """The fields of a body, each read as what it has to be."""

    def __init__(self, body: Body, known: Sequence[str]) -> None:
        """Take the fields of a body.

        Raises:
            RequestError: there is one that is not known.
        """
        self._values, self._is_form, self._files = body.fields, body.is_form, body.images
        for name in self._values:
            if name not in known:
                raise unknown_field(name, known)

    def has(self, name: str) -> bool:
        """Whether a field is given."""
        files = name == "images" and self._files is not None
        return files or self._values.get(name) is not None

    def text(self, name: str) -> str:
        """Give a text; empty where it is not given."""
        value = self._values.get(name)
        if value is None:
            return ""
        if not isinstance(value, str) or not _is_unicode(value):
            raise _wrong(name, "text", value)
        return value

    def fingerprint(self) -> str:
        """Give the fingerprint of vectors; empty where it is not given. Each has a copy of it."""
        text = self.text("fingerprint")
        if text and not FINGERPRINT.fullmatch(text):
            raise _wrong("fingerprint", "64 hex digits", text)
        return text

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """Give one of some words; the first where none is given."""
        value = self._values.get(name)
        if value is None:
            return choices[0]
        if value not in choices:
            raise _wrong(name, " or ".join(choices), value)
        return str(value)

    def integer(self, name: str) -> int:
        """Give a number that counts; 0 where it is not given."""
        value = self._values.get(name)
        if value is None:
            return 0
        if self._is_form and isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value[:20])
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_UINT32:
            raise _wrong(name, f"an integer, 1 to {MAX_UINT32}", value)
        return value

    def number(self, name: str) -> float | None:
        """Give a number that float32 holds; None where it is not given."""
        value = self._values.get(name)
        if value is None:
            return None
        if self._is_form and isinstance(value, str):
            with suppress(ValueError):
                value = float(value)
        return _number(name, value)

    def flag(self, name: str, *, default: bool = False) -> bool:
        """Give a yes or a no."""
        value = self._values.get(name)
        if self._is_form:
            value = {"true": True, "false": False}.get(str(value), value)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise _wrong(name, "true or false", value)
        return value

    def items(self, name: str) -> list[object]:
        """Give a list that is not empty."""
        return _items(name, self._values.get(name))

    def images(self, refused: dict[int, Json]) -> list[pb.Image]:
        """Give the images; note the status of those that are no base64."""
        if self._files is not None:
            return [pb.Image(encoded=data) for data in self._files]
        texts = self.items("images")
        images = []
        for n, text in enumerate(texts):
            image, status = _image(f"images[{n}]", text)
            images.append(image)
            if status:
                refused[n] = status
        return images


def _image(name: str, value: object) -> tuple[pb.Image, Json]:
    """Read an image out of base64; one that is none has a status, which is empty otherwise."""
    if not isinstance(value, str):
        raise _wrong(name, "text, the base64 of a file", value)
    if value.startswith("data:"):  # what a browser's FileReader gives
        value = value.partition(",")[2]
    try:
        return pb.Image(encoded=binascii.a2b_base64(value, strict_mode=True)), {}
    except ValueError as error:
        found = "other characters" if "base64 data" in str(error) else f"{error!s:.100}"
        message = f"image: expected base64, found {found}"
        return pb.Image(), {"status": "unreadable", "message": message}


def _combination(value: object, fingerprint: str) -> pb.Combination:
    """Read one query of several examples."""
    parts = _object("combined", value, ("positives", "negatives", "negative_weight"))
    combination = pb.Combination(
        positives=_examples("positives", parts.get("positives"), fingerprint),
        negatives=_examples("negatives", parts.get("negatives"), fingerprint),
    )
    weight = parts.get("negative_weight")
    if weight is not None:
        combination.negative_weight = _number("negative_weight", weight)
    return combination


def _examples(name: str, value: object, fingerprint: str) -> list[pb.Example]:
    """Read the examples of one side; there may be none."""
    return [_example(name, v, fingerprint) for v in _items(name, value)] if value else []


def _example(name: str, value: object, fingerprint: str) -> pb.Example:
    """Read one example; one that is no image is refused with the whole request."""
    parts = _object(name, value, ("image", "vector", "id"))
    if len(parts) != 1:
        found = " and ".join(parts) or "none"
        raise RequestError(name, expected="one of image, vector and id in each", found=found)
    if "image" in parts:
        image, status = _image(name, parts["image"])
        if status:
            raise RequestError(name, expected="an image in base64", found="something else")
        return pb.Example(image=image)
    if "id" in parts:
        return pb.Example(id=_id(name, parts["id"]))
    rows = vectors_to_wire(_rows(name, [parts["vector"]]))
    return pb.Example(vector=pb.VectorQueries(vectors=rows, fingerprint=fingerprint))


def _rows(name: str, values: Sequence[object]) -> NDArray[np.float32]:
    """Read vectors of one length."""
    rows = [_items(name, value) for value in values]
    if len({len(row) for row in rows}) != 1:
        raise RequestError(name, expected="vectors of one length", found="several lengths")
    if not all(_is_number(number) for row in rows for number in row):
        raise RequestError(name, expected="numbers", found="something else")
    with np.errstate(over="ignore"):  # what float32 cannot hold has a status of its own
        return np.asarray(rows, np.float64).astype(np.float32)


def _id(name: str, value: object) -> int:
    """Read an id: a number, or its digits as text."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value[:30])
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_UINT64:
        raise _wrong(name, "ids, as numbers or as text", value)
    return value


def _number(name: str, value: object) -> float:
    """Read a number that float32 holds."""
    if not _is_number(value) or not abs(value) <= MAX_FLOAT32:
        raise _wrong(name, "a number", value)
    return float(value)


def _is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number of JSON, of a size that a float has."""
    return type(value) is float or (type(value) is int and abs(value) <= MAX_FLOAT32)


def _object(name: str, value: object, known: Sequence[str]) -> Mapping[str, object]:
    """Read an object with no other parts than these; what is null is not there."""
    if not isinstance(value, dict) or not set(value) <= set(known):
        raise _wrong(name, f"an object of {', '.join(known)}", value)
    return {key: part for key, part in value.items() if part is not None}


def _items(name: str, value: object) -> list[object]:
    """Read a list that is not empty."""
    if not isinstance(value, list) or not value:
        raise _wrong(name, "a list that is not empty", value)
    return value


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8, which messages are made of."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _wrong(name: str, expected: str, value: object) -> RequestError:
    """Say what a field has to be; a value is shown in a few characters."""
    return RequestError(name, expected=expected, found=f"{SHORT.repr(value):.60}")
