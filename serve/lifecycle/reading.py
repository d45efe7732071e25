"""Reads what is minded from the disk, and remembers what was tried.

Rules:
    What changes on the disk while it is read is read again.
    What is cancelled was not tried: the next signal or look reads it.
    What cannot be looked at, or does not answer, as a file server that is away, is told once
    until it can be, or until it is to be told again; the others are looked at all the same.

It loads nothing itself; see `manager`. What a look means is decided in `watching`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

from models.bundle import split_precision
from models.errors import HoraceError, SourceError
from serve.errors import StartError
from serve.lifecycle.files import Signature, find_models, sign
from serve.lifecycle.opening import naming
from serve.lifecycle.options import ModelOptions
from serve.lifecycle.sources import RepositorySource, Source
from serve.lifecycle.watching import Changes, Watcher
from serve.pool import ThreadPool

READS = 3
"""How often what changes under our eyes is read before it is given up until the next look."""

Read = TypeVar("Read")


class Reader:
    """Knows what each source looked like when it was tried. Belongs to one event loop."""

    def __init__(self, pool: ThreadPool, on_unread: Callable[[Source, HoraceError], None]) -> None:
        """Look at files on the threads of `pool`, which is closed by its owner.

        Args:
            pool: threads that may block.
            on_unread: hears what cannot be looked at, and why.
        """
        self._pool = pool
        self._on_unread = on_unread
        self._unread: dict[str, str] = {}
        self._watcher = Watcher()

    def __repr__(self) -> str:
        return f"<Reader with {self._watcher!r}>"

    async def find(self, repository: RepositorySource) -> dict[str, Path] | None:
        """List the models of a repository; None where it cannot be read, which is told."""
        return await self._told(repository, self.list_models(repository))

    async def list_models(self, repository: RepositorySource) -> dict[str, Path]:
        """List the models of a repository.

        Raises:
            SourceError: it cannot be read.
            StartError: it does not answer.
        """
        with naming(str(repository)):
            return await self._pool.run(partial(find_models, Path(repository.options.path)))

    async def see(self, source: Source) -> Signature | None:
        """Sign a source; None where it cannot be read, which is told."""
        return await self._told(source, self._sign(source))

    async def _told(self, source: Source, reading: Awaitable[Read]) -> Read | None:
        """Give what was read; None where it was refused, which is told once."""
        try:
            read = await reading
        except (SourceError, StartError) as error:
            if self._unread.get(source.key) != str(error):
                self._on_unread(source, error)
            self._unread[source.key] = str(error)
            return None
        self._unread.pop(source.key, None)
        return read

    def tell_again(self) -> None:
        """Tell what cannot be looked at also where it was told before."""
        self._unread.clear()

    async def _sign(self, source: Source) -> Signature:
        """Say what a source looks like on the disk; empty for what is not there."""
        options = source.options
        if isinstance(options, ModelOptions) and options.is_remote:
            return ()
        directory, _ = split_precision(Path(options.path))
        with naming(str(source)):
            return await self._pool.run(partial(sign, directory))

    async def look(self, sources: Iterable[Source]) -> Changes:
        """Look at all sources once; what is found is their keys."""
        seen = {source.key: await self.see(source) for source in sources}
        return self._watcher.look({key: found for key, found in seen.items() if found is not None})

    async def read(self, source: Source, work: Callable[[], Awaitable[Read]]) -> Read:
        """Do `work` on what is on the disk; again where that changed meanwhile."""
        for attempts_left in reversed(range(READS)):
            try:
                signature = await self._sign(source)
            except (SourceError, StartError) as error:
                self._unread[source.key] = str(error)  # whoever reads tells it
                raise
            try:
                read = await work()
            except Exception as error:
                again = attempts_left and isinstance(error, HoraceError)
                if again and await self._sign(source) != signature:
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
        self._unread.pop(source.key, None)
        self._watcher.forget(source.key)

    def _note_tried(self, source: Source, signature: Signature) -> None:
        """Remember what a source looked like when it was loaded, or refused."""
        if signature:
            self._watcher.tried(source.key, signature)
