"""`python -m index.evaluate KIND`: how good an encoder and an index are, by a collection.

A dispatcher: each kind of evaluation is a module of its own with options of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from index.evaluation import evaluate_knn, evaluate_recall, evaluate_retrieval, evaluate_space
from models.command import run_command

Options = TypeVar("Options")
Kind = Callable[[Sequence[str]], int]
"""Takes the arguments after the kind's name, gives the exit status."""

PROG = "python -m index.evaluate"
USAGE = f"""usage: {PROG} KIND [OPTIONS]

kinds:
  knn        accuracy of a weighted vote of the nearest neighbours, beside baselines
  retrieval  whether what ranks first is of the query's class: P@k, mAP@R, nDCG
  recall     what the index finds of what an exact search finds, how fast, at what size
  space      the space itself: rank, spread, hubs, drift from another encoder

{PROG} KIND --help shows the options of a kind."""


def _kind(name: str, options: type[Options], main: Callable[[Options], None]) -> Kind:
    """Make a command of a kind of evaluation."""
    return lambda argv: run_command(options, main, prog=f"{PROG} {name}", argv=argv)


KINDS: Mapping[str, Kind] = {
    "knn": _kind("knn", evaluate_knn.KnnOptions, evaluate_knn.main),
    "retrieval": _kind("retrieval", evaluate_retrieval.RetrievalOptions, evaluate_retrieval.main),
    "recall": _kind("recall", evaluate_recall.RecallOptions, evaluate_recall.main),
    "space": _kind("space", evaluate_space.SpaceOptions, evaluate_space.main),
}


def run(argv: Sequence[str]) -> int:
    """Run the kind of evaluation that the first argument names; give the exit status."""
    kind = argv[0] if argv else ""
    if kind in ("-h", "--help"):
        print(USAGE)
        return 0
    if kind not in KINDS:
        found = repr(kind) if kind else "none"
        print(
            f"{PROG}: kind of evaluation: expected {' or '.join(KINDS)}, found {found}; "
            f"see {PROG} --help",
            file=sys.stderr,
        )
        return 2
    return KINDS[kind](argv[1:])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
