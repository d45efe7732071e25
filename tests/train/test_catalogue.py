"""Listing a source for a stream: rows, labels, a hash, and shards that are read at any place."""

from __future__ import annotations

import errno
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.images import open_source
from train.data import reading
from train.data.catalogue import Catalogue, list_images
from train.errors import TrainError


def write_folder(folder: Path) -> Path:
    """Write six files of two classes."""
    for i in range(6):
        path = folder / ("cat" if i % 2 else "dog") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (i + 1))
    return folder


def write_tar(path: Path) -> Path:
    """Write the same as a shard, compressed as its name says."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for i in range(6):
            label = b"cat" if i % 2 else b"dog"
            for name, data in ((f"{i}.jpg", b"x" * (i + 1)), (f"{i}.cls", label)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def listed(spec: Path | str, limit: int | None = None) -> Catalogue:
    """List a source."""
    return list_images(open_source(str(spec)), limit=limit)


@pytest.mark.parametrize("write", [write_folder, lambda path: write_tar(path / "s.tar")])
def test_images_are_read_in_any_order(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """Of folders and plain shards alike, each by its row."""
    catalogue = listed(write(tmp_path))
    assert catalogue.class_names == ("cat", "dog")
    assert sorted(catalogue.labels_N.tolist()) == [0, 0, 0, 1, 1, 1]
    for row in np.random.default_rng(0).permutation(6):
        record = catalogue.records[row]
        assert len(record.read()) == record.size_bytes
        assert catalogue.class_names[catalogue.labels_N[row]] == record.label


def test_limit_lists_the_first_images(mini_source: str) -> None:
    """Arrays can be streamed, too."""
    catalogue = listed(mini_source, limit=7)
    assert len(catalogue.records) == len(catalogue.labels_N) == 7
    assert catalogue.records[3].size_bytes == 28 * 28


def test_the_hash_knows_names_labels_and_sizes(tmp_path: Path) -> None:
    """Any change of these is another data set; what was done to the files' times is not."""
    first, same, longer, renamed, relabelled = (
        write_folder(tmp_path / name) for name in ("a", "b", "c", "d", "e")
    )
    (longer / "cat/1.jpg").write_bytes(b"more of it")
    (renamed / "cat/1.jpg").rename(renamed / "cat/1.png")
    (relabelled / "cat").rename(relabelled / "bird")
    hashes = [listed(folder).sha256 for folder in (first, same, longer, renamed, relabelled)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4
    assert listed(first, limit=5).sha256 != hashes[0]


def test_storage_that_fails_for_a_moment_is_no_other_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose images were listed meanwhile could not be resumed."""
    expected = listed(write_folder(tmp_path)).sha256
    stat, failing = os.stat, [True, True, False]

    def failing_stat(path: Path | str | int, **how: bool) -> os.stat_result:
        """Fail twice for one file: when it is listed, and when it is read for that."""
        if str(path).endswith("3.jpg") and failing and failing.pop(0):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return stat(path, **how)

    monkeypatch.setattr(reading, "WAITS_S", (0.0,))
    source = open_source(f"folder:{tmp_path}")
    monkeypatch.setattr(os, "stat", failing_stat)
    assert list_images(source).sha256 == expected
    failing[:] = [True] * 9
    with pytest.raises(TrainError, match=r"reading cat/3\.jpg: expected storage that works"):
        list_images(source)


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    """They have no way back to an image; the error says what to do."""
    for name in ("0.tar.gz", "1.tar.gz"):
        write_tar(tmp_path / name)
    with pytest.raises(TrainError) as error:
        listed(f"wds:{tmp_path}/*.tar.gz")
    assert str(error.value) == (
        f"streaming wds:{tmp_path}/*.tar.gz: expected plain .tar shards, which can be read at "
        "any place, found 2 compressed, such as 0.tar.gz; decompress them (pictures hardly "
        "shrink), or choose --data-in memory"
    )
