"""Callers of a server that changes: processes that call without pause and check every reply.

An image's vector must be that of the encoder whose fingerprint comes with it; a query must
have its hits. `python -m benchmarks.changes.callers JSON` is one such process: it says so after
its first reply, calls until its stdin ends, waits for the calls under way, and prints what it
has seen.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from serve.client import AsyncClient
from serve.client.connection import ClientTls
from serve.client.retry import RetryPolicy
from serve.errors import STOPPING, QueueFullError, ServeError, UnavailableError

CONCURRENCY = 8
"""Calls that a caller process has under way."""

CONNECTION_CALLS = 50
"""Calls of one connection where connections are made anew: a new certificate is for those."""

UNDER_WAY = "under way"
"""What a process prints after its first reply."""

NOT_CONNECTED = re.compile(r"found \S+:N: ")
"""The address at which no connection came about, as the client says it; of a call that had one it
says none."""

K = 5


@dataclass(frozen=True, kw_only=True)
class Calling:
    """What one caller process is to do.

    Attributes:
        address: of the server.
        search: whether every other call is a search.
        retries: whether the client retries as it does by default.
        ca: PEM file of the server's authority; in the clear where None.
    """

    address: str
    search: bool = False
    retries: bool = False
    ca: str | None = None


@dataclass(kw_only=True)
class Seen:
    """What one caller process has seen.

    Attributes:
        answered: calls with a reply that is right.
        refused: calls that a stopping server, or one with a full queue, turned away.
        unheard: calls that no server has looked at: no connection, or one that was closed.
        failed: other calls, by what they said.
    """

    answered: int = 0
    refused: int = 0
    unheard: int = 0
    failed: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Seen) -> Seen:
        return Seen(
            answered=self.answered + other.answered,
            refused=self.refused + other.refused,
            unheard=self.unheard + other.unheard,
            failed=self.failed + other.failed,
        )

    def count_error(self, error: ServeError) -> None:
        """Count a call that failed."""
        line = re.sub(r"\d+", "N", str(error).splitlines()[0])[:200]
        if STOPPING in line or isinstance(error, QueueFullError):
            self.refused += 1
        elif isinstance(error, UnavailableError) and NOT_CONNECTED.search(line):
            self.unheard += 1
        else:
            self.failed[f"{type(error).__name__}: {line}"] += 1


async def call_until_told(calling: Calling, seen: Seen, stop: asyncio.Event) -> None:
    """Keep calls under way until told to stop; those under way then are waited for."""
    vectors: dict[str, bytes] = {}
    await asyncio.gather(
        *[call_on_and_on(calling, n, seen, stop, vectors) for n in range(CONCURRENCY)]
    )


async def call_on_and_on(
    calling: Calling, n: int, seen: Seen, stop: asyncio.Event, vectors: dict[str, bytes]
) -> None:
    """Call again and again, one at a time, on connections that are made anew with TLS."""
    image = np.full((28, 28), 100, np.uint8)
    tls = None if calling.ca is None else ClientTls(ca=calling.ca, server_name="localhost")
    retry = RetryPolicy() if calling.retries else RetryPolicy(attempts=1)
    while not stop.is_set():
        async with AsyncClient(calling.address, tls=tls, retry=retry) as client:
            replies = 2  # of the first call: before it the client asks what the server takes
            for calls in range(sys.maxsize if tls is None else CONNECTION_CALLS):
                if stop.is_set():
                    break
                try:
                    if calling.search and (n + calls) % 2:
                        hits = (await client.search([image], k=K, timeout_s=30)).hits
                        right = [len(each) for each in hits] == [K]
                    else:
                        result = await client.embed([image], timeout_s=30)
                        data = result.vectors.tobytes()
                        right = vectors.setdefault(result.fingerprint, data) == data
                except ServeError as error:
                    seen.count_error(error)
                    await asyncio.sleep(0.01)  # a server that is not there is not hammered
                    continue
                if right:
                    if not seen.answered:
                        print(UNDER_WAY, flush=True)
                    seen.answered += replies
                    replies = 1
                else:
                    seen.failed["a wrong reply"] += 1


async def run_caller(calling: Calling) -> None:
    """Call until the end of stdin, then print what was seen."""
    seen, stop = Seen(), asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), stop.set)
    await call_until_told(calling, seen, stop)
    report = {"answered": seen.answered, "refused": seen.refused, "unheard": seen.unheard}
    print(json.dumps(report | {"failed": dict(seen.failed)}), flush=True)


class Caller:
    """A caller process."""

    def __init__(self, calling: Calling) -> None:
        """Start it."""
        command = [sys.executable, "-m", "benchmarks.changes.callers"]
        self._process = subprocess.Popen(
            [*command, json.dumps(vars(calling))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_for_replies(self) -> None:
        """Wait until it has had its first reply."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == UNDER_WAY

    def stop(self) -> Seen:
        """Let it end its calls, and hear what it has seen."""
        out, _ = self._process.communicate()
        report = json.loads(out)
        return Seen(
            answered=report["answered"],
            refused=report["refused"],
            unheard=report["unheard"],
            failed=Counter(report["failed"]),
        )


def start_callers(count: int, calling: Calling) -> list[Caller]:
    """Start callers and let them get going."""
    callers = [Caller(calling) for _ in range(count)]
    for caller in callers:
        caller.wait_for_replies()
    return callers


def stop_callers(callers: list[Caller]) -> Seen:
    """Stop callers, and add up what they have seen."""
    return sum((caller.stop() for caller in callers), Seen())


if __name__ == "__main__":
    asyncio.run(run_caller(Calling(**json.loads(sys.argv[1]))))
