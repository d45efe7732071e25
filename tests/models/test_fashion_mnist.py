"""Fashion-MNIST is found, or fetched and checked, or the error says how to get it."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from models import fashion_mnist
from models.errors import SourceError
from models.fashion_mnist import CLASS_NAMES, FILES, cache_folder, open_fashion_mnist

MINI = Path("tests/data/fashion-mnist-mini")


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A web server's folder and address."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def mini_is_genuine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the small files' checksums stand for the published ones."""
    for name in (name for names in FILES.values() for name in names):
        content = gzip.decompress((MINI / name).read_bytes())
        monkeypatch.setitem(fashion_mnist.SHA256, name, hashlib.sha256(content).hexdigest())


def test_the_small_set_has_every_class_equally_and_by_name() -> None:
    """What ships with the tests: 40 and 20 of each class."""
    for split, per_class in (("train", 40), ("test", 20)):
        source = open_fashion_mnist(split, folders=[MINI])
        assert source.uri == f"fashion-mnist:{split}"
        assert source.images.shape == (per_class * 10, 28, 28)
        assert source.labels is not None
        assert [source.labels.count(name) for name in CLASS_NAMES] == [per_class] * 10
        assert next(source.records()).key == f"{split}/00000"


@pytest.mark.skipif(
    not fashion_mnist.DEBIAN_FOLDER.is_dir(), reason="needs apt-get install dataset-fashion-mnist"
)
def test_debians_package_is_what_zalando_published() -> None:
    """The checksums of the downloads hold for it too; the small set is its beginning."""
    for name, sha256 in fashion_mnist.SHA256.items():
        content = gzip.decompress((fashion_mnist.DEBIAN_FOLDER / name).read_bytes())
        assert hashlib.sha256(content).hexdigest() == sha256
    whole = open_fashion_mnist("train")
    small = open_fashion_mnist("train", folders=[MINI])
    assert np.array_equal(whole.images[:100], small.images[:100])


@pytest.mark.usefixtures("mini_is_genuine")
def test_what_is_nowhere_is_downloaded_once(
    tmp_path: Path, mirror: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    """The files end up in the last folder, whole, and serve the next time."""
    folder, url = mirror
    for name in FILES["test"]:
        shutil.copy(MINI / name, folder)
    cache = tmp_path / "cache"
    with caplog.at_level("INFO"):
        source = open_fashion_mnist("test", folders=[tmp_path / "none", cache], url=url)
    assert source.count() == 200
    assert [record.getMessage() for record in caplog.records] == [
        f"downloading {url}/{name} to {cache}" for name in FILES["test"]
    ]
    assert sorted(path.name for path in cache.iterdir()) == sorted(FILES["test"])
    assert open_fashion_mnist("test", folders=[cache], url="http://127.0.0.1:1").count() == 200


@pytest.mark.parametrize("damage", ["other content", "cut short", "no gzip"])
@pytest.mark.usefixtures("mini_is_genuine")
def test_a_download_that_is_not_the_published_file_is_refused(
    tmp_path: Path, mirror: tuple[Path, str], damage: str
) -> None:
    """Nothing wrong reaches the cache."""
    folder, url = mirror
    images, _ = FILES["train"]
    data = {
        "other content": gzip.compress(b"malice"),
        "cut short": (MINI / images).read_bytes()[:-2000],
        "no gzip": b"<html>moved</html>",
    }[damage]
    (folder / images).write_bytes(data)
    cache = tmp_path / "cache"
    with pytest.raises(SourceError) as caught:
        open_fashion_mnist("train", folders=[cache], url=url)
    reason = "is not a gzip file" if damage == "no gzip" else "has SHA-256"
    assert f"found no file, and {url}/{images} {reason}" in str(caught.value)
    assert not cache.exists() or not list(cache.iterdir())


def test_where_all_fails_one_line_says_how_to_get_it(tmp_path: Path) -> None:
    """No file, no network: the package and the folder are named."""
    with pytest.raises(SourceError) as caught:
        open_fashion_mnist("train", folders=[tmp_path], url="http://127.0.0.1:1")
    assert str(caught.value) == (
        f"fashion-mnist file train-images-idx3-ubyte.gz: expected it in {tmp_path}, or a download"
        " from http://127.0.0.1:1, found no file, and <urlopen error [Errno 111] Connection"
        " refused>; run `apt-get install dataset-fashion-mnist`,"
        f" or put the four files in {tmp_path}"
    )


@pytest.mark.parametrize(
    "reply", [b"garbage\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc"]
)
def test_a_server_that_speaks_no_http_or_hangs_up_is_one_line(tmp_path: Path, reply: bytes) -> None:
    """As something in between does that wants to be asked first."""

    def answer() -> None:
        """Say it to the first who asks, whatever they ask."""
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        answering = threading.Thread(target=answer)
        answering.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(SourceError, match=r"is answered by no whole HTTP \(.*; run"):
            open_fashion_mnist("train", folders=[tmp_path], url=url)
        answering.join()


def test_a_user_without_a_home_has_debians_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container, under a number that no account has; where it is not, that is one line."""
    for name in ("HORACE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", MINI)
    assert open_fashion_mnist("test").count() == 200
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path)
    with pytest.raises(SourceError, match=f"expected it in {tmp_path}, or a download from"):
        open_fashion_mnist("test", url="http://127.0.0.1:1")


def test_a_split_that_is_none_is_refused() -> None:
    """There are two."""
    with pytest.raises(SourceError, match="expected fashion-mnist:train or :test, found 'val'"):
        open_fashion_mnist("val", folders=[MINI])


def test_labels_beyond_the_classes_are_refused(tmp_path: Path) -> None:
    """A file of MNIST's letters, say, put where the clothes should be."""
    shutil.copytree(MINI, tmp_path, dirs_exist_ok=True)
    labels = tmp_path / FILES["test"][1]
    content = bytearray(gzip.decompress(labels.read_bytes()))
    content[-1] = 10
    labels.write_bytes(gzip.compress(content))
    with pytest.raises(SourceError, match="expected classes 0 to 9, found 10"):
        open_fashion_mnist("test", folders=[tmp_path])


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """`$HORACE_CACHE`, then `$XDG_CACHE_HOME`, then the home."""
    monkeypatch.setenv("HOME", "/home/h")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HORACE_CACHE", raising=False)
    assert cache_folder() == Path("/home/h/.cache/horace")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/horace")
    monkeypatch.setenv("HORACE_CACHE", "/own")
    assert cache_folder() == Path("/own")
