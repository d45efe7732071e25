"""The parts of a step on CUDA: what is recorded, what is random, what goes through NCCL."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.networks import BarlowTwins, ResNet
from tests.train.recipes import FULL
from train import collectives
from train.checkpoint import Progress, restore_checkpoint, save_checkpoint
from train.device import Compute, prepare_device, resolve_compute
from train.diagnostics import embedding_diagnostics
from train.errors import TrainError
from train.loss import Objective, loss_terms
from train.loss.forms import Form
from train.ranks import Ranks, share_gradients
from train.recorded import STEPS_BEFORE, recorded
from train.trainer import TwoViews
from train.views import apply_view, draw_parameters

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
CALLS = STEPS_BEFORE + 5
CASES: list[tuple[Objective, Form]] = [
    ("barlow", "direct"), ("barlow", "gram"), ("hsic", "tiled"), ("hsic", "gram"),
    ("cross-entropy", "direct"),
]  # fmt: skip


def dropped(x: Tensor) -> tuple[Tensor, ...]:
    """Let half of the numbers fall, twice."""
    half = nn.functional.dropout(x, 0.5, training=True)
    return half, nn.functional.dropout(half, 0.5, training=True)


def repeated(compute: Callable[..., tuple[Tensor, ...]], calls: int) -> list[Tensor]:
    """What the calls give for ones."""
    return [compute(torch.ones(1000, device=GPU))[1].cpu() for _ in range(calls)]


def test_what_waits_for_the_gpu_is_computed_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """The warning names the reason, and the results are right before and after it."""
    compute = recorded(lambda x: (x * x.sum().item(),), GPU)
    for _ in range(STEPS_BEFORE + 3):
        (found,) = compute(torch.ones(3, device=GPU))
        torch.testing.assert_close(found.cpu(), torch.full((3,), 3.0))
    assert caplog.text.count("cannot be recorded as a CUDA graph") == 1


def test_a_recording_reads_what_it_is_given(caplog: pytest.LogCaptureFixture) -> None:
    """New inputs are looked at, and results that were given stay as they are."""
    compute = recorded(lambda x: (2 * x,), GPU)
    found = [compute(torch.full((3,), float(i), device=GPU))[0] for i in range(8)]
    for i, tensor in enumerate(found):
        torch.testing.assert_close(tensor.cpu(), torch.full((3,), 2.0 * i))
    assert not caplog.text


def test_a_recording_draws_the_numbers_of_single_steps(caplog: pytest.LogCaptureFixture) -> None:
    """New ones at every replay; and from a state that was kept others go on as it went on."""
    torch.cuda.manual_seed(0)
    plain = repeated(dropped, CALLS)
    assert not torch.equal(plain[-1], plain[-2])
    torch.cuda.manual_seed(0)
    replayed = recorded(dropped, GPU)
    found = repeated(replayed, CALLS - 2)
    state = torch.cuda.get_rng_state()
    found += repeated(replayed, 2)
    assert all(map(torch.equal, found, plain))
    torch.cuda.set_rng_state(state)
    assert all(map(torch.equal, repeated(recorded(dropped, GPU), 2), plain[-2:]))
    assert not caplog.text


def test_what_cannot_be_recorded_may_be_random(caplog: pytest.LogCaptureFixture) -> None:
    """A recording that failed leaves the generator as it was: the draws are the same."""

    def waits(x: Tensor) -> tuple[Tensor, ...]:
        first, second = dropped(x)
        return first, second * float(bool(first.sum().item() > 0))

    torch.cuda.manual_seed(0)
    plain = repeated(dropped, CALLS)
    torch.cuda.manual_seed(0)
    found = repeated(recorded(waits, GPU), CALLS)
    assert caplog.text.count("cannot be recorded as a CUDA graph") == 1
    assert all(map(torch.equal, found, plain))
    again = recorded(dropped, GPU)  # and what can be, is recorded after it
    torch.cuda.manual_seed(0)
    assert all(map(torch.equal, repeated(again, CALLS), plain))
    assert caplog.text.count("cannot be recorded as a CUDA graph") == 1


def test_a_checkpoint_brings_the_random_numbers_of_a_gpu_back(tmp_path: Path) -> None:
    """And weights, moments and the scale of gradients to the GPU; all of it by way of the CPU."""
    layer = nn.Linear(4, 4).to(GPU)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    scaler.scale(layer(torch.ones(2, 4, device=GPU)).sum()).backward()
    scaler.step(optimizer)
    scaler.update(4.0)
    path = save_checkpoint(
        tmp_path, Progress(step=1, elapsed_s=2.0), layer, optimizer, scaler, keep=1
    )
    drawn, weight = torch.rand(3, device=GPU), layer.weight.detach().clone()
    other = nn.Linear(4, 4).to(GPU)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.1, fused=True)
    other_scaler = torch.amp.GradScaler("cuda")
    restore_checkpoint(path, other, other_optimizer, other_scaler)
    assert torch.equal(torch.rand(3, device=GPU), drawn)
    assert torch.equal(other.weight, weight)
    assert other_scaler.get_scale() == 4.0
    moments = other_optimizer.state[other.weight]
    assert {x.device for x in moments.values()} == {GPU}
    assert torch.equal(moments["exp_avg"], optimizer.state[layer.weight]["exp_avg"])


def test_a_rank_without_a_gpu_of_its_own_is_refused() -> None:
    """Each takes the one of its local rank; the precision is bf16 where the GPU has that."""
    count = torch.cuda.device_count()
    assert resolve_compute("auto", "fp32", local_rank=count - 1).device.index == count - 1
    has_bf16 = torch.cuda.get_device_capability(0)[0] >= 8
    assert resolve_compute("cuda", "auto").precision == ("bf16" if has_bf16 else "fp32")
    with pytest.raises(TrainError, match=f"at least {count + 1}, found {count}; start at most one"):
        resolve_compute("auto", "auto", local_rank=count)


def test_fp32_on_a_gpu_is_no_tf32() -> None:
    """Neither in convolutions, where torch has it unasked, nor in products."""
    prepare_device(Compute(device=GPU, precision="fp32"), threads=1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 64, 16, 16, generator=generator)
    weights = torch.randn(64, 64, 3, 3, generator=generator)
    for compute in (
        lambda x, w: nn.functional.conv2d(x, w, padding=1),
        lambda x, w: nn.functional.linear(x.flatten(2), w.flatten(1)[:, :256]),
    ):
        exact = compute(images.double(), weights.double())
        found = compute(images.to(GPU), weights.to(GPU)).cpu()
        assert (found - exact).norm() <= 1e-5 * exact.norm()


def test_large_views_of_a_gpu_are_those_of_a_cpu() -> None:
    """Three channels at 224 pixels, by every operation."""
    images = torch.rand(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    parameters = draw_parameters(8, FULL, torch.Generator().manual_seed(1), height=224, width=224)
    on_gpu = apply_view(images.to(GPU), parameters)
    assert on_gpu.device == GPU
    torch.testing.assert_close(on_gpu.cpu(), apply_view(images, parameters), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(32, 64), (64, 16)])
def test_a_gpu_measures_what_a_cpu_measures(shape: tuple[int, int]) -> None:
    """Rank, spread and the like of a batch; NaN where a number is none."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator) for _ in range(3)]
    expected = embedding_diagnostics(*given)
    found = embedding_diagnostics(*(x.to(GPU) for x in given))
    assert found == pytest.approx(expected, rel=1e-3)
    given[0][0, 0] = torch.nan
    expected = embedding_diagnostics(*given)
    found = embedding_diagnostics(*(x.to(GPU) for x in given))
    assert found == pytest.approx(expected, rel=1e-3, nan_ok=True)


