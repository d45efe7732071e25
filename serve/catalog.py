"""What a server has to offer: its models and its collections, by name.

Rules:
    A collection is offered only beside the model that made its vectors: one of another
    fingerprint is refused when the server starts, whatever its dimension.
    A name that is not there is answered with those that are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from models.encoder import Encoder
from models.errors import FingerprintMismatchError, UsageError
from serve.engine import Engine
from serve.errors import RequestError, UnknownNameError

if TYPE_CHECKING:
    from index.collection import Collection


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """An encoder with the engine that runs it, under the name that callers use."""

    name: str
    encoder: Encoder
    engine: Engine


@dataclass(frozen=True, kw_only=True)
class ServedCollection:
    """A collection with the model whose images may query it."""

    name: str
    collection: Collection
    model: ServedModel


@dataclass(kw_only=True)
class Catalog:
    """All that is served; the first model is the default."""

    models: dict[str, ServedModel] = field(default_factory=dict)
    collections: dict[str, ServedCollection] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Catalog models={list(self.models)} collections={list(self.collections)}>"

    def add_model(self, name: str, encoder: Encoder, engine: Engine) -> None:
        """Offer a model.

        Raises:
            UsageError: the name is taken.
        """
        _refuse_taken_name("--bundle", name, self.models)
        self.models[name] = ServedModel(name=name, encoder=encoder, engine=engine)

    def add_collection(self, name: str, collection: Collection) -> None:
        """Offer a collection.

        Raises:
            UsageError: the name is taken.
            FingerprintMismatchError: none of the models made its vectors.
        """
        _refuse_taken_name("--collection", name, self.collections)
        for model in self.models.values():
            if model.encoder.fingerprint == collection.fingerprint:
                served = ServedCollection(name=name, collection=collection, model=model)
                self.collections[name] = served
                return
        offered = [f"{m.encoder.fingerprint} ({m.name})" for m in self.models.values()]
        raise FingerprintMismatchError(
            f"--collection {name}",
            expected=" or ".join(offered),
            found=collection.fingerprint,
            mend="serve the bundle that made it, or build it again with `python -m index.build`",
        )

    def model(self, name: str) -> ServedModel:
        """Find a model by name; the default where the name is empty.

        Raises:
            UnknownNameError: there is none of that name.
        """
        if not name and self.models:
            return next(iter(self.models.values()))
        if name in self.models:
            return self.models[name]
        raise _unknown("model", name, list(self.models))

    def collection(self, name: str) -> ServedCollection:
        """Find a collection by name; the only one where the name is empty.

        Raises:
            UnknownNameError: there is none of that name.
            RequestError: the name is empty and there are several.
        """
        if not name and len(self.collections) == 1:
            return next(iter(self.collections.values()))
        if name in self.collections:
            return self.collections[name]
        if not name and self.collections:
            raise RequestError("collection", expected=_listed(list(self.collections)), found="none")
        raise _unknown("collection", name, list(self.collections))

    @property
    def alive(self) -> bool:
        """Whether every model can serve."""
        return all(model.engine.alive for model in self.models.values())


def _refuse_taken_name(option: str, name: str, taken: Mapping[str, object]) -> None:
    """Refuse a second thing of the same name."""
    if name in taken:
        raise UsageError(
            f"{option} {name}",
            expected="a name of its own",
            found="the name of another",
            mend=f"give it one: {option} NAME=PATH",
        )


def _unknown(kind: str, name: str, names: Sequence[str]) -> UnknownNameError:
    """Say which names there are."""
    return UnknownNameError(kind, expected=_listed(names), found=repr(name))


def _listed(names: Sequence[str]) -> str:
    """Write names as a choice."""
    return " or ".join(map(repr, names)) or "none: this server has none"
