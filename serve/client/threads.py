"""Calls what may block, beside an event loop.

Rules:
    Each call has a thread of its own, which keeps no program from ending: `asyncio.run` waits
    for the threads of `asyncio.to_thread`, and an iterable may block for ever.
    Who is cancelled waits no longer; the call goes on, and what it gives is dropped.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from typing import TypeVar

Value = TypeVar("Value")


async def on_a_thread(function: Callable[[], Value]) -> Value:
    """Call `function`, in the caller's context; raises what it raises."""
    future: Future[Value] = Future()
    future.set_running_or_notify_cancel()  # so that nobody cancels it under the thread

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    context = copy_context()
    threading.Thread(target=context.run, args=(call,), name="horace-client", daemon=True).start()
    return await asyncio.wrap_future(future)
