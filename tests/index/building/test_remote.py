"""`--encoder horace://`, `horaces://` and `triton://`, each against a real server."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import trustme

from index.build import BuildOptions, build, plan
from index.collection import Collection
from models.errors import EncoderError
from models.remote import RemoteEncoder
from tests.tritonserver import SITE_PACKAGES, tritonserver
from train.export.triton import TritonOptions, write_model

ROOT = Path(__file__).parents[3]
WAIT_S = 30


@contextmanager
def serving(*arguments: str | Path) -> Iterator[str]:
    """Run `python -m serve` on a free port; give its host and port."""
    argv = [sys.executable, "-m", "serve", "--port", "0", *map(str, arguments)]
    with subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            yield server.stdout.readline().split()[3]
        finally:
            server.terminate()


def build_from(encoder, images, out, **more):
    """Build in small batches; give the vectors, and what the manifest says made them."""
    summary = build(
        BuildOptions(images=str(images), encoder=encoder, out=out, batch_size=4, **more)
    )
    with Collection.open(out) as collection:
        assert collection.count == summary.images
        return collection.vectors(collection.ids), collection.manifest


def test_a_horace_server_embeds_as_its_bundle_does(tmp_path, bundle, train_folder, monkeypatch):
    """The same vectors, with several requests in flight, from one process or from two."""
    expected, manifest = build_from(str(bundle.path), train_folder, tmp_path / "local")
    at_once, first, encode = threading.Barrier(3), count(1), RemoteEncoder.encode

    def encode_at_once(encoder, images_NHWC):
        if next(first) <= 3:  # later ones may have to wait for the oldest to be done
            at_once.wait(WAIT_S)
        return encode(encoder, images_NHWC)

    with serving("--bundle", bundle.path) as address:
        uri = f"horace://{address}/{bundle.name}"
        with monkeypatch.context() as patch:
            patch.setattr(RemoteEncoder, "encode", encode_at_once)
            vectors, remote = build_from(uri, train_folder, tmp_path / "one", requests=3)
        shared, _ = build_from(uri, train_folder, tmp_path / "two", processes=2)
        options = BuildOptions(images=str(train_folder), encoder=uri, out=tmp_path / "x")
        assert plan(options).fingerprint == bundle.fingerprint
    np.testing.assert_array_equal(vectors, expected)
    np.testing.assert_array_equal(shared, expected)
    assert remote.encoder == uri
    assert (remote.fingerprint, remote.preprocessing) == (
        manifest.fingerprint,
        manifest.preprocessing,
    )


def test_a_horace_server_embeds_by_tls(tmp_path, bundle, train_folder, monkeypatch):
    """`horaces://` with the authority that HORACE_TLS_CA names."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    (tmp_path / "cert.pem").write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    monkeypatch.setenv("HORACE_TLS_CA", str(tmp_path / "ca.pem"))
    expected, _ = build_from(str(bundle.path), train_folder, tmp_path / "local")
    files = ("--tls.cert", tmp_path / "cert.pem", "--tls.key", tmp_path / "key.pem")
    with serving("--bundle", bundle.path, *files) as address:
        port = address.rpartition(":")[2]
        uri = f"horaces://localhost:{port}/{bundle.name}"
        vectors, _ = build_from(uri, train_folder, tmp_path / "remote")
    np.testing.assert_array_equal(vectors, expected)


def test_a_tritonserver_embeds_as_the_bundle_does(tmp_path, bundle, train_folder):
    """By the repository that the export wrote; a batch of the build is two of that server."""
    write_model(
        TritonOptions(
            bundle=bundle.path, out=tmp_path / "repository", backend="python", threads=1,
            site_packages=SITE_PACKAGES, max_batch_size=2,
        )
    )  # fmt: skip
    expected, _ = build_from(str(bundle.path), train_folder, tmp_path / "local")
    with tritonserver(tmp_path / "repository", tmp_path) as server:
        uri = f"triton://{server.address}/{bundle.name}"
        vectors, manifest = build_from(uri, train_folder, tmp_path / "remote")
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert (manifest.encoder, manifest.fingerprint) == (uri, bundle.fingerprint)


def test_a_server_that_is_not_there_is_one_line(tmp_path):
    """Nothing is made."""
    options = BuildOptions(images=str(ROOT), encoder="horace://127.0.0.1:1/m", out=tmp_path / "c")
    with pytest.raises(EncoderError, match="expected a Horace server that answers"):
        build(options)
    assert list(tmp_path.iterdir()) == []
