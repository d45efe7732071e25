"""Runs one model: images in from the event loop, decoded, batched, computed, vectors out.

Rules:
    A request is admitted or refused before anything is done for it: its images are not even
    read out of the message before there is room for them, but for a small one alone.
    Every change of the batcher is made in `serve.changing`.
    Images are decoded ahead of the queue: `serve.decoding`.
    `Batcher` decides; the threads here do what it says and hold its lock while they ask.
    Whatever the encoder does with a batch ends as an error of that batch's requests. A thread
    that dies or hangs in it is replaced (`serve.crew`), and what it gives later is for nobody.
    An encoder whose servers do not answer is not `reachable` until a batch of it has passed.
    A thread that dies in our own policy fails every request held, and the engine says so by
    `alive`: nothing is left waiting.
    Vectors are normalised, and looked through for what is not finite, by the thread that has
    computed them, a batch at a time: numpy lets go of the interpreter for that, and on a busy
    machine the event loop would have to wait for its turn again with every reply.
    Results go back to the event loop a batch at a time: `serve.replies`.

It does not truncate or pack: that is `models.vectors`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from models.encoder import Encoder, LaneEncoder
from models.errors import (
    EncoderError,
    EncoderUnavailableError,
    FingerprintMismatchError,
    ImageError,
)
from models.image_source import ImageData
from models.preprocess import DEFAULT_LIMITS, ImageLimits
from models.vectors import finish_vectors
from serve.batching import Batcher
from serve.changing import Changing
from serve.crew import Crew, Member
from serve.decoding import Decoder
from serve.errors import (
    DeadlineError,
    InternalError,
    QueueFullError,
    ServeError,
    UnavailableError,
)
from serve.forecast import Forecast
from serve.job import NO_PIXELS, Embedded, Job
from serve.operation.observer import NO_MODEL_OBSERVER, ModelObserver
from serve.pool import ThreadPool
from serve.replies import Replies
from serve.tickets import Batch, BatcherStatistics, Ticket, read_priority

log = logging.getLogger("horace.serve")


class Engine:
    """The pipeline of one encoder. `embed` belongs to one event loop; the rest is threads."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        decode_pool: ThreadPool,
        max_batch_images: int = 32,
        max_held_images: int = 4096,
        max_held_bytes: int = 1 << 29,
        max_delay_s: float = 0.0,
        instances: int = 1,
        name: str | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
        clock: Callable[[], float] = time.monotonic,
        on_trouble: Callable[[], None] = lambda: None,
        on_unreachable: Callable[[], None] = lambda: None,
        observer: ModelObserver = NO_MODEL_OBSERVER,
    ) -> None:
        """Start the inference threads.

        Args:
            encoder: closed by its owner, after this.
            decode_pool: shared between engines; closed by its owner, after this.
            max_batch_images: see `Batcher`; so are the next three.
            max_held_images: of requests that are not over.
            max_held_bytes: of requests that are not over.
            max_delay_s: how long an idle encoder may wait for a fuller batch.
            instances: threads that call an encoder without lanes; else there is one a lane.
            name: as callers use it; the encoder's own where None.
            limits: what one image may cost.
            clock: monotonic seconds.
            on_trouble: called on some thread once one has died or hangs, and is replaced; and
                whenever a server that computes has another encoder than it had.
            on_unreachable: called on some thread once it is `reachable` no more.
            observer: hears of every request and of every batch.
        """
        self.encoder = encoder
        self.name = name or encoder.name
        self._lanes = encoder if isinstance(encoder, LaneEncoder) and encoder.lanes > 1 else None
        self.instances = instances = self._lanes.lanes if self._lanes else instances
        self._clock = clock
        self._decoder = Decoder(decode_pool, encoder.preprocessing, limits, self._prepared)
        self._batcher: Batcher[Job] = Batcher(
            max_batch_images=max_batch_images,
            max_held_images=max_held_images,
            max_held_bytes=max_held_bytes,
            max_delay_s=max_delay_s,
            instances=instances,
            has_lanes=self._lanes is not None,
        )
        spec = encoder.preprocessing
        self._image_bytes = spec.height * spec.width * spec.channels
        self._changed = threading.Condition()
        self._replies = Replies(clock, self._note_reply)
        self._changing = Changing(self._changed, self._batcher, self._replies.admitted)
        self._closing = False
        self._observer = observer
        self._crashed = False
        self._on_trouble = on_trouble
        self._on_unreachable = on_unreachable
        self.reachable = True
        """Whether the servers that compute it answered the last batch, where others do."""
        self._told_mismatch = ""
        self._idle_workers = 0
        self._crew = Crew(
            self._work,
            size=instances,
            name=f"infer-{self.name}",
            on_lost=self._lose,
            on_trouble=on_trouble,
        )

    def __repr__(self) -> str:
        return f"<Engine {self.name} {self.state} {self._crew!r} {self._batcher!r}>"

    @property
    def alive(self) -> bool:
        """Whether requests are being served."""
        return self.state == "alive"

    @property
    def ready(self) -> bool:
        """Whether a request can be expected to be computed."""
        return self.alive and self.reachable

    @property
    def state(self) -> str:
        """`alive`, `closed`, `crashed` for good, or `stuck`: every thread hangs."""
        if self._closing:
            return "closed"
        if self._crashed:
            return "crashed"
        return "alive" if self._crew.present else "stuck"

    def statistics(self) -> BatcherStatistics:
        """Give the present state and the counts so far."""
        with self._changed:
            return self._batcher.statistics()

    async def embed(
        self,
        images: Iterable[ImageData | ImageError],
        *,
        count: int,
        payload_bytes: int,
        deadline_s: float = math.inf,
        client: str = "",
        priority: int = 0,
        is_unit: bool = False,
        on_admitted: Callable[[], None] | None = None,
    ) -> Embedded:
        """Embed one to many images.

        Args:
            images: encoded files, uint8 pixels, or the error that one came with; read once
                there is room for them.
            count: how many there are.
            payload_bytes: memory that they take, until they are answered.
            deadline_s: on this engine's clock; what has not started by then never does.
            client: whose request it is: clients of one priority take turns.
            priority: 1 before 2 before 3; 0 is the default, 2.
            is_unit: whether the vectors are to have unit L2 norm.
            on_admitted: called once there is room and the images are read; with it a request
                waits in line where the queue is full, instead of being refused.

        Raises:
            RequestError: there is no such priority.
            QueueFullError: there is no room, and nobody asks to hear of it.
            DeadlineError: the deadline passed first.
            InternalError: the encoder failed.
            UnavailableError: the engine is closing or has crashed, or what computes elsewhere
                does not answer, or is another encoder now.

        On cancellation the images that have not started are forgotten.
        """
        job = self._make_job(count, payload_bytes, deadline_s, client, read_priority(priority))
        job.is_unit = is_unit
        try:
            embedded = await self._embed(job, images, on_admitted)
        except BaseException as error:
            self._observer.failed(error, count, self._clock() - job.arrived_s)
            raise
        self._observer.answered(embedded, self._clock() - job.arrived_s)
        return embedded

    def check(
        self, *, count: int, deadline_s: float, client: str, priority: int, before: int = 0
    ) -> Forecast | None:
        """Refuse a request that `embed` would not take in now; another is not held either.

        What its payload takes in memory is left to `embed`: to count it costs a copy.

        Args:
            count: how many images it has; see `embed`, as for the others.
            deadline_s: on this engine's clock.
            client: whose request it is.
            priority: of it.
            before: images of the same client and priority that are about to come.

        Returns:
            How long it will take; None where that is nowhere near what it has.

        Raises:
            RequestError: there is no such priority.
            QueueFullError: there is no room.
            DeadlineError: the deadline would pass first.
        """
        ticket = Ticket(
            images=count,
            held_bytes=count * self._image_bytes,
            arrived_s=self._clock(),
            deadline_s=deadline_s,
            client=client,
            priority=read_priority(priority),
        )
        try:
            with self._changed:
                return self._batcher.check(ticket, before=before)
        except (QueueFullError, DeadlineError) as error:
            self._observer.failed(error, count, 0.0)
            if isinstance(error, DeadlineError):
                self._replies.measure(asyncio.get_running_loop())
            raise

    def refuse_another(self, error: DeadlineError, *, count: int) -> None:
        """Count a request that is refused for what `check` has just said of its like."""
        with self._changed:
            self._batcher.count_unmeetable()
        self._observer.failed(error, count, 0.0)

    def close(self, *, timeout_s: float = 10.0) -> bool:
        """Fail what is held, and end the threads; whether they ended in time."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._crew.dismiss()
        self._fail_all(UnavailableError("the server has stopped"))
        return self._crew.join(timeout_s)

    def look(self, *, elapsed_s: float, limit_s: float) -> None:
        """Replace threads that have died or hang; see `serve.watchdog`."""
        self._crew.look(elapsed_s=elapsed_s, limit_s=limit_s)
        if self.state == "stuck":
            self._fail_all(self._out_of_order())

    # The event loop's side.

    async def _embed(
        self,
        job: Job,
        images: Iterable[ImageData | ImageError],
        on_admitted: Callable[[], None] | None,
    ) -> Embedded:
        """Bring a job through: admitted, prepared, computed."""
        try:
            await self._admit(job, wait_for_room=on_admitted is not None)
            job.fill(images, self.encoder.dim)
        except BaseException:
            with self._changing:
                self._batcher.cancel(job, unprepared=True)
            raise
        if on_admitted is not None:
            on_admitted()
        self._decoder.prepare(job)
        try:
            return await job.future
        except asyncio.CancelledError:
            with self._changing:
                self._batcher.cancel(job)
            raise

    def _make_job(
        self, count: int, payload_bytes: int, deadline_s: float, client: str, priority: int
    ) -> Job:
        """Describe one request; it holds nothing yet."""
        loop = asyncio.get_running_loop()
        return Job(
            images=count,
            held_bytes=payload_bytes + count * self._image_bytes,
            arrived_s=self._clock(),
            deadline_s=deadline_s,
            client=client,
            priority=priority,
            loop=loop,
            admitted=loop.create_future(),
            future=loop.create_future(),
        )

    async def _admit(self, job: Job, *, wait_for_room: bool) -> None:
        """Hold a place for the job, in its turn, or raise."""
        with self._changing:
            if not self.alive:
                raise self._out_of_order()
            try:
                if self._batcher.admit(job, line_up=wait_for_room):
                    job.admitted.set_result(None)
            except DeadlineError:
                self._replies.measure(job.loop)
                raise
        if job.admitted.done() or job.deadline_s == math.inf:
            await job.admitted
        else:
            await self._wait_in_line(job)

    async def _wait_in_line(self, job: Job) -> None:
        """Wait for room, as long as anybody waits for the job.

        Raises:
            DeadlineError: nobody does any more.
        """
        try:
            async with asyncio.timeout(job.deadline_s - self._clock()):
                await job.admitted
        except TimeoutError:
            with self._changing:
                self._batcher.expire(job)
            raise DeadlineError("the deadline passed while the request waited for room") from None

    # The threads' side.

    def _prepared(self, job: Job, good: Sequence[int], bad: int) -> None:
        """Queue images that can be computed; settle the others."""
        now_s = self._clock()
        complete = False
        with self._changing:
            job.decoded_s = max(job.decoded_s, now_s)
            if bad:
                complete = self._batcher.settle(job, bad)
            if good:
                self._batcher.ready(job, good, now_s)
                self._wake_worker()
        if complete:
            self._replies.deliver([job])

    def _work(self, member: Member) -> None:
        """Run batches until closed, or given up."""
        while (batch := self._next_batch(member)) is not None:
            self._run(member, batch)
            del batch  # its images go now, not when the next batch comes

    def _next_batch(self, member: Member) -> Batch[Job] | None:
        """Wait for a batch to run; None once there are no more for this thread."""
        while True:
            with self._changing:
                if self._closing or self._crashed or member.given_up:
                    return None
                decision = self._batcher.decide(self._clock())
                if decision.batch is not None:
                    member.begin(decision.batch)
                    self._wake_worker()  # more may wait than this batch takes
                elif not decision.expired:
                    self._wait(decision.wake_at_s)
            if decision.expired:
                late = DeadlineError("the deadline is too near for these images to be computed")
                self._replies.deliver(decision.expired, late)
            if decision.batch is not None:
                return decision.batch

    def _finish(self, member: Member, batch: Batch[Job], *, failed: bool = False) -> list[Job]:
        """Give a batch back; the jobs to answer now, none where the thread was given up."""
        with self._changing:
            if member.given_up:
                return []
            member.end()
            return self._batcher.finish(batch, self._clock(), failed=failed)

    def _lose(self, member: Member) -> None:
        """Fail what a thread was at that died or hangs.

        One that died between batches died of our own policy, which is not to be trusted any
        more: the engine ends.
        """
        batch: Batch[Job] | None = member.work
        if batch is not None:
            with self._changing:
                failed = self._batcher.finish(batch, self._clock(), failed=True)
            self._replies.deliver(
                failed, InternalError("the server has lost a thread at these images")
            )
        elif not member.hangs:
            self._crashed = True
            self._crew.dismiss()
            self._fail_all(InternalError("the server has lost a thread of this model"))

    def _wake_worker(self) -> None:
        """Wake an idle worker, if there is one and something waits; the lock is held."""
        if self._idle_workers and self._batcher.waiting_images:
            self._changed.notify()

    def _wait(self, wake_at_s: float | None) -> None:
        """Sleep until something changes, or until `wake_at_s`."""
        self._idle_workers += 1
        timeout_s = None if wake_at_s is None else max(0.0, wake_at_s - self._clock())
        self._changed.wait(timeout_s)
        self._idle_workers -= 1

    def _run(self, member: Member, batch: Batch[Job]) -> None:
        """Compute a batch and answer the requests that it completes."""
        started_s = self._clock()
        try:
            rows_ND = self._encode(batch)
        except Exception as error:
            answer = self._explain(error, batch)
            self._observer.computed(batch.images, self._clock() - started_s, failed=True)
            self._replies.deliver(self._finish(member, batch, failed=True), answer)
            return
        self.reachable = True
        inference_s = self._clock() - started_s
        self._observer.computed(batch.images, inference_s)
        all_finite = bool(np.isfinite(rows_ND).all())
        unit_ND = _to_unit(rows_ND) if any(part.ticket.is_unit for part in batch.parts) else rows_ND
        at = 0
        for part in batch.parts:
            job, end = part.ticket, at + len(part.positions)
            job.vectors_ND[part.positions] = (unit_ND if job.is_unit else rows_ND)[at:end]
            if not all_finite:
                job.all_finite = False
            job.queue_s = max(job.queue_s, started_s - part.ready_s)
            at = end
        for job in {part.ticket for part in batch.parts}:
            job.inference_s += inference_s
        self._replies.deliver(self._finish(member, batch))

    def _explain(self, error: Exception, batch: Batch[Job]) -> ServeError:
        """Log why a batch failed; give what its callers are told."""
        if isinstance(error, EncoderUnavailableError):
            self._note_unreachable(error, batch)
            return UnavailableError(
                f"model {self.name}",
                expected="servers that compute it",
                found="none that answers",
            )
        if isinstance(error, FingerprintMismatchError):
            return self._explain_mismatch(error)
        log.error("%r failed on a batch of %d images", self.encoder, batch.images, exc_info=error)
        return InternalError("the encoder failed on these images")

    def _note_unreachable(self, error: EncoderUnavailableError, batch: Batch[Job]) -> None:
        """Tell once, until a batch passes again, that no server answers."""
        if self.reachable:
            self.reachable = False
            log.warning("model %s: a batch of %d images failed: %s", self.name, batch.images, error)
            self._on_unreachable()

    def _explain_mismatch(self, error: FingerprintMismatchError) -> ServeError:
        """Tell that another encoder computes now, for as long as this model is not loaded again."""
        if self._told_mismatch != (text := str(error)):
            self._told_mismatch = text
            log.error("model %s cannot be served as it was loaded: %s", self.name, text)
        self._on_trouble()
        return UnavailableError(
            f"model {self.name}",
            expected=error.expected,
            found=error.found,
            mend="call another server, or have this one read its models again",
        )

    def _encode(self, batch: Batch[Job]) -> NDArray[np.float32]:
        """Lay the images of a batch side by side and run the encoder on them.

        Raises:
            EncoderError: the encoder failed, or gave something else than its vectors.
        """
        spec = self.encoder.preprocessing
        shape = (batch.images, spec.height, spec.width, spec.channels)
        images_NHWC = np.concatenate(
            [part.ticket.pixels[n] for part in batch.parts for n in part.positions]
        ).reshape(shape)
        for part in batch.parts:
            for n in part.positions:
                part.ticket.pixels[n] = NO_PIXELS
        if batch.on_one_thread and self._lanes is not None:
            rows_ND = self._lanes.encode_in_lane(images_NHWC)
        else:
            rows_ND = self.encoder.encode(images_NHWC)
        expected = (batch.images, self.encoder.dim)
        if rows_ND.shape != expected:
            raise EncoderError("vectors", expected=f"{expected}", found=f"{rows_ND.shape}")
        with np.errstate(over="ignore"):  # what is infinite then is found
            return rows_ND.astype(np.float32, copy=False)

    def _out_of_order(self) -> UnavailableError:
        """Say that this model computes nothing now; the server may have others."""
        return UnavailableError(
            f"model {self.name}", expected="one that is alive", found=f"one that is {self.state}"
        )

    def _fail_all(self, error: Exception) -> None:
        """End everything that is held."""
        with self._changing:
            jobs = self._batcher.tickets
            for job in jobs:
                self._batcher.cancel(job)
        self._replies.deliver(jobs, error)

    def _note_reply(self, seconds: float) -> None:
        """Allow as much for replies to come."""
        with self._changed:
            self._batcher.note_reply(seconds)


def _to_unit(rows_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale rows to unit L2 norm, a whole batch at once; those that are not finite stay so."""
    with np.errstate(invalid="ignore"):
        return finish_vectors(rows_ND)
