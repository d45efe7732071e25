"""What callers see of a server that changes under load: signals, reloads, swaps, a killed worker.

Each scenario starts `python -m serve` and callers in processes of their own, which call without
pause and without retries, each reply checked: an image's vector must be that of the encoder
whose fingerprint comes with it, a query must have its hits. Meanwhile, once a second:

| scenario | what changes |
|---|---|
| `sigterm` | nothing; the server is told to stop, and started anew, again and again |
| `bundle` | the bundle is replaced on the disk by another encoder, and SIGHUP sent |
| `collection` | the collection is built anew beside, put in its place, and SIGHUP sent |
| `certificate` | the server's certificate is replaced, and SIGHUP sent; callers connect anew |
| `sigkill` | of two workers one is killed; callers with the client's retries, others without |

Every call that was accepted must be answered. Where the server stays, that is every call. Where
it stops, the server's last line says how many calls it has accepted, and as many replies must
have come; a call that it never looked at (refused, or no connection) is counted apart. Of a
killed worker's calls those under way fail, with UNAVAILABLE and nothing else, which callers
with retries do not see.

Run from the root: `python -m benchmarks.serve_changes --out benchmarks/results/serve_changes.json`.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from index.build import BuildOptions, build
from models.bundle import ENCODER_FILE, SHIPPED_BUNDLE, Json, read_bundle, write_bundle
from models.command import run_command
from models.cpu import cpu_budget, cpu_name
from models.errors import UsageError
from models.files import atomic_directory, publish_directory
from serve.client import AsyncClient
from serve.client.connection import ClientTls
from serve.client.retry import RetryPolicy
from serve.errors import STOPPING, QueueFullError, ServeError, UnavailableError

Scenario = Literal["sigterm", "bundle", "collection", "certificate", "sigkill"]
SCENARIOS: tuple[Scenario, ...] = ("sigterm", "bundle", "collection", "certificate", "sigkill")

CONCURRENCY = 8
"""Calls that a caller process has under way."""

CONNECTION_CALLS = 50
"""Calls of one connection where connections are made anew: a new certificate is for those."""

AS_CALLER = "--as-caller"
"""The first argument of a caller process."""

UNDER_WAY = "under way"
"""What it prints after its first reply."""

NOT_CONNECTED = "failed to connect"
READY_S = 60.0
K = 5
COLLECTION_IMAGES = 200

ENCODERS = ("encoder.onnx", "random.onnx")
"""Of the shipped bundle: two encoders of one shape, whose fingerprints differ."""


class ChangesError(ServeError):
    """An accepted request failed."""


@dataclass(frozen=True, kw_only=True)
class ChangesOptions:
    """Change a server under load, and count what its callers see of it."""

    scenario: tuple[Scenario, ...] = SCENARIOS
    """Which."""
    seconds: float = 30.0
    """How long each of them."""
    every_s: float = 1.0
    """Seconds between two changes."""
    callers: int = 2
    """Processes that call."""
    frontend: Literal["auto", "native", "grpcio"] = "auto"
    """The server's."""
    workers: int = 1
    """The server's, but where one is killed: there are two."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.every_s <= 0 or self.callers < 1 or self.workers < 1:
            raise UsageError("--seconds, --every-s, --callers, --workers", expected="more than 0")


# The caller's side: a process of its own.


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
        elif isinstance(error, UnavailableError) and NOT_CONNECTED in line:
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
                    seen.answered += 1
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
        command = [sys.executable, "-m", "benchmarks.serve_changes", AS_CALLER]
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


# The server's side.


class ServerProcess:
    """`python -m serve` in a process of its own."""

    def __init__(self, folder: Path, *arguments: str, port: int = 0) -> None:
        """Start it, and wait until it is ready."""
        self._log = folder / f"server-{time.monotonic_ns()}.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serve", "--port", str(port), *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("horace serving on "):
            raise ChangesError("server", expected="one that is ready", found=self.log)
        self.address = line.split()[3]

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self._log.read_text()

    @property
    def resident_mib(self) -> float:
        """Memory of the process and its workers, what they share counted for each."""
        pids = (self.process.pid, *self.workers())
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    def workers(self) -> list[int]:
        """The processes of its workers."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        lines = {int(c): Path(f"/proc/{c}/cmdline").read_bytes() for c in children}
        return [child for child, line in lines.items() if b"spawn_main" in line]

    def stop(self) -> int:
        """Tell it to stop, and give the number of calls that it has accepted."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait()
        found = re.findall(r"stopped; every call was answered, (\d+) in all", self.log)
        if status or not found:
            raise ChangesError("server", expected="exit status 0 after a drain", found=self.log)
        return sum(map(int, found))


def put_bundle(path: Path, n: int) -> None:
    """Put the nth encoder, of two, in the place of a bundle."""
    shipped = read_bundle(SHIPPED_BUNDLE, verify=False)
    write_bundle(
        path,
        name="changing",
        files={ENCODER_FILE: SHIPPED_BUNDLE / ENCODERS[n % 2]},
        preprocessing=shipped.preprocessing,
        output=shipped.output,
        provenance={"command": "benchmarks.serve_changes"},
        replace=path.exists(),
    )


def put_images(folder: Path) -> None:
    """Make the images of a collection."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(COLLECTION_IMAGES):
        pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")


