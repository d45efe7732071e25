"""The bundle: an exported encoder in a directory, and the fingerprint that names it.

`train.export` writes one; `serve` and `index` read it. It holds `encoder.onnx`, optionally
`encoder.int8.onnx` and `encoder.fp16.onnx` (the same encoder in other precisions) and
`random.onnx` (the same network before its first training step: the baseline row of an
evaluation), and `bundle.json`, which says what they are, where they come from, and the
SHA-256 of each.

Rules:
    The fingerprint is the SHA-256 of the canonical JSON of what decides a vector: the hash
    of the encoder's file, the preprocessing, the output. Nothing else enters it. So every
    precision has one of its own; the bundle's is that of fp32.
    A bundle is named by its directory, or by the file of one of its encoders, which then
    chooses the precision: whatever takes a bundle takes any precision.
    A file that does not match its recorded hash is never opened.
    A bundle is written under a temporary name and renamed: it is whole or absent.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from models.documents import Json as Json
from models.documents import document_bytes, read_document
from models.errors import BundleError, HoraceError, reason_of
from models.files import (
    atomic_directory,
    atomic_file,
    canonical_json,
    sha256_file,
)
from models.preprocess import PreprocessSpec

SCHEMA_VERSION = 1
BUNDLE_FILE = "bundle.json"
ENCODER_FILE = "encoder.onnx"
RANDOM_FILE = "random.onnx"

Precision = Literal["fp32", "int8", "fp16"]
PRECISION_FILES: dict[Precision, str] = {
    "fp32": ENCODER_FILE,
    "int8": "encoder.int8.onnx",
    "fp16": "encoder.fp16.onnx",
}

SHIPPED_BUNDLE = Path(__file__).parent / "shipped" / "fashion-mnist"
"""The small encoder that comes with Horace, trained on Fashion-MNIST by `train.pretrain`."""


@dataclass(frozen=True, kw_only=True)
class OutputSpec:
    """What leaves the graph: float32 vectors of `dim`, not normalised."""

    dim: int

    def to_json(self) -> dict[str, Json]:
        """Give the spec as it stands in `bundle.json` and in the fingerprint."""
        return {"dim": self.dim, "dtype": "float32", "normalized": False}


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """One bundle on disk.

    Attributes:
        path: its directory.
        name: a word for people; no part of the fingerprint.
        preprocessing: how bytes become the graph's uint8 input.
        output: what the graph gives.
        files: SHA-256 by file name.
        fingerprint: 64 hexadecimal digits that name the encoder.
        provenance: command, seed, data, versions and evaluation that it came from.
    """

    path: Path
    name: str
    preprocessing: PreprocessSpec
    output: OutputSpec
    files: Mapping[str, str]
    fingerprint: str
    provenance: Mapping[str, Json]

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.output.dim

    @property
    def encoder_path(self) -> Path:
        """The ONNX file that serves."""
        return self.path / ENCODER_FILE

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The precisions that the bundle has the encoder in; fp32 is always there."""
        return tuple(name for name, file in PRECISION_FILES.items() if file in self.files)

    def path_of(self, precision: Precision) -> Path:
        """Give the ONNX file of a precision.

        Raises:
            BundleError: the bundle has none.
        """
        if precision not in self.precisions:
            raise BundleError(
                f"{self.path} in {precision}",
                expected=" or ".join(self.precisions),
                found=repr(precision),
                mend=f"export it again with --{precision}",
            )
        return self.path / PRECISION_FILES[precision]

    def fingerprint_of(self, file_name: str) -> str:
        """Name the encoder that one of the bundle's ONNX files is."""
        return fingerprint_of(self.files[file_name], self.preprocessing, self.output)

    @property
    def random_path(self) -> Path | None:
        """The untrained twin, where the bundle has one."""
        return self.path / RANDOM_FILE if RANDOM_FILE in self.files else None


