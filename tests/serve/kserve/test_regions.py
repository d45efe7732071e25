"""Regions of shared memory: what is opened, what is refused, and what is never touched."""

from __future__ import annotations

import os
import resource
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.errors import HoraceError
from serve.errors import QueueFullError, RequestError, UnknownNameError
from serve.kserve.regions import Regions


@pytest.fixture
def shm(tmp_path: Path) -> Path:
    """A directory that stands for /dev/shm."""
    directory = tmp_path / "shm"
    directory.mkdir()
    return directory


@pytest.fixture
def regions(shm: Path) -> Regions:
    """Regions of that directory."""
    return Regions(max_regions=3, directory=shm)


def make(shm: Path, key: str, size: int) -> Path:
    """A piece of shared memory with bytes that count up."""
    file = shm / key
    file.write_bytes(bytes(n % 256 for n in range(size)))
    return file


def test_a_part_is_read_and_written_where_it_says(regions, shm):
    """Offsets of the region and of the part add up, and nothing beside them changes."""
    file = make(shm, "mine", 100)
    regions.register("", "images", "/mine", 10, 50)
    part = regions.find("", "images").slice(5, 4)
    assert part.read() == bytes([15, 16, 17, 18])
    part.write(b"abc")
    assert file.read_bytes()[14:20] == bytes([14]) + b"abc" + bytes([18, 19])
    assert file.stat().st_size == 100


@pytest.mark.parametrize(
    "key", ["", "/", ".", "..", "/..", "../x", "/../x", "a/b", "//x", "/a/../b", "x\0", "\0"]
)
def test_a_key_that_leads_elsewhere_is_refused(regions, shm, key):
    """It is a name, and never a path."""
    make(shm.parent, "x", 10)
    with pytest.raises(RequestError, match="expected a name, such as '/images'") as error:
        regions.register("", "r", key, 0, 1)
    assert str(shm) not in str(error.value)


def test_a_link_is_not_followed(regions, shm):
    """Wherever it leads."""
    (shm / "link").symlink_to(make(shm.parent, "secret", 10))
    with pytest.raises(RequestError, match="expected shared memory that this server may") as error:
        regions.register("", "r", "/link", 0, 1)
    assert str(shm) not in str(error.value)


def test_what_is_no_memory_is_refused(regions, shm):
    """A directory, a pipe that would be waited for, or nothing at all."""
    (shm / "directory").mkdir()
    os.mkfifo(shm / "pipe")
    for key in ("directory", "pipe", "none"):
        with pytest.raises(RequestError, match="shared memory"):
            regions.register("", "r", key, 0, 1)
    assert regions.status("", "") == []


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 101), (100, 1), (1, 100), (0, 0), (2**64 - 1, 1), (0, 2**64 - 1)]
)
def test_a_region_is_within_its_file(regions, shm, offset, size):
    """Or it is refused."""
    make(shm, "mine", 100)
    with pytest.raises(RequestError, match="expected a part of what its key names"):
        regions.register("", "r", "mine", offset, size)


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 51), (50, 1), (-1, 2), (0, -1), (2**63 - 1, 1), (1, 2**63 - 1)]
)
def test_a_part_is_within_its_region(regions, shm, offset, size):
    """Also where the file goes on."""
    make(shm, "mine", 100)
    regions.register("", "r", "mine", 10, 50)
    with pytest.raises(RequestError, match="region 'r': expected a part within its 50 bytes"):
        regions.find("", "r").slice(offset, size)


def test_a_region_that_is_cut_off_is_an_error_and_no_signal(regions, shm):
    """Its owner may make it smaller at any time."""
    file = make(shm, "mine", 100)
    regions.register("", "r", "mine", 0, 100)
    part = regions.find("", "r").slice(50, 50)
    os.truncate(file, 60)
    with pytest.raises(RequestError, match="expected 100 bytes, as it was registered, found few"):
        part.read()
    with pytest.raises(RequestError, match="found fewer"):
        part.write(bytes(50))
    assert file.stat().st_size == 60


def test_what_does_not_fit_is_not_written(regions, shm):
    """Not even its beginning."""
    file = make(shm, "mine", 100)
    before = file.read_bytes()
    regions.register("", "r", "mine", 0, 100)
    with pytest.raises(RequestError, match="region 'r': expected room for 11 bytes, found 10"):
        regions.find("", "r").slice(0, 10).write(bytes(11))
    assert file.read_bytes() == before


@pytest.mark.parametrize("offset", [20, 50])
def test_memory_that_the_system_does_not_have_is_an_error_of_the_callers(regions, shm, offset):
    """A file may be larger than what can be written to it, such as in a full /dev/shm."""
    make(shm, "mine", 100)
    regions.register("", "r", "mine", 0, 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        with pytest.raises(RequestError, match="'r': expected memory that can be written, found F"):
            regions.find("", "r").slice(offset, 100 - offset).write(bytes(100 - offset))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_names_are_unique_and_few(regions, shm):
    """Each is an open file."""
    make(shm, "mine", 10)
    for name in "abc":
        regions.register("", name, "mine", 0, 10)
    with pytest.raises(RequestError, match="expected a name of its own, found one that is reg"):
        regions.register("", "a", "mine", 0, 10)
    with pytest.raises(QueueFullError, match="expected at most 3, found as many registered"):
        regions.register("", "d", "mine", 0, 10)
    for name in ("", "x" * 257):
        with pytest.raises(RequestError, match="expected 1 to 256 characters"):
            regions.register("", name, "mine", 0, 10)
    regions.unregister("", "b")
    regions.unregister("", "never registered")
    assert [region.name for region in regions.status("", "")] == ["a", "c"]
    with pytest.raises(UnknownNameError, match="expected one that is registered, found 'b'"):
        regions.status("", "b")
    regions.unregister("", "")
    assert regions.status("", "") == []


@pytest.fixture
def open_files(shm: Path) -> Iterator[None]:
    """Nothing of the directory stays open."""
    yield
    links = Path("/proc/self/fd").iterdir()
    found = [os.readlink(link) for link in links if link.is_symlink()]
    assert [name for name in found if name.startswith(f"{shm}/")] == []


@pytest.mark.usefixtures("open_files")
def test_a_region_stays_open_while_it_is_used_and_no_longer(regions, shm):
    """A request that has begun ends as it began, also where the name is taken anew."""
    make(shm, "mine", 10)
    make(shm, "other", 10).write_bytes(bytes(10))
    regions.register("", "r", "mine", 0, 10)
    part = regions.find("", "r").slice(1, 2)
    regions.unregister("", "r")
    regions.register("", "r", "other", 0, 10)
    assert part.read() == bytes([1, 2])
    del part
    regions.unregister("", "")
    with pytest.raises(HoraceError):
        regions.register("", "r", "mine", 0, 11)


def test_the_system_s_own_directory(tmp_path):
    """By default regions are those of /dev/shm."""
    key = f"horace-test-{uuid.uuid4().hex}"
    file = Path("/dev/shm") / key
    file.write_bytes(b"abc")
    try:
        regions = Regions(max_regions=1)
        regions.register("", "r", f"/{key}", 0, 3)
        assert regions.find("", "r").slice(0, 3).read() == b"abc"
    finally:
        file.unlink()
