"""BatchNorm over ranks: what it takes over. What it computes is in test_collectives.py."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from models.errors import UsageError
from train.sync_norm import GlobalBatchNorm, convert_batch_norm, replaced


def network() -> nn.Sequential:
    """BatchNorms of two kinds, one of them nested."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, momentum=0.3, eps=1e-3))
    return nn.Sequential(inner, nn.Flatten(), nn.BatchNorm1d(12, affine=False))


def test_alone_the_module_is_left_as_it_is() -> None:
    """Without a process group there is nothing to convert."""
    module = network()
    assert convert_batch_norm(module, "world") is module
    assert not any(isinstance(m, GlobalBatchNorm) for m in module.modules())


def test_state_and_settings_are_taken_over() -> None:
    """The state dict is the same, to the object: checkpoints know no difference."""
    module = network()
    before = dict(module.state_dict(keep_vars=True))
    converted = replaced(module, None)
    after = dict(converted.state_dict(keep_vars=True))
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    norm = converted.get_submodule("0.1")
    assert isinstance(norm, GlobalBatchNorm)
    assert (norm.momentum, norm.eps, norm.training) == (0.3, 1e-3, True)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_on_one_rank_it_is_batch_norm(affine: bool, training: bool, momentum: float | None) -> None:
    """Output, gradient and running statistics are those of torch's BatchNorm."""
    theirs = nn.BatchNorm2d(3, momentum=momentum, affine=affine).double().train(training)
    ours = replaced(nn.BatchNorm2d(3, momentum=momentum, affine=affine), None)
    ours = ours.double().train(training)
    for _ in range(2):
        x = torch.randn(6, 3, 4, 4, dtype=torch.float64) * 2 + 1
        results = []
        for norm in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y = norm(leaf)
            (dx,) = torch.autograd.grad((y * x.sin()).sum(), leaf)
            results.append((y.detach(), dx, dict(norm.named_buffers())))
        torch.testing.assert_close(results[0], results[1])


def test_half_precision_is_normalised_in_float32() -> None:
    """Under bfloat16 the statistics are float32, and the dtype of the input comes back."""
    norm = replaced(nn.BatchNorm1d(4), None)
    y = norm((torch.randn(64, 4) + 100).bfloat16())
    assert y.dtype == torch.bfloat16
    assert abs(y.float().mean()) < 0.05


@pytest.mark.parametrize("training", [True, False])
def test_the_activation_inside_of_a_norm_of_timm_stays(training: bool) -> None:
    """Its output, and its state dict, are those of what it replaces."""
    theirs = BatchNormAct2d(3, act_layer=nn.SiLU).train(training)
    ours = replaced(copy.deepcopy(theirs), None)
    assert isinstance(ours, GlobalBatchNorm)
    x = torch.randn(6, 3, 4, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_a_norm_that_computes_something_else_is_refused() -> None:
    """What it adds would be lost without a word."""

    class Doubled(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(UsageError, match=r"expected torch's BatchNorm, or timm's.*Doubled; choose"):
        replaced(nn.Sequential(Doubled(3)), None)
