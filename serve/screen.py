"""Refuses calls before they are begun, while engines refuse some.

Rules:
    What an engine refuses has cost a task, a context and an account by then: more than half of
    what an answer costs the event loop. So while some are refused, every call is first asked
    about here, and one that its engine would not take in ends there and then.
    The engine decides as it does later, for this caller and this priority. Who is taken in is
    charged and counted where that is always done; a newcomer is no worse off for others.
    What an engine has said of a request holds for the caller's next of the same kind (all but
    the images, and the name that the caller gave it) for a moment. Those that end before what
    was refused would have been answered are refused unread; those that have time even after who
    was let by since are let by; of the others the engine is asked anew.
    Who is let by comes to its engine a little later, which decides; until then the images of its
    client and priority count as before those that follow, or a burst would be let by together.
    Only a caller that would be let in hears of an engine. One without a key, one that is
    charged, and a message that is wrong or large, go the usual way, and are told there.
    Each refusal is counted, logged and traced as that of the service.

Only the native front end asks: grpcio makes a task before it shows a call.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeAlias
from weakref import ReferenceType, ref

import grpc

from models.errors import HoraceError
from serve.answering import Answering, time_to_answer
from serve.catalog import ServedModel
from serve.errors import DeadlineError, QueueFullError, retry_metadata, to_status
from serve.forecast import Forecast
from serve.operation.observer import Call
from serve.security.guard import Guard
from serve.security.wire import BYTES, VARINT, NotAMessageError, Parse, read_varint, reading

MAX_BYTES = 1 << 18
"""Of a message that is read here; most are admitted later, and then read again."""

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]

Lane: TypeAlias = tuple[str, str, str, int]
"""Model, version, client and priority."""

Status: TypeAlias = "tuple[grpc.StatusCode, str, Metadata]"
"""What a call ends with: its code, the message and what goes behind."""

FRESH_S = 0.02
"""How long what an engine has said of a request holds for others: less than a batch takes."""

MAX_VERDICTS = 256
"""Kinds of requests of which that is remembered, and lanes of which it is who was let by."""

MAX_KIND_BYTES = 1 << 12
"""What tells a kind from others; pixels that are no `images_field` would."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a request would have an engine do.

    Attributes:
        model: whose engine.
        images: how many.
        priority: as the request has it.
        within_s: the seconds that the request itself allows for.
    """

    model: ServedModel
    images: int
    priority: int = 0
    within_s: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method whose calls are asked about.

    Attributes:
        name: of the method alone.
        parse: reads its message.
        foresee: says what a request asks for; raises a HoraceError where that is wrong.
        images_field: the field of its messages that holds images, once or several times.
        id_field: the one that holds the caller's name for the request.
    """

    name: str
    parse: Parse
    foresee: Callable[[Any], Work]
    images_field: int
    id_field: int


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What an engine has said of a kind of request.

    Attributes:
        asked_s: when.
        forecast: how long such a request takes, from then.
        let_by: images of its lane that had been let by then.
        lane: where it comes from and goes to.
        model: whose engine, while there is anybody else who needs it.
        images: how many it has.
        within_s: the seconds that the request itself allows for.
        refusal: why, and how calls end for it; None where this one was not refused.
    """

    asked_s: float
    forecast: Forecast
    let_by: int
    lane: Lane
    model: ReferenceType[ServedModel]
    images: int
    within_s: float
    refusal: tuple[DeadlineError, Status] | None


class Screens(Protocol):
    """What a front end asks before it begins a call."""

    def begin_burst(self) -> Callable[[], None]:
        """Hear that calls come; give what is to be called when those let by are in their queues."""

    def refuses(
        self, path: str, payload: bytes, metadata: Metadata, peer: str, left_s: float | None
    ) -> Status | None:
        """Say how a call ends at once; None where it is to begin.

        Args:
            path: as `/package.Service/Method`.
            payload: its message.
            metadata: that came with it.
            peer: its caller's address as gRPC writes it.
            left_s: the seconds that it has.
        """


class _Nobody:
    """Lets every call begin."""

    def begin_burst(self) -> Callable[[], None]:
        """Keep nothing in mind."""
        return lambda: None

    def refuses(self, *_: object) -> None:
        """Refuse none."""


NO_SCREEN: Screens = _Nobody()


class Screen:
    """Asks the engines of one server. Belongs to its event loop."""

    def __init__(self, answering: Answering, guard: Guard, *, max_fields: int) -> None:
        """Ask about no method yet.

        Args:
            answering: how calls are answered; it knows whether some are refused.
            guard: knows who calls.
            max_fields: that a message may have.
        """
        self._answering = answering
        self._guard = guard
        self._max_fields = max_fields
        self._methods: dict[str, Method] = {}
        self._verdicts: dict[tuple[str, str, bytes], _Verdict] = {}
        self._coming: Counter[Lane] = Counter()  # images let by that are in no queue yet
        self._burst: Counter[Lane] = Counter()  # of which those of this burst
        self._let_by: Counter[Lane] = Counter()  # images, ever

    def __repr__(self) -> str:
        return f"<Screen {list(self._methods)} with {len(self._verdicts)} verdicts>"

    def add(self, path: str, method: Method) -> None:
        """Ask about the calls of a method, whose path is `/package.Service/Method`."""
        parse = reading(method.parse, self._max_fields)
        self._methods[path] = replace(method, parse=parse)

    def begin_burst(self) -> Callable[[], None]:
        """Hear that calls come; give what is to be called when those let by are in their queues."""
        burst = self._burst = Counter()
        return partial(self._end_burst, burst)

    def _end_burst(self, burst: Counter[Lane]) -> None:
        """Count the images of a burst no more: their engines do."""
        self._coming -= burst

    def refuses(
        self, path: str, payload: bytes, metadata: Metadata, peer: str, left_s: float | None
    ) -> Status | None:
        """Say how a call ends at once; None where it is to begin; see `Screens`."""
        if not self._answering.is_refusing or len(payload) > MAX_BYTES:
            return None
        if (method := self._methods.get(path)) is None:
            return None
        client = self._guard.recognise(path, metadata, peer=peer)
        read = sort_out(payload, method.images_field, method.id_field, self._max_fields)
        if client is None or read is None:
            return None
        kind, request_id = read
        now_s = self._answering.clock()
        deadline_s = now_s + time_to_answer(left_s)
        call = Call(
            method=method.name,
            arrived_s=now_s,
            metadata=lambda: metadata,
            request_id=request_id,
            client=client,
        )
        verdict = self._verdicts.get((path, client, kind))
        if (
            verdict is not None
            and now_s < verdict.asked_s + FRESH_S
            and (model := verdict.model()) is not None
        ):
            left_s = min(deadline_s, now_s + verdict.within_s) - verdict.asked_s
            since = self._let_by[verdict.lane] - verdict.let_by
            if left_s > verdict.forecast.takes_s(since):
                self._note_let_by(verdict.lane, verdict.images)
                return None
            if verdict.refusal is not None and left_s <= verdict.forecast.takes_s():
                error, status = verdict.refusal
                model.engine.refuse_another(error, count=verdict.images)
                return self._refuse(call, model, verdict.images, status)
        try:
            work = method.foresee(method.parse(payload))
        except HoraceError:  # it is told on the usual way
            return None
        return self._ask(call, work, deadline_s, (path, client, kind))

    def _ask(
        self, call: Call, work: Work, deadline_s: float, kind: tuple[str, str, bytes]
    ) -> Status | None:
        """Have an engine decide about a call, and remember what it says."""
        lane = work.model.name, work.model.version, call.client, work.priority
        remember = partial(self._remember, kind, lane, work, call.arrived_s)
        self._verdicts.pop(kind, None)
        if max(len(self._verdicts), len(self._let_by)) >= MAX_VERDICTS:
            self._verdicts.clear()
            self._let_by.clear()
        try:
            forecast = work.model.engine.check(
                count=work.images,
                deadline_s=min(deadline_s, call.arrived_s + work.within_s),
                client=call.client,
                priority=work.priority,
                before=self._coming[lane],
            )
        except (QueueFullError, DeadlineError) as error:
            status = (*to_status(error), retry_metadata(error))
            if isinstance(error, DeadlineError) and error.forecast is not None:
                error.with_traceback(None)  # whose frames hold the message, and the model
                remember(error.forecast, (error, status))
            return self._refuse(call, work.model, work.images, status)
        except HoraceError:  # such as a priority that there is not: told on the usual way
            return None
        if forecast is not None:
            remember(forecast, None)
        self._note_let_by(lane, work.images)
        return None

    def _remember(
        self,
        kind: tuple[str, str, bytes],
        lane: Lane,
        work: Work,
        now_s: float,
        forecast: Forecast,
        refusal: tuple[DeadlineError, Status] | None,
    ) -> None:
        """Remember what an engine has said of a kind of request."""
        if len(kind[-1]) > MAX_KIND_BYTES:
            return
        self._verdicts[kind] = _Verdict(
            asked_s=now_s,
            forecast=forecast,
            let_by=self._let_by[lane],
            lane=lane,
            model=ref(work.model),
            images=work.images,
            within_s=work.within_s,
            refusal=refusal,
        )

    def _note_let_by(self, lane: Lane, images: int) -> None:
        """Count images that are in no queue yet."""
        self._coming[lane] += images
        self._burst[lane] += images
        self._let_by[lane] += images

    def _refuse(self, call: Call, model: ServedModel, images: int, status: Status) -> Status:
        """Count a call that ends so."""
        call.model, call.version, call.images = model.name, model.version, images
        call.code, call.message, _ = status
        self._answering.refused(call)
        return status


def sort_out(
    raw: bytes, images_field: int, id_field: int, max_fields: int
) -> tuple[bytes, str] | None:
    """Tell the kind of a message from what changes between those of a kind.

    Two messages are of a kind where all but the contents of their images, and their ids, is
    the same, byte for byte.

    Args:
        raw: the message, in protobuf's encoding; only its own fields are looked at.
        images_field: which of them holds images; below 16, as are the others.
        id_field: which of them is the id.
        max_fields: of a message that is looked at.

    Returns:
        Its kind and its id; None where it is none that can be told.
    """
    kept: list[bytes] = []
    request_id = b""
    at, end = 0, len(raw)
    try:
        for _ in range(max_fields):
            if at == end:
                return b"".join(kept), request_id.decode()
            start, tag = at, raw[at]
            at += 1
            if tag & 7 == BYTES and tag < 128:
                size = raw[at]
                at += 1
                if size > 127:
                    size, at = read_varint(raw, at - 1)
                at += size
                if tag >> 3 == images_field:
                    kept.append(raw[start : start + 1])
                elif tag >> 3 == id_field:
                    request_id = raw[at - size : at]
                else:
                    kept.append(raw[start:at])
            elif tag & 7 == VARINT and tag < 128:
                _, at = read_varint(raw, at)
                kept.append(raw[start:at])
            else:
                return None
    except (NotAMessageError, IndexError, UnicodeDecodeError):
        return None
    return None
