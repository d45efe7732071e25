"""Ctrl-C, SIGTERM and SLURM's SIGUSR1 as a request that is met between two steps.

Rules:
    The first signal only asks. A second Ctrl-C or SIGTERM acts at once, as without this
    module; a second SIGUSR1 says nothing new, since SLURM may send it to several processes
    that pass it on.
    Under torchrun no signal acts at once: it hands on what its workers may have had already,
    and ends those that take longer than its 30 s by SIGKILL.
    Outside of the main thread, where Python has no signals, nothing is ever asked.

The exit status is 128 and the signal's number, as shells have it: 130 for Ctrl-C, 143 for
SIGTERM, 138 for SIGUSR1, which `sbatch --signal=USR1@120` sends before the time is up: to what
`srun` has started, and not to what the batch script runs itself.
torchrun itself dies of SIGUSR1, and its workers go on, unless `--signals-to-handle` names it.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether someone wants the process to end; a context manager that restores the handlers.

    Args:
        is_managed: whether a launcher started the process that passes signals on.

    Attributes:
        signal: the number of the one that came, or 0.
    """

    def __init__(self, *, is_managed: bool = False) -> None:
        self.signal = 0
        self._is_managed = is_managed
        self._before = {number: signal.getsignal(number) for number in SIGNALS}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore(SIGNALS)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Note the signal, and let the next one of those that insist act."""
        self.signal = number
        if not self._is_managed:
            self._restore((signal.SIGINT, signal.SIGTERM))

    def _restore(self, numbers: tuple[signal.Signals, ...]) -> None:
        """Put the handlers back that were there before."""
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                signal.signal(number, self._before[number])


def end_process(number: int) -> None:
    """End as the signal would have, through the usual clean-up.

    Raises:
        KeyboardInterrupt: for SIGINT.
        SystemExit: for any other, with the exit status of the module's header.
    """
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
