"""`python -m index.select C`: which images to label next.

The methods are those of `index.curation.choosing`. The probe of `margin` and `entropy` sees
vectors that are averaged over their neighbourhood (`index.curation.smoothing`), without which a few
labels teach it little. The list is a CSV file: rank, key,
source, id, an empty column `label` to be filled in, the method, its seed and score, and the
fingerprint of the encoder that it comes from.

A list that is there is replaced on request only: somebody may have typed labels into it.

Rounds: fill in `label` and give the file back with `--labels`, beside those of earlier rounds:
what is in them is not chosen again, and their labels teach `margin` and `entropy`. Labels that
the collection has of its source count too, unless `--ignore-labels`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tyro.conf import Positional

from index.collection import Collection
from index.curation.choosing import METHODS, Choice, Pool
from index.curation.labels_file import read_labels
from index.curation.outlying import find_surroundings
from index.curation.report import write_csv
from index.curation.smoothing import neighbours_for, rounds_for, smooth
from index.errors import unwritable
from index.knn import MISSING
from models.bundle import Json
from models.command import counted, run_command
from models.errors import UsageError
from models.files import atomic_file

HEADER = (
    "rank", "key", "source", "id", "label", "method", "seed", "score", "fingerprint",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SelectOptions:
    """Choose which images to label next, and write a list to fill in."""

    collection: Positional[Path]
    """The collection's directory."""
    out: Path
    """CSV file for the list, of a new name."""
    budget: int = 100
    """How many images to choose."""
    method: Literal["random", "kcentre", "typicality", "margin", "entropy"] = "typicality"
    """random; kcentre: far from all that is labelled; typicality: typical of what has no label
    yet; margin, entropy: what a probe of the labels is least certain of."""
    labels: tuple[Path, ...] = ()
    """CSV files with columns key (or id) and label: what was chosen and labelled before."""
    ignore_labels: bool = False
    """Do as if the collection's source had given no labels."""
    filter: str | None = None
    """Which images may be chosen, such as "source contains 'new'"; all where none is given."""
    smoothing: int | None = None
    """How often vectors are averaged with their neighbours first: for a probe 8 times, or once
    where images are fewer than 1,000; otherwise never."""
    exact: bool = False
    """Find those neighbours by comparing every pair instead of asking the index."""
    seed: int = 0
    """Of what is drawn."""
    replace: bool = False
    """Whether an earlier list of that name may be replaced, with the labels typed into it."""
    json: bool = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        """Check what can be checked without opening anything."""
        if self.budget < 1:
            raise UsageError("--budget", expected="at least 1", found=str(self.budget))
        if self.smoothing is not None and self.smoothing < 0:
            raise UsageError("--smoothing", expected="at least 0", found=str(self.smoothing))
        if self.seed < 0:
            raise UsageError("--seed", expected="at least 0", found=str(self.seed))
        if self.out.resolve() in {file.resolve() for file in self.labels}:
            raise UsageError(
                f"--out {self.out}", expected="a new file", found="one of --labels",
                mend="keep what was labelled, and choose another name",
            )  # fmt: skip
        if self.out.exists() and not self.replace:
            raise UsageError(
                f"--out {self.out}", expected="a new name", found="something of that name",
                mend="choose another name, or add --replace",
            )  # fmt: skip


def main(options: SelectOptions) -> None:
    """Choose, and write the list.

    Raises:
        HoraceError: the collection or the labels cannot be read, nothing is left to choose, or
            the list cannot be written.
    """
    with Collection.open(options.collection) as collection:
        pool = make_pool(collection, options)
        if not pool.free.size:
            raise nothing_to_choose(collection, options, is_labelled=bool(pool.is_taken_N.any()))
        choice = METHODS[options.method](pool, options.budget, options.seed)
        _write(options.out, collection, options, choice)
        document = _document(collection, options, pool, choice)
    print(json.dumps(document, indent=2) if options.json else _as_text(document, options))


def nothing_to_choose(
    collection: Collection, options: SelectOptions, *, is_labelled: bool
) -> UsageError:
    """Make the error for a collection without an image to choose, by what was left out of it."""
    by_source = not options.ignore_labels and any(one is not None for one in collection.labels())
    return UsageError(
        f"images of collection {collection.name}" + (" without a label" if is_labelled else ""),
        expected="at least 1" + ("" if options.filter is None else " that passes the filter"),
        found="none",
        mend="labels of the source count: --ignore-labels does as if there were none"
        if by_source
        else None,
    )


