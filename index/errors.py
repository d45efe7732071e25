"""The errors of collections: what they keep, and what they refuse."""

from __future__ import annotations

from models.errors import HoraceError


class IndexingError(HoraceError):
    """Base of the errors of `index`."""


class CollectionError(IndexingError):
    """A collection that is missing, damaged, of another schema, or not to be written."""


class UnknownIdError(IndexingError):
    """An id or a key that a collection does not hold."""


class QueryError(IndexingError):
    """Queries that cannot be used, beside others that can."""


class EvaluationError(IndexingError):
    """An evaluation that cannot be made of this collection and these images."""


def unknown_id(id_: int, *, count: int, name: str) -> UnknownIdError:
    """Make the error for an id that is none of a collection's."""
    return UnknownIdError(
        f"id {id_}",
        expected=f"an id of the {count} in collection {name}",
        found="none such",
        mend="take ids from a search of this collection",
    )
