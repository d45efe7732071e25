"""One rank of a gloo group: its share of the loss's gradients, written for the test to compare.

Run as `python ranks_worker.py RANK WORLD FOLDER`; the ranks meet through a file in FOLDER.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TypedDict, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train.collectives import Group, all_gather, all_reduce
from train.loss import Form, Normalise, Objective, Terms, loss_terms
from train.sync_norm import convert_batch_norm

N_GLOBAL, DIM = 24, 10
DTYPES = (torch.float32, torch.float64)


class Case(TypedDict):
    """What is asked of the loss."""

    objective: Objective
    form: Form
    normalise: Normalise
    terms: Terms


def all_cases() -> list[Case]:
    """Every combination that exists, and both single terms."""
    forms, quadratic = get_args(Form), ("barlow", "hsic")
    cases = [
        Case(objective=objective, form=form, normalise=normalise, terms="both")
        for objective, form, normalise in itertools.product(quadratic, forms, ("batch", "none"))
    ]
    cases += [
        Case(objective=objective, form="direct", normalise=normalise, terms="both")
        for objective, normalise in [
            ("cross-entropy", "batch"), ("cross-entropy", "none"), ("cross-entropy", "features"),
            ("barlow", "features"), ("hsic", "features"),
        ]
    ]  # fmt: skip
    cases += [
        Case(objective="barlow", form=form, normalise="batch", terms=terms)
        for form, terms in itertools.product(forms, ("invariance", "redundancy"))
    ]
    return cases


def embeddings(dtype: torch.dtype, dim: int = DIM) -> tuple[Tensor, Tensor]:
    """Both views of the whole batch; no two rows, and so no two ranks, are alike."""
    draw = torch.Generator().manual_seed(0)
    shared, noise1, noise2 = torch.randn(3, N_GLOBAL, dim, generator=draw, dtype=torch.float64)
    drift = torch.linspace(0, 3, N_GLOBAL, dtype=torch.float64)[:, None]
    return (3 * (shared + noise1) + drift).to(dtype), (shared + noise2 - 2 * drift).to(dtype)


def loss_and_gradients(
    z1: Tensor, z2: Tensor, case: Case, group: Group, lambd: float = 0.3
) -> list[Tensor]:
    """The loss, what is logged of it, and the gradient by each view."""
    z1, z2 = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    terms = loss_terms(z1, z2, lambd=lambd, group=group, **case)
    torch.autograd.backward(terms.loss)
    assert z1.grad is not None
    assert z2.grad is not None
    logged = [terms.invariance, terms.redundancy, terms.diagonal_mean, terms.diagonal_error,
              terms.off_diagonal_rms, torch.tensor(terms.off_diagonal_floor)]  # fmt: skip
    return [terms.loss.detach(), torch.stack([x.double() for x in logged]), z1.grad, z2.grad]


class TwoViews(nn.Module):
    """A network with BatchNorm after a convolution and after a Linear, applied to two views."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
            nn.Linear(54, 16), nn.BatchNorm1d(16, momentum=None), nn.ReLU(),
            nn.Linear(16, DIM, bias=False), nn.BatchNorm1d(DIM, affine=False),
        )  # fmt: skip

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Each view on its own, as in training."""
        return self.network(x1), self.network(x2)


def images(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two views of a batch of small images whose level drifts over the batch."""
    draw = torch.Generator().manual_seed(2)
    views = torch.randn(2, N_GLOBAL, 2, 5, 5, generator=draw, dtype=torch.float64)
    views += torch.linspace(-1, 1, N_GLOBAL, dtype=torch.float64)[:, None, None, None]
    return views[0].to(dtype), views[1].to(dtype)


def network_gradients(
    dtype: torch.dtype, objective: Objective, form: Form, rows: slice, group: Group
) -> dict[str, Tensor]:
    """Every parameter's gradient and every buffer after one step's forward and backward."""
    two_views = TwoViews().to(dtype)
    model: nn.Module = two_views
    if group is not None:
        model = DistributedDataParallel(convert_batch_norm(two_views, group))
    x1, x2 = images(dtype)
    z1, z2 = model(x1[rows], x2[rows])
    terms = loss_terms(z1, z2, lambd=0.3, objective=objective, form=form, group=group)
    torch.autograd.backward(terms.loss)
    gradients = {name: p.grad for name, p in two_views.named_parameters() if p.grad is not None}
    return gradients | dict(two_views.named_buffers())


def collectives(rank: int, world: int) -> dict[str, Tensor]:
    """What the collectives give, and the gradient of a different sum on each rank."""
    x = torch.arange(3.0).add(10 * rank).requires_grad_()
    reduced, gathered = all_reduce(x, "world"), all_gather(x[:, None], "world")
    weights = torch.arange(3.0 * world).view(-1, 1) * (rank + 1)
    (by_reduced,) = torch.autograd.grad((reduced * (rank + 1)).sum(), x)
    (by_gathered,) = torch.autograd.grad((gathered * weights).sum(), x)
    return {"reduced": reduced.detach(), "gathered": gathered.detach(),
            "by_reduced": by_reduced, "by_gathered": by_gathered}  # fmt: skip


def main(rank: int, world: int, folder: Path) -> None:
    """Compute this rank's part of everything."""
    torch.set_num_threads(1)
    store = f"file://{(folder / 'store').absolute()}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    n = N_GLOBAL // world
    rows = slice(rank * n, (rank + 1) * n)
    losses, networks = {}, {}
    for dtype in DTYPES:
        z1, z2 = embeddings(dtype)
        for i, case in enumerate(all_cases()):
            losses[str(dtype), i] = loss_and_gradients(z1[rows], z2[rows], case, "world")
        wide1, wide2 = embeddings(dtype, 2 * N_GLOBAL)
        auto = all_cases()[0] | Case(form="auto")  # type: ignore[typeddict-item]  # one is enough
        losses[str(dtype), "wide"] = loss_and_gradients(wide1[rows], wide2[rows], auto, "world")
        for objective, form in itertools.product(("barlow", "hsic"), ("gram", "tiled")):
            networks[str(dtype), objective, form] = network_gradients(
                dtype, objective, form, rows, "world"
            )
    found = {"losses": losses, "networks": networks, "collectives": collectives(rank, world)}
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