def put_collection(path: Path, made: Path) -> None:
    """Put a collection in the place of another, in one step, as `index.build --replace` does."""
    with atomic_directory(path.with_name("copy"), replace=True) as temporary:
        shutil.copytree(made, temporary, dirs_exist_ok=True)
    publish_directory(path.with_name("copy"), path, replace=True)


# The scenarios: each gives its changes and what the callers have seen.


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a scenario.

    Attributes:
        changes: how often something changed.
        accepted: calls that the server says it has accepted; None where it was killed.
        seen: by callers without retries.
        seen_with_retries: by the others, where there were some.
        notes: what else was measured.
    """

    changes: int
    accepted: int | None
    seen: Seen
    seen_with_retries: Seen | None = None
    notes: dict[str, Json] = field(default_factory=dict)


def paced(options: ChangesOptions) -> Iterator[int]:
    """Count changes, one every so often, for as long as the scenario lasts."""
    start_s = time.monotonic()
    n = 0
    while True:
        due_s = start_s + (n + 1) * options.every_s
        if due_s > start_s + options.seconds:
            return
        time.sleep(max(0.0, due_s - time.monotonic()))
        yield n
        n += 1


def server_arguments(options: ChangesOptions) -> list[str]:
    """Give the options that every scenario's server has."""
    return ["--frontend", options.frontend, "--workers", str(options.workers)]


def start_callers(count: int, calling: Calling) -> list[Caller]:
    """Start callers and let them get going."""
    callers = [Caller(calling) for _ in range(count)]
    for caller in callers:
        caller.wait_for_replies()
    return callers


def stop_callers(callers: list[Caller]) -> Seen:
    """Stop callers, and add up what they have seen."""
    return sum((caller.stop() for caller in callers), Seen())


