"""Tar shards: samples, labels, patterns, compression and damage."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pytest

from models.errors import ImageError, ImageFault, SourceError
from models.image_source import storage_fault
from models.webdataset import TarSource, expand_shards

MODES = {"tar": "w", "tar.gz": "w:gz", "tgz": "w:gz", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}
MANY = ((".png", b"image"), (".cls", b"cat"))
KINDS = [*MODES, "tar.zst"]


def write_shard(path: Path, members: Mapping[str, bytes]) -> Path:
    """Write a shard, compressed as its name says."""
    kind = path.name.split(".", 1)[1]
    plain = path.with_name(path.name.removesuffix(".zst"))
    with tarfile.open(plain, MODES.get(kind, "w")) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    if kind == "tar.zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(plain.read_bytes())
        plain.unlink()
    return path


def samples(n: int) -> dict[str, bytes]:
    """Make n samples whose images cannot be compressed away."""
    members = {}
    for i in range(n):
        members[f"{i:04d}.cls"] = str(i % 3).encode()
        members[f"{i:04d}.jpg"] = bytes((i * 37 + j * j) % 251 for j in range(1500))
        members[f"{i:04d}.txt"] = b"a caption"
    return members


def listed(path: Path | str) -> list[tuple[str, str | None]]:
    """Give keys and labels."""
    return [(record.key, record.label) for record in TarSource(str(path)).records()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_reads_the_same_whatever_its_compression(tmp_path: Path, kind: str) -> None:
    """Only the count differs: a compressed shard would have to be read for it."""
    members = samples(5)
    shard = write_shard(tmp_path / f"s.{kind}", members)
    source = TarSource(str(shard))
    assert listed(shard) == [(f"s.{kind}/{i:04d}.jpg", str(i % 3)) for i in range(5)]
    assert [record.read() for record in source.records(3)] == [
        members["0003.jpg"],
        members["0004.jpg"],
    ]
    assert source.load(f"s.{kind}/0002.jpg") == members["0002.jpg"]
    assert source.count() == (5 if kind == "tar" else None)


def test_members_of_a_sample_share_the_name_up_to_the_first_dot(tmp_path: Path) -> None:
    """The image is the plain one; masks beside it are not images of the data set."""
    shard = write_shard(
        tmp_path / "s.tar",
        {
            "./train/7.seg.png": b"mask",
            "./train/7.cls": b"cat\n",
            "./train/7.jpg": b"image",
            "./train/8.left.JPG": b"left",
            "./train/8.right.JPG": b"right",
            "./train/9.txt": b"no image",
            "./train/.8.jpg": b"hidden",
        },
    )
    assert listed(shard) == [
        ("s.tar/train/7.jpg", "cat"),
        ("s.tar/train/8.left.JPG", None),
        ("s.tar/train/8.right.JPG", None),
    ]


def test_a_name_whose_last_letter_changes_with_what_follows_is_as_any_other(tmp_path: Path) -> None:
    """A sigma that ends a word is another letter in lower case than one before an extension."""
    members = {f"\u039f\u03a3.{end}": b"cat" for end in ("jpg", "seg.png", "cls")}
    shard = write_shard(tmp_path / "s.tar", members)
    assert listed(shard) == [("s.tar/\u039f\u03a3.jpg", "cat")]


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_a_file_with_holes_is_read_whole(tmp_path: Path, kind: str) -> None:
    """Of which `tar --sparse` keeps what lies between them."""
    photo, other = tmp_path / "1.bmp", tmp_path / "2.bmp"
    with photo.open("wb") as file:
        file.write(b"begin")
        file.seek(1 << 20)
        file.write(b"end")
    other.write_bytes(b"another")
    shard = tmp_path / f"s.{kind}"
    names = [photo.name, other.name]
    tar = ["tar", "--sparse", "--auto-compress", "-cf", shard, "-C", tmp_path, *names]
    subprocess.run(tar, check=True)
    assert shard.stat().st_size < 1 << 20
    source = TarSource(str(shard))
    assert [record.read() for record in source.records()] == [
        photo.read_bytes(),
        other.read_bytes(),
    ]
    assert source.load(f"s.{kind}/1.bmp") == photo.read_bytes()


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_a_name_that_is_no_utf_8_is_a_key_all_the_same(tmp_path: Path, kind: str) -> None:
    """As of a folder's files: what is no character is written as its bytes."""
    shard = tmp_path / f"s.{kind}"
    how = {"encoding": "latin-1", "format": tarfile.GNU_FORMAT}
    with tarfile.open(shard, MODES.get(kind, "w"), **how) as archive:
        member = tarfile.TarInfo("caf\xe9.jpg")
        member.size = 5
        archive.addfile(member, io.BytesIO(b"image"))
    assert listed(shard) == [(key := f"s.{kind}/caf\\xe9.jpg", None)]
    assert TarSource(str(shard)).load(key) == b"image"


def test_a_shard_whose_name_is_no_utf_8_has_keys_all_the_same(tmp_path: Path) -> None:
    """A pattern of plain letters may stand for it."""
    write_shard(tmp_path / os.fsdecode(b"caf\xe9.tar"), {"1.jpg": b"image"})
    pattern = str(tmp_path / "*.tar")
    assert listed(pattern) == [(key := "caf\\xe9.tar/1.jpg", None)]
    assert TarSource(pattern).load(key) == b"image"


