"""Readouts: the cells they average, what they refuse, and that ONNX computes them alike."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.bundle import ENCODER_FILE, OutputSpec, write_bundle
from models.errors import UsageError
from models.networks import ResNet
from models.preprocess import PreprocessSpec
from models.runtime import open_bundle
from train.config import options_json
from train.export.graph import EncoderGraph, embed_with_torch, write_onnx
from train.export.held_out import is_worse
from train.export.options import PRESET_READOUTS, Readout, ReadoutOptions
from train.export.parity import require_batch_invariance
from train.export.readout import PooledReadout, WhitenedReadout, pool_to_grid
from train.export.readout_fit import warn_if_below
from train.export.whitening import FeatureMoments, Whitening
from train.presets import PRESETS


@given(
    height=st.integers(4, 17),
    width=st.integers(4, 17),
    grid=st.integers(1, 4),
    channels=st.integers(1, 5),
)
@settings(max_examples=40, deadline=None)
def test_cells_are_those_of_adaptive_pooling(
    height: int, width: int, grid: int, channels: int
) -> None:
    """For every size, divisible or not, cell by cell."""
    generator = torch.Generator().manual_seed(height * 100 + width)
    map_NCHW = torch.randn(3, channels, height, width, generator=generator)
    expected = nn.functional.adaptive_avg_pool2d(map_NCHW, grid).permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(pool_to_grid(map_NCHW, grid), expected, atol=1e-5, rtol=1e-5)


def test_plain_pooling_reads_the_last_stage() -> None:
    """Without a choice it is the mean of the last map."""
    maps = (torch.rand(2, 3, 4, 4), torch.rand(2, 5, 2, 2))
    readout = PooledReadout((3, 5))
    assert readout.dim == 5
    torch.testing.assert_close(readout(maps), maps[1].mean(dim=(2, 3)))


def test_stages_lie_side_by_side_in_the_order_asked_for() -> None:
    """The dimensions of the first stage come first."""
    maps = (torch.rand(2, 3, 4, 4), torch.rand(2, 5, 2, 2))
    readout = PooledReadout((3, 5), stages=(2, 1), grid=2)
    assert readout.dim == 4 * 8
    parts = [pool_to_grid(maps[1], 2), pool_to_grid(maps[0], 2)]
    torch.testing.assert_close(readout(maps), torch.cat(parts, dim=1))


def test_each_stage_may_have_a_grid_of_its_own() -> None:
    """Numbers go with the stages as they were asked for; there must be one, or as many."""
    maps = (torch.rand(2, 3, 4, 4), torch.rand(2, 5, 2, 2))
    readout = PooledReadout((3, 5), stages=(2, 1), grid=(1, 3))
    assert (readout.stages, readout.grids, readout.dim) == ((2, 1), (1, 3), 5 + 9 * 3)
    parts = [pool_to_grid(maps[1], 1), pool_to_grid(maps[0], 3)]
    torch.testing.assert_close(readout(maps), torch.cat(parts, dim=1))
    with pytest.raises(UsageError, match="one for each of 1 stages, found 1 2"):
        PooledReadout((3, 5), grid=(1, 2))


@pytest.mark.parametrize("stages", [(5,), (0,), (1, 1)])
def test_stages_that_are_not_there_are_refused(stages: tuple[int, ...]) -> None:
    """The message has the numbers there are."""
    with pytest.raises(UsageError, match="expected different numbers of 1 to 4"):
        PooledReadout((1, 2, 3, 4), stages=stages)


def test_a_grid_finer_than_the_map_is_refused() -> None:
    """Cells without a pixel of their own would repeat what others have."""
    with pytest.raises(UsageError, match=r"grid of the readout: expected at most 3, .* found 4"):
        PooledReadout((2,), grid=4)((torch.rand(1, 2, 3, 5),))


def test_a_whitened_readout_is_exported_to_the_bit_for_every_batch(tmp_path: Path) -> None:
    """A map of 7 x 7 in 4 x 4 cells, one of 4 x 4 in 3 x 3: as torch has them, in any batch."""
    torch.manual_seed(0)
    spec = PreprocessSpec(height=28, width=28, channels=1, resize=28)
    backbone = ResNet(layout="resnet10", width=4, in_channels=1, zero_init_residual=False)
    images = np.random.default_rng(0).integers(0, 256, (64, 28, 28, 1), dtype=np.uint8)
    pooled = PooledReadout(backbone.stage_dims, stages=(3, 4), grid=(4, 3))
    graph = EncoderGraph(backbone, pooled, (0.5,), (0.25,))
    features_ND = embed_with_torch(graph, images)
    moments = FeatureMoments(pooled.dim)
    moments.add(torch.from_numpy(features_ND))
    whitening = Whitening.fit(moments, dim=32, shrinkage=1e-2)
    graph.readout = WhitenedReadout(pooled, whitening)
    write_onnx(graph, spec, tmp_path / ENCODER_FILE)
    bundle = write_bundle(
        tmp_path / "bundle", name="x", files={ENCODER_FILE: tmp_path / ENCODER_FILE},
        preprocessing=spec, output=OutputSpec(dim=32), provenance={},
    )  # fmt: skip
    encoder = open_bundle(bundle.path, threads=1)
    found_ND = encoder.encode(images)
    np.testing.assert_allclose(found_ND, whitening(features_ND), atol=1e-3)
    np.testing.assert_allclose(found_ND, embed_with_torch(graph, images), atol=1e-4)
    assert require_batch_invariance(encoder.encode, images) == 0
    encoder.close()


def test_an_encoder_below_its_untrained_twin_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Where so many images cannot differ as much by chance."""
    untrained_Q = np.arange(400) < 290
    warn_if_below(np.arange(400) < 260, untrained_Q)
    assert caplog.messages == [
        "kNN 65.00% on 400 held-out images is less than the 72.50% of the untrained network: train "
        "for more --epochs, or export another readout by --readout.stages, --readout.grid and "
        "--readout.dim"
    ]
    caplog.clear()
    warn_if_below(np.arange(400) < 300, untrained_Q)
    warn_if_below(None, None)
    warn_if_below(np.arange(34) < 12, np.arange(34) < 14)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("lost", "gained", "images", "worse"),
    [
        (2, 0, 34, False),
        (4, 0, 34, False),
        (5, 0, 34, True),
        (10, 5, 34, False),
        (25, 0, 5000, True),
        (40, 15, 5000, True),
        (100, 75, 5000, False),
        (0, 9, 34, False),
    ],
)
def test_worse_is_what_two_standard_errors_leave_no_room_for(
    lost: int, gained: int, images: int, worse: bool
) -> None:
    """Of the paired difference: images that both get right, or both wrong, say nothing."""
    reference_Q, hits_Q = np.zeros(images, bool), np.zeros(images, bool)
    reference_Q[:lost] = True
    hits_Q[lost : lost + gained] = True
    assert is_worse(hits_Q, reference_Q) == worse


