"""A server whose bundle, collection and certificate are replaced as people replace them."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.served import Served
from models.bundle import ENCODER_FILE, SHIPPED_BUNDLE, read_bundle, write_bundle
from models.files import atomic_directory, publish_directory
from serve.errors import ServeError

COLLECTION_IMAGES = 200

ENCODERS = ("encoder.onnx", "random.onnx")
"""Of the shipped bundle: two encoders of one shape, whose fingerprints differ."""


class ChangesError(ServeError):
    """A server that did not do what it should have, or an accepted request that failed."""


class ChangingServer(Served):
    """A server with its workers, and what it says of the calls that it has accepted."""

    @property
    def resident_mib(self) -> float:
        """Memory of the process and its workers, what they share counted for each."""
        pids = (self.process.pid, *self.workers())
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    def workers(self) -> list[int]:
        """The processes of its workers."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        lines = {int(c): Path(f"/proc/{c}/cmdline").read_bytes() for c in children}
        return [child for child, line in lines.items() if b"spawn_main" in line]

    def drain(self) -> int:
        """Tell it to stop, and give the number of calls that it has accepted."""
        status = self.stop()
        found = re.findall(r"stopped; every call was answered, (\d+) in all", self.log)
        if status or not found:
            raise ChangesError("server", expected="exit status 0 after a drain", found=self.log)
        return sum(map(int, found))


def put_bundle(path: Path, n: int) -> None:
    """Put the nth encoder, of two, in the place of a bundle."""
    shipped = read_bundle(SHIPPED_BUNDLE, verify=False)
    write_bundle(
        path,
        name="changing",
        files={ENCODER_FILE: SHIPPED_BUNDLE / ENCODERS[n % 2]},
        preprocessing=shipped.preprocessing,
        output=shipped.output,
        provenance={"command": "benchmarks.serve_changes"},
        replace=path.exists(),
    )


def put_images(folder: Path) -> None:
    """Make the images of a collection."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(COLLECTION_IMAGES):
        pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")


def put_collection(path: Path, made: Path) -> None:
    """Put a collection in the place of another, in one step, as `index.build --replace` does."""
    with atomic_directory(path.with_name("copy"), replace=True) as temporary:
        shutil.copytree(made, temporary, dirs_exist_ok=True)
    publish_directory(path.with_name("copy"), path, replace=True)


def served_certificate(address: str) -> bytes | None:
    """Connect anew, and give the certificate that the server shows, as DER."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port))) as connection,
        context.wrap_socket(connection) as secure,
    ):
        return secure.getpeercert(binary_form=True)
