"""A folder of images: what counts, what it is called, and what cannot be read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from models.errors import ImageError, ImageFault, SourceError
from models.image_folder import FolderSource
from models.image_source import MAX_READ_BYTES, storage_fault


def fill(root: Path, *names: str) -> FolderSource:
    """Write a file under each name and open the folder."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return FolderSource(root)


def listed(source: FolderSource) -> list[tuple[str, str | None]]:
    """Give keys and labels."""
    return [(record.key, record.label) for record in source.records()]


def test_the_label_is_the_first_folder_however_deep_the_image(tmp_path: Path) -> None:
    """Folders below a class sort its images; they do not make new classes."""
    source = fill(tmp_path, "dogs/1.jpg", "cats/2019/a/1.jpg", "cats/1.jpg", "alone.jpg")
    assert listed(source) == [
        ("alone.jpg", None),
        ("cats/1.jpg", "cats"),
        ("cats/2019/a/1.jpg", "cats"),
        ("dogs/1.jpg", "dogs"),
    ]


def test_other_files_are_counted_and_not_listed(tmp_path: Path) -> None:
    """Suffixes decide, in any case; hidden files and folders are left alone."""
    source = fill(tmp_path, "a.JPG", "b.txt", "c.TXT", "LICENSE", "._a.jpg", ".git/c.jpg", "d.jpeg")
    assert [key for key, _ in listed(source)] == ["a.JPG", "d.jpeg"]
    ignored = source.ignored_by_suffix
    assert list(ignored.items()) == [(".txt", 2), ("hidden", 2), ("without suffix", 1)]


def test_links_are_followed_once_round(tmp_path: Path) -> None:
    """A folder linked twice is there twice; one that leads back up is not followed."""
    source = fill(tmp_path, "cats/1.jpg")
    (tmp_path / "kitties").symlink_to("cats")
    (tmp_path / "cats" / "up").symlink_to("..")
    assert listed(source) == [("cats/1.jpg", "cats"), ("kitties/1.jpg", "kitties")]


def test_a_file_that_cannot_be_read_is_listed_and_raises_when_read(tmp_path: Path) -> None:
    """Readers report and skip in one place; nothing is lost silently."""
    source = fill(tmp_path, "good.jpg")
    (tmp_path / "dangling.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "round.jpg").symlink_to("round.jpg")
    (tmp_path / "empty.jpg").touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(MAX_READ_BYTES + 1)
    faults = {}
    for record in source.records():
        try:
            record.read()
        except ImageError as error:
            faults[record.key] = (error.fault, str(error))
    assert faults == {
        "dangling.jpg": (
            ImageFault.UNREADABLE,
            "dangling.jpg: expected a readable file, found No such file or directory; "
            "check the path and its permissions",
        ),
        "round.jpg": (
            ImageFault.UNREADABLE,
            "round.jpg: expected a readable file, found Too many levels of symbolic links; "
            "check the path and its permissions",
        ),
        "empty.jpg": (ImageFault.EMPTY, "empty.jpg: expected an image, found no bytes"),
        "pipe.jpg": (
            ImageFault.UNREADABLE,
            "pipe.jpg: expected a regular file, found something else",
        ),
        "huge.jpg": (
            ImageFault.TOO_MANY_BYTES,
            f"huge.jpg: expected at most {MAX_READ_BYTES} bytes, found {MAX_READ_BYTES + 1} bytes",
        ),
    }


@pytest.mark.parametrize(("error", "fault"), [(errno.EACCES, None), (errno.EIO, errno.EIO)])
def test_a_folder_that_cannot_be_listed_is_reported_like_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, fault: int | None
) -> None:
    """Its images are missing, and the reader is told, and whose fault it is; the rest is read."""
    source = fill(tmp_path, "cats/1.jpg", "closed/2.jpg")
    real = os.scandir

    def scandir(folder: str) -> object:
        """Refuse one folder: the superuser, who may run this test, could read any."""
        if folder.endswith("closed"):
            raise OSError(error, os.strerror(error))
        return real(folder)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        records = list(source.records())
    assert [(record.key, record.label) for record in records] == [
        ("cats/1.jpg", "cats"),
        ("closed/", None),
    ]
    with pytest.raises(ImageError, match=r"^closed/: expected a readable folder") as caught:
        records[1].read()
    assert storage_fault(caught.value) == fault