def split_precision(path: Path) -> tuple[Path, Precision]:
    """Tell the directory of a bundle and the precision, of either way to name an encoder.

    Args:
        path: a bundle's directory, which stands for fp32, or one of its encoders' files.
    """
    for precision, file_name in PRECISION_FILES.items():
        if path.name == file_name and not path.is_dir():
            return path.parent, precision
    return path, "fp32"


def fingerprint_of(encoder_sha256: str, preprocessing: PreprocessSpec, output: OutputSpec) -> str:
    """Name an encoder by everything that decides its vectors, and by nothing else."""
    identity = {
        "encoder_sha256": encoder_sha256,
        "preprocessing": preprocessing.to_json(),
        "output": output.to_json(),
    }
    return hashlib.sha256(canonical_json(identity)).hexdigest()


def write_bundle(
    path: Path,
    *,
    name: str,
    files: Mapping[str, Path],
    preprocessing: PreprocessSpec,
    output: OutputSpec,
    provenance: Mapping[str, Json],
    replace: bool = False,
) -> Bundle:
    """Copy `files` into a new bundle at `path`, with their hashes and the fingerprint.

    Args:
        path: the bundle's directory; made whole, or not at all.
        name: a word for people.
        files: source path by name in the bundle; `encoder.onnx` must be among them.
        preprocessing: how bytes become the graph's input.
        output: what the graph gives.
        provenance: anything JSON that says where the encoder comes from.
        replace: whether an existing bundle may be replaced.

    Raises:
        BundleError: `encoder.onnx` is missing, or `path` holds something already.
    """
    if ENCODER_FILE not in files:
        raise BundleError("bundle files", expected=ENCODER_FILE, found=", ".join(files) or "none")
    refuse_foreign_target(path, replace=replace)
    with atomic_directory(path, replace=replace) as temporary:
        for file_name, source in files.items():
            shutil.copyfile(source, temporary / file_name)
        hashes = {file_name: sha256_file(temporary / file_name) for file_name in files}
        document = {
            "schema_version": SCHEMA_VERSION,
            "name": name,
            "input": _input_json(preprocessing),
            "preprocessing": preprocessing.to_json(),
            "output": output.to_json(),
            "fingerprint": fingerprint_of(hashes[ENCODER_FILE], preprocessing, output),
            "files": hashes,
            "provenance": dict(provenance),
        }
        (temporary / BUNDLE_FILE).write_bytes(document_bytes(document))
    return read_bundle(path)


def record_evaluation(path: Path, name: str, result: Json) -> None:
    """Keep an evaluation's result with the bundle, in its provenance; an older one goes.

    The fingerprint does not change: what was measured of an encoder decides no vector.

    Args:
        path: the bundle's directory, or the file of one of its encoders; of another precision
            than fp32 it is kept beside that of fp32, such as `knn.int8`.
        name: which evaluation it was, such as `knn`.
        result: what was measured, on which data, and by which command.

    Raises:
        BundleError: there is no sound bundle.
    """
    path, precision = read_bundle(path, verify=False).path, split_precision(path)[1]
    document = _read_document(path)
    provenance = cast(dict[str, Json], document["provenance"])
    evaluations = cast(dict[str, Json], provenance.setdefault("evaluations", {}))
    evaluations[name if precision == "fp32" else f"{name}.{precision}"] = result
    with atomic_file(path / BUNDLE_FILE) as temporary:
        temporary.write_bytes(document_bytes(document))


def read_bundle(path: Path, *, verify: bool = True) -> Bundle:
    """Read a bundle's description and check that it is what it says.

    Args:
        path: the bundle's directory, or the file of one of its encoders.
        verify: whether to hash every file, too; the fingerprint is always recomputed.

    Raises:
        BundleError: there is none, it is of another schema, a file is missing or does not
            match its hash, or the fingerprint is not that of its content; or the system
            lets nobody read it.
    """
    path, _ = split_precision(path)
    try:
        return _read(path, verify=verify)
    except OSError as error:
        name = str(error.filename or path)
        raise BundleError(
            name, expected="a bundle that can be read", found=reason_of(error)
        ) from error


def _read(path: Path, *, verify: bool) -> Bundle:
    """See `read_bundle`."""
    document = _read_document(path)
    try:
        bundle = Bundle(
            path=path,
            name=str(document["name"]),
            preprocessing=PreprocessSpec.from_json(
                cast(dict[str, Json], document["preprocessing"])
            ),
            output=OutputSpec(dim=int(cast(dict[str, int], document["output"])["dim"])),
            files=dict(cast(dict[str, str], document["files"])),
            fingerprint=cast(str, document["fingerprint"]),
            provenance=dict(cast(dict[str, Json], document["provenance"])),
        )
    except (KeyError, TypeError, ValueError, OverflowError, HoraceError) as error:
        raise BundleError(
            str(path / BUNDLE_FILE),
            expected=f"a bundle of schema {SCHEMA_VERSION} that this Horace can run",
            found=f"{error}" if isinstance(error, HoraceError) else f"no usable field {error}",
            mend="export it again with `python -m train.export`",
        ) from error
    _check_files(bundle, verify=verify)
    _check_fingerprint(bundle)
    return bundle


def _input_json(preprocessing: PreprocessSpec) -> dict[str, Json]:
    """Say what the graph takes, for readers that know nothing of our preprocessing."""
    shape: list[Json] = ["N", preprocessing.height, preprocessing.width, preprocessing.channels]
    return {"dtype": "uint8", "layout": "NHWC", "shape": shape}


def refuse_foreign_target(path: Path, *, replace: bool) -> None:
    """Leave alone what exists, unless it is a bundle and may be replaced.

    Raises:
        BundleError: it is something else, or a bundle that may not be replaced.
    """
    if not path.exists():
        return
    if not (path / BUNDLE_FILE).is_file():
        raise BundleError(
            str(path),
            expected="a new directory, or a bundle to replace",
            found="something else of that name",
            mend="choose another name",
        )
    if not replace:
        raise BundleError(
            str(path),
            expected="a new directory",
            found="a bundle",
            mend="choose another name, or replace it with --replace",
        )


def _read_document(path: Path) -> dict[str, Json]:
    """Parse `bundle.json`, and check its schema version and that it is as it was written."""
    file = path / BUNDLE_FILE
    if not file.is_file():
        found = "no such directory" if not path.exists() else f"no {BUNDLE_FILE} in it"
        raise BundleError(
            str(path),
            expected="a bundle directory",
            found=found,
            mend="make one with `python -m train.export RUN --out BUNDLE`",
        )
    with file.open("rb") as content:
        return read_document(
            content,
            file,
            schema_version=SCHEMA_VERSION,
            error=BundleError,
            restore="copy the bundle again",
            again="export it again",
        )


def _check_files(bundle: Bundle, *, verify: bool) -> None:
    """Hold every recorded file against its presence and, on request, its hash."""
    for file_name, recorded in bundle.files.items():
        file = bundle.path / file_name
        if Path(file_name).name != file_name or not file.is_file():
            raise BundleError(
                str(file),
                expected=f"a file that {BUNDLE_FILE} lists",
                found="none",
                mend="copy the bundle again, whole",
            )
        if verify:
            check_sha256(file, expected=recorded, found=sha256_file(file))


def check_sha256(file: Path, *, expected: str, found: str) -> None:
    """Refuse a bundle's file whose hash is not the recorded one.

    Raises:
        BundleError: the hashes differ.
    """
    if found != expected:
        raise BundleError(
            str(file),
            expected=f"SHA-256 {expected}",
            found=found,
            mend="the file is damaged: copy the bundle again, or export it again",
        )


def _check_fingerprint(bundle: Bundle) -> None:
    """Recompute the fingerprint: an edited `bundle.json` must not pass for another encoder."""
    actual = fingerprint_of(bundle.files.get(ENCODER_FILE, ""), bundle.preprocessing, bundle.output)
    if actual != bundle.fingerprint:
        raise BundleError(
            str(bundle.path / BUNDLE_FILE),
            expected=f"fingerprint {actual} for this content",
            found=bundle.fingerprint,
            mend="the file was edited: export the bundle again",
        )
