"""`python -m serve.client models` and `health`: what a server has, and whether it serves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from serve.client.commands.connecting import ServerOptions
from serve.errors import UnavailableError


@dataclass(frozen=True, kw_only=True)
class ModelsCommand(ServerOptions):
    """List the models and collections of a server."""

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class HealthCommand(ServerOptions):
    """Ask a server whether it serves; the exit status says so."""

    service: str = ""
    """A service, such as horace.v1.Horace; all of them where not given."""


def list_models(options: ModelsCommand) -> None:
    """Print the models and collections.

    Raises:
        ServeError: the server cannot be had.
    """
    with options.connect() as client:
        models, collections = client.list_models(), client.list_collections()
    if options.json:
        document = {
            "models": [dataclasses.asdict(model) for model in models],
            "collections": [dataclasses.asdict(collection) for collection in collections],
        }
        print(json.dumps(document, indent=2))
        return
    rows = [("model", "dimensions", "input", "encoder")]
    for model in models:
        spec = model.preprocessing
        shape = f"{spec.height}x{spec.width}x{spec.channels}"
        name = f"{model.name} (default)" if model.is_default else model.name
        rows.append((name, str(model.dim), shape, model.fingerprint[:12]))
    print(_table(rows))
    if collections:
        rows = [("collection", "images", "index", "model")]
        rows += [(c.name, f"{c.count}", c.index, c.model) for c in collections]
        print("\n" + _table(rows))


def check_health(options: HealthCommand) -> None:
    """Print whether the server serves.

    Raises:
        UnavailableError: it does not.
    """
    with options.connect() as client:
        is_serving = client.health(options.service)
    if not is_serving:
        what = f"server {options.server}"
        raise UnavailableError(
            what,
            expected="one that serves",
            found="one that does not now",
            mend="wait until it is ready; its log says why it is not",
        )
    print("serving")


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
