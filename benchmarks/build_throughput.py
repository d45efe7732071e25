"""How fast `index.build` is against decoding alone and encoding alone, and what memory it takes.

The bar: at least 95% of the slower of the two, each measured alone with all CPUs. Where a CPU
pays for both, no order of work can do better than the sum of their costs,
1 / (1 / decode + 1 / encode): that ceiling and what is reached of it stand beside the bar. The
ceiling is near the slower one only where the other is cheap, or computes elsewhere.

    large   ResNet-50 at 224, untrained: the speed of a network does not depend on its weights.
    small   ResNet-10 of width 8 at 64.

Images are JPEGs of 500 x 375 cut from photographs (`benchmarks.photographs`). In every round, by
turns: decoding them all with the build's own pool and no encoder; encoding, both as the build
does it, a batch a thread on all CPUs, and as one batch on all threads, of which the faster
counts; and the command `python -m index.build`, a process of its own that is timed by its own
report (reading, decoding, encoding, writing and syncing parts) and by the clock (also starting,
opening the encoder, writing the collection). CPU milliseconds an image stand beside every rate:
other programs disturb them less.

Memory is the peak resident size of the command over a quarter of the images and over all.

Run from the root: `python -m benchmarks.build_throughput --out
benchmarks/results/build_throughput.json` (about 25 minutes on two cores, of which the small
encoder takes two).
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.int8 import MEAN, STD
from benchmarks.measuring import command_line, spread_of, turns
from benchmarks.photographs import make_jpegs
from models.bundle import ENCODER_FILE, OutputSpec, write_bundle
from models.command import progress, run_command
from models.cpu import cpu_budget
from models.encoder import Encoder
from models.image_folder import FolderSource
from models.images import ImageRecord
from models.networks import ResNet
from models.preprocess import PreprocessSpec, preprocess
from models.runtime import open_bundle
from train.export.graph import EncoderGraph, write_onnx
from train.export.readout import PooledReadout
from train.run import describe_environment

BATCH = 64
BAR = 0.95
NETWORKS: dict[str, tuple[int, dict[str, Any], int]] = {
    "small": (64, {"layout": "resnet10", "stem": "large", "width": 8}, 40),
    "large": (224, {"layout": "resnet50", "stem": "large"}, 4),
}
"""Side of the input, network, and batches that are encoded to see how fast that is."""

ROOT = Path(__file__).parents[1]

COMMAND = """
import atexit, runpy, sys
def tell():
    status = open("/proc/self/status").read()
    print(status.split("VmHWM:")[1].split()[0], file=sys.stderr)
