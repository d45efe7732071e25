"""What the lifecycle knows of each model and collection that it minds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from serve.lifecycle.files import Signature
from serve.lifecycle.options import ModelOptions, NamedPath

Readiness = Literal["ready", "loading", "unavailable"]


@dataclass(frozen=True, kw_only=True)
class ModelStatus:
    """How one version of a model is, for whoever lists the repository.

    Attributes:
        name: the model's.
        version: its number; empty where none was ever loaded.
        state: whether it is served, on its way, or neither.
        reason: why it is not served, or why its latest load was refused.
    """

    name: str
    version: str
    state: Readiness
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class LoadStatistics:
    """How often something was loaded since the start.

    Attributes:
        loads: how often it was, and was then served.
        refusals: how often it was tried and what was there stayed.
        last_load_s: how long the latest load took that was served.
        last_refusal: what the latest refusal said.
    """

    loads: int = 0
    refusals: int = 0
    last_load_s: float = 0.0
    last_refusal: str = ""


@dataclass(kw_only=True, eq=False)
class Source:
    """A thing to load, and what came of it so far.

    Attributes:
        kind: `model` or `collection`.
        name: as callers use it; None until it is known.
        statistics: the counts so far; another record with each load.
    """

    kind: ClassVar[str]

    name: str | None
    options: NamedPath
    statistics: LoadStatistics = LoadStatistics()
    loading: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {self.options.path if self.name is None else self.name}"

    @property
    def key(self) -> str:
        """What it is watched under; one path may be served by several names."""
        return f"{self.kind} {self.options.name}={self.options.path}"

    def loaded(self, load_s: float) -> None:
        """Count a load that is served now."""
        loads = self.statistics.loads + 1
        self.statistics = replace(self.statistics, loads=loads, last_load_s=load_s, last_refusal="")

    def refused(self, why: str) -> None:
        """Count a load that changed nothing."""
        refusals = self.statistics.refusals + 1
        self.statistics = replace(self.statistics, refusals=refusals, last_refusal=why)


@dataclass(kw_only=True, eq=False)
class ModelSource(Source):
    """A model: its options, and what it looked like when its versions were loaded.

    Attributes:
        in_repository: whether it was found there, and goes when its directory goes.
        unloaded: whether a call has unloaded it; then only a call loads it again.
        signatures: by version, of those in numbered directories.
        last_version: the highest number that was ever served.
    """

    kind = "model"

    options: ModelOptions
    last_version: int = 0
    in_repository: bool = False
    unloaded: bool = False
    signatures: dict[str, Signature] = field(default_factory=dict)


@dataclass(kw_only=True, eq=False)
class RepositorySource(Source):
    """Where models are found; what is refused of it is a look at it."""

    kind = "repository"


@dataclass(kw_only=True, eq=False)
class CollectionSource(Source):
    """A collection, and whether it waits for the model that made it."""

    kind = "collection"

    waits_for_model: bool = False
