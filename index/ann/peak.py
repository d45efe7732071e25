"""The most memory that this process held while something ran.

Rules:
    What cannot be given back (`RssAnon`) is looked at every few milliseconds; the whole resident
    set, with the pages of mapped files that the system takes back when it needs room, is the
    kernel's own high-water mark since the process began.
    Where the system has no `/proc`, both are 0.
"""

from __future__ import annotations

import threading
from pathlib import Path

EVERY_S = 0.01
STATUS = Path("/proc/self/status")


def held_bytes(field: str = "RssAnon") -> int:
    """Read a figure of this process's memory."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(found[0]) if found else 0


class PeakMemory:
    """Watches memory while it is used as a context manager.

    Attributes:
        before_bytes: held at the beginning.
        peak_bytes: the most that was held.
    """

    def __init__(self) -> None:
        self.before_bytes = self.peak_bytes = held_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        """Look again and again."""
        while True:
            self.peak_bytes = max(self.peak_bytes, held_bytes())
            if self._stop.wait(EVERY_S):
                return
