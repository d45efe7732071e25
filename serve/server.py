"""Puts a server together, and takes it down again.

Rules:
    The port is taken first and alone: a port in use is an error, not a share of its traffic
    (gRPC would bind it with SO_REUSEPORT and say nothing).
    Readiness comes from a real image through the whole pipeline of every model, and after a
    thread was lost from another. What only a collection keeps is asked for no image then: a
    remote encoder that has become another is the trouble of that collection's callers alone.
    Stopping drains: not ready, no new calls, those under way are answered, within a limit.
    What this opens it closes: encoders, collections, engines, threads.
    Models and collections are opened on a thread that nobody has to wait for: a start can
    be cancelled while one of them hangs. What they are, and how they change, is the matter
    of `serve.lifecycle`.
    A worker takes its share of a port only when it can answer: one that starts anew beside
    others is given no caller before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from models.cpu import cpu_budget, share_cpus
from models.encoder import Encoder, open_encoder
from models.errors import HoraceError
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve import health, services
from serve.answering import Answering
from serve.calls import Calls
from serve.catalog import Catalog, ServedModel
from serve.config import MIB, ServeOptions
from serve.engine import Engine
from serve.front import Front, make_front
from serve.health import Health
from serve.http.door import HttpDoor
from serve.http.doorman import Doorman
from serve.kserve import servicer as kserve
from serve.kserve.servicer import KserveServicer
from serve.lifecycle.loading import CLOSE_TIMEOUT_S, Loader, OpenModel, warm_up
from serve.lifecycle.manager import Lifecycle
from serve.lifecycle.options import ModelOptions
from serve.operation.operation import Operation
from serve.operation.state import ServerState
from serve.pool import ThreadPool
from serve.port import is_loopback, join_address
from serve.recovery import Recovery
from serve.reloading import Reloads
from serve.screen import Method, Screen
from serve.security.security import Security
from serve.security.wire import most_fields
from serve.services import HoraceServicer
from serve.unsent import count_unsent, cut_off_unsent
from serve.valve import LoopLag, Valve
from serve.watchdog import Watchdog
from serve.workers.place import ALONE, WorkerPlace

if TYPE_CHECKING:
    from index.collection import Collection

log = logging.getLogger("horace.serve")

LAST_CALLS_S = 0.1
"""How long calls that are on their way are still refused one by one, and within which the last
replies have come from a front end's threads to the system."""

LAST_REPLIES_S = 2.0
"""The least that replies have to leave, however late they come. Beyond that nothing else that is
open holds a stop: not a stream that no service counts, nor a caller that answers nothing."""

LOOK_EVERY_S = 0.05
"""How often a drain looks whether they have left."""


