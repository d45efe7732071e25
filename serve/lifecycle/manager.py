"""Loads, replaces and unloads what is served: by call, by signal, by watching the disk.

Rules:
    One change at a time. What is new is opened and has computed an image before it takes
    the place of what is old, in one step on the event loop: every request meets the one or
    the other, and none meets neither. The old version drains and is closed.
    What is refused changes nothing: what is served goes on, the log has one line, and the
    refusal is counted. At the start it is an error, except for a model of a repository,
    which must not keep the others from being served.
    Models are read before collections, so that a pair that belongs together is replaced
    together. A collection that no model fits any more stays with the version that made it;
    one that fits none yet is tried again after every model that is loaded (decision 0009).
    What has left the repository is new should it come back. A repository that cannot be
    read, or is not there, has lost nothing: its models are served as they are until it can be.

Belongs to one event loop; whatever blocks runs on a thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import FingerprintMismatchError, HoraceError, SourceError
from serve.catalog import Catalog, refuse_taken_name
from serve.errors import PROMISED, PreconditionError, ServeError, UnknownNameError
from serve.lifecycle.files import Signature, find_signed_versions
from serve.lifecycle.loading import Loaded, Loader
from serve.lifecycle.opening import naming, open_on
from serve.lifecycle.options import ModelOptions, NamedPath
from serve.lifecycle.reading import Reader
from serve.lifecycle.sources import (
    CollectionSource,
    LoadStatistics,
    ModelSource,
    ModelStatus,
    Readiness,
    RepositorySource,
    Source,
)
from serve.lifecycle.versions import plan_versions
from serve.pool import ThreadPool
from serve.reloading import PartialReloadError

if TYPE_CHECKING:
    from index.collection import Collection

log = logging.getLogger("horace.serve")

OpenCollection = Callable[[str], "Collection"]


class ReloadError(ServeError):
    """What is served could not be read again."""


class Lifecycle:
    """Minds the models and collections of one server."""

    def __init__(
        self,
        catalog: Catalog,
        loader: Loader,
        *,
        models: Sequence[ModelOptions],
        collections: Sequence[NamedPath],
        repository: Path | None,
        open_collection: OpenCollection,
        pool: ThreadPool,
        model_control: bool,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Mind nothing yet; see `start`.

        Args:
            catalog: where what is loaded is offered.
            loader: opens models.
            models: named one by one.
            collections: named one by one.
            repository: a directory whose subdirectories are models, too.
            open_collection: opens one; blocks.
            pool: threads that may block; closed by its owner.
            model_control: whether `load` and `unload` are allowed to callers.
            on_change: called after every change of what is served.
            clock: monotonic seconds.
        """
        self._catalog = catalog
        self._loader = loader
        self._named_models = models
        self._repository: RepositorySource | None = None
        if repository is not None:
            options = NamedPath(name=None, path=str(repository))
            self._repository = RepositorySource(name=None, options=options)
        self._open_collection = open_collection
        self._pool = pool
        self._model_control = model_control
        self._on_change = on_change
        self._clock = clock
        self._models: dict[str, ModelSource] = {}
        self._found: Mapping[str, Path] = {}  # in the repository, at the last look that saw it
        self._taken: set[str] = set()  # names of models there that others have
        self._collections = [
            CollectionSource(name=named.name, options=named) for named in collections
        ]
        self._reader = Reader(pool, self._refuse)
        self._changing = asyncio.Lock()
        self._started = False

    def __repr__(self) -> str:
        return f"<Lifecycle of {', '.join(self._models) or 'no model'}, {self._reader!r}>"

    # For the server.

    @property
    def model_count(self) -> int:
        """How many models there are to share the CPUs, loaded or not."""
        named = {options.name for options in self._named_models}
        named |= {name for name, source in self._models.items() if not source.in_repository}
        return max(1, len(self._named_models) + len(self._found.keys() - named))

    async def start(self) -> None:
        """Load everything.

        Raises:
            HoraceError: what was named cannot be opened, does not run or does not fit.
        """
        async with self._changing:
            if self._repository is not None:  # each has its share of the CPUs, also the first
                self._found = await self._reader.list_models(self._repository)
            for options in self._named_models:
                await self._load_model(ModelSource(name=options.name, options=options))
            self._note_found()
            for source in self._models.values():
                if source.in_repository:
                    await self._try(source)
            for collection in self._collections:
                await self._load_collection(collection)
        self._started = True

    async def reload(self) -> None:
        """Read again what has changed or was refused, and whatever runs elsewhere.

        Raises:
            ReloadError: it was refused, or is so still; each has its line in the log.
            PartialReloadError: some of it was, and the rest is served.
        """
        async with self._changing:
            self._reader.tell_again()
            sees_repository = await self._discover()
            refused = [] if sees_repository else [str(self._repository)]
            taken = []
            for source in self._sources(sees_repository):
                signature = await self._reader.see(source)
                if signature is None:
                    refused.append(str(source))
                elif not signature and isinstance(source, ModelSource) and source.in_repository:
                    self._drop(source)
                    taken.append(str(source))
                elif (
                    not signature
                    or source.statistics.last_refusal
                    or self._reader.is_new(source, signature)
                ):
                    is_taken = await self._try(source)
                    (taken if is_taken else refused).append(str(source))
        if refused and taken:
            new, old = ", ".join(taken), ", ".join(refused)
            raise PartialReloadError(f"{old} as before, for the reasons above; {new} read again")
        if refused:
            raise ReloadError(f"{', '.join(refused)}, for the reasons above")

    async def watch(self, every_s: float) -> None:
        """Look at the disk every `every_s`, until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.look()
            except Exception:
                log.exception("a look at the disk failed in our own code")

    async def look(self) -> None:
        """Look at the disk once, and load what has changed and come to rest."""
        async with self._changing:
            sees_repository = await self._discover()
            sources = {source.key: source for source in self._sources(sees_repository)}
            changes = await self._reader.look(sources.values())
            for key in changes.changed:
                await self._try(sources[key])
            for key in changes.gone:
                source = sources.get(key)
                if isinstance(source, ModelSource) and source.in_repository:
                    self._drop(source)
                elif isinstance(source, ModelSource):  # a collection tells its own loss
                    path = source.options.path
                    self._refuse(source, SourceError(path, expected="a bundle", found="nothing"))

    # For callers.

    async def load(self, name: str) -> None:
        """Load a model: for the first time, again, or after it was unloaded.

        Raises:
            PreconditionError: callers may not, or the repository cannot be read.
            UnknownNameError: there is none of that name to load.
            HoraceError: it cannot be opened or does not run; what was served is served.
        """
        self._require_control()
        async with self._changing:
            if name not in self._models and not await self._discover():
                raise PreconditionError(
                    f"model {name}",
                    expected="a repository that can be read",
                    found="one that cannot, as the server's log says",
                )
            source = self._known(name)
            try:
                await self._load_model(source)
            except HoraceError as error:
                self._refuse(source, error)
                raise

    async def unload(self, name: str) -> None:
        """Offer a model no more. A collection that it made keeps its version for itself.

        Raises:
            PreconditionError: callers may not.
            UnknownNameError: there is none of that name.
        """
        self._require_control()
        async with self._changing:
            source = self._known(name)
            source.unloaded = True
            self._withdraw(source)

    def index(self) -> list[ModelStatus]:
        """Say how every version of every model is."""
        statuses = []
        for name, source in self._models.items():
            why = "unloaded" if source.unloaded else source.statistics.last_refusal
            if versions := self._catalog.versions.get(name):
                statuses += [
                    ModelStatus(name=name, version=version, state="ready", reason=why)
                    for version in versions
                ]
            else:
                state: Readiness = "loading" if source.loading else "unavailable"
                statuses.append(ModelStatus(name=name, version="", state=state, reason=why))
        return statuses

    def statistics(self) -> dict[str, LoadStatistics]:
        """Give the counts so far, by `model NAME`, `collection NAME` and `repository DIR`."""
        repositories = () if self._repository is None else (self._repository,)
        sources = (*repositories, *self._models.values(), *self._collections)
        return {str(source): source.statistics for source in sources}

    def _require_control(self) -> None:
        """Refuse callers where the operator has not allowed them."""
        if not self._model_control:
            raise PreconditionError(
                "models",
                expected="a server that lets callers load and unload them",
                found="one that does not",
                mend="start it with --model-control",
            )

    def _known(self, name: str) -> ModelSource:
        """Find what may be loaded under a name."""
        if name not in self._models:
            names = " or ".join(map(repr, self._models)) or "none"
            raise UnknownNameError("model to load", expected=names, found=f"{name[:80]!r}")
        return self._models[name]

    # Loading.

    def _sources(self, sees_repository: bool) -> list[Source]:
        """List what is minded, models first; not what a call has unloaded, nor what is hidden."""
        models = [
            source
            for source in self._models.values()
            if not source.unloaded and (sees_repository or not source.in_repository)
        ]
        return [*models, *self._collections]

    async def _try(self, source: Source) -> bool:
        """Load something; whether it is served now. What was there stays if it is not."""
        try:
            if isinstance(source, ModelSource):
                await self._load_model(source)
            elif isinstance(source, CollectionSource):
                await self._load_collection(source)
        except HoraceError as error:
            self._refuse(source, error)
            return False
        except Exception as error:
            log.exception("loading %s failed in our own code", source, extra=PROMISED)
            source.refused(type(error).__name__)
            return False
        return True

    def _tell(self, message: str, *what: object) -> None:
        """Log a change; at the start the ready line tells all."""
        if self._started:
            log.info(message, *what)

    def _refuse(self, source: Source, error: HoraceError) -> None:
        """Tell and count a load that changed nothing."""
        log.error("%s refused, what was served is served: %s", source, error, extra=PROMISED)
        source.refused(str(error))

    async def _load_model(self, source: ModelSource) -> None:
        """Open what is new of a model, and let it take the place of what is old."""
        started_s = self._clock()
        source.loading = True
        try:
            loaded, served = await self._reader.read(source, partial(self._open_model, source))
        finally:
            source.loading = False
        self._offer(source, loaded, served)
        source.loaded(self._clock() - started_s)
        for collection in self._collections:
            if collection.waits_for_model:
                await self._try(collection)

    async def _open_model(self, source: ModelSource) -> tuple[list[Loaded], frozenset[str]]:
        """Open the versions of a model that are wanted and not served as they are now.

        Returns:
            Those, and the numbers of all that are wanted.
        """
        options = source.options
        found: dict[str, str] = {"": options.path}
        signatures: dict[str, Signature] = {}
        if not options.is_remote:
            finding = partial(find_signed_versions, options.path)
            with naming(str(source)):
                found, signatures = await self._pool.run(finding)
        served = self._catalog.versions.get(source.name or "", {})
        plan = plan_versions(
            found,
            served=served,
            changed=[v for v in found if signatures.get(v) != source.signatures.get(v)],
            last=source.last_version,
            keep=options.keep,
        )
        loaded: list[Loaded] = []
        try:
            for version, path in plan.opened.items():
                loaded.append(
                    await self._loader.load(options, path, name=source.name, version=version)
                )
            if loaded and self._models.get(loaded[0].name, source) is not source:
                refuse_taken_name("--bundle", loaded[0].name, self._models)
        except BaseException:
            for opened in loaded:
                self._catalog.dispose(opened.close)
            raise
        source.signatures = signatures
        return loaded, plan.served

    def _offer(self, source: ModelSource, loaded: Sequence[Loaded], served: frozenset[str]) -> None:
        """Let versions take the place of those that are not wanted any more: one step."""
        for model in loaded:
            source.name = model.name
            source.last_version = max(source.last_version, int(model.version))
            self._catalog.put_model(
                model.name, model.encoder, model.engine, version=model.version, close=model.close
            )
            self._tell("model %s is served in version %s", model.name, model.version)
        assert source.name is not None
        self._models.setdefault(source.name, source)
        source.unloaded = False
        for version in self._catalog.versions[source.name].keys() - served:
            self._catalog.withdraw_model(source.name, version)
            self._tell("version %s of model %s drains", version, source.name)
        self._on_change()

    def _withdraw(self, source: ModelSource) -> None:
        """Offer no version of a model any more."""
        assert source.name is not None
        for version in list(self._catalog.versions.get(source.name, ())):
            self._catalog.withdraw_model(source.name, version)
        self._tell("%s is served no more", source)
        self._on_change()

    async def _load_collection(self, source: CollectionSource) -> None:
        """Open a collection, and let it take the place of the one of its name."""
        started_s = self._clock()
        if source.statistics.loads and await self._follow(source):
            source.loaded(self._clock() - started_s)
            return
        opening = partial(self._open_collection, source.options.path)
        collection = await self._reader.read(
            source, partial(open_on, self._pool, opening, self._catalog.dispose, what=str(source))
        )
        name = source.name or collection.name
        source.waits_for_model = False
        try:
            if source.name is None or not source.statistics.loads:
                refuse_taken_name("--collection", name, self._catalog.collections)
            self._catalog.put_collection(name, collection, close=collection.close)
        except FingerprintMismatchError:
            source.waits_for_model = True
            collection.close()
            raise
        except BaseException:
            collection.close()
            raise
        source.name = name
        source.loaded(self._clock() - started_s)
        self._tell("collection %s is served with %d images", name, collection.count)
        self._on_change()

    async def _follow(self, source: CollectionSource) -> bool:
        """Read what is new of a served collection; whether it is of the same encoder still.

        Raises:
            CollectionError: it cannot be read; what was served is served.
        """
        following = self._catalog.collection(source.name or "").following
        try:
            with naming(str(source)):
                await self._reader.read(source, partial(following.catch_up, self._pool.run))
        except FingerprintMismatchError:
            return False
        current = following.current
        self._tell("collection %s is served with %d images", source.name, current.count)
        self._on_change()
        return True

    # The repository.

    async def _discover(self) -> bool:
        """Look what models the repository has, and take note of them; whether it could be read."""
        if self._repository is not None:
            found = await self._reader.find(self._repository)
            if found is None:
                return False
            self._found = found
            self._note_found()
        return True

    def _note_found(self) -> None:
        """Take note of models that have come into the repository; forget what never was one."""
        # Not of what loads first: a request without a name would mean another model by chance.
        self._catalog.default = self._catalog.default or next(iter(self._found), "")
        taken = set()
        for name, path in self._found.items():
            options = ModelOptions(name=name, path=str(path))
            source = ModelSource(name=name, options=options, in_repository=True)
            if self._models.setdefault(name, source).options.path != str(path):
                taken.add(name)
        for name in sorted(taken - self._taken):
            told = "model %s of the repository is not served: the name is taken"
            log.warning(told, name, extra=PROMISED)
        self._taken = taken
        for name, source in list(self._models.items()):
            is_gone = source.in_repository and name not in self._found
            if is_gone and name not in self._catalog.versions:
                self._forget(source)

    def _drop(self, source: ModelSource) -> None:
        """Let go of a model whose directory is gone."""
        self._withdraw(source)
        self._forget(source)

    def _forget(self, source: ModelSource) -> None:
        """Mind a model no more."""
        del self._models[source.name or ""]
        self._reader.forget(source)
