"""A real Milvus Lite in a subprocess, spoken to over gRPC; for tests of the protocol alone."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ports import free_port

START_S = 60.0


@contextmanager
def milvus_server(directory: Path) -> Iterator[str]:
    """Run a server over a directory of its own; give its URI."""
    port = free_port()
    log = (directory / "milvus.log").open("wb")
    command = ["-m", "milvus_lite", "server", "--data-dir", str(directory), "--port", str(port)]
    server = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_S
        while True:
            assert server.poll() is None, (directory / "milvus.log").read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline, "Milvus Lite did not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)
        log.close()
