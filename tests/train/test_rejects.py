"""Skipped images: counted once, bounded, and kept in a file."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from index.embed import Reject
from models.errors import ImageError, ImageFault
from models.images import ImageRecord
from train.data.rejects import Rejects, read_rejects, reject_of, write_rejects
from train.errors import TrainError


def reject(key: str, fault: str = "corrupt") -> Reject:
    """Make a reject."""
    return Reject(key=key, fault=fault, message=f"{key} is damaged")


def test_an_image_is_counted_once_by_many_threads(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever meets it first; only the first of all is logged."""
    rejects = Rejects("folder:/x", 10)
    with (
        caplog.at_level(logging.WARNING, logger="horace"),
        ThreadPoolExecutor(4) as pool,
    ):
        list(pool.map(lambda i: rejects.add(i % 3, reject(f"{i % 3}.jpg")), range(60)))
    assert repr(rejects) == "Rejects('folder:/x', 3 of 10)"
    assert [found.key for found in rejects.all()] == ["0.jpg", "1.jpg", "2.jpg"]
    assert rejects.faults() == {"corrupt": 3}
    assert 1 in rejects
    assert 7 not in rejects
    assert len(caplog.records) == 1


def test_half_may_be_broken_and_no_more() -> None:
    """Beyond that it is the source that is wrong, and the error shows one of the faults."""
    rejects = Rejects("folder:/x", 4)
    rejects.add(0, reject("a"))
    rejects.add(1, reject("b"))
    with pytest.raises(TrainError) as error:
        rejects.add(2, reject("c"))
    assert str(error.value) == (
        "folder:/x: expected at least half of its images to be usable, found 3 of 4 that are "
        "not; the last: c: c is damaged; check that the path names whole images"
    )


def test_a_reject_says_which_and_why() -> None:
    """Key, fault and the error's own words."""
    record = ImageRecord("a/1.jpg", None, lambda: b"")
    error = ImageError(ImageFault.EMPTY, "image", found="no bytes")
    assert reject_of(record, error) == Reject(
        key="a/1.jpg", fault="empty", message="image: found no bytes"
    )


def test_the_file_keeps_what_it_held(tmp_path: Path) -> None:
    """A run that goes on finds some again and some anew; without any there is no file."""
    path = tmp_path / "rejects.jsonl"
    assert write_rejects(path, []) == 0
    assert not path.exists()
    assert write_rejects(path, [reject("b"), reject("c")]) == 2
    assert write_rejects(path, [reject("a", "empty"), reject("b", "empty")]) == 3
    assert read_rejects(path) == [reject("b"), reject("c"), reject("a", "empty")]
