"""What torchrun says to a process, and what the ranks do together."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from models.errors import UsageError
from train.ranks import Ranks, find_ranks, joined, share_gradients


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """It leads, waits for nobody, and its network stays as it is."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    ranks = find_ranks()
    assert ranks == Ranks()
    assert ranks.is_lead
    assert ranks.group is None
    network = nn.Linear(2, 2)
    with joined(ranks):
        ranks.wait()
        assert ranks.largest(15) == 15
        assert share_gradients(network, ranks, torch.device("cpu")) is network


def test_torchrun_says_who_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank, world and restarts come from its environment."""
    said = {
        "TORCHELASTIC_RUN_ID": "a7", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RESTART_COUNT": "2",
    }  # fmt: skip
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    ranks = find_ranks()
    assert ranks == Ranks(rank=5, world=8, local_rank=1, local_world=4, restarts=2, job="a7")
    assert ranks.is_managed
    assert not ranks.is_lead
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert find_ranks().job.endswith(f"-{os.getppid()}"), "the torchrun that was given no name"


def test_a_batch_has_to_be_shared_equally() -> None:
    """The error names the next size that can be."""
    Ranks(world=4).check_batch(8)
    with pytest.raises(UsageError) as error:
        Ranks(world=4).check_batch(9)
    assert str(error.value) == (
        "--batch-size: expected a multiple of the 4 ranks, found 9; give 12"
    )


class HoldsItself:
    """Refers to itself and to the group, as a trainer does."""

    def __init__(self) -> None:
        self.itself, self.group = self, dist.group.WORLD


def gloo_threads() -> list[str]:
    """The threads that a group has in this process."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


@pytest.mark.usefixtures("no_collector")
def test_the_threads_of_the_group_end_before_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that lets go of a tensor while the interpreter ends would abort the process."""
    at_exit: list[Callable[[], object]] = []
    monkeypatch.setattr("train.ranks.atexit", SimpleNamespace(register=at_exit.append))
    monkeypatch.setattr("train.ranks.rendezvous", lambda _: iter([(dist.HashStore(), 0, 1)]))
    with joined(Ranks(world=2)):
        HoldsItself()
    assert gloo_threads()
    for call in at_exit:
        call()
    assert not gloo_threads()
