"""A real tritonserver in a subprocess, from the wheel of nvidia-pytriton; no GPU, no Docker.

The wheel has the server's binary, its Python backend and that backend's stubs. It is fetched
once (55 MB), to a cache directory.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_port

WHEEL = "nvidia-pytriton==0.7.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "horace" / WHEEL
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@contextmanager
def _made(target: Path) -> Iterator[Path | None]:
    """Make a directory of the cache, whole or not at all; None where it is there."""
    if target.is_dir():
        yield None
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=target.parent))
    yield temporary
    try:
        temporary.rename(target)
    except OSError:  # another process has made it meanwhile
        assert target.is_dir()
        shutil.rmtree(temporary)


def fetch_server() -> Path:
    """Install the wheel to the cache, whole or not at all; give its directory."""
    with _made(CACHE) as temporary:
        if temporary is not None:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--target", str(temporary), WHEEL], check=True, timeout=500)
    return CACHE


def backends() -> Path:
    """Give a directory with the Python backend and its stub for this Python."""
    triton = fetch_server() / "pytriton" / "tritonserver"
    (triton / "bin" / "tritonserver").chmod(0o755)
    target = CACHE.with_name(f"{WHEEL}-backends-{PYTHON}")
    with _made(target) as temporary:
        if temporary is not None:
            backend = temporary / "python"
            shutil.copytree(triton / "backends" / "python", backend)
            shutil.copytree(triton / "python_backend_stubs" / PYTHON, backend, dirs_exist_ok=True)
            (backend / "triton_python_backend_stub").chmod(0o755)
    return target


@dataclass
class TritonServer:
    """A server that has loaded its models."""

    address: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End it as a machine does that loses its power; its backends, too."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def tritonserver(
    repository: Path, folder: Path, *, port: int | None = None
) -> Iterator[TritonServer]:
    """Serve a model repository over gRPC; give the server once every model is loaded.

    Args:
        repository: what `train.export.triton` wrote, for the backend `python`.
        folder: where the log goes.
        port: where to listen on 127.0.0.1; a free one where None.
    """
    port = port or free_port()
    home = fetch_server()
    regions = f"horace-{port}-"
    argv = [
        str(home / "pytriton/tritonserver/bin/tritonserver"), f"--model-repository={repository}",
        f"--backend-directory={backends()}", f"--grpc-port={port}",
        "--grpc-address=127.0.0.1", "--allow-http=false", "--allow-metrics=false",
        f"--backend-config=python,shm-region-prefix-name={regions}",
    ]  # fmt: skip
    environment = os.environ | {"LD_LIBRARY_PATH": str(home / "nvidia_pytriton.libs")}
    log = folder / f"tritonserver-{port}.log"
    try:
        with (
            log.open("w") as output,
            subprocess.Popen(
                argv, env=environment, stdout=output, stderr=output, start_new_session=True
            ) as process,
        ):
            try:
                _wait_until_ready(process, log)
                yield TritonServer(f"127.0.0.1:{port}", process)
            finally:
                if process.poll() is None:
                    process.terminate()
    finally:  # a server that was killed leaves its backends' memory behind
        for region in Path("/dev/shm").glob(f"{regions}*"):
            region.unlink(missing_ok=True)


def _wait_until_ready(server: subprocess.Popen[bytes], log: Path) -> None:
    """Follow the log until the server listens, or has given up."""
    tail = ["tail", "--follow", "--lines=+1", f"--pid={server.pid}", str(log)]
    with subprocess.Popen(tail, stdout=subprocess.PIPE, text=True) as lines:
        assert lines.stdout is not None
        for line in lines.stdout:
            if "Started GRPCInferenceService" in line:
                lines.terminate()
                return
    raise AssertionError(log.read_text())
