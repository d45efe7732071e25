"""Workers that serve nothing and behave as a test wants: the targets of real processes.

FAKE_WORKERS in the environment says how; a directory in FAKE_PLACE keeps what they remember.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from serve.workers.messages import Answer, Failed, Order, Ready

HELD = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def fake_worker(options, place, pipe) -> None:
    """Behave."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
    behaviour = os.environ["FAKE_WORKERS"]
    memory = Path(os.environ["FAKE_PLACE"])
    if behaviour == "bad use":
        pipe.send(Failed(line="--this: expected that", bad_use=True))
        sys.exit(1)
    if behaviour == "one dies" and place.index == 1:
        sys.exit(3)
    if place.index == 1 and behaviour in ("one cannot start again", "one hangs as it starts again"):
        starts = len(list(memory.glob("start-*")))
        (memory / f"start-{starts}").write_text("")
        if starts and behaviour == "one cannot start again":
            sys.exit(3)
        if starts == 1:
            signal.sigwait({signal.SIGUSR2})
    pipe.send(Ready(line=f"serving on port {options.port > 0}"))
    if behaviour == "one dies later" and place.index == 1:
        mark = memory / "died"
        if not mark.exists():
            mark.write_text("")
            while pipe.recv() is Order.ANSWER:  # until the test says when: all are ready then
                pipe.send(Answer())
            pipe.send(Failed(line="a reason", bad_use=False))
            sys.exit(4)
    if behaviour == "one hangs" and place.index == 1 and not (memory / "hung").exists():
        (memory / "hung").write_text("")
        while pipe.recv() is Order.ANSWER:  # until the test says when: all are ready then
            pipe.send(Answer())
        signal.sigwait({signal.SIGUSR2})
    obey(behaviour, pipe, memory / f"reloads-{place.index}")


def obey(behaviour: str, pipe, reloads: Path) -> None:
    """Take orders until one of them is the last."""
    while True:
        order = pipe.recv()
        if order is Order.RELOAD:
            reloads.write_text("reloaded")
        elif order is Order.ANSWER:
            pipe.send(Answer())
        elif order is Order.STOP and behaviour == "stubborn":
            reloads.with_name("told").write_text("")
        elif order is Order.STOP and behaviour == "deaf":
            time.sleep(60)
        elif order is Order.STOP:
            return
        elif order is Order.CUT_OFF:
            pipe.send(Failed(line="drain: 2 cut off", bad_use=False))
            sys.exit(1)