REACH_EVERY_S = 5.0
"""How long a remote model that did not answer is left alone before it is asked again."""


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
            open_model: opens an encoder by directory or URI.
            place: where this process stands among those that serve the same.

        Raises:
            StartError: a file of certificates or keys is not right.
        """
        self._options = options
        self.place = place
        self.reloads = Reloads()
        self._lag = LoopLag()
        self.valve = Valve(self._lag)
        self.security = Security(
            tls=options.tls,
            keys=options.keys,
            limits=options.limits,
            max_images=options.max_images_per_request,
            max_in_flight_bytes=options.max_in_flight_mib * MIB,
            refuses=self.valve.refuses,
            on_turned_away=lambda code: self.operation.observer.turned_away(code),
        )
        self._shares = share_cpus(place.share_of(options.cpu_budget or cpu_budget()))
        self._closing = ExitStack()
        self._closing.callback(self.security.close)
        self.security.register(self.reloads)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.recovery = Recovery(self._probe, on_change=self._tell_health)
        self._reaching = Recovery(
            self._reach,
            on_change=lambda: None,
            every_s=REACH_EVERY_S,
            what="remote models: ",
            over="all that are served answer",  # or the one that did not is unloaded
        )
        self._watchdog = Watchdog(options.watchdog)
        self._closing.callback(self._watchdog.close)
        self._decode_pool = self._make_pool("decode")
        self._search_pool = self._make_pool("search")
        self._watchdog.watch(self._decode_pool)
        self._watchdog.watch(self._search_pool)
        self._opening_pool = self._make_pool("open", threads=1)
        self._disposal_pool = self._make_pool("dispose", threads=1)
        n_followed = max(1, len(options.collections))  # one reads, and holds up no other
        self._following_pool = self._make_pool("follow", threads=n_followed)
        for pool in (self._opening_pool, self._disposal_pool, self._following_pool):
            self._watchdog.watch(pool, limit_s=options.watchdog.opening_s)
        self.catalog = Catalog(dispose=self._disposal_pool.submit)
        self._closing.callback(self.catalog.close)
        self.lifecycle = self._make_lifecycle(open_model)
        self.reloads.register("models and collections", self.lifecycle.reload)
        self._watching: asyncio.Task[None] | None = None
        self.health = Health([services.SERVICE_NAME, kserve.SERVICE_NAME, health.SERVICE_NAME])
        self.calls = Calls()
        self._engines: WeakKeyDictionary[Engine, tuple[str, str]] = WeakKeyDictionary()
        self.operation = self._make_operation()
        self._closing.callback(self.operation.close)
        self._watchdog.watch(self.operation)
        answering = Answering(calls=self.calls, observer=self.operation.observer)
        self.services = HoraceServicer(
            self.catalog,
            limits=options.request_limits,
            search_pool=self._search_pool,
            following_pool=self._following_pool,
            answering=answering,
        )
        self.kserve = self._make_kserve(answering)
        self._front = self._make_front(answering)
        self.http = self._make_http_door()
        self.port = 0
        self._ready = False

    def __repr__(self) -> str:
        return f"<Server {self.address} {self.health!r} {self.services!r}>"

    @property
    def address(self) -> str:
        """Where it listens, as `host:port`."""
        return join_address(self._options.host, self.port)

    @property
    def unfinished(self) -> int:
        """How many calls are under way, or have callers who have not received their replies."""
        return self.calls.active + self._sending

    @property
    def _sending(self) -> int:
        """How many replies are on their way, by the front end's word or by the system's."""
        return self.calls.sending or count_unsent({self.port, self.http.port})

    async def start(self) -> None:
        """Take the port, open everything, serve, and say so once every model has run.

        Raises:
            StartError: the port cannot be had, or a model does not run.
            HoraceError: a bundle or a collection cannot be opened or does not fit.

        On cancellation what was opened is closed; what hangs is left behind.
        """
        self._loop = asyncio.get_running_loop()
        self._watchdog.start()
        self._lag.start()
        self._closing.callback(self._lag.stop)
        try:
            if not self.place.shares_ports:
                self._listen()
            self.operation.start()
            await self.lifecycle.start()
            if self.place.shares_ports:
                self._listen()
            pb_grpc.add_HoraceServicer_to_server(self.services, self._front.server)
            self.kserve.add_to(self._front.server)
            health_pb2_grpc.add_HealthServicer_to_server(self.health, self._front.server)
            names = (
                services.SERVICE_NAME,
                kserve.SERVICE_NAME,
                health.SERVICE_NAME,
                reflection.SERVICE_NAME,
            )
            reflection.enable_server_reflection(names, self._front.server)
            await self._front.start()
            await self.http.start()
        except BaseException:
            await self.kill()
            raise
        self._ready = True
        self._tell_health()
        if self._options.watch_s:
            self._watching = asyncio.create_task(self.lifecycle.watch(self._options.watch_s))

    async def drain(self, *, limit_s: float) -> int:
        """Stop: not ready, no new calls, answer those under way for at most `limit_s`.

        An answer is given when its caller has it; what is left of the time is for that, too.
        The port closes last, and a moment later than it could: a gRPC server that stops
        cancels the calls that it has not looked at, so they are looked at, and refused.

        Returns:
            How many calls were cut off.

        On cancellation some calls may still be under way: `kill` ends them.
        """
        began_s = time.monotonic()
        self._end_changes()
        self.health.set_serving(False)
        self.calls.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.calls.wait_idle(), limit_s)
        if not self.calls.active:
            await asyncio.sleep(LAST_CALLS_S)
        until_s = max(began_s + limit_s, time.monotonic() + LAST_REPLIES_S)
        while self._sending and time.monotonic() < until_s:
            await asyncio.sleep(LOOK_EVERY_S)
        cut_off = self.unfinished
        self.health.close()
        if cut_off:
            cut_off_unsent({self.port})
        await self._front.stop(None if cut_off else LAST_REPLIES_S)
        await self.http.stop(cut_off=bool(cut_off))
        self._closing.close()
        return cut_off

    async def kill(self) -> None:
        """Stop at once; calls under way are cut off."""
        self._end_changes()
        self.health.close()
        cut_off_unsent({self.port})
        await self._front.stop(None)
        await self.http.stop(cut_off=True)
        self._closing.close()

    def _make_operation(self) -> Operation:
        """Make what an operator sees."""
        options = self._options
        state = ServerState(
            self.catalog,
            self.calls,
            self.health,
            served=self._served,
            loads=self.lifecycle.statistics,
            reloads=self.reloads.statistics,
            in_flight=self.security.interceptor.in_flight,
            lives=self._lives,
        )
        return Operation(
            metrics=options.metrics,
            tracing=options.tracing,
            logs=options.log,
            state=state,
            place=self.place,
            keyed=options.keys.file is not None,
        )

    def _make_kserve(self, answering: Answering) -> KserveServicer:
        """Make the service of KServe's protocol."""
        options = self._options
        return KserveServicer(
            self.catalog,
            answering=answering,
            health=self.health,
            options=options.kserve,
            max_images=options.max_images_per_request,
            max_batch_images=options.max_batch_images,
            tallies=self.operation.models,
            control=self.lifecycle,
            max_message_bytes=options.max_message_mib * MIB,
            unix_is_local=is_loopback(options.host),
        )

    def _make_front(self, answering: Answering) -> Front:
        """Make what reads gRPC."""
        options = self._options
        return make_front(
            options.frontend,
            max_message_bytes=options.max_message_mib * MIB,
            max_calls=options.max_calls,
            max_calls_a_connection=options.limits.calls_per_connection,
            interceptors=[self.security.interceptor],
            reuse_port=self.place.shares_ports,
            tls=options.tls.is_on,
            host=options.host,
            refuses=self.valve.refuses,
            screen=self._make_screen(answering),
            on_turned_away=self.operation.observer.turned_away,
        )

    def _make_screen(self, answering: Answering) -> Screen:
        """Make what ends calls before they are begun: those of the methods that embed."""
        max_fields = most_fields(self._options.max_images_per_request)
        screen = Screen(answering, self.security.guard, max_fields=max_fields)
        embed, infer = f"/{services.SERVICE_NAME}/Embed", f"/{kserve.SERVICE_NAME}/ModelInfer"
        screen.add(
            embed,
            Method(
                name="Embed",
                parse=pb.EmbedRequest.FromString,
                foresee=self.services.foresee_embed,
                images_field=pb.EmbedRequest.IMAGES_FIELD_NUMBER,
                id_field=pb.EmbedRequest.REQUEST_ID_FIELD_NUMBER,
            ),
        )
        screen.add(
            infer,
            Method(
                name="ModelInfer",
                parse=kserve.INFER.FromString,
                foresee=self.kserve.foresee_infer,
                images_field=kserve.INFER.RAW_INPUT_CONTENTS_FIELD_NUMBER,
                id_field=kserve.INFER.ID_FIELD_NUMBER,
            ),
        )
        return screen

    def _make_http_door(self) -> HttpDoor:
        """Make the door for HTTP to the same services."""
        options = self._options
        doorman = Doorman(
            services=self.services,
            limits=options.request_limits,
            calls=self.calls,
            is_serving=lambda: self.health.serving,
            guard=self.security.guard,
            timeout_s=options.http.timeout_s,
            max_held_bytes=options.http.max_body_mib * MIB,
            on_turned_away=self.operation.observer.turned_away,
        )
        return HttpDoor(
            options.http,
            doorman=doorman,
            host=options.host,
            max_connections=options.max_calls,
            reuse_port=self.place.shares_ports,
            certificates=self.security.certificates,
        )

    def _make_pool(self, name: str, *, threads: int | None = None) -> ThreadPool:
        """Start threads that end with this server, as many as for decoding by default."""
        pool = ThreadPool(
            threads=threads or self._shares.decode_threads, name=name, on_trouble=self._on_trouble
        )
        self._closing.callback(pool.close, timeout_s=CLOSE_TIMEOUT_S)
        return pool

    def _listen(self) -> None:
        """Take the port: at once, or with other workers only when a caller can be answered."""
        options = self._options
        self.port = self._front.listen(options.host, options.port, self.security.credentials)
        self.http.listen()

    def _tell_health(self) -> None:
        """Say whether every model can serve."""
        well = self.catalog.alive and not self.recovery.in_trouble
        self.health.set_serving(self._ready and well)

    def _lives(self) -> bool:
        """Say, on any thread, whether every thread is there that nothing else replaces."""
        pools = (self._decode_pool, self._search_pool, self._opening_pool, self._disposal_pool)
        return self._front.alive and all(pool.alive for pool in pools)

    def _served(self) -> list[tuple[str, str]]:
        """Name the versions that run: offered, about to be, or still in use."""
        return [pair for engine, pair in self._engines.items() if engine.state != "closed"]

    def _on_trouble(self, encoder: Encoder | None = None) -> None:
        """Hear, on any thread, that one has died or hangs: an encoder's, or one of a pool."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._note_trouble, encoder)

    def _note_trouble(self, encoder: Encoder | None) -> None:
        """Be ready no more until a probe has passed, where it can."""
        if encoder is None or any(encoder is model.encoder for model in self.catalog.offered):
            self.recovery.note_trouble()
        else:
            self._tell_health()

    async def _probe(self) -> None:
        """Send an image through every version that is offered, and a task through the search pool.

        What was swapped out meanwhile is left out: what replaced it has computed an image. So is
        a model whose servers do not answer, which keeps no other from being served: `_reach`.

        Raises:
            StartError: a model gave no vector.
            ServeError: it takes no requests, or lost this one.
        """
        for model in self.catalog.offered:
            if model.hold.closed or not model.engine.reachable:
                continue
            try:
                await self._ask(model)
            except HoraceError:
                if model.engine.reachable:
                    raise
        await self._search_pool.run(lambda: None)

    def _on_unreachable(self, encoder: Encoder) -> None:
        """Hear, on any thread, that no server answers that computes for an encoder."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._note_unreachable, encoder)

    def _note_unreachable(self, encoder: Encoder) -> None:
        """Ask such a model for an image from time to time, unless it is about to be refused."""
        if any(encoder is model.encoder for model in self.catalog.running):
            self._reaching.note_trouble()

    async def _reach(self) -> None:
        """Send an image through every model whose servers did not answer the last.

        Raises:
            ServeError: it is not computed, still.
        """
        probes = []
        for model in self.catalog.running:
            if not model.engine.reachable and not model.hold.closed:
                probes.append(self._ask(model))
        for outcome in await asyncio.gather(*probes, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _ask(self, model: ServedModel) -> None:
        """Send an image through a model; see `warm_up`."""
        with model.lease():
            await warm_up(model.engine, model.name)

    def _end_changes(self) -> None:
        """Replace nothing any more."""
        self._ready = False
        self.recovery.close()
        self._reaching.close()
        if self._watching is not None:
            self._watching.cancel()

    def _make_lifecycle(self, open_model: OpenModel) -> Lifecycle:
        """Make what loads and replaces models and collections."""
        options = self._options
        loader = Loader(
            open_model=open_model,
            make_engine=self._make_engine,
            divide_threads=self._divide_threads,
            pool=self._opening_pool,
            dispose=self.catalog.dispose,
            largest_batch=options.max_batch_images,
            instances=options.instances,
        )
        return Lifecycle(
            self.catalog,
            loader,
            models=options.bundles,
            collections=options.collections,
            repository=Path(options.repository) if options.repository else None,
            open_collection=self._open_collection,
            pool=self._opening_pool,
            model_control=options.model_control,
            on_change=self._tell_health,
        )

    def _divide_threads(self, options: ModelOptions) -> int:
        """Give a model's encoder its share of the CPU budget."""
        return divide_threads(
            self._shares.inference_threads,
            models=self.lifecycle.model_count,
            instances=options.instances or self._options.instances or 1,
        )

    def _make_engine(
        self, encoder: Encoder, model: ModelOptions, *, name: str, version: str
    ) -> Engine:
        """Start the engine of one encoder as the options say."""
        options = self._options
        engine = Engine(
            encoder,
            decode_pool=self._decode_pool,
            max_batch_images=options.max_batch_images,
            max_held_images=options.max_queue_images,
            max_held_bytes=options.max_queue_mib * MIB,
            max_delay_s=options.max_delay_ms / 1e3,
            instances=model.instances or options.instances or model.usual_instances,
            name=name,
            limits=options.image_limits,
            on_trouble=partial(self._on_trouble, encoder),
            on_unreachable=partial(self._on_unreachable, encoder),
            observer=self.operation.models.watch_model(name, version),
        )
        self._engines[engine] = name, version
        self._watchdog.watch(engine)
        return engine

    def _open_collection(self, path: str) -> Collection:
        """Open a collection."""
        from index.collection import Collection  # with faiss and pyarrow: only where needed

        return Collection.open(path, threads=self._shares.inference_threads)


def divide_threads(threads: int, *, models: int, instances: int) -> int:
    """Give each model's encoder its share of the inference threads, at least 1.

    An encoder of n threads has n - 1 of its own beside those that call it, one an instance.
    """
    return max(1, threads // models - (instances - 1))
