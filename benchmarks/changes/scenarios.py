"""What changes while callers call, and what they have seen of it; see `serve_changes`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.changes.callers import Calling, Seen, start_callers, stop_callers
from benchmarks.changes.server import (
    ChangesError,
    ChangingServer,
    put_bundle,
    put_collection,
    put_images,
    served_certificate,
)
from index.build import BuildOptions, build
from models.bundle import Json

READY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """How hard and how long a server is called, and which server.

    Attributes:
        seconds: how long.
        every_s: between two changes.
        callers: processes that call.
        frontend: the server's.
        workers: the server's.
    """

    seconds: float
    every_s: float
    callers: int
    frontend: Literal["auto", "native", "grpcio"]
    workers: int


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


def paced(load: Load) -> Iterator[int]:
    """Count changes, one every so often, for as long as the scenario lasts."""
    start_s = time.monotonic()
    n = 0
    while True:
        due_s = start_s + (n + 1) * load.every_s
        if due_s > start_s + load.seconds:
            return
        time.sleep(max(0.0, due_s - time.monotonic()))
        yield n
        n += 1


def server_arguments(load: Load) -> list[str]:
    """Give the options that every scenario's server has."""
    return ["--frontend", load.frontend, "--workers", str(load.workers)]


def change_while_called(
    load: Load,
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
    server = ChangingServer(folder, *server_arguments(load), *arguments)
    calling = Calling(address=server.address, search=search, ca=ca)
    callers = start_callers(load.callers, calling)
    changes, resident_mib = 0, []
    for n in paced(load):
        change(n)
        server.process.send_signal(signal.SIGHUP)
        resident_mib.append(round(server.resident_mib, 1))
        changes += 1
    time.sleep(load.every_s)  # for the last change, as for those before it
    seen = stop_callers(callers)
    found = look(server.address)
    accepted = server.drain()
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


def change_bundle(load: Load, folder: Path) -> Outcome:
    """Replace the bundle."""
    path = folder / "bundle"
    put_bundle(path, 0)
    return change_while_called(
        load, folder, ["--bundle", f"m={path}"], lambda n: put_bundle(path, n + 1)
    )


def change_collection(load: Load, folder: Path) -> Outcome:
    """Replace the collection."""
    put_images(folder / "images")
    bundle, made, path = folder / "bundle", folder / "made", folder / "things"
    put_bundle(bundle, 0)
    build(BuildOptions(images=str(folder / "images"), encoder=str(bundle), out=made))
    shutil.copytree(made, path)
    return change_while_called(
        load,
        folder,
        ["--bundle", f"m={bundle}", "--collection", f"c={path}"],
        lambda _: put_collection(path, made),
        search=True,
    )


def change_certificate(load: Load, folder: Path) -> Outcome:
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
        load,
        folder,
        ["--tls.cert", str(folder / "cert.pem"), "--tls.key", str(folder / "key.pem")],
        put,
        ca=str(folder / "ca.pem"),
        look=look,
    )


def stop_and_start(load: Load, folder: Path) -> Outcome:
    """Stop a server under load, and start it anew on its port, again and again."""
    server = ChangingServer(folder, *server_arguments(load))
    port = int(server.address.rpartition(":")[2])
    callers = start_callers(load.callers, Calling(address=server.address))
    stops, accepted = 0, 0
    end_s = time.monotonic() + load.seconds
    while time.monotonic() < end_s:
        time.sleep(load.every_s)
        accepted += server.drain()
        stops += 1
        server = ChangingServer(folder, *server_arguments(load), port=port)
    seen = stop_callers(callers)
    accepted += server.drain()
    return Outcome(changes=stops, accepted=accepted, seen=seen)


def kill_workers(load: Load, folder: Path) -> Outcome:
    """Kill one of two workers, then the other, each time when both serve."""
    server = ChangingServer(folder, "--frontend", load.frontend, "--workers", "2")
    retrying = start_callers(1, Calling(address=server.address, retries=True))
    callers = start_callers(1, Calling(address=server.address))
    kills = 0
    end_s = time.monotonic() + load.seconds
    while time.monotonic() < end_s:
        time.sleep(load.every_s)
        os.kill(server.workers()[0], signal.SIGKILL)
        kills += 1
        until_s = time.monotonic() + READY_S
        while server.log.count("serves again") < kills:
            if time.monotonic() > until_s:
                raise ChangesError("worker", expected="one that serves again", found=server.log)
            time.sleep(0.05)
    seen, seen_with_retries = stop_callers(callers), stop_callers(retrying)
    notes: dict[str, Json] = {"exit_status": server.stop()}
    return Outcome(
        changes=kills, accepted=None, seen=seen, seen_with_retries=seen_with_retries, notes=notes
    )
