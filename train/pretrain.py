"""`python -m train.pretrain SOURCE`: make an encoder from images alone.

The command only chooses the preset and parses the options; `train.loop` does the work. It
is imported after parsing, since torch takes seconds to load and `--help` should not.
"""

from __future__ import annotations

import os
import sys

from models.command import run_command
from models.errors import UsageError
from train.config import PretrainOptions, choose_preset


def main(options: PretrainOptions) -> None:
    """Check what can be known without torch, then train."""
    if options.source == "fashion-mnist:test":
        raise UsageError(
            "source",
            expected="training images",
            found=options.source,
            mend="train on fashion-mnist; the test images are for `python -m index.evaluate`",
        )
    # OpenMP reads this once, when torch loads. By default a waiting thread spins for long,
    # which on cores that others use, too, keeps off the very thread it waits for: training
    # the default network on two such cores fell from 500 to 100 views/s. A short spin keeps
    # the full speed of a quiet machine; sleeping at once (OMP_WAIT_POLICY=passive) does not.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from train.loop import pretrain

    pretrain(options)


if __name__ == "__main__":
    preset = choose_preset(sys.argv[1:])
    sys.exit(run_command(PretrainOptions, main, prog="python -m train.pretrain", default=preset))
