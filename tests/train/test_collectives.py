"""Ranks with different data against one process: real gloo groups of 2 and 4 processes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from train.collectives import (
    Group,
    all_gather,
    all_reduce,
    cheaper_collective,
    gather,
    rank_in,
    ranks_of,
    sum_in_place,
    world_size,
)

sys.path.insert(0, str(Path(__file__).parent))
import ranks_worker

ROOT = Path(__file__).parents[2]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
CASES = ranks_worker.all_cases()


@dataclass(frozen=True, kw_only=True)
class Found:
    """What each rank of a group wrote."""

    world: int
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Run a group once for every test of it."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, ranks_worker.__file__, str(rank), str(world), str(folder)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    complaints = [worker.communicate(timeout=240)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * world, complaints
    ranks = [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]
    return Found(world=world, ranks=ranks)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference, relative to the norm of what is right."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def assert_is_of_one_process(
    found: Found, key: tuple[str, object], expected: list[Tensor], limit: float
) -> None:
    """Every rank has the whole batch's loss; its gradient over world is its rows' true one."""
    n = ranks_worker.N_GLOBAL // found.world
    for rank in range(found.world):
        loss, logged, *gradients = found.ranks[rank]["losses"][key]
        assert relative_error(loss, expected[0]) < limit
        torch.testing.assert_close(logged, expected[1], rtol=10 * limit, atol=10 * limit)
        for gradient, whole in zip(gradients, expected[2:], strict=True):
            own = whole[rank * n : (rank + 1) * n]
            assert relative_error(gradient / found.world, own) < limit


@pytest.mark.parametrize("dtype", ranks_worker.DTYPES, ids=str)
@pytest.mark.parametrize("i", range(len(CASES)), ids=[" ".join(case.values()) for case in CASES])
def test_the_mean_over_ranks_is_the_gradient_of_one_process(
    found: Found, i: int, dtype: torch.dtype
) -> None:
    """Every objective, form, normalisation and single term, with other data on each rank."""
    z1, z2 = ranks_worker.embeddings(dtype)
    expected = ranks_worker.loss_and_gradients(z1, z2, CASES[i], None)
    assert_is_of_one_process(found, (str(dtype), i), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ranks_worker.DTYPES, ids=str)
def test_auto_gathers_what_is_wide(found: Found, dtype: torch.dtype) -> None:
    """With D above N the Gram form is taken across ranks, and is exact, too."""
    z1, z2 = ranks_worker.embeddings(dtype, 2 * ranks_worker.N_GLOBAL)
    expected = ranks_worker.loss_and_gradients(z1, z2, CASES[0], None)
    assert_is_of_one_process(found, (str(dtype), "wide"), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ranks_worker.DTYPES, ids=str)
@pytest.mark.parametrize("form", ["gram", "tiled"])
@pytest.mark.parametrize("objective", ["barlow", "hsic"])
def test_a_network_under_ddp_learns_as_in_one_process(
    found: Found, objective: str, form: str, dtype: torch.dtype
) -> None:
    """DDP's gradients and the running statistics of global BatchNorm are the whole batch's."""
    expected = ranks_worker.network_gradients(dtype, objective, form, slice(None), None)
    for rank in found.ranks:
        ours = rank["networks"][str(dtype), objective, form]
        assert ours.keys() == expected.keys()
        # A bias before a BatchNorm has no gradient but rounding: all together, as one vector.
        stacked = [
            torch.cat([tensors[name].double().flatten() for name in expected])
            for tensors in (ours, expected)
        ]
        assert relative_error(*stacked) < TOLERANCE[dtype]


def test_collectives_and_their_gradients(found: Found) -> None:
    """A sum and a gather, and as gradients the sum over ranks of what each asks for."""
    world = found.world
    xs = [torch.arange(3.0) + 10 * rank for rank in range(world)]
    asked = world * (world + 1) / 2  # rank r weighs by r + 1
    for rank, each in enumerate(found.ranks):
        got = each["collectives"]
        torch.testing.assert_close(got["reduced"], torch.stack(xs).sum(dim=0))
        torch.testing.assert_close(got["gathered"], torch.cat(xs)[:, None])
        torch.testing.assert_close(got["by_reduced"], torch.full((3,), asked))
        own = torch.arange(3.0 * world)[3 * rank : 3 * rank + 3]
        torch.testing.assert_close(got["by_gathered"], own * asked)


@pytest.mark.parametrize("group", [None, "world"])
def test_without_a_group_nothing_moves(group: Group) -> None:
    """One process gives its tensors back as they are."""
    x = torch.ones(2, 3)
    assert ranks_of(group) is None
    assert (world_size(group), rank_in(group)) == (1, 0)
    for collective in (all_reduce, all_gather, gather, sum_in_place):
        assert collective(x, group) is x


@pytest.mark.parametrize(
    ("n_global", "dim", "cheaper"),
    [
        (2048, 8192, "all_gather"),
        (8191, 8192, "all_gather"),
        (8192, 8192, "all_reduce"),
        (4096, 128, "all_reduce"),
    ],
)
def test_the_collective_that_moves_fewer_bytes_is_taken(
    n_global: int, dim: int, cheaper: str
) -> None:
    """2 N D floats gathered, once, against D^2 reduced, which pass every rank twice."""
    assert cheaper_collective(n_global, dim) == cheaper
