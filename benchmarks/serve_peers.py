"""Compare Horace's server with Triton, mosec, LitServe and BentoML: same encoder, same runtime.

Each contender serves the same ONNX file in the same ONNX Runtime on all CPUs of this machine,
which the client shares. Cases differ in encoder, payload and images a request:

    small   the encoder that ships (28 x 28, 5.4 MB), as it is by default;
    int8    its INT8 form;
    light   three convolutions: what servers cost where the encoder costs nothing;
    large   ResNet-50 at 224, random weights.

Closed loops of 1, 16 and 64 calls, open loops at 50, 80 and 120% of what a contender reached
with 64. An open loop, whose rate is `asked_per_s`, has 64 calls at most under way, too: latency
from sending; above capacity figures are those of the closed loop. A reply is held against
in-process vectors once before a contender is timed. After that a gRPC server must itself count
as many answers as the client: gRPC's errors look like answers to h2load. The ceiling is the
encoder in a process of its own without any server.

A server's instance has all threads. Triton and mosec take part in a second form, too, `_lanes`,
whose instances have one thread each: see `benchmarks.peers.servers`. Horace is as by default.

Triton is its Python backend (`train.export.triton_model`), since the wheel that brings the server
has no other: each instance calls ONNX Runtime from a Python process of its own. JPEGs it decodes
there in a loop, one after the other, before it encodes; mosec has two workers that decode, and
Horace a pool. What is said of Triton is said of this, not of its onnxruntime backend.

Contenders take turns within a round; ratios are paired within rounds, and given with their
extremes. Each measurement is kept under artifacts/bench/peers/ as soon as it is made. A run goes
on from there, so several with a few cases each and a last one with all make one report. What is
kept does not say by which code, options or machine: `--fresh` forgets it, and a report is made so.

gRPC: perf_analyzer, and h2load where it cannot (JPEGs, Horace's own Embed); HTTP: wrk, and
h2load at a rate. Clients differ in cost, and share the CPUs with the server: h2load takes less
than perf_analyzer, which favours Embed. So the CPU of server and client is counted apart. With
JPEGs Horace's own HTTP stands beside its gRPC.

Run from the root, on a quiet machine, after `apt-get install wrk nghttp2-client`:
`python -m benchmarks.serve_peers --out benchmarks/results/serve_peers.json`: some 16 minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.measuring import command_line, spread_of, turns
from benchmarks.peers.bundles import make_bundle
from benchmarks.peers.encoder import Setting
from benchmarks.peers.loads import (
    Load,
    Target,
    children_cpu_s,
    measure,
    measure_alone,
    warm_up,
)
from benchmarks.peers.processes import BenchmarkError
from benchmarks.peers.requests import check_answer, make_images, write_bodies
from benchmarks.peers.servers import LANES, PEERS, PYTRITON, count_answered, kind_of, serve
from models.command import progress, run_command
from models.cpu import cpu_budget, cpu_name
from models.encoder import open_encoder
from models.errors import UsageError

CEILING = "ceiling"
STRONGEST = ("triton", "triton" + LANES, "mosec", "mosec" + LANES)
OURS = ("horace-kserve", "horace-embed")
CONTENDERS = (*OURS, "triton", *PEERS)
IN_LANES = (*CONTENDERS, "triton" + LANES, "mosec" + LANES)
ON_GRPCIO = "horace_grpcio-kserve"
ON_HTTP = "horace_http-embed"
EVERYBODY = (*IN_LANES, ON_GRPCIO, ON_HTTP)
OPEN = (0.5, 0.8, 1.2)
"""Of what a contender answered a second with 64 calls under way."""

Row = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison.

    Attributes:
        encoder: which of `benchmarks.peers.bundles`.
        payload: `tensor` or `jpeg`.
        images: a request.
        concurrencies: of the closed loops.
        is_open: whether there are open loops, too, in the first round.
        repeats: whether it is part of every round, or of the first alone.
        patience: how much longer than others a measurement takes: a large encoder answers a
            batch at a time, and few of them, so that its rate is known to no better than a batch
            in the time.
        contenders: who takes part.
    """

    encoder: str
    payload: str
    images: int
    concurrencies: tuple[int, ...]
    is_open: bool = False
    repeats: bool = False
    patience: float = 1.0
    contenders: tuple[str, ...] = CONTENDERS

    @property
    def name(self) -> str:
        """Encoder, payload, images."""
        return f"{self.encoder}-{self.payload}-{self.images}"


