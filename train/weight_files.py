"""Reading trained weights, ours or others', from whatever file they lie in.

Rules:
    No code of a file is run: `weights_only=True`, always. Objects that a file names beside
    its tensors (the authors' checkpoint has functions, Lightning's a configuration) are read
    as hollow stand-ins, which can do nothing.
    Our own checkpoints are checked against their hash.
    Names are given as they are in the file; what they mean is found out in `train.weights`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from models.bundle import BUNDLE_FILE, Json, read_bundle, split_precision
from models.errors import HoraceError, reason_of
from train.checkpoint import FILE_NAME, checkpoint_file, last_whole_step, load_weights
from train.errors import RunError, TrainError
from train.run import RunDirectory

STATE_KEYS = ("state_dict", "model", "network", "model_state_dict", "backbone")
"""Where files keep their tensors: Lightning, the authors, ourselves, and others' habits."""

INITIAL_FILE = "initial.pt"


class Hollow:
    """Stands in for an object of a file that is not a tensor: takes anything, does nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def read_tensors(path: Path) -> tuple[Path, dict[str, Tensor]]:
    """Read the tensors that `path` stands for, by their names in the file.

    Args:
        path: a run, a bundle whose run is still there, or a file of torch: a checkpoint, or
            a dictionary of tensors, alone or under one of `STATE_KEYS`.

    Returns:
        The file that was read, and its tensors.

    Raises:
        TrainError: there is nothing such, it is damaged, or no tensors are in it.
    """
    file = _file_of(path)
    if FILE_NAME.fullmatch(file.name) or file.name == INITIAL_FILE:
        return file, dict(load_weights(file)["network"])
    tensors = _tensors_in(_load(file))
    if not tensors:
        raise _unreadable(file, "no named tensors")
    return file, tensors


def _file_of(path: Path) -> Path:
    """Give the file that a run, a bundle or a file stands for."""
    if not path.exists():
        raise _unreadable(path, "nothing of that name")
    bundle, _ = split_precision(path)
    if (bundle / BUNDLE_FILE).is_file():
        return _checkpoint_of_bundle(bundle)
    if not path.is_dir():
        return path
    run = RunDirectory(path=path)
    run.read_config()
    if not (step := last_whole_step(run.checkpoints)):
        raise _unreadable(path, "a run without a checkpoint yet")
    return checkpoint_file(run.checkpoints, step)


def _checkpoint_of_bundle(path: Path) -> Path:
    """Find the checkpoint that a bundle was exported from, in the run that it names.

    A bundle has no projector, and `train.export.unfold` needs images.
    """
    provenance = read_bundle(path, verify=False).provenance
    try:
        run = Path(cast(str, provenance["run"]))
        config = RunDirectory(path=run).read_config()
        training = cast(Mapping[str, str], provenance["training"])
        checkpoint = RunDirectory(path=run).checkpoints / training["checkpoint"]
        data = cast(Mapping[str, Json], provenance["data"])
        is_same = (
            config.options == provenance["options"] and config.data["sha256"] == data["sha256"]
        )
    except HoraceError as error:  # whose mend is not that of a bundle
        raise _run_is_gone(path, f"{error.what}: {error.found}") from error
    except (KeyError, TypeError, ValueError, SystemExit) as error:
        raise _run_is_gone(path, str(error)) from error
    if not is_same or not checkpoint.is_file():
        raise _run_is_gone(path, f"{run}, which is another run or has no {checkpoint.name}")
    return checkpoint


def _run_is_gone(path: Path, found: str) -> TrainError:
    """Make the error for a bundle whose run cannot be gone on from."""
    return TrainError(
        f"weights of the bundle {path}",
        expected="the run that it was exported from, where it was then",
        found=found,
        mend="give the run's directory or a checkpoint itself",
    )


def _load(file: Path) -> object:
    """Unpickle a file of torch to the CPU, with everything but plain data hollow."""
    try:
        with torch.serialization.safe_globals(_stand_ins(file)):
            return cast(object, torch.load(file, map_location="cpu", weights_only=True))
    except OSError as error:
        raise _unreadable(file, reason_of(error)) from error
    except Exception as error:  # a foreign file may end the unpickling in any way
        lines = str(error).splitlines() or [type(error).__name__]
        raise _unreadable(file, f"a file that torch cannot read safely ({lines[0]})") from error


def _stand_ins(file: Path) -> list[Callable[..., object] | tuple[Callable[..., object], str]]:
    """Pair what a file names, and torch would refuse, with a hollow stand-in."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except (ValueError, RuntimeError, pickle.UnpicklingError):  # of a format before the zip
        return []
    return [(Hollow, name) for name in names]


def _tensors_in(content: object) -> dict[str, Tensor]:
    """Give the named tensors of a file's content: its own, or those under a known key."""
    for found in _dictionaries(content):
        tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
        if tensors:
            return tensors
    return {}


def _dictionaries(content: object) -> Iterator[Mapping[object, object]]:
    """Yield the dictionaries that may hold tensors, the likeliest first."""
    if not isinstance(content, Mapping):
        return
    for key in STATE_KEYS:
        yield from _dictionaries(content.get(key))
    yield content


def _unreadable(path: Path, found: str) -> TrainError:
    """Make the error for what holds no weights."""
    return RunError(
        f"weights {path}",
        expected="a run, a bundle of one, or a file of torch tensors by name",
        found=found,
        mend="check --init-from",
    )
