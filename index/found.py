"""What a search found, by query: for people as text, for a picture as rows.

It does not search; `index.search` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from index.interface import AnyCollection
from index.neighbours import Neighbours
from index.storage.rows import Row, metadata_to_json
from models.command import shown
from models.errors import HoraceError


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One neighbour.

    Attributes:
        score: its cosine.
        row: which image it is.
    """

    score: float
    row: Row


@dataclass(frozen=True, kw_only=True)
class Found:
    """One query and its neighbours, best first.

    Attributes:
        query: the file's path or the image's key.
        label: its class, for an image of the collection that has one.
        image: its content; None for an image of the collection.
        row: which image of the collection it is, if it is one.
        pictured: which of several examples the image or the row is.
        hits: the neighbours.
        error: why the query cannot be used, if so.
    """

    query: str
    label: str | None = None
    image: bytes | None = None
    row: Row | None = None
    pictured: str = ""
    hits: Sequence[Hit] = ()
    error: HoraceError | None = None


def look_up_hits(collection: AnyCollection, neighbours: Neighbours) -> list[list[Hit]]:
    """Look up what was found; padding is left out."""
    found = []
    for ids, scores in zip(neighbours.ids, neighbours.scores, strict=True):
        kept = ids >= 0
        rows = collection.rows(ids[kept])
        found.append(
            [Hit(score=float(s), row=row) for s, row in zip(scores[kept], rows, strict=True)]
        )
    return found


def as_text(found: Sequence[Found], *, nothing: str) -> str:
    """Lay out a table for each query, or say `nothing` where it has no neighbour."""
    lines = []
    for one in found:
        if one.error is not None:
            lines += [shown(str(one.error)), ""]
            continue
        lines.append(shown(one.query + (f"  ({one.label})" if one.label is not None else "")))
        if not one.hits:
            lines += [f"  {nothing}", ""]
            continue
        labels = [shown(hit.row.label or "-") for hit in one.hits]
        width = max([5, *map(len, labels)])
        lines.append(f"  {'score':>7}  {'label':<{width}}  key")
        for hit, label in zip(one.hits, labels, strict=True):
            known = metadata_to_json(hit.row.metadata).items()
            further = "".join(f"  {name}={value}" for name, value in known if value is not None)
            lines.append(f"  {hit.score:7.4f}  {label:<{width}}  {shown(hit.row.key + further)}")
        lines.append("")
    return "\n".join(lines).rstrip()