def test_a_root_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sync would take every image for gone."""
    source = fill(tmp_path, "cats/1.jpg")

    def scandir(folder: object) -> object:
        """Fail as a share does that is away."""
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    message = (
        f"image folder {tmp_path}: expected a folder that can be listed, found "
        f"{os.strerror(errno.ESTALE)}; check its permissions and whether its disk is there"
    )
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SourceError) as caught:
        source.count()
    assert str(caught.value) == message
    monkeypatch.setattr(os, "stat", scandir)
    with pytest.raises(SourceError) as caught:
        FolderSource(tmp_path)
    monkeypatch.undo()
    assert str(caught.value) == message


@pytest.mark.parametrize("put", ["nothing", "another folder", "a file"])
def test_a_root_that_is_gone_is_storage_that_fails(tmp_path: Path, put: str) -> None:
    """None of its images is to blame, as one that was deleted is."""
    root = tmp_path / "images"
    first, second = fill(root, "a.png", "b.png").records()
    (root / "a.png").unlink()
    with pytest.raises(ImageError, match="found No such file or directory") as caught:
        first.read()
    assert storage_fault(caught.value) is None
    root.rename(tmp_path / "away")
    if put == "another folder":
        root.mkdir()
    elif put == "a file":
        root.touch()
    with pytest.raises(ImageError, match=r"found .*/images is out of reach, or another") as caught:
        second.read()
    assert storage_fault(caught.value) == errno.ESTALE


def test_a_folder_that_is_gone_is_storage_that_fails(tmp_path: Path) -> None:
    """As where a class lies on another disk, which is no longer mounted."""
    source = fill(tmp_path / "images", "cats/1.png")
    fill(tmp_path / "disk", "2.png")
    (tmp_path / "images" / "birds").symlink_to(tmp_path / "disk")
    bird, cat = source.records()
    (tmp_path / "disk").rename(tmp_path / "away")
    with pytest.raises(ImageError, match=r"found .*/images/birds is out of reach") as caught:
        bird.read()
    assert storage_fault(caught.value) == errno.ESTALE
    assert cat.read()


def test_a_link_that_leads_nowhere_is_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    """What was below it is not gone: the disk that it leads to may be back tomorrow."""
    source = fill(tmp_path, "cats/1.jpg", "notes.txt")
    (tmp_path / "away").symlink_to("nowhere")
    (tmp_path / "cats" / "round").symlink_to("round")
    assert [key for key, _ in listed(source)] == ["away/", "cats/1.jpg", "cats/round/"]
    assert source.ignored_by_suffix == {".txt": 1}


def test_a_name_that_is_no_text_has_a_key_that_is(tmp_path: Path) -> None:
    """Keys travel as UTF-8; the bytes of such a name are spelled out and found again."""
    name = os.fsdecode(b"caf\xe9.jpg")
    source = fill(tmp_path, "plain.jpg")
    (tmp_path / name).write_bytes(b"pixels")
    assert [key for key, _ in listed(source)] == ["caf\\xe9.jpg", "plain.jpg"]
    assert source.load("caf\\xe9.jpg") == b"pixels"


@pytest.mark.parametrize(
    ("names", "found", "mend"),
    [
        ([], "none", "check the path"),
        (["a.heic", "b.heic", "c.csv"], "3 other files: 2 .heic, 1 .csv", "check the path"),
        (["0.tar", "1.tar.gz"], "2 other files: 1 .gz, 1 .tar", "for shards use wds:"),
    ],
)
def test_a_folder_without_images_says_what_it_holds(
    tmp_path: Path, names: list[str], found: str, mend: str
) -> None:
    """Nothing to do is an error, not an empty collection."""
    source = fill(tmp_path, *names)
    with pytest.raises(SourceError) as caught:
        source.count()
    assert str(caught.value).startswith(f"image folder {tmp_path}: expected images (.bmp ")
    assert f"found {found}; {mend}" in str(caught.value)


def test_a_missing_folder_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    """Long work does not start only to find nothing there."""
    with pytest.raises(SourceError, match="expected a folder, found nothing; check the path"):
        FolderSource(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="expected a folder, found a file"):
        FolderSource(tmp_path / "file")
