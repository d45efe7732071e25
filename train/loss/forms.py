"""Which form of the loss costs less, from shapes, ranks and the machine.

Rules:
    A form is chosen by arithmetic on one rank, by bytes moved across ranks.
    Memory counts as all that the machine has, not what happens to be free: else a run that
    goes on after a stop might take another form, and end with other bits.
    Ranks must agree, so across them memory, which may differ, is not asked.

Shapes: N pairs of embeddings over all ranks, D dimensions.
"""

from __future__ import annotations

from typing import Literal

import torch

from models.memory import memory_bytes
from train.collectives import cheaper_collective

Form = Literal["auto", "direct", "gram", "tiled"]
Chosen = Literal["direct", "gram", "tiled"]

GRAM_BELOW_N_PER_D = 0.75
"""The Gram form costs up to 8 N^2 D flop forward and backward, the others 6 N D^2.

`benchmarks/results/loss_intel.json` (2 threads): 1.5 times as fast as direct at N = D / 2, .4 times
at N = 2 D.
"""

TILE_BYTES = 64 * 2**20
"""Most bytes of C that `tiled` has at once, and the largest C that `auto` keeps whole."""

MEMORY_SHARE = 0.25
"""Most of the machine's memory that the two Gram matrices may take."""


def choose_form(
    n_global: int, dim: int, *, world: int, item_bytes: int, memory_bytes: int
) -> Chosen:
    """Choose the form that `auto` is.

    Args:
        n_global: N, of all ranks.
        dim: D.
        world: ranks that share the batch.
        item_bytes: bytes of one number: 4 or 8.
        memory_bytes: all memory of the device, where there is one rank.
    """
    whole: Chosen = "direct" if dim**2 * item_bytes <= TILE_BYTES else "tiled"
    if world > 1:
        return "gram" if cheaper_collective(n_global, dim) == "all_gather" else whole
    grams_fit = 2 * n_global**2 * item_bytes <= MEMORY_SHARE * memory_bytes
    return "gram" if n_global < GRAM_BELOW_N_PER_D * dim and grams_fit else whole


def tile_rows(form: Chosen, dim: int, *, item_bytes: int) -> int | None:
    """Give how many rows of C are made at once: all, as many as may be, or None: no C."""
    if form == "gram":
        return None
    return dim if form == "direct" else min(dim, max(1, TILE_BYTES // (dim * item_bytes)))


def device_memory_bytes(device: torch.device) -> int:
    """Give all the memory that a device, or this machine and its container, has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return memory_bytes()
