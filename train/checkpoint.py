"""Checkpoints: everything a run needs to go on to the same bits, in files that are whole.

Rules:
    A checkpoint appears whole or not at all, whatever the moment of a SIGKILL.
    A file ends with the SHA-256 of the rest, which is checked: a damaged one is never loaded as
    other weights. `torch.load` reads over it.
    A run goes on from the last checkpoint that can be read, with a warning where a later one
    cannot: it ends in the same bits. Only where none can be read it does not go on.
    State dicts only, read back with `weights_only=True`: opening one runs no code.
    The step says where the sampler, the schedule and the views are, since each of them is
    a function of seed and step; beside weights and optimiser only torch's own generators and
    the scaler of fp16 gradients have a state.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import torch
from torch import Tensor, nn

from models.errors import reason_of
from models.files import atomic_file
from train.errors import RunError

FILE_NAME = re.compile(r"step-(\d{8})\.pt")
DIGEST_BYTES = hashlib.sha256().digest_size

log = logging.getLogger("horace")


class State(TypedDict):
    """What a checkpoint holds; `initial.pt` has but the network.

    `scaler` is empty unless the network computes in fp16, `cuda_rng` absent without CUDA.
    """

    step: int
    elapsed_s: float
    network: dict[str, Tensor]
    optimizer: NotRequired[dict[str, object]]
    scaler: NotRequired[dict[str, float]]
    torch_rng: NotRequired[Tensor]
    cuda_rng: NotRequired[Tensor]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is: steps done, and the seconds that they took in all sittings."""

    step: int = 0
    elapsed_s: float = 0.0


def save_checkpoint(
    folder: Path,
    progress: Progress,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    keep: int,
) -> Path:
    """Write the state after `progress.step` steps, then delete all before it but `keep - 1`.

    Later ones could not be read when the run went on: they take the place of none.
    """
    path = checkpoint_file(folder, progress.step)
    state = State(
        step=progress.step,
        elapsed_s=progress.elapsed_s,
        network=network.state_dict(),
        optimizer=optimizer.state_dict(),
        scaler=scaler.state_dict(),
        torch_rng=torch.get_rng_state(),
    )
    if _is_on_cuda(network):
        state["cuda_rng"] = torch.cuda.get_rng_state()
    save_weights(path, state)
    made = [other for other in list_checkpoints(folder) if other.name <= path.name]
    for old in made[:-keep]:
        old.unlink(missing_ok=True)
    return path


def restore_checkpoint(
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Progress:
    """Put network, optimiser, scaler and torch's generators where they were.

    Returns:
        How far that is.

    Raises:
        RunError: the file is damaged or belongs to another network.
    """
    state = load_weights(path)
    try:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        if scaler.is_enabled():
            scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["torch_rng"])
        if "cuda_rng" in state and _is_on_cuda(network):
            torch.cuda.set_rng_state(state["cuda_rng"])
        return Progress(step=state["step"], elapsed_s=state["elapsed_s"])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise _unusable(path, "weights of another network") from error


def load_backbone(path: Path, backbone: nn.Module) -> Progress:
    """Put the backbone of a checkpoint, or of `initial.pt`, into `backbone`.

    Raises:
        RunError: the file is missing, damaged, or belongs to another network.
    """
    state = load_weights(path)
    prefix = "backbone."
    try:
        weights = state["network"].items()
        own = {k.removeprefix(prefix): v for k, v in weights if k.startswith(prefix)}
        backbone.load_state_dict(own)
        return Progress(step=state["step"], elapsed_s=state["elapsed_s"])
    except (KeyError, RuntimeError) as error:
        raise _unusable(path, "weights of another network") from error


def save_initial(path: Path, network: nn.Module) -> None:
    """Keep the backbone before its first step: the random twin of an export."""
    weights = {k: v for k, v in network.state_dict().items() if k.startswith("backbone.")}
    save_weights(path, State(step=0, elapsed_s=0.0, network=weights))


def checkpoint_file(folder: Path, step: int) -> Path:
    """Name the checkpoint after so many steps."""
    return folder / f"step-{step:08d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*.pt") if FILE_NAME.fullmatch(path.name))


def last_whole_step(folder: Path) -> int:
    """Find the last checkpoint that can be read, and warn of later ones that cannot.

    Returns:
        Its step; 0 where there are no checkpoints.

    Raises:
        RunError: there are some, and none can be read.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            _read_whole(path)
        except RunError as error:
            if not path.exists():  # a run at work has gone on meanwhile
                return last_whole_step(folder)
            log.warning("%s cannot be used: %s", path, error.found)
        else:
            return int(path.stem.removeprefix("step-"))
    if checkpoints:
        raise RunError(
            str(folder),
            expected="a checkpoint that can be read",
            found=f"none among {len(checkpoints)}",
            mend="bring them back from a copy, or delete them to begin at step 0 again",
        )
    return 0


def save_weights(path: Path, state: State) -> None:
    """Write a state atomically, with its hash.

    Raises:
        OSError: the disk is full or may not be written.
    """
    buffer = io.BytesIO()  # torch's own file writer has a RuntimeError for a full disk
    torch.save(dict(state), buffer)
    content = buffer.getbuffer()  # no copy: a checkpoint may have gigabytes
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.write(hashlib.sha256(content).digest())


def load_weights(path: Path) -> State:
    """Read a state to the CPU without running any code in it.

    Raises:
        RunError: the file is missing, damaged, or no checkpoint.
    """
    content = _read_whole(path)
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file may end the unpickling in any way
        raise _unusable(path, "a file of something else") from error
    if not isinstance(state, dict):
        raise _unusable(path, "a file of something else")
    return cast(State, state)


def _read_whole(path: Path) -> bytes:
    """Give what a file has before its hash.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        whole = path.read_bytes()
    except OSError as error:
        found = reason_of(error)
        raise _unusable(path, found) from error
    content, digest = whole[:-DIGEST_BYTES], whole[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise _unusable(path, "damage: its content does not match its SHA-256")
    return content


def _is_on_cuda(network: nn.Module) -> bool:
    """Say whether a network's random numbers, if it draws any, come from a GPU."""
    return any(parameter.is_cuda for parameter in network.parameters())


def _unusable(path: Path, found: str) -> RunError:
    """Make the error for a file that holds no state of this run."""
    is_one_of_many = FILE_NAME.fullmatch(path.name) is not None
    return RunError(
        str(path),
        expected="a checkpoint of this run",
        found=found,
        mend="delete the file to go on from the one before it"
        if is_one_of_many
        else "bring it back from a copy, or export with --no-random-twin",
    )
