"""What a server has to offer: its models and its collections, by name.

Rules:
    Whoever uses a model or a collection across an `await` leases it: what was swapped out
    is closed when its last lease ends, and never before.
    A model may have several versions; the newest is meant where none is named. The first
    model that was asked for is the default, and stays it: a request without a name never
    lands elsewhere because a model was unloaded, or not loaded yet.
    A collection is offered only beside the model that made its vectors: one of another
    fingerprint is refused, whatever its dimension. It holds a lease on that version of
    the model as long as it is offered, so a model may change under it and its queries are
    still embedded by the encoder that made its vectors (decision 0009).
    A name that is not there is answered with those that are.

Belongs to one event loop, once the server has started.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from models.encoder import Encoder
from models.errors import FingerprintMismatchError, UsageError
from serve.engine import Engine
from serve.errors import RequestError, UnknownNameError
from serve.following import Following
from serve.leases import Dispose, Hold, Lease, at_once

if TYPE_CHECKING:
    from index.collection import Collection


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedModel:
    """One version of an encoder with the engine that runs it, under the name callers use."""

    name: str
    version: str
    encoder: Encoder
    engine: Engine
    hold: Hold = field(repr=False)

    def lease(self) -> Lease[ServedModel]:
        """Keep it open within a context."""
        return Lease(self, self.hold)


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedCollection:
    """A collection with the model whose images may query it.

    Attributes:
        name: as callers use it.
        following: gives the snapshot to search, and keeps it up with the collection's writer.
        model: the version that made its vectors.
        hold: of this pair; when it ends it lets go of both.
        files: of the collection alone, which may go on beside another version.
    """

    name: str
    following: Following
    model: ServedModel
    hold: Hold = field(repr=False)
    files: Hold = field(repr=False)

    @property
    def collection(self) -> Collection:
        """The snapshot that was read last; who searches asks `following` for the latest."""
        return self.following.current

    def lease(self) -> Lease[ServedCollection]:
        """Keep it, and its model, open within a context."""
        return Lease(self, self.hold)


@dataclass(kw_only=True)
class Catalog:
    """All that is served.

    Attributes:
        models: the version that is served by default, by name.
        versions: every version that is served, by name and version, newest first.
        collections: by name.
        default: the model that a request without a name means.
        dispose: runs what closes a thing that was swapped out.
    """

    models: dict[str, ServedModel] = field(default_factory=dict)
    versions: dict[str, dict[str, ServedModel]] = field(default_factory=dict)
    collections: dict[str, ServedCollection] = field(default_factory=dict)
    default: str = ""
    dispose: Dispose = at_once
    _holds: list[Hold] = field(default_factory=list, repr=False)

    def __repr__(self) -> str:
        return f"<Catalog models={list(self.models)} collections={list(self.collections)}>"

    def lease_model(self, name: str = "", version: str = "") -> Lease[ServedModel]:
        """Keep a model open within a context; see `model`."""
        return self.model(name, version).lease()

    def lease_collection(self, name: str = "") -> Lease[ServedCollection]:
        """Keep a collection and its model open within a context; see `collection`."""
        return self.collection(name).lease()

    def model(self, name: str = "", version: str = "") -> ServedModel:
        """Find a model by name; the default where the name is empty, the newest version too.

        Whoever computes with it takes a lease.

        Raises:
            UnknownNameError: there is none of that name, or not in that version.
        """
        name = name or self.default
        if name not in self.models:
            raise _unknown("model", name, list(self.models))
        if not version:
            return self.models[name]
        if version not in self.versions[name]:
            raise _unknown(f"version of model {name!r}", version, list(self.versions[name]))
        return self.versions[name][version]

    def collection(self, name: str = "") -> ServedCollection:
        """Find a collection by name; the only one where the name is empty.

        Whoever searches it takes a lease.

        Raises:
            UnknownNameError: there is none of that name.
            RequestError: the name is empty and there are several.
        """
        if not name and len(self.collections) == 1:
            return next(iter(self.collections.values()))
        if name in self.collections:
            return self.collections[name]
        if not name and self.collections:
            raise RequestError(
                "collection",
                expected=_listed(list(self.collections)),
                found="none",
                mend="name one of them",
            )
        raise _unknown("collection", name, list(self.collections))

    def put_model(
        self,
        name: str,
        encoder: Encoder,
        engine: Engine,
        *,
        version: str = "1",
        close: Callable[[], None] = lambda: None,
    ) -> None:
        """Offer a version of a model beside the others, in the place of one of its number.

        The newest leads. Collections that it fits, and that an older one served, move to it.
        """
        hold = self._hold(close)
        model = ServedModel(name=name, version=version, encoder=encoder, engine=engine, hold=hold)
        self.default = self.default or model.name
        versions = self.versions.setdefault(name, {})
        replaced = versions.get(version)
        versions[version] = model
        newest_first = sorted(versions.items(), key=lambda item: int(item[0]), reverse=True)
        self.versions[name] = dict(newest_first)
        self.models[name] = newest_first[0][1]
        self._rebind_collections()
        if replaced is not None:
            replaced.hold.retire()

    def withdraw_model(self, name: str, version: str) -> None:
        """Offer a version no more; it is closed when nobody uses it."""
        model = self.versions[name].pop(version)
        if self.versions[name]:
            self.models[name] = next(iter(self.versions[name].values()))
        else:
            del self.versions[name], self.models[name]
        model.hold.retire()

    def put_collection(
        self, name: str, collection: Collection, *, close: Callable[[], None] = lambda: None
    ) -> None:
        """Offer a collection in the place of the one of that name, if there is one.

        Raises:
            FingerprintMismatchError: none of the models made its vectors; what was offered
                is offered still.
        """
        model = self._maker_of(name, collection)
        following = Following(name, collection)

        def close_all() -> None:
            following.close()
            close()

        files = self._hold(close_all)
        replaced = self.collections.get(name)
        self._bind(name, following, model, files)
        if replaced is not None:
            _retire(replaced)

    def close(self) -> None:
        """Close everything here and now, used or not, also what was swapped out."""
        for hold in self._holds:  # the latest first
            hold.close()

    @property
    def offered(self) -> list[ServedModel]:
        """List every version that callers may name.

        May be read on any thread, as `running` may: each dictionary is copied in one step.
        """
        by_name = list(self.versions.values())
        return [model for versions in by_name for model in list(versions.values())]

    @property
    def running(self) -> list[ServedModel]:
        """List every version that callers reach: those offered, and what collections keep."""
        kept = [served.model for served in list(self.collections.values())]
        return list(dict.fromkeys((*self.offered, *kept)))

    @property
    def alive(self) -> bool:
        """Whether every version that callers reach can serve."""
        return all(model.engine.alive for model in self.running)

    def _maker_of(self, name: str, collection: Collection) -> ServedModel:
        """Find the newest version that made a collection's vectors.

        The one that the collection of this name is bound to counts, too, offered or not.
        """
        offered = self.offered
        if name in self.collections:
            offered.append(self.collections[name].model)
        for model in offered:
            if model.encoder.fingerprint == collection.fingerprint:
                return model
        raise FingerprintMismatchError(
            f"--collection {name}",
            expected=" or ".join(f"{m.encoder.fingerprint} ({m.name})" for m in offered)
            or "of a model that is served, of which there is none",
            found=f"{collection.fingerprint} ({collection.encoder})",
            mend="serve the bundle that made it, or build it again with `python -m index.build`",
        )

    def _hold(self, close: Callable[[], None]) -> Hold:
        """Keep account of a thing until it is closed."""
        hold = Hold(close, dispose=self.dispose)
        self._holds = [hold, *(other for other in self._holds if not other.closed)]
        return hold

    def _bind(self, name: str, following: Following, model: ServedModel, files: Hold) -> None:
        """Offer a collection with a model; the pair keeps both open."""

        def let_go() -> None:
            files.give_back()
            model.hold.give_back()

        files.take()
        model.hold.take()
        self.collections[name] = ServedCollection(
            name=name, following=following, model=model, hold=Hold(let_go), files=files
        )

    def _rebind_collections(self) -> None:
        """Give every collection the newest version that made its vectors."""
        for name, served in list(self.collections.items()):
            model = self._maker_of(name, served.collection)
            if model is not served.model:
                self._bind(name, served.following, model, served.files)
                served.hold.retire()


def _retire(served: ServedCollection) -> None:
    """Close a collection when nobody uses it."""
    served.files.retire()
    served.hold.retire()


def refuse_taken_name(option: str, name: str, taken: Mapping[str, object]) -> None:
    """Refuse a second thing of the same name.

    Raises:
        UsageError: the name is taken.
    """
    if name in taken:
        raise UsageError(
            f"{option} {name}",
            expected="a name of its own",
            found="the name of another",
            mend=f"give it one: {option} NAME=PATH",
        )


def _unknown(kind: str, name: str, names: Sequence[str]) -> UnknownNameError:
    """Say which names there are."""
    mend = "name one that is there, or have it served" if names else "have it serve one"
    return UnknownNameError(kind, expected=_listed(names), found=f"{name[:80]!r}", mend=mend)


def _listed(names: Sequence[str]) -> str:
    """Write names as a choice."""
    return " or ".join(map(repr, names)) or "none: this server has none"
