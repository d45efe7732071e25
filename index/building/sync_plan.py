"""What a sync has to do: the images of a source now, held against those of a collection.

Rules:
    An image is what its bytes are: the same digest under the same key is unchanged. Where the
    digest is that of a row whose key is gone, or has other bytes now, it is that image, moved, and
    takes vector and metadata along, also to a key that had another image: files that were numbered
    anew, or exchanged, keep what is theirs.
    Other bytes under a key are that image, changed, with the metadata of the key; where the old
    bytes have moved to another key they are a new image. Known bytes are never embedded again.
    What cannot be read now is no reason to drop what is stored: the file may be back tomorrow.
    So may one that is no image while it is being written: see `Seen.is_settled`.
    What can be read and is no image is dropped, and is not tried again until it changes.
    Nothing of another source is touched: a key that another source's image has is refused.

It decides and does nothing: see `index.building.sync`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from index.building.part_set import DUPLICATE_KEY
from index.embed import Reject

UNREADABLE = "unreadable"
"""The fault of an image that could not be read, as of `models.errors.ImageFault`."""

TOO_LARGE = "row_too_large"
"""The fault of an image whose row has more text than may come in."""

MENDED_ELSEWHERE = (DUPLICATE_KEY, TOO_LARGE)
"""Faults that may be gone although the bytes are the same; what is unreadable has no digest."""

OF_ANOTHER = (
    "an image of another source with this key or its id; sources with equal names belong under one "
    "folder, and --moved-from says where this one was before"
)


@dataclass(frozen=True, slots=True)
class Seen:
    """A record of the source.

    Attributes:
        key: its key.
        label: the class that the source gives it.
        digest: of its bytes; None where nobody has read them.
        reject: why they cannot be read, if so.
        is_settled: whether nobody has written to it of late: what it is now it may stay.
    """

    key: str
    label: str | None
    digest: str | None
    reject: Reject | None = None
    is_settled: bool = True


@dataclass(frozen=True, slots=True)
class Stored:
    """An image of the same source in the collection; `row` is its place there."""

    row: int
    digest: str | None


@dataclass(frozen=True, slots=True)
class Reuse:
    """A key that takes over a stored vector.

    Attributes:
        seen: the record.
        vector_row: whose vector it takes.
        metadata_row: whose metadata it takes; None where it has none yet.
    """

    seen: Seen
    vector_row: int
    metadata_row: int | None


@dataclass(kw_only=True)
class SyncPlan:
    """What is to be done, in the order of the source.

    Attributes:
        unchanged: keys that stay as they are, and their rows.
        reuse: keys that are written with a vector that is there; what takes a row's metadata comes
            before what is written over it, so that a sync that was killed finds the others.
        embed: keys that are to be embedded, and the rows whose metadata they keep.
        replaced: rows that are written over, by key.
        vacated: rows whose image has moved, and whose key waits for another one to be embedded;
            deleted when what moved is written.
        drop: rows that are to be deleted.
        retained: rows whose images cannot be read now, or are being written, which stay.
        rejects: images that are not tried, and why; later those that turned out to be none, too.
        updated: how many unchanged ones have another label, metadata or source now.
        new: how many images the collection did not have.
        changed: how many have other bytes under their key.
        moved: how many had another key.
        gone: how many images of the collection the source has no more.
    """

    unchanged: list[tuple[Seen, int]] = field(default_factory=list)
    reuse: list[Reuse] = field(default_factory=list)
    embed: dict[str, int | None] = field(default_factory=dict)
    replaced: dict[str, int] = field(default_factory=dict)
    vacated: list[int] = field(default_factory=list)
    drop: list[int] = field(default_factory=list)
    retained: list[int] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    updated: int = 0
    new: int = 0
    changed: int = 0
    moved: int = 0
    gone: int = 0


def plan_sync(
    seen: Iterable[Seen],
    stored: Mapping[str, Stored],
    *,
    by_digest: Mapping[str, int],
    taken: Set[str] = frozenset(),
    rejected: Mapping[str, Reject] | None = None,
) -> SyncPlan:
    """Decide what becomes of every image.

    Args:
        seen: the records of the source.
        stored: the images of this source in the collection, by key.
        by_digest: a row of each digest in the collection, of whatever source.
        taken: keys whose ids images of other sources, or of other keys, have.
        rejected: what an earlier run could not use, by key.
    """
    plan, rejected = SyncPlan(), rejected or {}
    others: list[Seen] = []
    met: set[str] = set()
    away: set[str] = set()
    for one in seen:
        old = stored.get(one.key)
        if one.key in met:
            plan.rejects.append(_refuse(one, "an earlier image of this key"))
            continue
        met.add(one.key)
        if one.reject is not None:
            plan.rejects.append(one.reject)
            is_away = one.reject.fault == UNREADABLE
            if old is not None:
                (plan.retained if is_away or not one.is_settled else plan.drop).append(old.row)
            if is_away:
                away.add(one.key.removesuffix("/"))  # a link like an image may lead to a folder
        elif one.key in taken:
            plan.rejects.append(_refuse(one, OF_ANOTHER))
        elif old is not None and one.digest is not None and old.digest == one.digest:
            plan.unchanged.append((one, old.row))
        elif (reject := rejected.get(one.key)) and one.digest and reject.digest == one.digest:
            plan.rejects.append(reject)
            if old is not None:
                (plan.drop if one.is_settled else plan.retained).append(old.row)
        else:
            others.append(one)
            if old is not None:
                plan.replaced[one.key] = old.row
    gone = _find_gone(plan, stored, met, away)
    left = _move(plan, others, stored)
    taken_rows = {one.metadata_row for one in plan.reuse}
    for one in left:
        row = plan.replaced.get(one.key)
        if row is None or row in taken_rows:
            plan.new += 1
            _reuse_or_embed(plan, one, by_digest, metadata_row=None)
        else:
            plan.changed += 1
            taken_rows.add(row)
            _reuse_or_embed(plan, one, by_digest, metadata_row=row)
    plan.gone = len({*gone, *plan.replaced.values()} - taken_rows)
    waiting = [key for key in plan.replaced if key in plan.embed and plan.embed[key] is None]
    plan.vacated = [plan.replaced.pop(key) for key in waiting]
    plan.reuse = _takers_first(plan)
    return plan


def _move(plan: SyncPlan, others: Sequence[Seen], stored: Mapping[str, Stored]) -> list[Seen]:
    """Give images the rows that they had under other keys; return those that had none."""
    digests = {old.row: old.digest for old in stored.values()}
    rows: dict[str | None, list[int]] = {}
    for row in [*plan.replaced.values(), *plan.drop]:  # the last, of gone keys, are taken first
        rows.setdefault(digests[row], []).append(row)
    left = []
    for one in others:
        if one.digest is not None and (donors := rows.get(one.digest)):
            row = donors.pop()
            plan.moved += 1
            plan.reuse.append(Reuse(one, row, row))
        else:
            left.append(one)
    return left


def _takers_first(plan: SyncPlan) -> list[Reuse]:
    """Give `plan.reuse` in an order in which a row is taken before its key is written over.

    Of a circle of exchanged keys one is written over before; all of it stands together.
    """
    takers = {one.metadata_row: one for one in plan.reuse if one.metadata_row is not None}
    ordered: list[Reuse] = []
    met: set[str] = set()
    for first in plan.reuse:
        chain: list[Reuse] = []
        one: Reuse | None = first
        while one is not None and one.seen.key not in met:
            met.add(one.seen.key)
            chain.append(one)
            row = plan.replaced.get(one.seen.key)
            one = None if row is None else takers.get(row)
        ordered += reversed(chain)
    return ordered


def _find_gone(
    plan: SyncPlan, stored: Mapping[str, Stored], met: Set[str], away: Set[str]
) -> list[int]:
    """Find the rows whose keys the source has no more; they are dropped."""
    gone = []
    for key, old in stored.items():
        if key in met:
            continue
        if any(key[:n] in away for n, letter in enumerate(key) if letter == "/"):
            plan.retained.append(old.row)
            continue
        gone.append(old.row)
    plan.drop += gone
    return gone


def _reuse_or_embed(
    plan: SyncPlan, one: Seen, by_digest: Mapping[str, int], *, metadata_row: int | None
) -> None:
    """Take a vector that is there, or plan to make one."""
    row = None if one.digest is None else by_digest.get(one.digest)
    if row is None:
        plan.embed[one.key] = metadata_row
    else:
        plan.reuse.append(Reuse(one, row, metadata_row))


def _refuse(one: Seen, found: str) -> Reject:
    """Reject a key that is not its own."""
    message = f"expected a key of its own, found {found}"
    return Reject(key=one.key, fault=DUPLICATE_KEY, message=message, digest=one.digest)
