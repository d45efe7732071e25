"""Reads what is minded from the disk, and remembers what was tried.

Rules:
    What changes on the disk while it is read is read again.
    What is cancelled was not tried: the next signal or look reads it.

It loads nothing itself; see `manager`. What a look means is decided in `watching`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

from models.bundle import split_precision
from models.errors import HoraceError
from serve.lifecycle.files import Signature, sign
from serve.lifecycle.options import ModelOptions
from serve.lifecycle.sources import Source
from serve.lifecycle.watching import Changes, Watcher
from serve.pool import ThreadPool

READS = 3
"""How often what changes under our eyes is read before it is given up until the next look."""

Read = TypeVar("Read")


class Reader:
    """Knows what each source looked like when it was tried. Belongs to one event loop."""

    def __init__(self, pool: ThreadPool) -> None:
        """Look at files on the threads of `pool`, which is closed by its owner."""
        self._pool = pool
        self._watcher = Watcher()

    def __repr__(self) -> str:
        return f"<Reader with {self._watcher!r}>"

    async def sign(self, source: Source) -> Signature:
        """Say what a source looks like on the disk; empty for what is not there."""
        options = source.options
        if isinstance(options, ModelOptions) and options.is_remote:
            return ()
        directory, _ = split_precision(Path(options.path))
        return await self._pool.run(partial(sign, directory))

    async def look(self, sources: Iterable[Source]) -> Changes:
        """Look at all sources once; what is found is their keys."""
        return self._watcher.look({source.key: await self.sign(source) for source in sources})

    async def read(self, source: Source, work: Callable[[], Awaitable[Read]]) -> Read:
        """Do `work` on what is on the disk; again where that changed meanwhile."""
        for attempts_left in reversed(range(READS)):
            signature = await self.sign(source)
            try:
                read = await work()
            except Exception as error:
                again = attempts_left and isinstance(error, HoraceError)
                if again and await self.sign(source) != signature:
                    continue
                self._note_tried(source, signature)
                raise
            self._note_tried(source, signature)
            return read
        raise AssertionError("the last attempt returns or raises")

    def is_new(self, source: Source, signature: Signature) -> bool:
        """Whether a source looks otherwise than when it was tried last."""
        return self._watcher.is_new(source.key, signature)

    def forget(self, source: Source) -> None:
        """Take a source for new should it come again."""
        self._watcher.forget(source.key)

    def _note_tried(self, source: Source, signature: Signature) -> None:
        """Remember what a source looked like when it was loaded, or refused."""
        if signature:
            self._watcher.tried(source.key, signature)
