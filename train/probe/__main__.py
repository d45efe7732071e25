"""`python -m train.probe linear|finetune|transfer`: how good an encoder is, judged with labels.

A dispatcher: each kind of probe is a module of its own with options of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from models.command import run_command
from train.probe import finetune, linear, transfer
from train.probe.options import FinetuneOptions, LinearOptions, TransferOptions

PROG = "python -m train.probe"
USAGE = f"""usage: {PROG} KIND [OPTIONS]

kinds:
  linear     a linear layer on a frozen encoder, beside pixels and the untrained encoder
  finetune   a run with few labels, against the same network from scratch
  transfer   both, on other labelled images

{PROG} KIND --help shows the options of a kind."""


def run(argv: Sequence[str]) -> int:
    """Run the kind of probe that the first argument names; give the exit status."""
    kind, rest = (argv[0], argv[1:]) if argv else ("", [])
    prog = f"{PROG} {kind}"
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch loads: see train.pretrain
    if kind in ("-h", "--help"):
        print(USAGE)
        return 0
    if kind == "linear":
        return run_command(LinearOptions, linear.main, prog=prog, argv=rest)
    if kind == "finetune":
        return run_command(FinetuneOptions, finetune.main, prog=prog, argv=rest)
    if kind == "transfer":
        return run_command(TransferOptions, transfer.main, prog=prog, argv=rest)
    found = repr(kind) if kind else "none"
    print(
        f"{PROG}: kind of probe: expected linear, finetune or transfer, found {found}; "
        f"see {PROG} --help",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
