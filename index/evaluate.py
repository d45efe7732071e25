"""`python -m index.evaluate KIND`: how good an encoder and an index are, by a collection.

A dispatcher: each kind of evaluation is a module of its own with options of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from index.evaluation import evaluate_knn, evaluate_retrieval
from models.command import run_command

PROG = "python -m index.evaluate"
USAGE = f"""usage: {PROG} KIND [OPTIONS]

kinds:
  knn        accuracy of a weighted vote of the nearest neighbours, beside baselines
  retrieval  whether what ranks first is of the query's class: P@k, mAP@R, nDCG

{PROG} KIND --help shows the options of a kind."""


def _run_knn(argv: Sequence[str]) -> int:
    """Evaluate the vote of the nearest."""
    return run_command(evaluate_knn.KnnOptions, evaluate_knn.main, prog=f"{PROG} knn", argv=argv)


def _run_retrieval(argv: Sequence[str]) -> int:
    """Evaluate rankings."""
    return run_command(
        evaluate_retrieval.RetrievalOptions,
        evaluate_retrieval.main,
        prog=f"{PROG} retrieval",
        argv=argv,
    )


KINDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "knn": _run_knn,
    "retrieval": _run_retrieval,
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