FOLDER, FASHION = (options_json(PRESETS[name]) for name in ("folder", "fashion-mnist"))


def test_what_is_not_given_is_the_presets() -> None:
    """Plain pooling, where the preset says nothing; 0 dimensions stand for no whitening."""
    assert ReadoutOptions().resolve(FOLDER) == Readout()
    asked = ReadoutOptions(stages=(3,), grid=(2,), dim=8, shrinkage=0.1, fit_images=10)
    expected = Readout(stages=(3,), grid=(2,), dim=8, shrinkage=0.1, fit_images=10)
    assert asked.resolve(FOLDER) == expected
    assert ReadoutOptions(dim=0).resolve(FASHION).dim is None
    assert ReadoutOptions(grid=(3,)).resolve(FASHION) == replace(
        PRESET_READOUTS["fashion-mnist"], grid=(3,)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("network.stages", 2), ("network.layout", "timm:resnet18"), ("image_size_px", 14)],
)
def test_the_presets_readout_is_for_its_own_network(
    name: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    """Another may have no such stage or map: it is pooled plainly, which is said."""
    with caplog.at_level("INFO", logger="horace"):
        assert ReadoutOptions().resolve(FASHION | {name: value}) == Readout()  # type: ignore[dict-item]  # one of them
    assert f"this run has another (--{name.replace('_', '-')}): pooling" in caplog.text


@pytest.mark.parametrize("fields", [{"shrinkage": 0.1}, {"fit_images": 10, "dim": 0}])
def test_options_of_a_whitening_that_there_is_not_are_refused(fields: dict[str, float]) -> None:
    """They would do nothing."""
    with pytest.raises(UsageError, match=r"expected none without whitening, .* --readout.dim"):
        ReadoutOptions(**fields).resolve(FOLDER)  # type: ignore[arg-type]  # one of them


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": (2, 0)}, "--readout.grid: expected numbers of at least 1, found 2 0"),
        ({"grid": ()}, "--readout.grid: expected numbers of at least 1, found none"),
        ({"dim": -1}, "--readout.dim: expected at least 0, found -1"),
        ({"fit_images": 1}, "--readout.fit-images: expected at least 2, found 1"),
        ({"shrinkage": 0.0}, "--readout.shrinkage: expected a finite number above 0, found 0.0"),
        (
            {"shrinkage": math.inf},
            "--readout.shrinkage: expected a finite number above 0, found inf",
        ),
    ],
)
def test_values_that_cannot_be_meant_are_refused(fields: dict[str, object], message: str) -> None:
    """Each option says what it takes."""
    with pytest.raises(UsageError) as error:
        ReadoutOptions(**fields)  # type: ignore[arg-type]  # one of them
    assert str(error.value) == message
