"""Opens one version of a model, starts its engine, and sends an image through both.

Rules:
    Nothing is offered to callers before a real image has gone through the whole pipeline:
    what is broken is found here, while what is served goes on.
    What was opened and does not run, or not in time, is closed; so is what nobody waits for.
    On a GPU a full batch and smaller ones go through, too: CUDA plans and TensorRT builds by
    shape, and no caller must wait for that.
    Opening blocks and runs on a thread; the warm-up belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from PIL import Image

from models.bundle import Precision
from models.encoder import Encoder
from models.errors import ImageFault
from models.preprocess import PreprocessSpec
from models.providers import ON_CPU, Placement, sizes_to_plan
from serve.engine import Engine
from serve.errors import StartError
from serve.leases import Dispose
from serve.lifecycle.opening import open_on
from serve.lifecycle.options import ModelOptions
from serve.pool import ThreadPool

WARM_UP_S = 600.0
"""How long the first image may take; TensorRT may build for minutes."""

CLOSE_TIMEOUT_S = 2.0
"""How long a thread may take to end once nobody waits for it."""

TOO_LOW = {
    ImageFault.TOO_MANY_BYTES: "--max-image-bytes",
    ImageFault.TOO_MANY_PIXELS: "--max-image-pixels",
}
"""The options that leave an image of the encoder's own size out, by its fault."""


class OpenModel(Protocol):
    """The signature of `models.encoder.open_encoder`."""

    def __call__(
        self,
        path_or_uri: str,
        /,
        *,
        threads: int | None = None,
        precision: Precision | None = None,
        placement: Placement = ON_CPU,
        with_lanes: bool = False,
    ) -> Encoder:
        """Open an encoder."""


class MakeEngine(Protocol):
    """Starts the engine of an encoder, as the server's options say."""

    def __call__(
        self, encoder: Encoder, options: ModelOptions, /, *, name: str, version: str
    ) -> Engine:
        """Start an engine."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """A version of a model that has computed an image and is not offered yet."""

    name: str
    version: str
    encoder: Encoder
    engine: Engine

    def close(self) -> None:
        """End the engine and what it runs."""
        self.engine.close(timeout_s=CLOSE_TIMEOUT_S)
        self.encoder.close()


class Loader:
    """Opens models on a thread. Belongs to one event loop."""

    def __init__(
        self,
        *,
        open_model: OpenModel,
        make_engine: MakeEngine,
        divide_threads: Callable[[ModelOptions], int],
        pool: ThreadPool,
        dispose: Dispose,
        largest_batch: int = 32,
        instances: int | None = None,
    ) -> None:
        """Take what opens and what runs.

        Args:
            open_model: opens an encoder by directory or URI.
            make_engine: starts its engine.
            divide_threads: gives an encoder its threads.
            pool: where models are opened; closed by its owner.
            dispose: runs what closes a model; see `serve.leases`.
            largest_batch: images of the largest batch that an engine makes.
            instances: batches of a model that run at once; an encoder on CPUs has lanes where
                neither this nor its own options say.
        """
        self._open_model = open_model
        self._make_engine = make_engine
        self._divide_threads = divide_threads
        self._pool = pool
        self.dispose = dispose
        self._largest_batch = largest_batch
        self._instances = instances

    async def load(
        self, options: ModelOptions, path: str, *, name: str | None, version: str
    ) -> Loaded:
        """Open a version, and run it once.

        Args:
            options: how it is to run.
            path: where this version is.
            name: the model's; the encoder's own where None.
            version: its number.

        Raises:
            HoraceError: it cannot be opened, or does not run.
        """
        opening = partial(self._open, options, path)
        what = f"model {name or options.path}"
        encoder = await open_on(self._pool, opening, self.dispose, what=what)
        name = name or encoder.name
        try:
            engine = self._make_engine(encoder, options, name=name, version=version)
        except BaseException:
            encoder.close()
            raise
        loaded = Loaded(name=name, version=version, encoder=encoder, engine=engine)
        try:
            await warm_up(engine, name)
        except BaseException:
            self.dispose(loaded.close)
            raise
        return loaded

    def _open(self, options: ModelOptions, path: str) -> Encoder:
        """Open an encoder; a remote one has its own threads and precision."""
        threads = options.threads or self._divide_threads(options)
        if options.is_remote:
            return self._open_model(path, threads=threads)
        encoder = self._open_model(
            path,
            threads=threads,
            precision=options.precision,
            placement=options.placement,
            with_lanes=options.provider == "cpu" and not (options.instances or self._instances),
        )
        if options.provider != "cpu":
            spec = encoder.preprocessing
            shape = (self._largest_batch, spec.height, spec.width, spec.channels)
            images_NHWC = np.zeros(shape, np.uint8)
            try:
                for size in sizes_to_plan(options.provider, self._largest_batch):
                    encoder.encode(images_NHWC[:size])
            except BaseException:
                encoder.close()
                raise
        return encoder


async def warm_up(engine: Engine, name: str) -> None:
    """Send an encoded image through the whole pipeline.

    Raises:
        StartError: no vector came out, or not in time.
    """
    image = _grey_png(engine.encoder.preprocessing)
    work = engine.embed(
        [image], count=1, payload_bytes=len(image), priority=1, on_admitted=lambda: None
    )
    try:
        embedded = await asyncio.wait_for(work, WARM_UP_S)
    except TimeoutError as error:
        raise StartError(
            f"model {name}",
            expected=f"a vector of a grey image within {WARM_UP_S:g} s",
            found="none",
            mend="see what its runtime waits for, or export the bundle again",
        ) from error
    bad = embedded.errors[0]
    if bad is not None or not np.isfinite(embedded.vectors_ND).all():
        option = None if bad is None else TOO_LOW.get(bad.fault)
        raise StartError(
            f"model {name}",
            expected="a vector of finite numbers for a grey image",
            found=str(bad or "others"),
            mend="export the bundle again" if option is None else f"allow more with {option}",
        )


def _grey_png(spec: PreprocessSpec) -> bytes:
    """Make an image file of the encoder's size."""
    file = io.BytesIO()
    Image.new("RGB", (spec.width, spec.height), (128, 128, 128)).save(file, "PNG")
    return file.getvalue()
