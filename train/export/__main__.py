"""`python -m train.export RUN`: make a bundle of a run, or fail saying why it would not do.

The backbone of the last checkpoint, with the chosen readout, becomes `encoder.onnx`, and the
backbone before the first step, with the same readout and a fit of its own, `random.onnx`.
Each graph is then opened as a server would open it and compared with torch on the run's own
images; only graphs that pass become a bundle. Other precisions, a model for Triton and an
engine of TensorRT are written on request.

torch is imported after parsing, since it takes seconds to load and `--help` should not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import cast

from models.bundle import Bundle, Json, Precision
from models.command import run_command
from models.cpu import cpu_budget
from train.errors import training_packages
from train.export.options import ExportOptions
from train.export.tensorrt import DEFAULT_OUT, build_engine, require_tensorrt
from train.export.triton import TritonOptions, check_model_target, write_model
from train.run import RunDirectory


def main(options: ExportOptions) -> None:
    """Export, check, write, and print what came of it."""
    name = options.name or options.bundle_path.resolve().name
    if options.triton_repository is not None:  # all that can be refused, before the work
        check_model_target(options.triton_repository, name, replace=options.replace)
    if options.tensorrt:
        require_tensorrt()
    run = RunDirectory(path=options.run)
    run.read_config()
    with training_packages():
        from train.device import HIDE_GPU, gpu_faults, prepare_device, resolve_compute
        from train.export.bundle import export_run

        with gpu_faults(mend=HIDE_GPU):
            prepare_device(resolve_compute("auto", "fp32"), threads=cpu_budget())
            bundle = export_run(
                run,
                options.bundle_path,
                name=name,
                source=options.source,
                readout=options.readout,
                precisions=options.precisions,
                with_random_twin=options.random_twin,
                replace=options.replace,
            )
    summary = summarise(bundle) | deploy(bundle, options)
    print(json.dumps(summary, indent=2) if options.json else _summary_text(summary))


def deploy(bundle: Bundle, options: ExportOptions) -> dict[str, Json]:
    """Write what was asked for beside the bundle; say where it is."""
    written: dict[str, Json] = {}
    if options.triton_repository is not None:
        model = TritonOptions(
            bundle=bundle.path, out=options.triton_repository, replace=options.replace
        )
        written["triton"] = str(write_model(model))
    if options.tensorrt:
        precision: Precision = "fp16" if options.fp16 else "fp32"
        written["tensorrt"] = str(build_engine(bundle.path_of(precision), DEFAULT_OUT))
    return written


def summarise(bundle: Bundle) -> dict[str, Json]:
    """Give what a person wants to know of a new bundle."""
    validation = cast(dict[str, Json] | None, bundle.provenance["validation"])
    return {
        "bundle": str(bundle.path),
        "name": bundle.name,
        "dim": bundle.dim,
        "size_bytes": bundle.encoder_path.stat().st_size,
        "parity": bundle.provenance["parity"],
        "readouts": None if validation is None else validation["readouts"],
        "precisions": bundle.provenance["precisions"],
        "fingerprint": bundle.fingerprint,
    }


def _summary_text(summary: Mapping[str, Json]) -> str:
    """Lay the summary out in lines."""
    parity = cast(dict[str, float], summary["parity"])
    lines = [
        ("bundle", f"{summary['bundle']} ({summary['name']})"),
        ("dim", str(summary["dim"])),
        ("size", f"{cast(int, summary['size_bytes']) / 1e6:.2f} MB"),
        (
            "parity",
            f"least cosine {parity['min_cosine']:.6f}, neighbour overlap "
            f"{parity['overlap']:.4f}, over {parity['images']} images",
        ),
    ]
    readouts = cast(dict[str, dict[str, float | None]] | None, summary["readouts"]) or {}
    lines += [(name, f"kNN {_knn_text(scores)}") for name, scores in readouts.items()]
    precisions = cast(dict[str, dict[str, Json]], summary["precisions"])
    lines += [(name, _precision_text(scores)) for name, scores in precisions.items()]
    lines += [(name, str(summary[name])) for name in ("triton", "tensorrt") if name in summary]
    lines.append(("fingerprint", str(summary["fingerprint"])))
    return "\n".join(f"{name:12} {text}" for name, text in lines)


def _knn_text(scores: Mapping[str, float | None]) -> str:
    """Say how each step of the readout does, such as `81.20% plain, 84.50% pooled`."""
    return ", ".join(f"{score:.2%} {name}" for name, score in scores.items() if score is not None)


def _precision_text(scores: Mapping[str, Json]) -> str:
    """Say what a precision takes, and what it costs against fp32."""
    text = f"{cast(int, scores['size_bytes']) / 1e6:.2f} MB"
    parity = cast(dict[str, float] | None, scores["parity"])
    if parity is not None:
        text += f", mean cosine {parity['mean_cosine']:.6f}, overlap {parity['overlap']:.4f}"
    if scores["knn_top1"] is not None:
        text += f", kNN {scores['knn_top1']:.2%} ({100 * cast(float, scores['knn_delta']):+.2f})"
    return text


if __name__ == "__main__":
    sys.exit(run_command(ExportOptions, main, prog="python -m train.export"))