def test_a_label_is_the_text_of_cls(tmp_path: Path) -> None:
    """Without the mark that some editors begin a file with, and without what surrounds it."""
    members = {}
    for n, text in enumerate((b"cat", b"\xef\xbb\xbfcat\r\n", b" \n", b"\xff")):
        members |= {f"{n}.jpg": b"image", f"{n}.cls": text}
    labels = [label for _, label in listed(write_shard(tmp_path / "s.tar", members))]
    assert labels == ["cat", "cat", None, "\ufffd"]


@pytest.mark.parametrize(
    ("facts", "label"),
    [
        (json.dumps({"label": "cat", "cls": 3}).encode(), "cat"),
        (json.dumps({"cls": 3}).encode(), "3"),
        (json.dumps({"label": [1, 2]}).encode(), None),
        (json.dumps([1]).encode(), None),
        (b"{not json", None),
        (b"\xff\xfe", None),
        (b"[" * 100_000, None),
        (b'{"label": "\\ud83d"}', "?"),
    ],
)
def test_a_json_gives_its_label_or_none(tmp_path: Path, facts: bytes, label: str | None) -> None:
    """A description without a usable label leaves the image without one."""
    shard = write_shard(tmp_path / "s.tar", {"1.jpg": b"image", "1.json": facts})
    assert listed(shard) == [("s.tar/1.jpg", label)]


def test_a_range_names_every_shard_and_a_glob_those_that_are_there(tmp_path: Path) -> None:
    """Shards come in the order of their names, and keys tell them apart."""
    for n in (9, 10, 11):
        write_shard(tmp_path / f"s-{n:03d}.tar", samples(1))
    keys = [f"s-{n:03d}.tar/0000.jpg" for n in (9, 10, 11)]
    assert [key for key, _ in listed(f"{tmp_path}/s-{{009..011}}.tar")] == keys
    assert [key for key, _ in listed(f"{tmp_path}/s-*.tar")] == keys


@pytest.mark.parametrize(
    "pattern", ["s-0.tar", "s-*.tar", "s-{0..1}.tar", "../run [[]1] [{]0..1}/s-?.tar"]
)
def test_a_directory_may_be_called_as_a_pattern_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    """Where people stand is taken as it is; and the source is opened again from anywhere."""
    (folder := tmp_path / "run [1] {0..1}").mkdir()
    shards = [write_shard(folder / f"s-{n}.tar", samples(1)) for n in (0, 1)]
    monkeypatch.chdir(folder)
    source = TarSource(pattern)
    assert source.shards == (shards[:1] if pattern == "s-0.tar" else shards)
    monkeypatch.chdir(tmp_path)
    assert TarSource(source.uri.removeprefix("wds:")).shards == source.shards
    monkeypatch.chdir(folder)
    with pytest.raises(SourceError, match=r"found no s-2\.tar \(1 of 3 are missing\)"):
        TarSource("s-{0..2}.tar")


