"""Puts a server together, and takes it down again.

Rules:
    The port is taken first and alone: a port in use is an error, not a share of its traffic
    (gRPC would bind it with SO_REUSEPORT and say nothing).
    Readiness comes from a real image through the whole pipeline of every model.
    Stopping drains: not ready, no new calls, those under way are answered, within a limit.
    What this opens it closes: encoders, collections, engines, threads.
    Models and collections are opened on a thread that nobody has to wait for: a start can
    be cancelled while one of them hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
from contextlib import ExitStack
from functools import partial
from typing import Protocol

import numpy as np
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from PIL import Image

from models.cpu import cpu_budget, share_cpus
from models.encoder import Encoder, open_encoder
from models.preprocess import PreprocessSpec
from protos import horace_pb2_grpc as pb_grpc
from serve import health, services
from serve.answering import Answering
from serve.calls import Calls
from serve.catalog import FIRST_VERSION, Catalog, ServedModel
from serve.config import MIB, ServeOptions
from serve.engine import Engine
from serve.errors import StartError
from serve.front import make_front
from serve.front.port import join_address
from serve.health import Health
from serve.lifecycle.reloading import Reloads
from serve.operation.operation import Operation
from serve.operation.state import ServerState
from serve.pool import ThreadPool
from serve.security.security import Security
from serve.services import HoraceServicer
from serve.workers.place import ALONE, WorkerPlace

log = logging.getLogger("horace.serve")

LAST_CALLS_S = 0.1
"""How long calls that are on their way are still refused one by one."""

LAST_REPLIES_S = 2.0
"""How long the last replies, and what else is open, may take to leave."""

CLOSE_TIMEOUT_S = 2.0
"""How long a thread may take to end once nobody waits for it."""


class OpenModel(Protocol):
    """The signature of `models.encoder.open_encoder`."""

    def __call__(self, path_or_uri: str, /, *, threads: int | None = None) -> Encoder:
        """Open an encoder."""


class Server:
    """A server of `ServeOptions`: `start` it, `drain` it. Belongs to one event loop."""

    def __init__(
        self,
        options: ServeOptions,
        *,
        open_model: OpenModel = open_encoder,
        place: WorkerPlace = ALONE,
    ) -> None:
        """Prepare; nothing is opened yet.

        Args:
            options: what to serve, where and how.
            open_model: opens an encoder by directory or URI, with `threads` threads.
            place: where this process stands among those that serve the same.

        Raises:
            StartError: a file of certificates or keys is not right.
        """
        self._options = options
        self._open_model = open_model
        self.place = place
        self.reloads = Reloads()
        self.security = Security(
            tls=options.tls,
            keys=options.keys,
            limits=options.limits,
            max_images=options.max_images_per_request,
        )
        self._shares = share_cpus(place.share_of(options.cpu_budget or cpu_budget()))
        self._closing = ExitStack()
        self._closing.callback(self.security.close)
        self.security.register(self.reloads)
        self._decode_pool = self._make_pool("decode")
        self._search_pool = self._make_pool("search")
        self._opening_pool = self._make_pool("open", threads=1)
        self.catalog = Catalog(dispose=self._opening_pool.submit)
        self._closing.callback(self.catalog.close)
        self.health = Health([services.SERVICE_NAME, health.SERVICE_NAME])
        self.calls = Calls()
        self.operation = Operation(
            metrics=options.metrics,
            tracing=options.tracing,
            logs=options.log,
            state=ServerState(self.catalog, self.calls, self.health),
            place=place,
        )
        self._closing.callback(self.operation.close)
        answering = Answering(calls=self.calls, observer=self.operation.observer)
        self.services = HoraceServicer(
            self.catalog,
            limits=options.request_limits,
            search_pool=self._search_pool,
            answering=answering,
        )
        self._front = make_front(
            options.frontend,
            max_message_bytes=options.max_message_mib * MIB,
            max_calls=options.max_calls,
            max_calls_a_connection=options.limits.calls_per_connection,
            interceptors=[self.security.interceptor],
            reuse_port=place.shares_ports,
            tls=options.tls.is_on,
            host=options.host,
        )
        self.port = 0

    def __repr__(self) -> str:
        return f"<Server {self.address} {self.health!r} {self.services!r}>"

    @property
    def address(self) -> str:
        """Where it listens, as `host:port`."""
        return join_address(self._options.host, self.port)

    async def start(self) -> None:
        """Take the port, open everything, serve, and say so once every model has run.

        Raises:
            StartError: the port cannot be had, or a model does not run.
            HoraceError: a bundle or a collection cannot be opened or does not fit.

        On cancellation what was opened is closed; what hangs is left behind.
        """
        try:
            self.port = self._front.listen(
                self._options.host, self._options.port, self.security.credentials
            )
            self.operation.start()
            loop = asyncio.get_running_loop()
            await self._opening_pool.run(partial(self._open_models, loop))
            await self._opening_pool.run(self._open_collections)
            pb_grpc.add_HoraceServicer_to_server(self.services, self._front.server)
            health_pb2_grpc.add_HealthServicer_to_server(self.health, self._front.server)
            names = (services.SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._front.server)
            await self._front.start()
            for model in self.catalog.models.values():
                await _warm_up(model)
        except BaseException:
            await self.kill()
            raise
        self.health.set_serving(self.catalog.alive)

    async def drain(self, *, limit_s: float) -> int:
        """Stop: not ready, no new calls, answer those under way for at most `limit_s`.

        The port closes last, and a moment later than it could: a gRPC server that stops
        cancels the calls that it has not looked at, so they are looked at, and refused.

        Returns:
            How many calls were cut off.

        On cancellation some calls may still be under way: `kill` ends them.
        """
        self.health.set_serving(False)
        self.calls.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.calls.wait_idle(), limit_s)
        cut_off = self.calls.active
        if not cut_off:
            await asyncio.sleep(LAST_CALLS_S)
        self.health.close()
        await self._front.stop(None if cut_off else LAST_REPLIES_S)
        self._closing.close()
        return cut_off

    async def kill(self) -> None:
        """Stop at once; calls under way are cut off."""
        self.health.close()
        await self._front.stop(None)
        self._closing.close()

    def _make_pool(self, name: str, *, threads: int | None = None) -> ThreadPool:
        """Start threads that end with this server, as many as for decoding by default."""
        pool = ThreadPool(threads=threads or self._shares.decode_threads, name=name)
        self._closing.callback(pool.close, timeout_s=CLOSE_TIMEOUT_S)
        return pool

    def _open_models(self, loop: asyncio.AbstractEventLoop) -> None:
        """Open every encoder and start its engine."""
        threads = divide_threads(
            self._shares.inference_threads,
            models=len(self._options.bundles),
            instances=self._options.instances,
        )
        for bundle in self._options.bundles:
            encoder = self._open_model(bundle.path, threads=threads)
            name = bundle.name or encoder.name
            engine = self._make_engine(name, encoder, loop)
            close = partial(_close_model, encoder, engine)
            try:
                self.catalog.add_model(name, encoder, engine, close=close)
            except BaseException:
                close()
                raise

    def _make_engine(self, name: str, encoder: Encoder, loop: asyncio.AbstractEventLoop) -> Engine:
        """Start the engine of one encoder as the options say."""
        options = self._options

        def on_crash() -> None:
            loop.call_soon_threadsafe(self.health.set_serving, False)

        return Engine(
            encoder,
            decode_pool=self._decode_pool,
            max_batch_images=options.max_batch_images,
            max_held_images=options.max_queue_images,
            max_held_bytes=options.max_queue_mib * MIB,
            max_delay_s=options.max_delay_ms / 1e3,
            instances=options.instances,
            limits=options.image_limits,
            on_crash=on_crash,
            observer=self.operation.observer.watch_model(name, FIRST_VERSION),
        )

    def _open_collections(self) -> None:
        """Open every collection and hold it against the models."""
        if not self._options.collections:
            return
        from index.collection import Collection  # with faiss and pyarrow: only where needed

        for named in self._options.collections:
            collection = Collection.open(named.path, threads=self._shares.inference_threads)
            name = named.name or collection.name
            self.catalog.add_collection(name, collection, close=collection.close)


def divide_threads(threads: int, *, models: int, instances: int) -> int:
    """Give each model's encoder its share of the inference threads, at least 1.

    An encoder of n threads has n - 1 of its own beside those that call it, one an instance.
    """
    return max(1, threads // models - (instances - 1))


def _close_model(encoder: Encoder, engine: Engine) -> None:
    """End an engine and what it runs."""
    engine.close(timeout_s=CLOSE_TIMEOUT_S)
    encoder.close()


async def _warm_up(model: ServedModel) -> None:
    """Send an encoded image through the whole pipeline.

    Raises:
        StartError: no vector came out.
    """
    image = _grey_png(model.encoder.preprocessing)
    embedded = await model.engine.embed([image], count=1, payload_bytes=len(image))
    if embedded.errors[0] is not None or not np.isfinite(embedded.vectors_ND).all():
        raise StartError(
            f"model {model.name}",
            expected="a vector of finite numbers for a grey image",
            found=str(embedded.errors[0] or "others"),
            mend="export the bundle again",
        )


def _grey_png(spec: PreprocessSpec) -> bytes:
    """Make an image file of the encoder's size."""
    file = io.BytesIO()
    Image.new("RGB", (spec.width, spec.height), (128, 128, 128)).save(file, "PNG")
    return file.getvalue()
