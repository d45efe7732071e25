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

Nothing of this is worth anything where nothing changed: every new bundle and collection must be
served and none refused, new connections must see the latest certificate, and the server whose
workers were killed must end with exit status 0.

Run from the root: `python -m benchmarks.serve_changes --out benchmarks/results/serve_changes.json`.
"""

from __future__ import annotations

import datetime
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from benchmarks.changes.callers import CONCURRENCY, Seen
from benchmarks.changes.scenarios import (
    Load,
    Outcome,
    change_bundle,
    change_certificate,
    change_collection,
    kill_workers,
    stop_and_start,
)
from benchmarks.changes.server import ChangesError
from benchmarks.measuring import command_line
from models.bundle import Json
from models.command import run_command
from models.cpu import cpu_budget, cpu_name
from models.errors import UsageError

Scenario = Literal["sigterm", "bundle", "collection", "certificate", "sigkill"]
SCENARIOS: dict[Scenario, Callable[[Load, Path], Outcome]] = {
    "sigterm": stop_and_start,
    "bundle": change_bundle,
    "collection": change_collection,
    "certificate": change_certificate,
    "sigkill": kill_workers,
}


@dataclass(frozen=True, kw_only=True)
class ChangesOptions:
    """Change a server under load, and count what its callers see of it."""

    scenario: tuple[Scenario, ...] = tuple(SCENARIOS)
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

    @property
    def load(self) -> Load:
        """What every scenario has in common."""
        return Load(
            seconds=self.seconds,
            every_s=self.every_s,
            callers=self.callers,
            frontend=self.frontend,
            workers=self.workers,
        )


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


def left_undone(scenario: Scenario, outcome: Outcome) -> list[str]:
    """Say what the server did not do, without which its callers have seen no change."""
    notes = outcome.notes
    swaps = notes.get("swaps")
    assert swaps is None or isinstance(swaps, int)
    faults = {
        "nothing was changed": not outcome.changes,
        f"{swaps} swaps for {outcome.changes} changes": scenario in ("bundle", "collection")
        and (swaps or 0) < outcome.changes,
        f"{notes.get('refused_reloads')} reloads refused": bool(notes.get("refused_reloads")),
        "an old certificate": notes.get("latest_certificate_is_served") is False,
        f"exit status {notes.get('exit_status')}": bool(notes.get("exit_status")),
    }
    return [f"{scenario}: {fault}" for fault, is_there in faults.items() if is_there]


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
        ChangesError: an accepted request failed, or what changed was not served; the result is
            written all the same.
    """
    scenarios: dict[str, Json] = {}
    failed, undone = 0, []
    for scenario in options.scenario:
        with tempfile.TemporaryDirectory() as folder:
            outcome = SCENARIOS[scenario](options.load, Path(folder))
        scenarios[scenario] = describe(scenario, outcome)
        failed += failed_accepted(scenario, outcome)
        undone += left_undone(scenario, outcome)
        print(scenario, json.dumps(scenarios[scenario]), flush=True)
    packages = ("grpcio", "pygrpc-native", "numpy", "onnxruntime", "protobuf")
    report: dict[str, Json] = {
        "command": command_line(),
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
    if undone:
        raise ChangesError("server", expected="every change served", found="; ".join(undone))


if __name__ == "__main__":
    sys.exit(run_command(ChangesOptions, main, prog="python -m benchmarks.serve_changes"))
