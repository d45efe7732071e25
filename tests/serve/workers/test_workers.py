from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from models.files import publish_directory
from serve.client import Client
from serve.errors import ServeError
from serve.workers.ports import held_port

ROOT = Path(__file__).parents[3]
IMAGE = np.zeros((28, 28), np.uint8)
PATIENCE_S = 60.0


def wait_until(holds) -> None:
    """Wait for another process; nothing waits this long if all is well."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.02)


def workers_of(pid: int) -> list[int]:
    """The processes of a supervisor's workers."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(child)
        for child in children
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


@pytest.fixture
def start_workers(start_server, make_bundle, tmp_path):
    """A function that starts a server of two workers; it gives the server and its log."""

    def start(*arguments: str, bundle: Path | None = None):
        path = bundle or make_bundle().path
        server = start_server("--bundle", f"m={path}", "--workers", "2", *arguments)
        return server, tmp_path / "server-0.log"

    return start


def test_one_line_when_all_are_ready_and_one_order_ends_them(start_workers):
    """Two processes serve gRPC and HTTP; Ctrl-C and a service manager reach them, too."""
    server, log = start_workers("--http.port", "0")
    url = re.search(r" http=(http://\S+) workers=2$", server.ready_line)[1]
    workers = workers_of(server.process.pid)
    assert len(workers) == 2
    for _ in range(4):
        with Client(server.address) as client:
            assert client.embed([IMAGE]).statuses[0].ok
        with urllib.request.urlopen(f"{url}/readyz") as reply:
            assert reply.status == 200
    for pid in workers:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert server.stop() == 0
    assert "cut off" not in log.read_text()
    assert log.read_text().count("stopped; every call was answered") == 2


@pytest.mark.parametrize("frontend", ["native", "grpcio"])
def test_a_killed_worker_is_replaced_and_retries_hide_it(start_workers, frontend):
    """Callers with the usual retries see no error; a while later there are two again."""
    server, log = start_workers("--frontend", frontend)
    done, failures, counts = threading.Event(), [], []

    def call() -> None:
        calls = 0
        with Client(server.address) as client:
            while not done.is_set():
                try:
                    assert client.embed([IMAGE], timeout_s=30).statuses[0].ok
                except ServeError as error:
                    failures.append(error)
                calls += 1
        counts.append(calls)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    before = workers_of(server.process.pid)
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: "worker 0 serves again" in log.read_text())
    os.kill(before[1], signal.SIGKILL)
    wait_until(lambda: "worker 1 serves again" in log.read_text())
    done.set()
    for caller in callers:
        caller.join()
    assert failures == []
    assert min(counts) > 0
    assert set(workers_of(server.process.pid)).isdisjoint(before)
    assert re.search(r"worker 0 died of SIGKILL; another follows in 0\.[01] s", log.read_text())
    assert server.stop() == 0


@pytest.mark.parametrize("frontend", ["native", "grpcio"])
def test_a_worker_that_is_stopped_is_killed_and_replaced(start_workers, frontend):
    """It does not die by itself; callers who wait for no longer than they must are answered."""
    server, log = start_workers("--frontend", frontend, "--watchdog.silent-s", "2")
    before = workers_of(server.process.pid)
    os.kill(before[0], signal.SIGSTOP)
    wait_until(lambda: "worker 0 serves again" in log.read_text())
    text = log.read_text()
    assert "worker 0 is killed: its event loop had not answered for 2 s" in text
    assert "worker 0 was killed, since its event loop had not answered for 2 s; another" in text
    assert before[0] not in workers_of(server.process.pid)
    for _ in range(4):
        with Client(server.address) as client:
            assert client.embed([IMAGE]).statuses[0].ok
    assert server.stop() == 0
    assert "worker 1 was killed" not in log.read_text()


def test_a_worker_that_is_told_to_end_drains_and_is_replaced(start_workers):
    """So an operator restarts one after the other; a signal to the parent drains them all."""
    server, log = start_workers()
    assert server.ready_line == (
        f"horace serving on {server.address} models=m collections=none workers=2"
    )
    os.kill(workers_of(server.process.pid)[1], signal.SIGTERM)
    wait_until(lambda: "worker 1 serves again" in log.read_text())
    assert "worker 1 ended with status 0; another follows" in log.read_text()
    assert server.stop() == 0
    assert log.read_text().count("stopped; every call was answered") == 3


def test_a_signal_reloads_every_worker(start_workers, make_bundle, tmp_path):
    """SIGHUP to the parent: each of them takes the new bundle."""
    one, two = make_bundle("m", seed=1), make_bundle("m", seed=2)
    server, log = start_workers(bundle=one.path)
    publish_directory(two.path, one.path, replace=True)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: log.read_text().count("model m is served in version 2") == 2)
    with Client(server.address) as client:
        assert client.embed([IMAGE]).fingerprint == two.fingerprint
    assert server.stop() == 0


def test_workers_end_when_their_supervisor_is_gone(start_workers):
    """Nobody minds them: they drain and end, and the port is free again."""
    server, log = start_workers()
    workers = workers_of(server.process.pid)
    server.stop(signal.SIGKILL)
    wait_until(lambda: not any(Path(f"/proc/{pid}/fd").exists() for pid in workers))
    assert "stopping on the end of the supervisor" in log.read_text()


def refusal(*arguments: str) -> tuple[int, str]:
    """The status and the last line of a server of two workers that cannot start."""
    done = subprocess.run(
        [sys.executable, "-m", "serve", "--workers", "2", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.splitlines()[-1]


def test_a_worker_that_cannot_start_ends_them_all_with_its_words(make_bundle, tmp_path):
    """The line is that of a single server, and so is the status."""
    path = make_bundle().path
    (path / "bundle.json").write_text("{}")
    status, line = refusal("--port", "0", "--bundle", str(path))
    assert (status, line.partition(": ")[0]) == (1, "python -m serve")
    assert "expected JSON with a schema_version, of finite numbers, found something else" in line
    shutil.rmtree(path)
    status, line = refusal("--port", "0", "--bundle", f"{make_bundle('x').path},precision=int8")
    assert status == 1
    assert "in int8: expected fp32" in line


def test_a_port_of_others_is_refused_also_where_they_would_share_it(make_bundle):
    """Another server of ours holds its port against a second one, and so does a stranger."""
    with held_port("127.0.0.1", 0) as port:
        status, line = refusal("--port", str(port), "--bundle", str(make_bundle().path))
        assert status == 1
        assert f"port 127.0.0.1:{port}: expected a free port, found one in use" in line


def test_a_held_port_takes_no_connection():
    """The one who holds it listens to nobody; those who share it can listen meanwhile."""
    with held_port("localhost", 0) as port:
        with socket.socket() as caller, pytest.raises(ConnectionRefusedError):
            caller.connect(("127.0.0.1", port))
        with socket.socket() as worker:
            worker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            worker.bind(("127.0.0.1", port))
            worker.listen()
            with socket.create_connection(("127.0.0.1", port)):
                pass
    with held_port("localhost", port):
        pass
