"""A real server in this process or in another, and an encoder whose every move shows."""

from __future__ import annotations

import asyncio
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.preprocess import PreprocessSpec
from serve.config import ServeOptions
from serve.server import Server

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0
"""How long anything may take before a test fails; nothing waits this long if all is well."""


FAKE_SPEC = PreprocessSpec(height=8, width=8, channels=1, resize=8)


@dataclass(eq=False)
class FakeEncoder:
    """Gives each image the vector (first pixel, 1, 1, 1) and keeps account.

    Attributes:
        gate: batches wait here; open from the start unless a test closes it.
        entered: set when a batch has come as far as the gate.
        batches: the first pixels of every batch that was computed.
        failures: raised, one a batch, before anything is computed.
    """

    name: str = "fake"
    fingerprint: str = "f" * 64
    dim: int = 4
    preprocessing: PreprocessSpec = FAKE_SPEC
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    batches: list[list[int]] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def computed(self) -> list[int]:
        """The first pixels of all images computed so far."""
        return [pixel for batch in self.batches for pixel in batch]

    def preprocess(self, data):
        """Nobody calls this."""
        raise AssertionError("the engine preprocesses with its own limits")

    def encode(self, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Wait for the gate, then give the vectors or raise the next failure."""
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        if self.failures:
            raise self.failures.pop(0)
        first_N = images_NHWC[:, 0, 0, 0]
        self.batches.append(first_N.tolist())
        vectors = np.ones((len(first_N), 4), np.float32)
        vectors[:, 0] = first_N
        return vectors

    def close(self) -> None:
        """Note it."""
        self.closed = True


def image(value: int) -> NDArray[np.uint8]:
    """An image of one value, of the fake encoder's size."""
    return np.full((8, 8, 1), value, np.uint8)


@pytest.fixture
def fake() -> FakeEncoder:
    """An encoder that tests can hold, fail and count."""
    return FakeEncoder()


@pytest.fixture(name="image")
def image_fixture() -> Callable[[int], NDArray[np.uint8]]:
    """A function that makes an image of one value, of the fake encoder's size."""
    return image


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], object]:
    """A coroutine function that waits until a condition holds."""

    async def wait(holds: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline_s, "it never came true"
            await asyncio.sleep(0.002)

    return wait


@contextmanager
def _out_of_descriptors() -> Iterator[None]:
    """Have this process open nothing meanwhile; what is open stays, and `stat` works."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))  # stops root, too
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def out_of_descriptors() -> Callable[[], AbstractContextManager[None]]:
    """Makes a time in which nothing can be opened (EMFILE)."""
    return _out_of_descriptors


@pytest.fixture
def vigilant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watchdog that looks a hundred times a second."""
    monkeypatch.setattr("serve.watchdog.EVERY_S", 0.01)


@pytest.fixture(params=["native", "grpcio"])
def frontend(request: pytest.FixtureRequest) -> str:
    """What reads gRPC: a test that uses a server in this process runs on both."""
    return str(request.param)


@pytest.fixture
def serving(frontend):
    """An async context manager: a server in this process, of bundles or of fake encoders."""

    @asynccontextmanager
    async def run(*encoders: FakeEncoder, **options: object) -> AsyncIterator[Server]:
        options.setdefault("frontend", "auto" if "tls" in options else frontend)
        by_name = {encoder.name: encoder for encoder in encoders}
        if encoders:
            options["bundle"] = tuple(f"fake://{name}" for name in by_name)

            def open_fake(uri: str, **_: object) -> FakeEncoder:
                return by_name[uri.removeprefix("fake://")]

            server = Server(ServeOptions(port=0, **options), open_model=open_fake)
        else:
            server = Server(ServeOptions(port=0, **options))
        await server.start()
        for encoder in encoders:  # forget the warm-up
            encoder.batches.clear()
            encoder.entered.clear()
        try:
            yield server
        finally:
            for encoder in encoders:
                encoder.gate.set()
            await server.kill()

    return run


@dataclass
class ServerProcess:
    """`python -m serve` in a process of its own, ready."""

    process: subprocess.Popen[str]
    ready_line: str
    log: Path

    @property
    def address(self) -> str:
        """Where it listens."""
        return self.ready_line.split()[3]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and give the exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """A function that starts `python -m serve` on a free port and waits until it is ready."""
    processes = []

    def start(*arguments: str) -> ServerProcess:
        log = (tmp_path / f"server-{len(processes)}.log").open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", "serve", "--port", "0", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        processes.append((process, log))
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            assert selector.select(PATIENCE_S), "the server said nothing"
        line = process.stdout.readline()
        assert line.startswith("horace serving on "), Path(log.name).read_text()
        return ServerProcess(process, line.strip(), Path(log.name))

    yield start
    for process, log in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
        log.close()


@dataclass(frozen=True)
class StoredImages:
    """A bundle, a folder of images, and the collection that the one made of the other."""

    bundle: Path
    folder: Path
    collection: Path
    fingerprint: str

    @property
    def files(self) -> list[Path]:
        """The images, in the order of their names."""
        return sorted(self.folder.rglob("*.png"))


@pytest.fixture
def stored(tmp_path: Path, make_bundle) -> StoredImages:
    """Twelve images of two classes in a collection that is called `things`."""
    from index.build import BuildOptions, build

    rng = np.random.default_rng(0)
    for n in range(12):
        path = tmp_path / "images" / f"class-{n % 2}" / f"{n:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(path)
    bundle, out = make_bundle(), tmp_path / "things"
    build(BuildOptions(images=str(tmp_path / "images"), encoder=str(bundle.path), out=out))
    return StoredImages(bundle.path, tmp_path / "images", out, bundle.fingerprint)
