"""`python -m serve.client bench`: how fast a server answers, and how it fails.

Rules:
    A closed loop keeps `--concurrency` requests under way; an open loop (`--rate`) sends them
    at their times whatever becomes of the others, and counts a latency from the time at which
    its request was due, so that a server that stalls is not measured by the requests that
    were never sent (coordinated omission).
    A request is made once: what it fails with is counted, and not hidden by a retry. A closed
    loop makes its next one as long after as the server asks, and not at once.
    A request counts with those of the time in which it was due: what is under way at the end is
    awaited, but by no Ctrl-C, and warm-up is not counted. Throughput is what was answered in the
    time that is measured.
    The status is 1 where anything has failed, in an overload, too: the report says what.

Client and server share the machine where they run on one: the client costs what it costs.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from models.errors import UsageError
from models.image_source import ImageData
from serve.client.async_client import AsyncClient
from serve.client.commands.connecting import ServerOptions
from serve.client.commands.files import read_files
from serve.client.requests import EmbedOptions
from serve.client.results import ModelInfo
from serve.client.retry import RetryPolicy
from serve.errors import STATUS_CODES, FailedItemsError, ServeError, UnknownNameError

MAX_OUTSTANDING = 4096
"""Requests of an open loop that may be under way; one beyond them is counted as not sent."""

MAX_FILES = 1000
"""Images that are read into memory and sent in turn."""

SYNTHETIC_IMAGES = 64

MOST = 1e9
"""Seconds, and requests in one."""

PAUSE_S = 0.1
"""Of a closed loop after a request that failed, at least: a refusal comes in no time, and who is
refused in real life does not come back so soon either."""


@dataclass(frozen=True, kw_only=True)
class BenchCommand(ServerOptions):
    """Measure a server: throughput, latencies, errors."""

    images: Positional[tuple[Path, ...]] = ()
    """Files and folders to send in turn; random pixels of the model's own size where none."""
    model: str | None = None
    """A served model; the server's default where not given."""
    concurrency: int = 16
    """Requests under way at once, in a closed loop."""
    rate: float | None = None
    """Requests a second at fixed times, in an open loop, instead of --concurrency."""
    images_per_request: int = 1
    """Images of one request."""
    seconds: float = 10.0
    """How long is measured."""
    warm_up_s: float = 1.0
    """How long requests are made before that."""
    dtype: str = "fp32"
    """How vectors cross the wire: fp32, fp16 or int8."""
    priority: int = 0
    """Of every request."""
    json: bool = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        """Check what can be checked without a server.

        Raises:
            UsageError: a value makes no sense.
        """
        super().__post_init__()
        EmbedOptions(model=self.model, dtype=self.dtype, priority=self.priority)
        for name in ("concurrency", "images_per_request"):
            if getattr(self, name) < 1:
                option = "--" + name.replace("_", "-")
                raise UsageError(option, expected="at least 1", found=str(getattr(self, name)))
        for name in ("rate", "seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < MOST:
                expected = f"below {MOST:.0e}" if value >= MOST else "above 0"
                raise UsageError(f"--{name}", expected=expected, found=str(value))
        if not 0 <= self.warm_up_s < MOST:
            expected = f"below {MOST:.0e}" if self.warm_up_s >= MOST else "0 or more"
            raise UsageError("--warm-up-s", expected=expected, found=str(self.warm_up_s))


@dataclass
class Measured:
    """What was seen of the time that counts.

    Attributes:
        latencies_s: of requests that were due in it, and were answered at some time.
        faults: of those, why some images have no vector.
        errors: requests that were due in it and were not answered, by gRPC's code.
        not_sent: requests of an open loop for which there was no room here.
        answered: requests that were answered in it, whenever they were due.
        images: of those, with a vector.
    """

    latencies_s: list[float] = field(default_factory=list)
    answered: int = 0
    images: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    not_sent: int = 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is printed."""

    server: str
    model: str
    mode: str
    images_per_request: int
    seconds: float
    requests: int
    requests_per_s: float
    images_per_s: float
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    failed_images: int
    faults: dict[str, int]
    errors: dict[str, int]
    not_sent: int


def main(options: BenchCommand) -> None:
    """Measure, and print what was measured.

    Raises:
        HoraceError: the server cannot be had, or, after the report, something has failed, or
            nothing was answered.
    """
    report = asyncio.run(measure(options))
    print(json.dumps(asdict(report), indent=2) if options.json else _as_text(report))
    failed = [f"{count} requests {code}" for code, count in report.errors.items()]
    failed += [f"{count} images {fault}" for fault, count in report.faults.items()]
    failed += [f"{report.not_sent} requests not sent"] if report.not_sent else []
    if failed or not report.requests:
        raise FailedItemsError(
            f"bench of {options.server}",
            expected="a vector for every image",
            found=", ".join([f"{report.requests} requests answered", *failed]),
            mend=None if failed else "measure longer with --seconds",
        )


async def measure(options: BenchCommand) -> Report:
    """Connect, warm up, measure."""
    async with options.connect_async(retry=RetryPolicy(attempts=1)) as client:
        model = await _find_model(client, options.model)
        load = _Load(client, options, model.name, _images(options, model))
        async with _running(load):
            await asyncio.sleep(options.warm_up_s)
            load.measured, started_s = Measured(), time.monotonic()
            await asyncio.sleep(options.seconds)
            measured, elapsed_s = load.measured, time.monotonic() - started_s
            load.measured = Measured()  # of what is answered from now on
    return _report(options, model.name, measured, elapsed_s)


class _Load:
    """Makes requests until it is told to stop, and notes what becomes of them."""

    def __init__(
        self, client: AsyncClient, options: BenchCommand, model: str, images: Sequence[ImageData]
    ) -> None:
        self.measured = Measured()
        self._is_over = asyncio.Event()
        self._client = client
        self._options = options
        self._model = model
        self._images = cycle(images)
        self._outstanding: set[asyncio.Task[float]] = set()

    def end(self) -> None:
        """Have no more requests made."""
        self._is_over.set()

    async def run(self) -> None:
        """Make requests, one loop or the other."""
        if self._options.rate is None:
            await asyncio.gather(*(self._close_loop() for _ in range(self._options.concurrency)))
        else:
            await self._open_loop(self._options.rate)

    async def _close_loop(self) -> None:
        """Make one request after the other."""
        while not self._is_over.is_set():
            pause_s = await self._request(time.monotonic())
            if pause_s:
                await self._wait_until(time.monotonic() + pause_s)

    async def _open_loop(self, rate: float) -> None:
        """Make requests when they are due."""
        begun_s, number = time.monotonic(), 0
        while True:
            due_s = begun_s + number / rate
            await self._wait_until(due_s)
            if self._is_over.is_set():
                break
            number += 1
            if len(self._outstanding) >= MAX_OUTSTANDING:
                self.measured.not_sent += 1
                continue
            task = asyncio.create_task(self._request(due_s))
            self._outstanding.add(task)
            task.add_done_callback(self._outstanding.discard)
        await asyncio.gather(*self._outstanding)

    async def _wait_until(self, due_s: float) -> None:
        """Wait, but no longer than until the end."""
        with suppress(TimeoutError):
            async with asyncio.timeout(due_s - time.monotonic()):
                await self._is_over.wait()

    async def _request(self, due_s: float) -> float:
        """Make one request, with its latency counted from `due_s`; give the pause after it."""
        images = list(islice(self._images, self._options.images_per_request))
        measured = self.measured
        try:
            result = await self._client.embed(
                images,
                model=self._model,
                dtype=self._options.dtype,
                priority=self._options.priority,
            )
        except ServeError as error:
            measured.errors[_code_of(error)] += 1
            return max(PAUSE_S, error.retry_after_s or 0.0)
        measured.latencies_s.append(time.monotonic() - due_s)
        measured.faults.update(s.code for s in result.statuses if not s.ok)
        self.measured.answered += 1
        self.measured.images += len(result.vectors)
        return 0.0


@asynccontextmanager
async def _running(load: _Load) -> AsyncIterator[None]:
    """Keep a load running; what is under way at the end is awaited, unless it is an error."""
    task = asyncio.create_task(load.run())
    try:
        yield
        load.end()
        await task
    finally:
        task.cancel()


async def _find_model(client: AsyncClient, name: str | None) -> ModelInfo:
    """Find the model of that name; the default one where there is none.

    Raises:
        UnknownNameError: the server does not have it.
    """
    models = await client.list_models()
    for model in models:
        if model.name == name or (name is None and model.is_default):
            return model
    raise UnknownNameError(
        "--model",
        expected=" or ".join(repr(model.name) for model in models) or "a server that has one",
        found="none" if name is None else repr(name),
        mend="choose one that is served" if models else "have the server load one",
    )


def _images(options: BenchCommand, model: ModelInfo) -> list[ImageData]:
    """Read the files, or make pixels of the model's size.

    Raises:
        ImageError: a file cannot be read.
    """
    if not options.images:
        rng = np.random.default_rng(0)
        spec = model.preprocessing
        shape = (SYNTHETIC_IMAGES, spec.height, spec.width, spec.channels)
        return list(rng.integers(0, 256, shape, dtype=np.uint8))
    images: list[ImageData] = []
    for file in islice(read_files(options.images), MAX_FILES):
        if file.data is None:
            assert file.error is not None
            raise file.error
        images.append(file.data)
    return images


def _report(options: BenchCommand, model: str, measured: Measured, elapsed_s: float) -> Report:
    """Sum up."""
    latencies_s = measured.latencies_s
    closed = f"closed loop, {options.concurrency} under way"

    def quantile_ms(share: float) -> float | None:
        return round(float(np.quantile(latencies_s, share)) * 1e3, 3) if latencies_s else None

    return Report(
        server=options.server,
        model=model,
        mode=closed if options.rate is None else f"open loop, {options.rate:g} requests a second",
        images_per_request=options.images_per_request,
        seconds=round(elapsed_s, 3),
        requests=len(latencies_s),
        requests_per_s=round(measured.answered / elapsed_s, 1),
        images_per_s=round(measured.images / elapsed_s, 1),
        p50_ms=quantile_ms(0.5),
        p90_ms=quantile_ms(0.9),
        p99_ms=quantile_ms(0.99),
        max_ms=quantile_ms(1.0),
        failed_images=measured.faults.total(),
        faults=dict(measured.faults.most_common()),
        errors=dict(measured.errors),
        not_sent=measured.not_sent,
    )


def _as_text(report: Report) -> str:
    """Lay out a report for people."""
    lines = [
        f"{report.server}, model {report.model}: {report.mode}, "
        f"{report.images_per_request} images a request, {report.seconds:g} s",
        f"  {report.requests_per_s:g} requests/s, {report.images_per_s:g} images/s",
    ]
    if report.p50_ms is not None:
        lines.append(
            f"  latency p50 {report.p50_ms:.2f} ms, p90 {report.p90_ms:.2f} ms, "
            f"p99 {report.p99_ms:.2f} ms, longest {report.max_ms:.2f} ms"
        )
    if report.failed_images:
        faults = ", ".join(f"{count} {fault}" for fault, count in report.faults.items())
        lines.append(f"  images without a vector: {faults}")
    lines += [f"  {code}: {count} requests" for code, count in report.errors.items()]
    if report.not_sent:
        lines.append(f"  not sent, with {MAX_OUTSTANDING} under way: {report.not_sent} requests")
    return "\n".join(lines)


def _code_of(error: ServeError) -> str:
    """Name an error as gRPC does."""
    code = STATUS_CODES.get(type(error))
    return "UNKNOWN" if code is None else code.name
