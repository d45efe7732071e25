"""The clock of the benchmarks of training, which a GPU works behind."""

from __future__ import annotations

import time


def now_s() -> float:
    """Read the clock when a GPU, if there is one, has done what it was told."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
