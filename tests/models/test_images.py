"""One line of text opens any source, and every source keeps the same promises."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.errors import ImageError, ImageFault, SourceError
from models.images import ImageSource, describe_ignored, open_source

MINI = Path("tests/data/fashion-mnist-mini")
TRAIN = f"idx:{MINI}/train-images-idx3-ubyte.gz"


def make_folder(root: Path) -> str:
    """Lay out two classes of two images."""
    for name in ("cats/1.jpg", "cats/2.PNG", "dogs/1.webp", "dogs/old/3.tif"):
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return f"folder:{root / 'images'}"


def make_shards(root: Path) -> str:
    """Write two plain shards of two images."""
    for shard in range(2):
        with tarfile.open(root / f"shard-{shard}.tar", "w") as archive:
            for i in range(2):
                for name, data in ((f"{i}.cls", b"cat"), (f"{i}.jpg", f"{shard}{i}".encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return f"wds:{root}/shard-{{0..1}}.tar"


SOURCES = {"folder": make_folder, "wds": make_shards, "idx": lambda _: TRAIN}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> ImageSource:
    """Each kind of source in turn."""
    make: Callable[[Path], str] = SOURCES[request.param]
    return open_source(make(tmp_path))


def test_a_source_opens_again_by_its_uri_from_any_directory(
    source: ImageSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is written into a manifest leads back to the same images."""
    keys = [record.key for record in source.records()]
    monkeypatch.chdir(tmp_path)
    again = open_source(source.uri)
    assert again.uri == source.uri
    assert [record.key for record in again.records()] == keys


def test_count_is_how_many_records_come(source: ImageSource) -> None:
    """Progress bars may believe it."""
    assert source.count() == len(list(source.records())) > 0


def test_records_start_anywhere_in_the_same_order(source: ImageSource) -> None:
    """A build that was killed goes on where it stopped."""
    records = [(record.key, record.label) for record in source.records()]
    for start in (0, 1, len(records) - 1, len(records), len(records) + 5):
        assert [(r.key, r.label) for r in source.records(start)] == records[start:]


def test_load_gives_what_the_record_of_that_key_reads(source: ImageSource) -> None:
    """A hit can be shown by its key alone; a record can be read after the iterator moved."""
    records = list(source.records())
    assert len({record.key for record in records}) == len(records)
    for record in records:
        assert np.array_equal(record.read(), source.load(record.key))


@pytest.mark.parametrize("key", ["", "nothing", "cats/9.jpg", "../secret.jpg", "/etc/passwd"])
def test_an_unknown_key_is_an_image_error(source: ImageSource, key: str) -> None:
    """A key that is not in the source reads nothing, and nothing outside it."""
    with pytest.raises(ImageError) as caught:
        source.load(key)
    assert caught.value.fault is ImageFault.UNREADABLE


def test_a_folder_and_a_shard_are_known_without_a_prefix(tmp_path: Path) -> None:
    """A bare path says enough where it is a folder or ends as shards do."""
    make_folder(tmp_path)
    make_shards(tmp_path)
    assert open_source(str(tmp_path / "images")).uri == f"folder:{tmp_path}/images"
    assert open_source(f"{tmp_path}/shard-*.tar").count() == 4


def test_what_is_passed_over_is_named_by_its_suffixes(tmp_path: Path) -> None:
    """The five most frequent; nothing is said where nothing is passed over, or of arrays."""
    folder = make_folder(tmp_path)
    assert describe_ignored(open_source(folder)) is None
    assert describe_ignored(open_source(TRAIN)) is None
    (tmp_path / "images/cats/1.heic").touch()
    assert describe_ignored(open_source(folder)) == "1 file passed over: 1 .heic"
    for name in ("2.HEIC", "1.f", "1.b", "1.c", "1.d", "1.e"):
        (tmp_path / "images/dogs" / name).touch()
    assert describe_ignored(open_source(folder)) == (
        "7 files passed over: 2 .heic, 1 .b, 1 .c, 1 .d, 1 .e, and others"
    )


def test_a_path_may_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave the tilde alone behind a colon."""
    make_folder(tmp_path)
    make_shards(tmp_path)
    uris = {
        "folder:~/images": f"folder:{tmp_path}/images",
        "~/images": f"folder:{tmp_path}/images",
        "wds:~/shard-*.tar": f"wds:{tmp_path}/shard-*.tar",
        f"idx:~/{MINI.name}/train-images-idx3-ubyte.gz": open_source(TRAIN).uri,
    }
    for spec, uri in uris.items():
        monkeypatch.setenv("HOME", str(MINI.parent.absolute() if "idx" in spec else tmp_path))
        assert open_source(spec).uri == uri


@pytest.mark.parametrize("spec", ["no/such/folder", "", "folder:", "wds:", "idx:", "cifar-10"])
def test_what_names_no_source_says_what_would(spec: str) -> None:
    """The error shows the forms that can be meant."""
    with pytest.raises(SourceError) as caught:
        open_source(spec)
    assert str(caught.value) == (
        f"images {spec!r}: expected fashion-mnist[:train|:test], folder:PATH, wds:PATTERN or"
        " idx:IMAGES[,LABELS], found nothing of that name;"
        " check the path, or say what it is with one of these forms"
    )
