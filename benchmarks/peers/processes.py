"""Starts a server in a process group of its own, and counts the CPU of a tree of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from models.errors import HoraceError

START_S = 120.0
"""How long a server may take to answer; BentoML takes ten seconds on a busy machine."""

STOP_S = 15.0
TICKS = os.sysconf("SC_CLK_TCK")


class BenchmarkError(HoraceError):
    """A server or a load that did not do as it should."""


@contextmanager
def running(
    argv: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    answers: Callable[[], bool],
) -> Iterator[int]:
    """Run a server until the block ends; give its process id once it answers.

    Raises:
        BenchmarkError: it ended, or did not answer in time.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            argv, stdout=output, stderr=output, env=os.environ | environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            _wait(process, answers, log)
            yield process.pid
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], answers: Callable[[], bool], log: Path) -> None:
    """Ask until the server answers."""
    deadline_s = time.monotonic() + START_S
    while not answers():
        if process.poll() is not None or time.monotonic() > deadline_s:
            lines = log.read_text(errors="replace").splitlines()[-5:]
            raise BenchmarkError(
                f"server {process.args!r:.80}", expected="an answer", found=" | ".join(lines)
            )
        time.sleep(0.2)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and what it has started."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def cpu_s(pid: int) -> float:
    """Give the CPU seconds, user and system, of a process and all that it has started."""
    return sum(_own_cpu_s(member) for member in _tree(pid))


def machine_cpu_s() -> float:
    """Give the CPU seconds that everything on this machine has used."""
    user, nice, system, _, _, *rest = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    return sum(map(int, (user, nice, system, *rest))) / TICKS


def _tree(pid: int) -> Iterator[int]:
    """List a process and its descendants that live."""
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _tree(int(child))
    except OSError:  # it has ended
        return


def _own_cpu_s(pid: int) -> float:
    """Give the CPU seconds of one process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS
