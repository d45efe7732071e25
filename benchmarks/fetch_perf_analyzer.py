"""Triton's perf_analyzer, fetched once to the cache: no Docker, no GPU, an old glibc will do.

Its present wheel wants a newer glibc than Debian 12 has. The wheel of tritonclient 2.50.0 for
manylinux1 has a binary that runs; it is linked against libcudart 12, which NVIDIA has a wheel
of, and against Debian's libb64. Needs pip, apt-get and dpkg, and network the first time.

Run from the root to have it at hand: `python -m benchmarks.fetch_perf_analyzer -m MODEL ...`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CLIENT = "tritonclient==2.50.0"
CUDART = "nvidia-cuda-runtime-cu12"
B64 = "libb64-0d"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "horace"
HOME = CACHE / f"perf_analyzer-{CLIENT}"
BINARY = "perf_analyzer"
LIBRARIES = "lib"


@dataclass(frozen=True, kw_only=True)
class PerfAnalyzer:
    """The binary, and what its environment needs."""

    binary: Path
    environment: Mapping[str, str]


def fetch_perf_analyzer() -> PerfAnalyzer:
    """Fetch it unless that was done, whole or not at all.

    Raises:
        CalledProcessError: a package cannot be had.
    """
    if not HOME.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix=".tmp-") as folder:
            made = Path(folder, "made")
            (made / LIBRARIES).mkdir(parents=True)
            _fetch_binary(Path(folder), made)
            _fetch_cudart(Path(folder), made)
            _fetch_b64(Path(folder), made)
            made.rename(HOME)
    return PerfAnalyzer(
        binary=HOME / BINARY, environment=os.environ | {"LD_LIBRARY_PATH": str(HOME / LIBRARIES)}
    )


def _fetch_binary(folder: Path, made: Path) -> None:
    """Take the binary out of its wheel."""
    _pip_download(
        folder, CLIENT, "--only-binary=:all:", "--platform=manylinux1_x86_64",
        "--python-version=3.11",
    )  # fmt: skip
    _unpack(next(folder.glob("tritonclient-*.whl")), "/bin/perf_analyzer", made / BINARY)
    (made / BINARY).chmod(0o755)


def _fetch_cudart(folder: Path, made: Path) -> None:
    """Take the library out of its wheel."""
    _pip_download(folder, CUDART)
    wheel = next(folder.glob("nvidia_cuda_runtime_cu12-*.whl"))
    _unpack(wheel, "/libcudart.so.12", made / LIBRARIES / "libcudart.so.12")


def _fetch_b64(folder: Path, made: Path) -> None:
    """Take the library out of Debian's package; its lists are fetched where they are old."""
    download = ["apt-get", "download", B64]
    if subprocess.run(download, cwd=folder, check=False, capture_output=True).returncode:
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(download, cwd=folder, check=True, capture_output=True)
    package = next(folder.glob(f"{B64}_*.deb"))
    subprocess.run(["dpkg", "-x", str(package), str(folder / "debian")], check=True)
    library = next((folder / "debian").rglob("libb64.so.0d"))
    (made / LIBRARIES / "libb64.so.0d").write_bytes(library.read_bytes())


def _pip_download(folder: Path, what: str, *arguments: str) -> None:
    """Download a wheel."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--dest", str(folder), *arguments, what], check=True)


def _unpack(wheel: Path, ending: str, target: Path) -> None:
    """Take the file whose name ends so out of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(ending))
        target.write_bytes(archive.read(name))


if __name__ == "__main__":
    found = fetch_perf_analyzer()
    os.execve(found.binary, [str(found.binary), *sys.argv[1:]], dict(found.environment))