def make_pool(collection: Collection, options: SelectOptions) -> Pool:
    """Say what may be chosen, what is labelled, and what the vectors are."""
    places = {id_: place for place, id_ in enumerate(collection.ids.tolist())}
    given: dict[int, str | None] = {}
    if not options.ignore_labels:
        known = zip(collection.ids.tolist(), collection.labels(), strict=True)
        given = {id_: label for id_, label in known if label is not None}
    for file in options.labels:
        given |= read_labels(file, collection)
    numbers = {name: n for n, name in enumerate(sorted({name for name in given.values() if name}))}
    is_taken_N = np.zeros(collection.count, np.bool_)
    classes_N = np.full(collection.count, MISSING, np.int64)
    for id_, label in given.items():
        is_taken_N[places[id_]] = True
        classes_N[places[id_]] = MISSING if label is None else numbers[label]
    # What the filter leaves out counts as labelled for nobody: it is neither chosen nor covered.
    mask_N = np.ones(collection.count, np.bool_)
    if options.filter is not None:
        mask_N = collection.select(options.filter).mask_N | is_taken_N
    return Pool(
        vectors_ND=find_vectors(collection, options)[mask_N],
        is_taken_N=is_taken_N[mask_N],
        classes_N=classes_N[mask_N],
        ids_N=collection.ids[mask_N],
    )


def find_vectors(collection: Collection, options: SelectOptions) -> NDArray[np.float32]:
    """Give the vectors, averaged over their neighbourhood where a method looks at them."""
    vectors_ND = collection.vectors(collection.ids)
    rounds = _rounds(collection, options)
    if not rounds or collection.count < 2:
        return vectors_ND
    around = find_surroundings(collection, neighbours_for(collection.count), exact=options.exact)
    is_unit = collection.metric == "cosine"
    return smooth(vectors_ND, around.places_NK, rounds, unit=is_unit)


def _rounds(collection: Collection, options: SelectOptions) -> int:
    """Say how often vectors are averaged."""
    if options.smoothing is not None:
        return options.smoothing
    return rounds_for(collection.count) if options.method in ("margin", "entropy") else 0


def _write(out: Path, collection: Collection, options: SelectOptions, choice: Choice) -> None:
    """Write the list, whole or not at all."""
    scores = [""] * len(choice.ids_B)
    if choice.scores_B is not None:
        scores = ["" if np.isnan(score) else f"{score:.6g}" for score in choice.scores_B]
    rows = collection.rows(choice.ids_B)
    try:
        with atomic_file(out) as temporary:
            write_csv(
                temporary,
                HEADER,
                (
                    [rank, row.key, row.source, row.id, "", options.method, options.seed, score,
                     collection.fingerprint]
                    for rank, (row, score) in enumerate(zip(rows, scores, strict=True), start=1)
                ),
            )  # fmt: skip
    except OSError as error:
        raise unwritable(f"--out {out}", "a file that can be written", error) from error


def _document(
    collection: Collection, options: SelectOptions, pool: Pool, choice: Choice
) -> dict[str, Json]:
    """Lay the result out for a machine."""
    classes = Counter(pool.classes_N[pool.classes_N != MISSING].tolist())
    return {
        "collection": collection.name,
        "fingerprint": collection.fingerprint,
        "method": options.method,
        "seed": options.seed,
        "smoothing": _rounds(collection, options),
        "score": choice.meaning,
        "filter": options.filter,
        "free": len(pool.free),
        "taken": int(pool.is_taken_N.sum()),
        "labelled": sum(classes.values()),
        "classes": len(classes),
        "chosen": [row.key for row in collection.rows(choice.ids_B)],
        "out": str(options.out),
    }


def _as_text(document: dict[str, Json], options: SelectOptions) -> str:
    """Say what was done, and what comes next."""
    chosen, free = document["chosen"], document["free"]
    labelled, classes = document["labelled"], document["classes"]
    assert isinstance(chosen, list)
    assert isinstance(free, int)
    assert isinstance(labelled, int)
    assert isinstance(classes, int)
    lists = " ".join(map(str, (*options.labels, options.out)))
    ignoring = " --ignore-labels" if options.ignore_labels else ""
    return (
        f"{len(chosen)} of {counted(free, 'image')} chosen by {options.method}, beside "
        f"{counted(labelled, 'label')} of {counted(classes, 'class', plural='classes')}: "
        f"{options.out}\n"
        f"fill in its column label, then: --labels {lists}{ignoring}"
    )


if __name__ == "__main__":
    sys.exit(run_command(SelectOptions, main, prog="python -m index.select"))
