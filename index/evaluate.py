"""`python -m index.evaluate knn`: how good an encoder is, judged through a collection.

A dispatcher: each kind of evaluation is a module of its own with options of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from index.evaluation.evaluate_knn import KnnOptions
from index.evaluation.evaluate_knn import main as evaluate_knn
from models.command import run_command

PROG = "python -m index.evaluate"
USAGE = f"""usage: {PROG} KIND [OPTIONS]

kinds:
  knn   accuracy of a weighted vote of the nearest neighbours, beside baselines

{PROG} KIND --help shows the options of a kind."""


def run(argv: Sequence[str]) -> int:
    """Run the kind of evaluation that the first argument names; give the exit status."""
    kind = argv[0] if argv else ""
    if kind in ("-h", "--help"):
        print(USAGE)
        return 0
    if kind != "knn":
        found = repr(kind) if kind else "none"
        print(
            f"{PROG}: kind of evaluation: expected knn, found {found}; see {PROG} --help",
            file=sys.stderr,
        )
        return 2
    return run_command(KnnOptions, evaluate_knn, prog=f"{PROG} knn", argv=argv[1:])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
