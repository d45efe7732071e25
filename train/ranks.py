"""The processes that `torchrun` starts for one training, and what they have to agree on.

Rules:
    W ranks learn what one process would, to rounding: each takes its slice of every batch,
    and what belongs to a batch (BatchNorm's statistics, the loss, the gradient) is of all
    slices together. Networks with dropout or stochastic depth are the exception: all ranks are
    seeded alike, so each draws for its slice the masks that the others draw for theirs.
    The first rank alone writes: log, checkpoints, configuration, kNN accuracy. The others
    wait for it at the next thing that they have to do together.
    What can differ between ranks, a signal above all, is agreed on before any acts on it, so
    that none waits for one that has left.
    Without torchrun, or with one process of it, there is no process group at all.

The run directory and the images must be where every rank can read them.

torchrun restarts all ranks when one dies (`--max-restarts`), and a run that it began goes on
from the last checkpoint. Ranks that join or leave a torchrun at work are not provided for.
"""

from __future__ import annotations

import atexit
import gc
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from models.errors import UsageError
from train.errors import TrainError


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of one training.

    Attributes:
        rank, world: which of how many, over all machines.
        local_rank, local_world: the same on this machine.
        restarts: how often torchrun has started all of them anew.
        job: which torchrun started it, the same over its restarts; empty for none.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    restarts: int = 0
    job: str = ""

    @property
    def is_managed(self) -> bool:
        """Whether torchrun started it, which passes signals on."""
        return bool(self.job)

    @property
    def is_lead(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group of all ranks; None for one process."""
        return dist.group.WORLD if self.world > 1 else None

    def largest(self, value: int) -> int:
        """Give the largest of all ranks' values.

        Raises:
            TrainError: a rank has ended.
        """
        if self.world == 1:
            return value
        values = torch.tensor([value])
        with together(self):
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values.item())

    def check_batch(self, batch_size: int) -> None:
        """Refuse a batch that cannot be shared equally.

        Raises:
            UsageError: with the next size that can.
        """
        rest = batch_size % self.world
        if rest:
            raise UsageError(
                "--batch-size",
                expected=f"a multiple of the {self.world} ranks",
                found=str(batch_size),
                mend=f"give {batch_size - rest + self.world}",
            )

    def wait(self) -> None:
        """Wait until all ranks are here.

        Raises:
            TrainError: a rank has ended.
        """
        self.largest(0)


def find_ranks() -> Ranks:
    """Read from the environment what torchrun has said to this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Ranks()
    job = os.environ["TORCHELASTIC_RUN_ID"]
    if job == "none":  # nobody named it: torchrun itself, this process's parent, stands for it
        job = f"{socket.gethostname()}-{os.getppid()}"
    return Ranks(
        rank=int(os.environ["RANK"]),
        world=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_world=int(os.environ["LOCAL_WORLD_SIZE"]),
        restarts=int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
        job=job,
    )


@contextmanager
def joined(ranks: Ranks) -> Iterator[None]:
    """Join the process group of all ranks, and leave it at the end.

    CPU tensors go through gloo, and so does what is agreed on: a GPU is never waited for
    only to ask whether to stop.
    """
    if ranks.world == 1:
        yield
        return
    store, rank, world = next(rendezvous("env://"))
    # torchrun keeps its store over a restart, with the addresses of the ranks that are gone;
    # under names of each start's own none of them is called.
    store = PrefixStore(f"start-{ranks.restarts}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    # The trainer refers to itself, so it holds the group, and gloo's threads, until it is
    # collected. A thread of gloo that lets go of a tensor once the interpreter has begun to end
    # aborts the process: they must be gone by then, however this ends.
    atexit.register(gc.collect)
    try:
        yield
    finally:
        dist.destroy_process_group()


def share_gradients(network: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """Let the backward pass leave the mean of all ranks' gradients; one process stays as it is.

    Every step builds the same graph and uses every parameter, which DDP need not find out
    anew (`static_graph`).
    """
    if ranks.world == 1:
        return network
    return DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=True,
    )


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """Say in one line that a rank has left the others, whatever they did together.

    Raises:
        TrainError: in place of what the process group raises.
    """
    try:
        yield
    except RuntimeError as error:
        # NCCL's errors are of torch's own classes; gloo's are told by their text.
        if ranks.world == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise TrainError(
            "the ranks of this training",
            expected="all of them at work",
            found=f"one that has ended ({str(error).splitlines()[0]})",
            mend="see what it said last; under torchrun --max-restarts the run goes on by itself",
        ) from error
