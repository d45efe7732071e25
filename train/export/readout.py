"""Readouts: vectors from the maps of a backbone's stages, as they are exported.

Rules:
    A readout is any module from the stages' maps to (N, dim) vectors that has `dim`.
    Pooling and whitening are 1x1 convolutions, which ONNX Runtime computes image by image, as
    it does not a matrix product: a vector's bits must not depend on its batch (decision 0003).

ONNX has no adaptive pooling. A map's size is known when the graph is written, so what each
pixel counts in each cell is a constant matrix, over pixels as channels: one operation for any
size, where slices and means for a map of 7 x 7 in 4 x 4 cells are 56.

Shapes: N images, C channels, H x W = P pixels of a map, G cells, D features, K whitened
dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.errors import UsageError
from train.export.whitening import Whitening


class PooledReadout(nn.Module):
    """The maps of some stages, each averaged over grid x grid cells, side by side.

    Args:
        stage_dims: channels of every stage of the backbone.
        stages: numbers of stages, from 1; the last where empty.
        grid: cells a side; one number for all stages, or one for each.

    Attributes:
        stages, grids: what was chosen, a number a stage.
        dim: length of a vector.

    Raises:
        UsageError: there is no such stage, or it is given twice, or grids are not as many.
    """

    def __init__(
        self,
        stage_dims: Sequence[int],
        *,
        stages: Sequence[int] = (),
        grid: int | Sequence[int] = 1,
    ) -> None:
        super().__init__()
        stages = tuple(stages) or (len(stage_dims),)
        known = set(range(1, len(stage_dims) + 1))
        if not set(stages) <= known or len(set(stages)) < len(stages):
            raise UsageError(
                "stages of the readout",
                expected=f"different numbers of 1 to {len(stage_dims)}",
                found=" ".join(map(str, stages)),
                mend="choose some that the network has",
            )
        grids = (grid,) if isinstance(grid, int) else tuple(grid)
        if len(grids) not in (1, len(stages)):
            raise UsageError(
                "grid of the readout",
                expected=f"one number, or one for each of {len(stages)} stages",
                found=" ".join(map(str, grids)) or "none",
            )
        self.stages = stages
        self.grids = grids if len(grids) == len(stages) else grids * len(stages)
        self.dim = sum(
            grid * grid * stage_dims[stage - 1]
            for stage, grid in zip(stages, self.grids, strict=True)
        )

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Pool the maps to (N, dim); of each stage cell by cell.

        Raises:
            UsageError: a map has fewer pixels a side than the grid has cells.
        """
        pooled = [
            pool_to_grid(maps[stage - 1], grid)
            for stage, grid in zip(self.stages, self.grids, strict=True)
        ]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)


class WhitenedReadout(nn.Module):
    """A readout, and its whitening as a last layer."""

    def __init__(self, pooled: PooledReadout, whitening: Whitening) -> None:
        super().__init__()
        weights_KD = torch.from_numpy(whitening.weights_KD)
        mean_D = torch.from_numpy(whitening.mean_D)
        self.pooled = pooled
        self.dim = len(weights_KD)
        self.whiten = nn.Conv2d(pooled.dim, self.dim, 1)
        with torch.no_grad():
            self.whiten.weight.copy_(weights_KD[:, :, None, None])
            assert self.whiten.bias is not None
            self.whiten.bias.copy_(-(weights_KD @ mean_D))  # in float64 until here

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Whiten the pooled maps to (N, dim)."""
        features_ND = self.pooled(maps)
        whitened_NK11: Tensor = self.whiten(features_ND[:, :, None, None])
        return whitened_NK11.flatten(1)


def pool_to_grid(map_NCHW: Tensor, grid: int) -> Tensor:
    """Average a map over grid x grid cells, (N, grid * grid * C); cells may overlap.

    The cells are those of `torch.nn.functional.adaptive_avg_pool2d`.

    Raises:
        UsageError: the map has fewer pixels a side than the grid has cells.
    """
    if grid == 1:
        return map_NCHW.mean(dim=(2, 3))
    height, width = map_NCHW.shape[2:]
    if min(height, width) < grid:
        raise UsageError(
            "grid of the readout",
            expected=f"at most {min(height, width)}, the pixels of the stage's map",
            found=str(grid),
            mend="choose a smaller grid or an earlier stage",
        )
    of_cells = _kept_cell_shares if map_NCHW.is_cuda else _cell_shares
    shares_GP11 = of_cells(height, width, grid, map_NCHW.device)
    pixels_NPC1 = map_NCHW.flatten(2).transpose(1, 2).unsqueeze(3)
    return nn.functional.conv2d(pixels_NPC1, shares_GP11).flatten(1)


def _cell_shares(height: int, width: int, grid: int, device: torch.device) -> Tensor:
    """Give how much each of P pixels of a map counts in each of G cells, (G, P, 1, 1)."""
    shares_GP = np.kron(_shares(height, grid), _shares(width, grid)).astype(np.float32)
    return torch.from_numpy(shares_GP).to(device)[:, :, None, None]


@cache
def _kept_cell_shares(height: int, width: int, grid: int, device: torch.device) -> Tensor:
    """Keep them on a GPU: a copy from the host cannot be recorded (`train.recorded`)."""
    with torch.inference_mode(False):  # a training may be the next to need them
        return _cell_shares(height, width, grid, device)


def _shares(size: int, cells: int) -> NDArray[np.float64]:
    """Give how much each of `size` pixels in a row counts in each of the cells."""
    shares = np.zeros((cells, size))
    for i in range(cells):
        low, high = i * size // cells, -(-(i + 1) * size // cells)
        shares[i, low:high] = 1 / (high - low)
    return shares
