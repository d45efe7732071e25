"""The choice among the forms of the loss, and the memory it counts with."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.loss.forms import TILE_BYTES, choose_form, device_memory_bytes, tile_rows

GIB = 2**30


@pytest.mark.parametrize(
    ("n", "dim", "world", "memory", "chosen"),
    [
        (256, 8192, 1, 16 * GIB, "gram"),
        (6143, 8192, 1, 16 * GIB, "gram"),
        (6144, 8192, 1, 16 * GIB, "tiled"),  # C has 256 MB
        (4096, 4096, 1, 16 * GIB, "direct"),
        (2048, 128, 1, 16 * GIB, "direct"),
        (20_000, 65_536, 1, 16 * GIB, "gram"),  # two Grams of 1.6 GB
        (20_000, 65_536, 1, 8 * GIB, "tiled"),
        (20_000, 65_536, 4, 8 * GIB, "gram"),  # ranks must agree, whatever memory they have
        (8191, 8192, 4, 16 * GIB, "gram"),
        (8192, 8192, 4, 16 * GIB, "tiled"),
        (4096, 512, 4, 16 * GIB, "direct"),
    ],
)
def test_the_form_follows_arithmetic_bytes_and_memory(
    n: int, dim: int, world: int, memory: int, chosen: str
) -> None:
    """Flops on one rank, bytes moved across ranks, and only what fits."""
    assert choose_form(n, dim, world=world, item_bytes=4, memory_bytes=memory) == chosen


@given(dim=st.integers(1, 10**6), item_bytes=st.sampled_from([4, 8]))
def test_a_tile_is_bounded_and_never_empty(dim: int, item_bytes: int) -> None:
    """As many rows as fit, at least one; all for `direct`; none are made for `gram`."""
    rows = tile_rows("tiled", dim, item_bytes=item_bytes)
    assert rows is not None
    assert 1 <= rows <= dim
    assert rows * dim * item_bytes <= max(TILE_BYTES, dim * item_bytes)
    assert tile_rows("direct", dim, item_bytes=item_bytes) == dim
    assert tile_rows("gram", dim, item_bytes=item_bytes) is None


def test_memory_is_what_the_machine_has() -> None:
    """All of it, so that a form does not depend on what else runs."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    before = device_memory_bytes(torch.device("cpu"))
    assert 0 < before <= physical
    taken = np.ones(64 << 20, np.uint8)
    assert device_memory_bytes(torch.device("cpu")) == before, "64 MiB less are free"
    del taken
