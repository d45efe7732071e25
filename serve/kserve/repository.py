"""Loading and unloading of models by KServe's RPCs: the messages; `serve.lifecycle` does it.

Rules:
    A model is loaded from where the server was told that it is: a caller brings no files and
    no configuration.
    Why a model could not be loaded is for the operator, since it says where things lie: it is
    in the log. A caller hears that it could not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tritonclient.grpc import service_pb2 as kserve

from models.errors import HoraceError
from serve.errors import PreconditionError, RequestError, UnknownNameError
from serve.lifecycle.manager import Lifecycle
from serve.lifecycle.sources import ModelStatus

READY = "ready"

UNLOADED = "unloaded"
"""The one reason that says nothing of the server."""

LOOK = "the server's log says why"
REFUSED = f"the last load was refused; {LOOK}"


def repository_index(models: Iterable[ModelStatus], *, ready_only: bool) -> Any:
    """List models with their states, as Triton writes them."""
    index = kserve.RepositoryIndexResponse()
    for model in models:
        if model.state == READY or not ready_only:
            index.models.add(
                name=model.name,
                version=model.version,
                state=model.state.upper(),
                reason=model.reason if model.reason in ("", UNLOADED) else REFUSED,
            )
    return index


async def load(control: Lifecycle, name: str) -> None:
    """Load a model for a caller; the log has what `control` found wrong.

    Raises:
        PreconditionError: callers may not, or it cannot be loaded.
        UnknownNameError: the server knows no such model.
    """
    try:
        await control.load(name)
    except (PreconditionError, UnknownNameError):
        raise
    except HoraceError as error:
        raise PreconditionError(
            f"model {name[:80]!r}", expected="one that can be loaded", found="another", mend=LOOK
        ) from error


def check_change(repository: str, parameters: Mapping[str, Any]) -> None:
    """Refuse to load or unload anything but a model by its name.

    Raises:
        RequestError: it names a repository, or brings files or a configuration.
    """
    foreign = [name for name in parameters if name != "unload_dependents"]
    if repository or foreign:
        raise RequestError(
            "load or unload of a model",
            expected="a name alone: a model is loaded from where the server was told it is",
            found="a repository" if repository else f"parameter {foreign[0][:80]!r}",
        )