CASES = (
    Case(encoder="small", payload="tensor", images=1, concurrencies=(1, 16, 64), is_open=True,
         repeats=True, contenders=IN_LANES),
    Case(encoder="int8", payload="tensor", images=1, concurrencies=(64,), repeats=True,
         contenders=IN_LANES),
    Case(encoder="light", payload="tensor", images=1, concurrencies=(64,), repeats=True,
         contenders=("horace-kserve", "horace-embed", ON_GRPCIO, "triton", "mosec")),
    Case(encoder="small", payload="jpeg", images=1, concurrencies=(1, 64), repeats=True,
         contenders=(*IN_LANES, ON_HTTP)),
    Case(encoder="small", payload="tensor", images=32, concurrencies=(16,), patience=1.5),
    Case(encoder="small", payload="jpeg", images=32, concurrencies=(16,), patience=1.5),
    Case(encoder="large", payload="tensor", images=1, concurrencies=(1, 16), repeats=True,
         patience=6, contenders=("horace-kserve", "horace-embed", *STRONGEST)),
    Case(encoder="large", payload="jpeg", images=1, concurrencies=(4,), patience=3,
         contenders=("horace-kserve", "triton", "mosec")),
    Case(encoder="large", payload="tensor", images=32, concurrencies=(4,), patience=6,
         contenders=("horace-kserve", "triton", "mosec")),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure Horace's server and its peers on the same encoders."""

    cases: tuple[str, ...] = tuple(case.name for case in CASES)
    """Which comparisons, as ENCODER-PAYLOAD-IMAGES."""

    contenders: tuple[str, ...] = EVERYBODY
    """Who takes part."""

    rounds: int = 3
    """How often the cases of small encoders with one image a request are measured."""

    seconds: float = 3.0
    """How long each measurement takes; longer for the large encoder."""

    home: Path = Path("artifacts/bench/peers")
    """Where environments, bundles and measurements are kept."""

    fresh: bool = False
    """Forget the measurements that are there."""

    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            UsageError: there is no such case or contender.
        """
        if self.rounds < 1:
            raise UsageError("--rounds", expected="at least 1", found=str(self.rounds))
        known = {"--cases": [case.name for case in CASES], "--contenders": list(EVERYBODY)}
        for option, names in (("--cases", self.cases), ("--contenders", self.contenders)):
            for name in set(names) - set(known[option]):
                raise UsageError(option, expected=" or ".join(known[option]), found=name)


class Measurements:
    """What has been measured, in a file of one JSON object a line."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        """Read what is there."""
        self._path = path
        if fresh:
            path.unlink(missing_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self._rows: dict[tuple[str, str, str, int], Row] = {
            (row["case"], row["contender"], row["load"], row["round"]): row["figures"]
            for row in map(json.loads, lines)
        }

    def find(self, case: str, contender: str, load: str, n: int) -> Row | None:
        """Give the figures of one measurement, if it was made."""
        return self._rows.get((case, contender, load, n))

    def add(self, case: str, contender: str, load: str, n: int, figures: Row) -> None:
        """Keep the figures of one measurement."""
        self._rows[case, contender, load, n] = figures
        row = {"case": case, "contender": contender, "load": load, "round": n, "figures": figures}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def of(self, case: str, contender: str, load: str) -> dict[int, Row]:
        """Give the figures of all rounds."""
        key = (case, contender, load)
        return {n: row for (*which, n), row in self._rows.items() if tuple(which) == key}

    def loads(self, case: str, contender: str) -> list[str]:
        """List the loads that a contender was put under."""
        keys = [key for key in self._rows if key[:2] == (case, contender)]
        return sorted({load for _, _, load, _ in keys})


def main(options: Options) -> None:
    """Measure in turns, print and write."""
    _check_tools()
    options.home.mkdir(parents=True, exist_ok=True)
    kept = Measurements(options.home / "measurements.jsonl", fresh=options.fresh)
    order = [
        (n, case, server)
        for n in range(options.rounds)
        for case in CASES
        if case.name in options.cases and (case.repeats or n == 0)
        for server in turns([CEILING, *dict.fromkeys(map(server_of, _who(case, options)))], n)
    ]
    load, failures = os.getloadavg()[0], []
    for n, case, server in progress(order, what="measuring", total=len(order), unit="turn"):
        try:
            take_turn(n, case, server, options, kept)
        except BenchmarkError as error:  # a peer that fails is part of the result
            failures.append(f"{case.name}, {server}, round {n}: {error}")
    report = summarise(options, kept) | {
        "failures": failures,
        "load_average_before": round(load, 1),
    }
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def server_of(contender: str) -> str:
    """Name the server of a contender: Horace is called in two ways."""
    return contender.partition("-")[0]


def _who(case: Case, options: Options) -> list[str]:
    """List the contenders of a case that are asked for."""
    return [name for name in case.contenders if name in options.contenders]


def take_turn(n: int, case: Case, server: str, options: Options, kept: Measurements) -> None:
    """Measure one server in one case, as far as that is not done."""
    bundle = make_bundle(case.encoder, options.home)
    home = options.home / case.name
    encoder = open_encoder(bundle)
    images = make_images(encoder.preprocessing, case.payload, case.images)
    targets = write_bodies(images, home)
    seconds = options.seconds * case.patience
    if server == CEILING:
        if kept.find(case.name, CEILING, "c1", n) is None:
            one = write_bodies(images[:1], home / "one")["mosec"]
            kept.add(case.name, CEILING, "c1", n, run_ceiling(bundle, case.payload, one, seconds))
        return
    expected_ND = encoder.encode(np.stack([encoder.preprocess(image) for image in images]))
    who = [name for name in _who(case, options) if server_of(name) == server]
    if all(not list(_loads_left(n, case, name, seconds, kept)) for name in who):
        return
    with serve(server, bundle, case.payload, images=case.images, home=home) as running:
        for name in turns(who, n):
            target = replace(targets[kind_of(name)], url=running.url)
            check_answer(kind_of(name), target, expected_ND)
            client = client_of(kind_of(name), case.payload)
            warm_up(client, target, max(case.concurrencies))
            if client != "http":
                target = replace(target, count=count_answered(running.url))
            for load in _loads_left(n, case, name, seconds, kept):
                figures = measure(client, target, load, running.pid)
                kept.add(case.name, name, load_label(load, case, name, n, kept), n, figures)


def _loads_left(
    n: int, case: Case, name: str, seconds: float, kept: Measurements
) -> Iterator[Load]:
    """Give the loads that a contender has not been put under in a round, closed ones first."""
    for concurrency in case.concurrencies:
        if kept.find(case.name, name, f"c{concurrency}", n) is None:
            yield Load(concurrency=concurrency, seconds=seconds)
    if not case.is_open or n:
        return
    for share in OPEN:
        if kept.find(case.name, name, open_label(share), n) is None:
            capacity = kept.find(case.name, name, f"c{max(case.concurrencies)}", n)
            rate = share * capacity["requests_per_s"] if capacity else 1.0
            concurrency = 64 if share > 1 or kind_of(name) not in PEERS else 16
            yield Load(rate=rate, concurrency=concurrency, seconds=seconds)


def open_label(share: float) -> str:
    """Name an open loop."""
    return f"open{100 * share:.0f}%"


def load_label(load: Load, case: Case, name: str, n: int, kept: Measurements) -> str:
    """Name a load: by its calls, or by its share of the contender's capacity."""
    if load.rate is None:
        return f"c{load.concurrency}"
    capacity = kept.find(case.name, name, f"c{max(case.concurrencies)}", n)
    assert capacity is not None, "closed loops come first"
    return open_label(load.rate / capacity["requests_per_s"])


def client_of(name: str, payload: str) -> str:
    """Choose who calls."""
    if name in PEERS or name == ON_HTTP:
        return "http"
    return "perf_analyzer" if payload == "tensor" and name != "horace-embed" else "h2load"


def run_ceiling(bundle: Path, payload: str, one: Target, seconds: float) -> Row:
    """Measure the encoder in a process of its own."""
    setting = Setting(
        bundle=bundle, payload=payload, port=0, instances=1, threads=cpu_budget(), max_requests=1
    )
    argv = [sys.executable, "-m", "benchmarks.peers.ceiling", str(one.body), str(seconds)]

    def run() -> Row:
        done = subprocess.run(
            argv, env=os.environ | setting.environment(), capture_output=True, text=True, check=True
        )
        figures: Row = json.loads(done.stdout)
        return figures

    return measure_alone(run, children_cpu_s)


def summarise(options: Options, kept: Measurements) -> dict[str, object]:
    """Give medians and spread of every measurement, and the bars."""
    cases = [case for case in CASES if case.name in options.cases]
    figures = {
        case.name: {
            name: {load: _median(kept.of(case.name, name, load)) for load in loads}
            for name in (CEILING, *_who(case, options))
            if (loads := kept.loads(case.name, name))
        }
        for case in cases
    }
    return {
        "command": command_line(),
        "hardware": {"cpu": cpu_name(), "cpus": cpu_budget()},
        "versions": {
            **{name: version(name) for name in ("onnxruntime", "grpcio", "pygrpc-native")},
            **PEERS,
            "tritonserver": f"nvidia-pytriton {PYTRITON}, Python backend",
        },
        "rounds": options.rounds,
        "seconds": options.seconds,
        "bars": {case.name: bars(case, kept) for case in cases},
        "cases": figures,
    }


def _median(rows: dict[int, Row]) -> dict[str, object]:
    """Give the median of every figure, and the rates of all rounds."""
    names = next(iter(rows.values()))
    medians: dict[str, object] = {
        name: round(statistics.median(row[name] for row in rows.values()), 3) for name in names
    }
    if len(rows) > 1:
        for name in {"requests_per_s", "images_per_s"} & set(names):
            medians[f"{name}_of_rounds"] = [round(row[name], 1) for row in rows.values()]
    return medians


def bars(case: Case, kept: Measurements) -> dict[str, object]:
    """Hold Horace against the others, called in either way: ratios are paired within rounds."""
    return {ours: _held(ours, case, kept) for ours in case.contenders if ours in OURS}


def _held(ours: str, case: Case, kept: Measurements) -> dict[str, Row]:
    """Hold Horace, called in one way, against each of the others and the ceiling."""
    most = f"c{max(case.concurrencies)}"
    rows = kept.of(case.name, ours, most)
    held: dict[str, Row | None] = {}
    for name in case.contenders:
        if name in OURS:
            continue
        theirs = kept.of(case.name, name, most)
        held[f"times {name}'s rate at {most}"] = _ratio(rows, theirs, "requests_per_s")
        held[f"times {name}'s p99 at {most}"] = _ratio(rows, theirs, "p99_ms")
        held[f"{name}'s server CPU a request, times Horace's"] = _ratio(
            theirs, rows, "server_cpu_ms_a_request"
        )
    ceilings = kept.of(case.name, CEILING, "c1")
    alone = {n: {"images_per_s": row["requests_per_s"] * case.images} for n, row in rows.items()}
    held["share of the ceiling"] = _ratio(alone, ceilings, "images_per_s")
    single = kept.of(case.name, ours, "c1")
    if overheads := [single[n]["p50_ms"] - ceilings[n]["p50_ms"] for n in single if n in ceilings]:
        held["overhead over in-process at c1, ms"] = spread_of(overheads, 2)
    return {name: value for name, value in held.items() if value is not None}


def _ratio(ours: dict[int, Row], theirs: dict[int, Row], figure: str) -> Row | None:
    """Give the spread over rounds of one figure's ratio; None without common rounds."""
    ratios = [ours[n][figure] / theirs[n][figure] for n in ours if theirs.get(n, {}).get(figure)]
    return spread_of(ratios, 2) if ratios else None


def _check_tools() -> None:
    """Refuse to start where a client is missing.

    Raises:
        BenchmarkError: it is.
    """
    for tool, package in (("wrk", "wrk"), ("h2load", "nghttp2-client")):
        if shutil.which(tool) is None:
            raise BenchmarkError(
                tool, expected="it installed", found="none", mend=f"apt-get install {package}"
            )


if __name__ == "__main__":
    sys.exit(run_command(Options, main, prog="python -m benchmarks.serve_peers"))