atexit.register(tell)
runpy.run_module("index.build", run_name="__main__", alter_sys=True)
"""
"""`python -m index.build`, which says last how much it held at most, in KiB: `ru_maxrss` begins
with what the parent held (getrusage(2)), and that is more."""


@dataclass(frozen=True, kw_only=True)
class BuildThroughputOptions:
    """Compare index.build with decoding alone and encoding alone."""

    images: int = 5000
    """How many JPEGs."""
    encoders: tuple[str, ...] = ("small", "large")
    """Which of the two."""
    rounds: int = 3
    """How often everything has its turn."""
    processes: tuple[int, ...] = (1, 2)
    """Numbers of processes that the small encoder's builds have; the large one's has the first."""
    jpegs: Path = Path("artifacts/bench/jpegs")
    """Folder for the JPEGs; their number is appended, and what is there is taken as it is."""
    out: Path | None = None
    """JSON file for the result."""


@dataclass(frozen=True)
class Timing:
    """One run: how many images a second, and what each cost in CPU time."""

    images_per_s: float
    cpu_ms: float


def main(options: BuildThroughputOptions) -> None:
    """Measure, print, and write the result."""
    folder = make_jpegs(Path(f"{options.jpegs}-{options.images}"), options.images)
    report = {
        "command": command_line(),
        "hardware": describe_environment()["hardware"],
        "cpus": cpu_budget(),
        "load_before": os.getloadavg(),
        "versions": {
            name: version(name) for name in ("onnxruntime", "simplejpeg", "pillow", "pyarrow")
        },
        "images": options.images,
        "jpeg_bytes": spread_of([file.stat().st_size for file in folder.iterdir()]),
        "batch_size": BATCH,
        "rounds": options.rounds,
        "encoders": {name: measure(name, folder, options) for name in options.encoders},
        "load_after": os.getloadavg(),
    }
    text = json.dumps(report, indent=2)
    print(text)
    print(as_table(report["encoders"]), file=sys.stderr)
    if options.out is not None:
        options.out.write_text(text + "\n")


def measure(name: str, folder: Path, options: BuildThroughputOptions) -> dict[str, Any]:
    """Measure one encoder."""
    side, network, n_batches = NETWORKS[name]
    with tempfile.TemporaryDirectory() as place:
        bundle, spec = write_encoder(Path(place), name, side, network)
        one, all_ = open_bundle(bundle, threads=1), open_bundle(bundle)
        counts = options.processes if name == "small" else options.processes[:1]
        records = list(FolderSource(folder).records())
        images_NHWC = np.stack([preprocess(record.read(), spec) for record in records[:BATCH]])
        batches = [images_NHWC] * n_batches
        with closing(one), closing(all_):
            work: dict[str, Callable[[], Timing]] = {
                "decode": lambda: time_decoding(records, spec),
                "encode_batch_a_thread": lambda: time_encoding(one, batches, cpu_budget()),
                "encode_batch_on_all": lambda: time_encoding(all_, batches, 1),
            }
            time_encoding(one, batches[:1] * cpu_budget(), cpu_budget())  # the first run allocates
            time_encoding(all_, batches[:1], 1)
            builds = {
                f"build_{n}_processes": lambda n=n: run_build(folder, bundle, Path(place), n)
                for n in counts
            }
            found: dict[str, list[Any]] = {key: [] for key in (*work, *builds)}
            rounds = range(options.rounds)
            for number in progress(rounds, what=name, total=options.rounds, unit="round"):
                for key, run in turns([*work.items(), *builds.items()], number):
                    found[key].append(run())
            times: dict[str, list[Timing]] = {key: found[key] for key in work}
            built: dict[str, list[dict[str, float]]] = {key: found[key] for key in builds}
        quarter = link_some(folder, Path(place) / "quarter", options.images // 4)
        few = run_build(quarter, bundle, Path(place), 1)
    return {
        "side_px": side,
        "network": network,
        **{key: summarise(timings) for key, timings in times.items()},
        **{key: spread_of_all(runs) for key, runs in built.items()},
        "bar": compare(times, built["build_1_processes"]),
        "peak_rss_mib": {
            "quarter": few["peak_rss_mib"],
            "all": max(run["peak_rss_mib"] for run in built["build_1_processes"]),
        },
    }


def compare(times: dict[str, list[Timing]], built: Sequence[dict[str, float]]) -> dict[str, object]:
    """Hold the build against the slower of the two and against the ceiling, round by round."""
    slower_ratios, ceiling_ratios, cpu_ratios, limits = [], [], [], []
    ways = zip(
        times["decode"], times["encode_batch_a_thread"], times["encode_batch_on_all"], strict=True
    )
    for (decode, a_thread, on_all), build in zip(ways, built, strict=True):
        encode = max(a_thread.images_per_s, on_all.images_per_s)
        slower = min(decode.images_per_s, encode)
        ceiling = 1 / (1 / decode.images_per_s + 1 / encode)
        slower_ratios.append(build["images_per_s"] / slower)
        ceiling_ratios.append(build["images_per_s"] / ceiling)
        limits.append(ceiling / slower)
        cpu_ratios.append((decode.cpu_ms + a_thread.cpu_ms) / build["cpu_ms"])
    return {
        "of_the_slower_alone": spread_of(slower_ratios),
        "ceiling_of_the_slower": spread_of(limits),
        "of_the_ceiling": spread_of(ceiling_ratios),
        "cpu_of_both_alone_over_build": spread_of(cpu_ratios),
        "holds": statistics.median(slower_ratios) >= BAR,
        "holds_against_the_ceiling": statistics.median(ceiling_ratios) >= BAR,
    }


def time_decoding(records: Sequence[ImageRecord], spec: PreprocessSpec) -> Timing:
    """Read and preprocess all images with as many threads as there are CPUs."""

    def decode(batch: Sequence[ImageRecord]) -> None:
        np.stack([preprocess(record.read(), spec) for record in batch])

    batches = [records[n : n + BATCH] for n in range(0, len(records), BATCH)]
    return timed(len(records), lambda: in_threads(decode, batches, cpu_budget()))


def time_encoding(encoder: Encoder, batches: Sequence[NDArray[np.uint8]], threads: int) -> Timing:
    """Encode batches, so many at once."""
    return timed(sum(map(len, batches)), lambda: in_threads(encoder.encode, batches, threads))


def in_threads(work: Callable[[Any], object], items: Sequence[Any], threads: int) -> None:
    """Do all of it, so much at once."""
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, items):
            pass


def timed(n_images: int, work: Callable[[], None]) -> Timing:
    """Time one run in this process."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    work()
    took_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    return Timing(n_images / took_s, 1e3 * cpu_s / n_images)


