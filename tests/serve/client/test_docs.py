"""Every example of docs/client.md, as a reader would run it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "client.md").read_text()


def blocks(kind):
    """The page's blocks of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def page(stored, start_server, tmp_path):
    """A server as the page has it; a function that puts its addresses into an example."""
    (tmp_path / "photos").mkdir()
    for n, path in enumerate(stored.files):
        shutil.copy(path, tmp_path / "photos" / f"{n}.png")
    Image.open(stored.files[0]).convert("L").save(tmp_path / "a.jpg")
    shutil.copy(stored.files[1], tmp_path / "b.png")
    server = start_server(
        *("--bundle", f"photos={stored.bundle}", "--collection", f"photos={stored.collection}"),
        *("--http.port", "0"),
    )
    http = server.ready_line.rpartition("http=http://")[2]

    def with_addresses(text):
        return text.replace("localhost:50051", server.address).replace("localhost:8080", http)

    return with_addresses


def test_the_python_of_the_page_runs(page, tmp_path, monkeypatch, capsys):
    """Block after block, in one program."""
    monkeypatch.chdir(tmp_path)
    program = page("\n".join(blocks("python")))
    exec(compile(program, "docs/client.md", "exec"), {"__name__": "page"})
    out = capsys.readouterr().out
    assert out.startswith("(2, 8) ")
    assert out.count("photos/") == 12
    assert out.count(" ok\n") == 12


def test_the_commands_of_the_page_run(page, tmp_path):
    """Each ends with status 0 and prints something, or writes its file."""
    for line in re.findall(r"^\$ (.+)$", "".join(blocks("console")), re.MULTILINE):
        command = line
        if line.startswith("python"):
            command = line.replace("python", sys.executable, 1) + " --server localhost:50051"
        done = subprocess.run(
            ["bash", "-c", page(command)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert done.stdout or (tmp_path / "vectors.npy").exists(), line
    assert (tmp_path / "found.png").exists()
