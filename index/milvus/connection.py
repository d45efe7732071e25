"""The way to a Milvus: addresses, the client, and its errors in our words.

An address is `milvus:URI#NAME`: URI as pymilvus takes it (`http://host:19530`, with a database
`http://host:19530/photos`, or the path of a Milvus Lite file), NAME the collection there.

Rules:
    pymilvus is imported when an address is opened, and not before: it is an extra.
    A token comes from the environment (`MILVUS_TOKEN`), never from an address: addresses are
    printed and logged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from index.errors import CollectionError
from models.errors import UsageError

if TYPE_CHECKING:
    from pymilvus import MilvusClient

SCHEME = "milvus:"
TOKEN_VARIABLE = "MILVUS_TOKEN"
TIMEOUT_S = 30.0
"""Of connecting."""


@dataclass(frozen=True, kw_only=True)
class MilvusAddress:
    """Where a collection is.

    Attributes:
        uri: of the Milvus.
        name: of the collection there; an alias as well.
    """

    uri: str
    name: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.uri}#{self.name}"


def is_milvus(address: str) -> bool:
    """Tell whether an address is of a Milvus, and no directory."""
    return address.startswith(SCHEME)


def require_directory(path: Path | str) -> None:
    """Refuse the address of a Milvus where a collection on disk is needed.

    Raises:
        UsageError: it is one.
    """
    if is_milvus(str(path)):
        raise UsageError(
            "collection",
            expected="a directory",
            found="the address of a Milvus",
            mend="`index.search`, `index.evaluate` and `index.export` take either, this does not",
        )


def read_address(address: str) -> MilvusAddress:
    """Take an address apart.

    Raises:
        UsageError: it is none, or has a password, or its name is none that Milvus takes.
    """
    uri, _, name = address.removeprefix(SCHEME).rpartition("#")
    if "@" in uri.partition("://")[2].partition("/")[0]:
        raise UsageError(
            "address of a Milvus",
            expected="no user or password in it, since it is printed",
            found="one",
            mend=f"give user:password by {TOKEN_VARIABLE}",
        )
    if not is_milvus(address) or not uri or not _is_uri(uri):
        raise UsageError(
            f"address {address!r}",
            expected="milvus:URI#NAME, such as milvus:http://localhost:19530#photos",
            found="something else",
        )
    check_name(name)
    return MilvusAddress(uri=uri, name=name)


def is_file(uri: str) -> bool:
    """Tell whether it is the path of a file of Milvus Lite, as pymilvus does."""
    return uri.endswith(".db")


def _is_uri(uri: str) -> bool:
    """Tell whether a host, where there is one, and its port are such."""
    try:
        urlsplit(uri).port  # noqa: B018  # checks itself
    except ValueError:
        return False
    return True


def check_name(name: str) -> None:
    """Refuse the name of a collection that Milvus does not take.

    Raises:
        UsageError: it is not of letters, digits and `_`, or too long.
    """
    if not (name.isascii() and name.isidentifier() and len(name) <= 200):
        raise UsageError(
            "name of a collection in Milvus",
            expected="letters, digits and _, not a digit first, at most 200",
            found=repr(name),
        )


def connect(uri: str) -> MilvusClient:
    """Open a client.

    Raises:
        CollectionError: pymilvus is not installed, or nothing answers.
    """
    try:
        from pymilvus import MilvusClient
    except ImportError as error:
        raise CollectionError(
            f"store {SCHEME}{uri}",
            expected="the package pymilvus",
            found="none",
            mend="pip install 'pymilvus>=3.0', the extra milvus",
        ) from error
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # what fails is raised and said once
    mend = "check that Milvus runs there"
    if is_file(uri):  # Milvus Lite serves from this process, and logs what it does not know
        for name in ("grpc._server", "milvus_lite"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        mend = "check the path, and that no other process has the file open"
    with milvus_errors(f"store {SCHEME}{uri}", mend=mend):
        return MilvusClient(uri=uri, token=os.environ.get(TOKEN_VARIABLE, ""), timeout=TIMEOUT_S)


@contextmanager
def milvus_errors(what: str, *, mend: str | None = None) -> Iterator[None]:
    """Translate what pymilvus raises.

    Raises:
        CollectionError: the Milvus refused, or does not answer.
    """
    from pymilvus.exceptions import ErrorCode, MilvusException

    try:
        yield
    except MilvusException as error:
        if mend is None and error.code == ErrorCode.COLLECTION_NOT_FOUND:
            mend = "open it again: another build may have taken its name"
        lines = (error.message or str(error)).splitlines() or ["no reason"]
        raise CollectionError(
            what, expected="an answer of Milvus", found=lines[0], mend=mend
        ) from error