def change_while_called(
    options: ChangesOptions,
    folder: Path,
    arguments: list[str],
    change: Callable[[int], None],
    *,
    search: bool = False,
    ca: str | None = None,
    look: Callable[[str], dict[str, Json]] = lambda address: {},
) -> Outcome:
    """Call a server, and change something and send SIGHUP, again and again.

    At the end `look` is given its address, and what it finds is noted.
    """
    server = ServerProcess(folder, *server_arguments(options), *arguments)
    calling = Calling(address=server.address, search=search, ca=ca)
    callers = start_callers(options.callers, calling)
    changes, resident_mib = 0, []
    for n in paced(options):
        change(n)
        server.process.send_signal(signal.SIGHUP)
        resident_mib.append(round(server.resident_mib, 1))
        changes += 1
    seen = stop_callers(callers)
    found = look(server.address)
    accepted = server.stop()
    refused = server.log.count(" refused, what was served is served")
    notes: dict[str, Json] = {
        "reloads": server.log.count("reloading on SIGHUP"),
        "swaps": len(re.findall(r" is served (?:in version|with) \d", server.log)),
        "refused_reloads": refused,
        "resident_mib_first_middle_last": [
            resident_mib[0], resident_mib[len(resident_mib) // 2], resident_mib[-1],
        ],
        **found,
    }  # fmt: skip
    return Outcome(changes=changes, accepted=accepted, seen=seen, notes=notes)


def run_bundle(options: ChangesOptions, folder: Path) -> Outcome:
    """Replace the bundle."""
    path = folder / "bundle"
    put_bundle(path, 0)
    return change_while_called(
        options, folder, ["--bundle", f"m={path}"], lambda n: put_bundle(path, n + 1)
    )


def run_collection(options: ChangesOptions, folder: Path) -> Outcome:
    """Replace the collection."""
    put_images(folder / "images")
    bundle, made, path = folder / "bundle", folder / "made", folder / "things"
    put_bundle(bundle, 0)
    build(BuildOptions(images=str(folder / "images"), encoder=str(bundle), out=made))
    shutil.copytree(made, path)
    return change_while_called(
        options,
        folder,
        ["--bundle", f"m={bundle}", "--collection", f"c={path}"],
        lambda _: put_collection(path, made),
        search=True,
    )


def run_certificate(options: ChangesOptions, folder: Path) -> Outcome:
    """Replace the server's certificate."""
    import trustme  # of the extra `test`

    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))

    def put(_: int) -> None:
        issued = authority.issue_cert("localhost", "127.0.0.1")
        for name, blobs in (
            ("key.pem", [issued.private_key_pem]),
            ("cert.pem", issued.cert_chain_pems),
        ):
            new = folder / f"new-{name}"
            new.write_bytes(b"".join(blob.bytes() for blob in blobs))
            new.replace(folder / name)

    def look(address: str) -> dict[str, Json]:
        latest = ssl.PEM_cert_to_DER_cert((folder / "cert.pem").read_text())
        return {"latest_certificate_is_served": served_certificate(address) == latest}

    put(0)
    return change_while_called(
        options,
        folder,
        ["--tls.cert", str(folder / "cert.pem"), "--tls.key", str(folder / "key.pem")],
        put,
        ca=str(folder / "ca.pem"),
        look=look,
    )