def run_build(folder: Path, bundle: Path, place: Path, processes: int) -> dict[str, float]:
    """Run the command; give its rates, its CPU time an image and its peak memory.

    Memory is the command's own: where it has workers, theirs comes on top.
    """
    out = place / "collection"
    argv = [
        sys.executable, "-c", COMMAND, "--images", str(folder), "--encoder", str(bundle),
        "--out", str(out), "--replace", "--batch-size", str(BATCH),
        "--processes", str(processes), "--json",
    ]  # fmt: skip
    before, start_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    after, took_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start_s
    summary = json.loads(done.stdout)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    n_images = summary["images"]
    return {
        "images_per_s": n_images / summary["embed_s"],
        "whole_command_images_per_s": n_images / took_s,
        "cpu_ms": 1e3 * cpu_s / n_images,
        "peak_rss_mib": int(done.stderr.split()[-1]) / 1024,
        "index_s": summary["index_s"],
    }


def write_encoder(
    folder: Path, name: str, side: int, network: dict[str, Any]
) -> tuple[Path, PreprocessSpec]:
    """Write an untrained network as a bundle."""
    torch.manual_seed(0)
    backbone = ResNet(zero_init_residual=False, **network)
    graph = EncoderGraph(backbone, PooledReadout(backbone.stage_dims), MEAN, STD)
    spec = PreprocessSpec(height=side, width=side, channels=3, resize=side)
    write_onnx(graph, spec, folder / ENCODER_FILE)
    bundle = write_bundle(
        folder / "bundle",
        name=name,
        files={ENCODER_FILE: folder / ENCODER_FILE},
        preprocessing=spec,
        output=OutputSpec(dim=backbone.stage_dims[-1]),
        provenance={},
    )
    return bundle.path, spec


def link_some(folder: Path, target: Path, count: int) -> Path:
    """Make a folder of links to the first images of another."""
    target.mkdir()
    for file in sorted(folder.glob("*.jpg"))[:count]:
        (target / file.name).symlink_to(file.resolve())
    return target


def summarise(timings: Sequence[Timing]) -> dict[str, dict[str, float]]:
    """Give the spread of rates and of costs."""
    return {
        "images_per_s": spread_of([timing.images_per_s for timing in timings]),
        "cpu_ms": spread_of([timing.cpu_ms for timing in timings]),
    }


def spread_of_all(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Give the spread of every figure of some runs."""
    return {key: spread_of([run[key] for run in runs]) for key in runs[0]}


def as_table(encoders: dict[str, dict[str, Any]]) -> str:
    """Lay the figures out for people: medians."""
    lines = []
    for name, found in encoders.items():
        rates = {
            key: value["images_per_s"]["median"]
            for key, value in found.items()
            if isinstance(value, dict) and "images_per_s" in value
        }
        bar = {key: value["median"] for key, value in found["bar"].items() if key[:5] != "holds"}
        memory = found["peak_rss_mib"]
        lines += [
            f"{name}: " + ", ".join(f"{key} {rate:.1f}/s" for key, rate in rates.items()),
            "  " + ", ".join(f"{key} {ratio:.3f}" for key, ratio in bar.items()),
            f"  peak memory {memory['quarter']:.0f} MiB of a quarter, {memory['all']:.0f} of all",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(
        run_command(BuildThroughputOptions, main, prog="python -m benchmarks.build_throughput")
    )
