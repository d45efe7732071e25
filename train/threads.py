"""Threads that each compute on their own: many small pieces of work beside one another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

START_S = 60.0
"""In which all threads must have started; else the machine has none to give."""


def single_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Start threads in each of which torch's operations take no other thread to help.

    What OpenMP sets up for a new thread takes longer than a small piece, so keep them. The
    caller's own operations have as many threads as before.
    """
    pool = ThreadPoolExecutor(count, name)
    ready = Barrier(count)
    before = torch.get_num_threads()

    def start(_: int) -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # binds this thread to that: see lazy_init_num_threads in ATen
        ready.wait(START_S)

    for _ in pool.map(start, range(count)):
        pass
    torch.set_num_threads(before)  # for threads that are yet to come
    return pool