def served_certificate(address: str) -> bytes | None:
    """Connect anew, and give the certificate that the server shows, as DER."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port))) as connection,
        context.wrap_socket(connection) as secure,
    ):
        return secure.getpeercert(binary_form=True)


def run_sigterm(options: ChangesOptions, folder: Path) -> Outcome:
    """Stop a server under load, and start it anew on its port, again and again."""
    server = ServerProcess(folder, *server_arguments(options))
    port = int(server.address.rpartition(":")[2])
    callers = start_callers(options.callers, Calling(address=server.address))
    stops, accepted = 0, 0
    end_s = time.monotonic() + options.seconds
    while time.monotonic() < end_s:
        time.sleep(options.every_s)
        accepted += server.stop()
        stops += 1
        server = ServerProcess(folder, *server_arguments(options), port=port)
    seen = stop_callers(callers)
    accepted += server.stop()
    return Outcome(changes=stops, accepted=accepted, seen=seen)


def run_sigkill(options: ChangesOptions, folder: Path) -> Outcome:
    """Kill one of two workers, then the other, each time when both serve."""
    server = ServerProcess(folder, "--frontend", options.frontend, "--workers", "2")
    retrying = start_callers(1, Calling(address=server.address, retries=True))
    callers = start_callers(1, Calling(address=server.address))
    kills = 0
    end_s = time.monotonic() + options.seconds
    while time.monotonic() < end_s:
        time.sleep(options.every_s)
        os.kill(server.workers()[0], signal.SIGKILL)
        kills += 1
        until_s = time.monotonic() + READY_S
        while server.log.count("serves again") < kills:
            if time.monotonic() > until_s:
                raise ChangesError("worker", expected="one that serves again", found=server.log)
            time.sleep(0.05)
    seen, seen_with_retries = stop_callers(callers), stop_callers(retrying)
    server.process.send_signal(signal.SIGTERM)
    notes: dict[str, Json] = {"exit_status": server.process.wait()}
    return Outcome(
        changes=kills, accepted=None, seen=seen, seen_with_retries=seen_with_retries, notes=notes
    )


RUNS: dict[Scenario, Callable[[ChangesOptions, Path], Outcome]] = {
    "sigterm": run_sigterm,
    "bundle": run_bundle,
    "collection": run_collection,
    "certificate": run_certificate,
    "sigkill": run_sigkill,
}


# The verdict.


def failed_accepted(scenario: Scenario, outcome: Outcome) -> int:
    """Count the accepted requests that were not answered as they should have been."""
    seen = outcome.seen
    failures = sum(seen.failed.values())
    if scenario == "sigterm":
        assert outcome.accepted is not None
        wrong = seen.failed["a wrong reply"]
        return outcome.accepted - seen.answered + wrong
    if scenario == "sigkill":
        assert outcome.seen_with_retries is not None
        others = failures - sum(n for line, n in seen.failed.items() if "UnavailableE" in line)
        retried = outcome.seen_with_retries
        visible = sum(retried.failed.values()) + retried.refused + retried.unheard
        too_many = max(0, failures - outcome.changes * CONCURRENCY)
        return others + visible + too_many
    return failures + seen.unheard + seen.refused


def describe(scenario: Scenario, outcome: Outcome) -> dict[str, Json]:
    """Lay out a scenario's outcome."""

    def laid_out(seen: Seen) -> dict[str, Json]:
        return {
            "answered": seen.answered,
            "refused": seen.refused,
            "unheard": seen.unheard,
            "errors": dict(seen.failed),
        }

    found: dict[str, Json] = {
        "changes": outcome.changes,
        "accepted_by_server": outcome.accepted,
        "failed_accepted": failed_accepted(scenario, outcome),
        "callers": laid_out(outcome.seen),
        **outcome.notes,
    }
    if outcome.seen_with_retries is not None:
        found["callers_with_retries"] = laid_out(outcome.seen_with_retries)
    return found


def main(options: ChangesOptions) -> None:
    """Run the scenarios, print and write what came of them.

    Raises:
        ChangesError: an accepted request failed; the result is written all the same.
    """
    scenarios: dict[str, Json] = {}
    failed = 0
    for scenario in options.scenario:
        with tempfile.TemporaryDirectory() as folder:
            outcome = RUNS[scenario](options, Path(folder))
        scenarios[scenario] = describe(scenario, outcome)
        failed += failed_accepted(scenario, outcome)
        print(scenario, json.dumps(scenarios[scenario]), flush=True)
    packages = ("grpcio", "pygrpc-native", "numpy", "onnxruntime", "protobuf")
    report: dict[str, Json] = {
        "command": shlex.join(["python", "-m", "benchmarks.serve_changes", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": {"cpu": cpu_name(), "cpus": cpu_budget()},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "seconds_each": options.seconds,
        "caller_processes": options.callers,
        "calls_under_way_each": CONCURRENCY,
        "frontend": options.frontend,
        "workers": options.workers,
        "scenarios": scenarios,
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    if failed:
        raise ChangesError(
            "accepted requests", expected="every one answered", found=f"{failed} not"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == [AS_CALLER]:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(run_caller(Calling(**json.loads(sys.argv[2]))))
        sys.exit()
    sys.exit(run_command(ChangesOptions, main, prog="python -m benchmarks.serve_changes"))
