"""What is asked of one model: `NAME=DIR,precision=int8,instances=2,provider=cuda,threads=1`.

Rules:
    A comma begins an option only where a known word and `=` follow it, so a path may hold
    commas; a word that is not known is refused, not taken for a part of the path.
    What is not said is as the options of the whole server say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import get_args

from models.bundle import Precision
from models.errors import UsageError
from models.providers import GPU_BATCHES, PROVIDERS, Placement, Provider, split_options

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
A_FLEETS_INSTANCES = 2
"""Batches that are under way at each endpoint of a fleet, so that there is always one to take."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True, kw_only=True)
class NamedPath:
    """A thing to serve: where it is, and under which name (its own where None)."""

    name: str | None
    path: str


@dataclass(frozen=True, kw_only=True)
class ModelOptions(NamedPath):
    """A model to serve, and how.

    Attributes:
        precision: which of the bundle's encoders; the one that the path names where None.
        provider: where it computes.
        device: the number of the GPU.
        instances: batches that run at once; the server's where None, but of a fleet two for each
            endpoint: one computes while another is on its way.
        threads: CPU threads of the encoder; its share of the CPU budget where None.
        keep: how many versions are served, the newest of them by default.
    """

    precision: Precision | None = None
    provider: Provider = "cpu"
    device: int = 0
    instances: int | None = None
    threads: int | None = None
    keep: int = 1

    @property
    def placement(self) -> Placement:
        """Where it computes."""
        return Placement(provider=self.provider, device=self.device)

    @property
    def usual_instances(self) -> int:
        """Batches that run at once where nobody has said how many."""
        return 1 if self.provider == "cpu" else GPU_BATCHES

    @property
    def is_remote(self) -> bool:
        """Whether another server computes it."""
        return "://" in self.path


def read_named_path(text: str) -> NamedPath:
    """Read `NAME=PATH`, or `PATH` alone.

    Raises:
        UsageError: there is no path, or the name is not one.
    """
    match = re.fullmatch(rf"(?:({NAME})=)?(.+)", text, flags=re.DOTALL)
    if match is None:
        raise UsageError("--bundle or --collection", expected="[NAME=]PATH", found=repr(text))
    return NamedPath(name=match[1], path=match[2])


def read_model_options(text: str) -> ModelOptions:
    """Read `[NAME=]PATH[,OPTION=VALUE]...`.

    Raises:
        UsageError: there is no path, or an option or its value is not one.
    """
    named = read_named_path(text)
    path, settings = split_options(named.path)
    values: dict[str, object] = {}
    for word, value in settings:
        if word in values:
            raise UsageError(f"--bundle {text}", expected=f"one {word}", found="two")
        values[word] = _read_value(text, word, value)
    if path.startswith("triton://"):
        values.setdefault("instances", A_FLEETS_INSTANCES * (1 + path.count(",")))
    options = ModelOptions(
        name=named.name,
        path=path,
        **values,  # type: ignore[arg-type]  # of each word its value has the type: `_read_value`
    )
    if options.is_remote and (of_a_bundle := values.keys() - {"instances"}):
        raise UsageError(
            f"--bundle {text}",
            expected="no option but instances: the server there chooses the rest",
            found=", ".join(sorted(of_a_bundle)),
        )
    if "device" in values and options.provider == "cpu":
        raise UsageError(
            f"--bundle {text}: device",
            expected="provider=cuda or tensorrt beside it",
            found=str(values.get("provider", "none")),
        )
    return options


def _read_value(text: str, word: str, value: str) -> object:
    """Read the value of one option."""
    match word:
        case "precision":
            return _one_of(text, word, value, PRECISIONS)
        case "provider":
            return _one_of(text, word, value, PROVIDERS)
        case "instances" | "threads" | "keep":
            return _count(text, word, value, least=1)
        case "device":
            return _count(text, word, value, least=0)
    raise UsageError(
        f"--bundle {text}",
        expected="precision, provider, device, instances, threads or keep",
        found=repr(word),
    )


def _one_of(text: str, word: str, value: str, choices: tuple[str, ...]) -> str:
    """Take one of a few words."""
    if value not in choices:
        raise UsageError(
            f"--bundle {text}: {word}", expected=" or ".join(choices), found=repr(value)
        )
    return value


def _count(text: str, word: str, value: str, *, least: int) -> int:
    """Take a whole number."""
    if not re.fullmatch(r"\d{1,6}", value) or int(value) < least:
        raise UsageError(
            f"--bundle {text}: {word}", expected=f"a number from {least}", found=repr(value)
        )
    return int(value)
