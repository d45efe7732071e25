"""Probes on CUDA: frozen features, and training that is recorded, with labels and without.

The run and the bundle that are judged come from a GPU, too, where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.bundle import Bundle
from models.networks import ResNet
from tests.train.probe.probing import QUICK, opened, top1
from train.device import Compute, Precision, prepare_device
from train.export.graph import EncoderGraph
from train.export.readout import PooledReadout
from train.probe import classifier as classifier_module
from train.probe import finetune as finetune_probe
from train.probe import linear as linear_probe
from train.probe.__main__ import run as run_probe
from train.probe.classifier import Classifier, Recipe, predict, train_classifier
from train.probe.options import DistilOptions, FinetuneOptions, LinearOptions, SgdOptions
from train.probe.probed import open_probed
from train.recorded import STEPS_BEFORE

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
RECIPE = Recipe(
    epochs=4, batch_size=16, optimizer="adamw", lr_head=1e-3, lr_backbone=1e-3, weight_decay=0.01,
    schedule="cosine", warmup_share=0.1, label_smoothing=0.1, smallest_crop=0.8,
    flip_probability=0.5, head_c=None, freezes_batch_norm=False,
)  # fmt: skip
STEPS = 4 * (64 // 16)

Replays = list[torch.cuda.CUDAGraph]


def trained(recipe: Recipe, precision: Precision, *, is_soft: bool) -> Classifier:
    """Train a classifier on 64 images of noise; always the same."""
    compute = Compute(device=GPU, precision=precision)
    prepare_device(compute, threads=1)
    torch.manual_seed(0)
    backbone = ResNet(
        layout="resnet10", stem="small", width=8, in_channels=1, zero_init_residual=False
    )
    readout = PooledReadout(backbone.stage_dims, stages=(1, 2, 3), grid=2)
    classifier = Classifier(EncoderGraph(backbone, readout, [0.5], [0.25]), 4)
    rng = np.random.default_rng(0)
    images_NHWC = rng.integers(0, 256, (64, 16, 16, 1), dtype=np.uint8)
    targets_N = np.arange(64) % 4
    chances_NC = rng.dirichlet(np.ones(4), 64).astype(np.float32)
    train_classifier(
        classifier, images_NHWC, chances_NC if is_soft else targets_N, recipe, seed=0,
        compute=compute,
    )  # fmt: skip
    assert np.isfinite(predict(classifier, images_NHWC, compute)).all()
    return classifier


@pytest.mark.parametrize(
    ("changes", "precision", "is_soft"),
    [
        ({}, "fp32", False),
        ({"head_c": 0.1, "freezes_batch_norm": True}, "fp32", False),
        ({"head_c": 0.1, "freezes_batch_norm": True}, "bf16", False),
        ({"optimizer": "sgd", "schedule": "drops", "lr_head": 0.1}, "fp16", False),
        ({"label_smoothing": 0.0}, "fp32", True),
        ({"label_smoothing": 0.0}, "bf16", True),
    ],
)
def test_a_recorded_classifier_learns_what_others_learn(
    replays: Replays,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    precision: Precision,
    is_soft: bool,
) -> None:
    """By labels and by a teacher's word: nothing in it waits, and it ends where others end."""
    recipe = replace(RECIPE, **changes)  # type: ignore[arg-type]  # cases
    recorded = trained(recipe, precision, is_soft=is_soft)
    assert len(replays) == STEPS - STEPS_BEFORE
    assert "cannot be recorded" not in caplog.text
    assert all(parameter.grad is None for parameter in recorded.parameters())
    monkeypatch.setattr(classifier_module, "recorded", lambda compute, device: compute)
    plain = trained(recipe, precision, is_soft=is_soft).state_dict()
    assert len(replays) == STEPS - STEPS_BEFORE
    for name, value in recorded.state_dict().items():
        torch.testing.assert_close(value, plain[name], rtol=1e-2, atol=1e-3)


def test_few_labels_on_a_gpu(
    finetune: FinetuneOptions,
    replays: Replays,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command takes the GPU by itself; every network that trains there is recorded."""
    status = run_probe(
        [
            "finetune", str(finetune.run), "--images", finetune.images, "--test", finetune.test,
            "--labels", ".25", "--seeds", "0", "--unlabelled", finetune.images, "--json",
            "--distil.epochs", "2", "--distil.batch-size", "32", "--recipe.epochs", "2",
            "--recipe.scratch-epochs", "2", "--recipe.lr-backbone", "1e-3", "--recipe.scratch-lr",
            "1e-3", "--recipe.batch-size", "16", "--recipe.smallest-crop", ".8",
            "--stages", "2", "3", "--grid", "2",
        ]
    )  # fmt: skip
    assert status == 0
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["device"] == "cuda:0"
    assert [row["name"] for row in report["rows"]] == [
        "self-distilled", "fine-tuned", "from scratch", "frozen, linear layer",
        "random, linear layer", "from scratch, self-distilled",
    ]  # fmt: skip
    assert report["rows"][0]["top1"]["mean"] > 0.3
    assert len(set(map(id, replays))) == 4  # graphs: of those that take steps
    assert "cannot be recorded" not in caplog.text


def test_a_bundle_is_trained_further_on_a_gpu(
    finetune: FinetuneOptions, bundle: Bundle, replays: Replays
) -> None:
    """Its network, unfolded on the CPU, goes to the GPU; students of it learn there."""
    compute = Compute(device=GPU, precision="bf16")
    prepare_device(compute, threads=1)
    options = replace(
        finetune, run=bundle.path, seeds=(0,), baselines=False, unlabelled=finetune.images,
        recipe=replace(QUICK, lr_backbone=(1e-3,)),
        distil=DistilOptions(epochs=1, batch_size=32, images=200),
    )  # fmt: skip
    with closing(open_probed(str(bundle.path), device=GPU, threads=1)) as probed:
        report = finetune_probe.evaluate_finetune(options, probed, compute)
    assert [row.name for row in report.rows][:2] == ["self-distilled", "fine-tuned"]
    assert top1(report, "fine-tuned") > 0.3
    assert replays


def test_frozen_features_of_a_gpu_are_those_of_a_cpu(
    linear: LinearOptions, finished_run: Path
) -> None:
    """So a linear layer does as well on them, be they those of the images or of new crops."""
    prepare_device(Compute(device=GPU, precision="fp32"), threads=1)
    images_NHWC = np.random.default_rng(0).integers(0, 256, (300, 14, 14, 1), dtype=np.uint8)
    options = replace(linear, c=(1.0,), baselines=False, stages=(2, 3), grid=2)
    crops = replace(
        options, c=LinearOptions.c, solver="sgd", augment=True, sgd=SgdOptions(epochs=3, lr=0.1)
    )
    readout: dict[str, object] = {"stages": (2, 3), "grid": 2}

    def measured(open_run: Callable[[], object]) -> list[np.ndarray | float]:
        with closing(open_run()) as probed:
            figures = [
                top1(linear_probe.evaluate_linear(one, probed), "encoder")
                for one in (options, crops)
            ]
            return [probed.encoder.encode(images_NHWC), *figures]

    on_gpu = measured(lambda: open_probed(str(finished_run), device=GPU, threads=1, **readout))
    on_cpu = measured(lambda: opened(finished_run, **readout))
    np.testing.assert_allclose(on_gpu[0], on_cpu[0], rtol=1e-3, atol=1e-3)
    assert on_gpu[1:] == pytest.approx(on_cpu[1:], abs=0.03)  # six of 200 images