@pytest.fixture
def nccl() -> Iterator[None]:
    """A process group of this process alone, whose tensors on the GPU go through NCCL."""
    torch.cuda.set_device(GPU)
    store = dist.HashStore()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("default")  # of DDP's own
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_are_shared_over_nccl(nccl: None, dtype: torch.dtype | None) -> None:
    """DDP takes the network as it lies, channels last, and leaves the gradients that it has."""
    prepare_device(Compute(device=GPU, precision="fp32"), threads=1)
    backbone = ResNet(layout="resnet10", stem="small", width=8, in_channels=1)
    network = BarlowTwins(backbone, (32, 32)).to(memory_format=torch.channels_last).to(GPU)
    plain = TwoViews(network, stop_gradient=False)
    shared = share_gradients(copy.deepcopy(plain), Ranks(world=2), GPU)  # as if there were two
    assert isinstance(shared, nn.parallel.DistributedDataParallel)
    for _ in range(3):
        views = torch.randn(2, 16, 1, 14, 14, device=GPU)
        for module in (plain, shared):
            module.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
                _, z1_ND, z2_ND = module(*views)
            loss_terms(z1_ND, z2_ND, lambd=0.01).loss.backward()
    pairs = zip(plain.parameters(), shared.parameters(), strict=True)
    for expected, found in pairs:
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-2, atol=1e-3)


def test_what_the_loss_sums_goes_through_nccl(nccl: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes every tensor that is summed or gathered, and alone gives it back."""
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(16, 24, generator=generator).to(GPU).requires_grad_() for _ in range(2))
    sums: list[Tensor] = []
    all_reduce = dist.all_reduce

    def noted(x: Tensor, group: dist.ProcessGroup) -> None:
        sums.append(x)
        all_reduce(x, group=group)

    def results() -> list[Tensor]:
        found = []
        for objective, form in CASES:
            terms = loss_terms(z1, z2, lambd=0.1, objective=objective, form=form)
            found += [terms.loss.detach(), *torch.autograd.grad(terms.loss, (z1, z2))]
        return found

    alone = results()
    monkeypatch.setattr(dist, "all_reduce", noted)
    monkeypatch.setattr(collectives, "ranks_of", lambda _: dist.group.WORLD)
    for one, other in zip(alone, results(), strict=True):
        torch.testing.assert_close(one, other)
    assert len(sums) > len(CASES)