def test_shards_of_one_name_in_two_folders_keep_their_keys_apart(tmp_path: Path) -> None:
    """The folder below the common one becomes part of the key."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "s.tar", samples(1))
    source = TarSource(f"{tmp_path}/*/s.tar")
    assert [record.key for record in source.records()] == ["a/s.tar/0000.jpg", "b/s.tar/0000.jpg"]
    assert source.load("b/s.tar/0000.jpg") == samples(1)["0000.jpg"]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """A range promises all of its shards; a glob must match something."""
    write_shard(tmp_path / "s-0.tar", samples(1))
    with pytest.raises(SourceError, match=r"found no s-1\.tar \(2 of 3 are missing\); check the"):
        expand_shards(f"{tmp_path}/s-{{0..2}}.tar")
    with pytest.raises(SourceError, match="expected tar files, found none of that name"):
        expand_shards(f"{tmp_path}/t-*.tar")
    with pytest.raises(SourceError, match=r"expected a range that goes up, found \{2\.\.0\}"):
        expand_shards(f"{tmp_path}/s-{{2..0}}.tar")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0.3, 0.6])
def test_a_truncated_shard_is_an_error_that_names_it(
    tmp_path: Path, kind: str, kept: float
) -> None:
    """Images before the cut are good; the cut is never taken for the end."""
    members = samples(20)
    shard = write_shard(tmp_path / f"s.{kind}", members)
    data = shard.read_bytes()
    shard.write_bytes(data[: int(len(data) * kept)])
    found: list[object] = []

    def read_all() -> None:
        """Read up to the fault."""
        found.extend(record.read() for record in TarSource(str(shard)).records())

    with pytest.raises(SourceError, match=f"shard {shard}: expected a whole tar file, found "):
        read_all()
    assert found == [members[f"{i:04d}.jpg"] for i in range(len(found))]
    assert len(found) < 20


@pytest.mark.parametrize("end", ["cut at a member", "garbage for a header"])
def test_an_end_that_tarfile_would_accept_is_damage(tmp_path: Path, end: str) -> None:
    """An archive ends with a block of zeros and with nothing else."""
    shard = write_shard(tmp_path / "s.tar", samples(3))
    data = bytearray(shard.read_bytes())
    header = data.index(b"0002.cls")
    if end == "cut at a member":
        del data[header:]
    else:
        data[header : header + 512] = b"garbage " * 64
    shard.write_bytes(data)
    with pytest.raises(SourceError, match="header where a file or the end should be"):
        listed(shard)


def test_long_names_without_end_are_damage(tmp_path: Path) -> None:
    """Each is a header of its own for the one that follows, which tarfile reads by recursion."""
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 6
    block = long_name.tobuf(tarfile.GNU_FORMAT) + b"1.jpg".ljust(tarfile.BLOCKSIZE, b"\0")
    (tmp_path / "s.tar").write_bytes(2000 * block)
    with pytest.raises(SourceError, match=r"expected a whole tar file, found maximum recursion"):
        listed(tmp_path / "s.tar")


def test_a_file_that_is_no_tar_is_an_error(tmp_path: Path) -> None:
    """Whatever its name says."""
    for name in ("s.tar", "s.tar.gz", "s.tar.zst"):
        (tmp_path / name).write_bytes(b"This is no archive. " * 100)
        with pytest.raises(SourceError, match=f"shard .*{name}: expected a whole tar file"):
            listed(tmp_path / name)


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_an_empty_image_is_listed_and_raises_when_read(tmp_path: Path, kind: str) -> None:
    """As in a folder: readers report and skip in one place."""
    shard = write_shard(tmp_path / f"s.{kind}", {"1.jpg": b"", "2.jpg": b"image"})
    first, second = TarSource(str(shard)).records()
    with pytest.raises(ImageError, match="expected an image, found no bytes") as caught:
        first.read()
    assert caught.value.fault is ImageFault.EMPTY
    assert second.read() == b"image"


@pytest.mark.parametrize("how", ["renamed over", "written to", "emptied"])
def test_a_shard_that_was_replaced_gives_nobody_anothers_bytes(tmp_path: Path, how: str) -> None:
    """A record outlives its iterator: where its image lay another may lie now."""
    members = {"1.jpg": b"image one", "2.jpg": b"image two"}
    shard = write_shard(tmp_path / "s.tar", members)
    source = TarSource(str(shard))
    first, _ = source.records()
    assert source.load("s.tar/1.jpg") == first.read() == b"image one"
    other = write_shard(tmp_path / "other.tar", dict(reversed(members.items())))
    assert other.stat().st_size == shard.stat().st_size
    if how == "renamed over":
        later_ns = shard.stat().st_mtime_ns + 10**9  # else both may be of one tick of the clock
        os.utime(other, ns=(later_ns, later_ns))
        other.replace(shard)
    else:
        data = other.read_bytes() + bytes(tarfile.RECORDSIZE)
        shard.write_bytes(data if how == "written to" else b"")
    with pytest.raises(SourceError) as caught:
        first.read()
    assert str(caught.value) == (
        f"shard {shard}: expected the file that was listed, found another: the shard was "
        "replaced or written to while it was read; let it rest, and run again"
    )
    if how != "emptied":
        assert source.load("s.tar/1.jpg") == b"image one"


def test_a_shard_that_is_gone_is_storage_that_fails(tmp_path: Path) -> None:
    """None of its images is to blame."""
    shard = write_shard(tmp_path / "s.tar", {"1.jpg": b"image"})
    source = TarSource(str(shard))
    (record,) = source.records()
    shard.unlink()
    with pytest.raises(
        ImageError, match=r"s\.tar is out of reach, or another of its name"
    ) as caught:
        record.read()
    assert storage_fault(caught.value) == errno.ESTALE
    with pytest.raises(ImageError, match=r"s\.tar is out of reach"):
        source.load("s.tar/1.jpg")


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
@pytest.mark.parametrize("pattern", ["{}", "*{}"])
def test_a_pipe_is_no_shard(tmp_path: Path, name: str, pattern: str) -> None:
    """It would be waited for."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(SourceError, match=f"found {name}, which is no regular file; check the"):
        TarSource(f"{tmp_path}/{pattern.format(name)}")


@pytest.mark.parametrize("name", ["folder", "photos.zip"])
def test_what_is_no_tar_by_its_name_is_refused(tmp_path, name):
    """A folder or another kind of archive is one line with what to name instead."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(SourceError, match=r"name that ends in \.tar, .*take folder:PATH"):
        TarSource(str(tmp_path / name))


def test_labels_come_from_the_open_shard(tmp_path, monkeypatch):
    """A shard is opened once for a walk over its records, however many labels it has."""
    members = {f"{n:03}{end}": text for n in range(50) for end, text in MANY}
    path = write_shard(tmp_path / "many.tar", members)
    opened = []
    really_open = Path.open
    monkeypatch.setattr(Path, "open", lambda p, mode: opened.append(p) or really_open(p, mode))
    labels = [record.label for record in TarSource(str(path)).records()]
    assert labels == ["cat"] * 50
    assert opened == [path]
