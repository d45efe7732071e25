"""Opens what a probe judges, on a device that is ready, and closes it: how every probe begins.

torch loads when something is opened, not before: the probes' options are shown without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from models.bundle import BUNDLE_FILE, split_precision
from models.cpu import cpu_budget
from models.errors import UsageError
from train.errors import RunError, training_packages
from train.probe.options import CommonOptions
from train.run import RunDirectory

if TYPE_CHECKING:
    from train.device import Compute
    from train.probe.probed import Probed


@contextmanager
def opened_on_device(
    where: str, options: CommonOptions, *, precision: Literal["auto", "fp32", "bf16", "fp16"]
) -> Iterator[tuple[Probed, Compute]]:
    """Open a bundle, a run or a server's encoder; it is closed at the end of the block.

    Args:
        where: any of them.
        options: the device, its threads, and the readout of a run.
        precision: arithmetic of what is trained.

    Raises:
        BundleError, EncoderError: no sound bundle, or no answer.
        RunError: the run has no checkpoint, or is damaged.
        TrainError: a package or the device is not there, or the GPU is full.
        UsageError: the run's network has no such stage.
    """
    with training_packages():
        from train.device import gpu_faults, prepare_device, resolve_compute
        from train.probe.probed import open_probed
    threads = options.threads or cpu_budget()
    with gpu_faults(mend="free the GPU, or compute with --device cpu"):
        with training_packages():
            compute = resolve_compute(options.device, precision)
            prepare_device(compute, threads=threads)
            probed = open_probed(
                where,
                stages=options.stages,
                grid=options.grid,
                device=compute.device,
                threads=threads,
            )
        with closing(probed):
            yield probed, compute


def refuse_readout(where: str, options: CommonOptions) -> None:
    """Refuse `--stages` and `--grid` for an encoder whose readout is its own.

    Raises:
        UsageError: one of them is given.
    """
    if options.stages or options.grid != 1:
        raise UsageError(
            "--stages" if options.stages else "--grid",
            expected="a run, whose readout is chosen here",
            found=f"{where}, which has a readout of its own",
            mend="leave the option out, or name a run",
        )


def require_weights(where: Path) -> None:
    """Refuse what has no weights that could be trained further.

    Raises:
        RunError: it is neither a run nor a bundle, or an encoder in another precision than fp32.
    """
    path, precision = split_precision(where)
    if not (path / BUNDLE_FILE).is_file():
        RunDirectory(path=where).read_config()
    elif precision != "fp32":
        raise RunError(
            str(where),
            expected="the encoder in fp32, whose weights can be trained further",
            found=f"that in {precision}",
            mend=f"name the bundle, {path}",
        )
