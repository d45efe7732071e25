"""Keys as people use them: a command makes one, a process takes it, a client sends it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from serve.client import Client
from serve.errors import UnauthenticatedError

ROOT = Path(__file__).parents[3]
PATIENCE_S = 120.0


def new_key(name: str, file: Path) -> str:
    """Have the command make a key."""
    command = [sys.executable, "-m", "serve.security.keys", "new", name, "--file", str(file)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def call_on(client: Client) -> None:
    """Call until it fails, for as long as a test may take."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        client.embed([np.zeros((28, 28, 1), np.uint8)])


def test_a_key_opens_a_server_until_it_is_taken_back(start_server, make_bundle, tmp_path):
    """Without one, and with one that was taken back, a client is told so; a new one opens."""
    file = tmp_path / "keys"
    key = new_key("app", file)
    server = start_server("--bundle", str(make_bundle().path), "--keys.file", str(file))
    image = np.zeros((28, 28, 1), np.uint8)
    with Client(server.address) as stranger, Client(server.address, api_key=key) as client:
        assert stranger.health()
        with pytest.raises(UnauthenticatedError, match="expected a key of this server"):
            stranger.embed([image])
        assert client.embed([image]).vectors.shape == (1, 16)
        file.write_text("")
        other = new_key("other", file.with_name("new"))
        file.write_text(file.with_name("new").read_text())
        with pytest.raises(UnauthenticatedError):
            call_on(client)
    with Client(server.address, api_key=other) as client:
        assert client.embed([image]).vectors.shape == (1, 16)
    assert server.stop() == 0


def test_a_stranger_writes_nothing_into_the_log(pki, start_server, make_bundle):
    """Who speaks no TLS, to a port of it: every line is of the form that was asked for."""
    tls = ("--tls.cert", pki.options.cert, "--tls.key", pki.options.key)
    bundle = ("--bundle", str(make_bundle().path))
    server = start_server(*bundle, *tls, "--log-format", "json")
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        while stranger.recv(1000):
            pass
    assert server.stop() == 0
    assert all(json.loads(line) for line in server.log.read_text().splitlines())


def test_a_server_with_a_broken_key_file_does_not_start(tmp_path):
    """One line, and the line of the file by its number."""
    file = tmp_path / "keys"
    file.write_text("horace_a-key-that-was-pasted\n")
    command = [sys.executable, "-m", "serve", "--port", "0", "--keys.file", str(file)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "line 1: expected NAME:SHA256-HEX" in done.stderr
    assert "pasted" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_pipe_for_a_key_file_is_a_line_and_holds_up_neither_signal_nor_end(
    start_server, make_bundle, tmp_path
):
    """At the start nothing starts; in mid-run the old keys go on, and so do the reloads."""
    file, pipe = tmp_path / "keys", tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "serve", "--port", "0", "--keys.file", str(pipe)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"python -m serve: key file {pipe}: expected a file that can be read, "
        "found no regular file\n"
    )
    key = new_key("app", file)
    server = start_server("--bundle", str(make_bundle().path), "--keys.file", str(file))
    with Client(server.address, api_key=key) as client:
        pipe.replace(file)
        server.process.send_signal(signal.SIGHUP)
        deadline_s = time.monotonic() + PATIENCE_S
        while "reloaded models" not in server.log.read_text() and time.monotonic() < deadline_s:
            assert client.health()
        assert client.embed([np.zeros((28, 28, 1), np.uint8)]).vectors.shape == (1, 16)
    assert server.stop() == 0
    assert "reload of API keys refused" in server.log.read_text()
