"""Images in tar shards as WebDataset lays them out, plain or compressed.

Rules:
    A sample is a run of members whose names agree up to the first dot of the file name.
    Its image is the member whose whole extension is an image's (`000123.jpg`); where none
    is, every member that ends in one (`000123.left.jpg`). Its label is the text of `.cls`,
    or else `label` or `cls` of `.json`. All other members are passed over.
    A key is the shard's path below the folder common to all shards, then the member's name:
    `shard-000000.tar/000123.jpg`.
    A shard is read front to back. Images before a fault stay good; at the fault
    `SourceError` names the shard, also where tarfile alone would quietly stop: at a
    damaged header, and at an end without the two zero blocks that close an archive.
    Images of a plain shard are read where they lie when `read` is called; those of a
    compressed shard, and files with holes, come with the record. A shard that was replaced or
    written to since it was listed has other bytes there: `SourceError` says so, and nobody
    gets them.

Source: the WebDataset format, https://github.com/webdataset/webdataset; tar in POSIX pax.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from glob import escape, glob, has_magic
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, NamedTuple, cast

from models.errors import ImageError, ImageFault, SourceError, reason_of
from models.image_source import (
    IMAGE_SUFFIXES,
    MAX_READ_BYTES,
    OF_THE_FILE,
    ImageData,
    ImageRecord,
    away,
    unknown_key,
)
from models.picture import DEFAULT_LIMITS

SHARD_NAME = re.compile(r"\.(tar|tar\.gz|tgz|tar\.bz2|tar\.xz|tar\.zst)$")
"""What the name of a shard, or a pattern for shards, ends in."""

MAX_LABEL_BYTES = 1 << 20
"""A larger `.cls` or `.json` is no label and is passed over."""

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_ESCAPED = re.compile(r"\[([*?[{])\]")  # as `glob.escape` writes what stands for itself, and `{`
# The last three are what tarfile makes of mutated headers, and of thousands of long names in a row.
_FAULTS = (
    tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError,
    RecursionError,
)  # fmt: skip
_LABELS = frozenset({".cls", ".json"})


class _FileId(NamedTuple):
    """By what a plain shard is known for the one that was listed.

    Not by its inode: some network file systems give an untouched file another one.
    """

    size: int
    modified_ns: int

    @classmethod
    def of(cls, info: os.stat_result) -> _FileId:
        """Take it from what the system says of a file."""
        return cls(info.st_size, info.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class _Member:
    """One file of a shard that matters.

    Attributes:
        name: in the shard.
        offset: of its bytes, where the shard is plain.
        size: of its bytes.
        data: they themselves, where they had to be read already.
        shard: which file `offset` is of; None of a compressed shard.
    """

    name: str
    offset: int
    size: int
    data: bytes | None
    shard: _FileId | None


class TarSource:
    """The images of tar shards.

    Args:
        pattern: a path, a glob, or a range such as `shard-{000000..000009}.tar`.

    Raises:
        SourceError: a shard that is named is missing, or nothing matches.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern = _absolute(pattern)
        self.shards = expand_shards(self._pattern)
        folder = Path(os.path.commonpath([shard.parent for shard in self.shards]))
        self._shard_of = {_text(str(shard.relative_to(folder))): shard for shard in self.shards}

    def __repr__(self) -> str:
        """Show the source as it is opened, and how many shards it has."""
        return f"TarSource({self.uri!r}, shards={len(self.shards)})"

    @property
    def uri(self) -> str:
        """`wds:` and the absolute pattern."""
        return f"wds:{self._pattern}"

    def count(self) -> int | None:
        """Count the images from the headers of plain shards; None if any is compressed.

        Raises:
            SourceError: a shard is damaged.
        """
        if any(_is_compressed(shard) for shard in self.shards):
            return None
        return sum(1 for _ in self.records())

    def records(self, start: int = 0) -> Iterator[ImageRecord]:
        """Yield the images, shard by shard in the order of their names.

        Raises:
            SourceError: a shard is damaged or cannot be read.
        """
        every = (_shard_records(shard, name) for name, shard in self._shard_of.items())
        return islice(chain.from_iterable(every), start, None)

    def load(self, key: str) -> ImageData:
        """Read the image of that key; a compressed shard is read up to it.

        Raises:
            ImageError: there is no such image, or it cannot be read.
            SourceError: the shard is damaged before the image, or was replaced meanwhile.
        """
        for name, shard in self._shard_of.items():
            if key.startswith(f"{name}/"):
                if not _is_compressed(shard):
                    return _load_plain(shard, name, key, self.uri)
                for record in _shard_records(shard, name):
                    if record.key == key:
                        return record.read()
        raise unknown_key(key, self.uri)


def _absolute(pattern: str) -> str:
    """Name shards from any directory; what this one is called is no pattern."""
    path = os.path.abspath(pattern)
    if os.path.isabs(pattern) or os.path.isfile(path):
        return path
    here = _RANGE.sub(r"[{]\1..\2}", escape(os.getcwd()))
    return os.path.normpath(os.path.join(here, pattern))


def expand_shards(pattern: str) -> list[Path]:
    """List the shards that a path, glob or range stands for.

    Raises:
        SourceError: a shard that is named is missing, nothing matches, or it is no tar by
            its name.
    """
    if not SHARD_NAME.search(pattern):
        raise SourceError(
            f"shards {pattern}",
            expected="a name that ends in .tar, .tgz, .tar.gz, .tar.bz2, .tar.xz or .tar.zst",
            found="a folder" if os.path.isdir(pattern) else repr(Path(pattern).suffix),
            mend="name the shards, such as 'FOLDER/*.tar', or take folder:PATH for loose images",
        )
    if os.path.isfile(pattern):
        return [Path(pattern)]
    shards: list[Path] = []
    for name in _expand_ranges(pattern):
        is_pattern = has_magic(_ESCAPED.sub("", name))
        found = sorted(glob(name, recursive=True)) if is_pattern else [_ESCAPED.sub(r"\1", name)]
        shards += map(Path, found)
    missing = [shard for shard in shards if not shard.is_file()]
    if missing or not shards:
        raise SourceError(
            f"shards {pattern}",
            expected="tar files",
            found=_describe_missing(missing, len(shards)) if missing else "none of that name",
            mend="check the pattern, and quote it so that the shell leaves it alone",
        )
    return shards


def _describe_missing(missing: Sequence[Path], count: int) -> str:
    """Say what stands in the place of the first of the shards that are no files."""
    first = missing[0]
    if first.exists():
        return f"{first.name}, which is no regular file"
    return f"no {first.name} ({len(missing)} of {count} are missing)"


def _expand_ranges(pattern: str) -> list[str]:
    """Write out every `{first..last}`, zero-padded as `first` is."""
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = int(found[1]), int(found[2])
    if last < first:
        raise SourceError(
            f"shards {pattern}", expected="a range that goes up", found=found[0], mend="swap it"
        )
    names = (f"{n:0{len(found[1])}d}" for n in range(first, last + 1))
    before, after = pattern[: found.start()], _expand_ranges(pattern[found.end() :])
    return [before + name + rest for name in names for rest in after]


def _is_compressed(shard: Path) -> bool:
    """Tell a plain tar from a compressed one by its name."""
    return shard.suffix != ".tar"


def _shard_records(shard: Path, shard_name: str) -> Iterator[ImageRecord]:
    """Yield the images of one shard."""
    sample: list[_Member] = []
    stem = ""
    for member in _members(shard):
        if sample and _stem(member.name) != stem:
            yield from _sample_records(shard, shard_name, sample)
            sample = []
        stem = _stem(member.name)
        sample.append(member)
    yield from _sample_records(shard, shard_name, sample)


def _sample_records(
    shard: Path, shard_name: str, sample: Sequence[_Member]
) -> Iterator[ImageRecord]:
    """Yield the images of one sample, with its label."""
    exact = [member for member in sample if _extension(member.name) in IMAGE_SUFFIXES]
    images = exact or [member for member in sample if _suffix(member.name) in IMAGE_SUFFIXES]
    label = _label(sample) if images else None
    for member in images:
        key = f"{shard_name}/{member.name}"
        yield ImageRecord(key, label, partial(_read_image, shard, member, key), member.size)


def _label(sample: Sequence[_Member]) -> str | None:
    """Give the label of a sample, None where it has none that can be read."""
    texts = {
        _extension(member.name): member.data
        for member in sample
        if _extension(member.name) in _LABELS and member.data is not None
    }
    if ".cls" in texts:
        return texts[".cls"].decode("utf-8-sig", "replace").strip() or None  # editors write a mark
    if ".json" in texts:
        try:
            facts = json.loads(texts[".json"])
        except (ValueError, RecursionError):
            return None
        value = facts.get("label", facts.get("cls")) if isinstance(facts, dict) else None
        if not isinstance(value, str | int):
            return None
        return str(value).encode("utf-8", "replace").decode()
    return None


def _read_image(shard: Path, member: _Member, key: str) -> bytes:
    """Read an image, wherever it lies.

    Raises:
        ImageError: it is empty, too large, or the shard cannot be read any more.
        SourceError: the shard is another than was listed.
    """
    DEFAULT_LIMITS.check_bytes(member.size, key)
    try:
        return _read(shard, member)
    except OSError as error:
        cause = away(shard) if error.errno in OF_THE_FILE else error
        raise _cannot_read(key, cause) from cause


def _cannot_read(key: str, cause: OSError) -> ImageError:
    """Say that the shard of an image cannot be read."""
    return ImageError(
        ImageFault.UNREADABLE, key, expected="a readable shard", found=reason_of(cause)
    )


def _read(shard: Path, member: _Member) -> bytes:
    """Give the bytes of a member; opens the shard anew, so that threads do not meet."""
    if member.data is not None:
        return member.data
    with shard.open("rb") as file:
        file.seek(member.offset)
        data = file.read(member.size)
        which = _FileId.of(os.fstat(file.fileno()))
    if which != member.shard or len(data) != member.size:
        raise SourceError(
            f"shard {shard}",
            expected="the file that was listed",
            found="another: the shard was replaced or written to while it was read",
            mend="let it rest, and run again",
        )
    return data


def _load_plain(shard: Path, shard_name: str, key: str, uri: str) -> bytes:
    """Read an image of a plain shard through its table of contents."""
    try:
        which = _FileId.of(shard.stat())
    except OSError as error:
        cause = away(shard) if error.errno in OF_THE_FILE else error
        raise _cannot_read(key, cause) from cause
    contents = _contents(shard, which)
    member = contents.get(key.removeprefix(f"{shard_name}/"))
    if member is None:
        raise unknown_key(key, uri)
    return _read_image(shard, member, key)


@lru_cache(maxsize=4)
def _contents(shard: Path, which: _FileId) -> dict[str, _Member]:
    """List a plain shard's images by name; `which` tells a file that was replaced."""
    suffixed = (m for m in _members(shard) if _suffix(m.name) in IMAGE_SUFFIXES)
    return {member.name: member for member in suffixed}


class _StrictHeader(tarfile.TarInfo):
    """A header that says so when it is damaged, where tarfile takes it for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictHeader:
        """Parse one header block; only the zero block ends an archive."""
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            raise tarfile.ReadError(f"{error} where a file or the end should be") from error


def _members(shard: Path) -> Iterator[_Member]:
    """Yield the images and labels of a shard in their order.

    Raises:
        SourceError: the shard is damaged or cannot be read.
    """
    compressed = _is_compressed(shard)
    try:
        with (
            _open_stream(shard) as stream,
            tarfile.open(
                fileobj=stream, mode="r|" if compressed else "r:", tarinfo=_StrictHeader
            ) as archive,
        ):
            which = None if compressed else _FileId.of(os.fstat(stream.fileno()))
            for header in archive:
                if header.isreg() and _matters(header.name):
                    yield _member(archive, header, which)
                archive.members = []  # type: ignore[attr-defined]  # or all stay in memory
    except _FAULTS as error:
        raise SourceError(
            f"shard {shard}",
            expected="a whole tar file",
            found=str(error),
            mend="get the shard again, or leave it out of the pattern",
        ) from error


def _member(archive: tarfile.TarFile, header: tarfile.TarInfo, shard: _FileId | None) -> _Member:
    """Describe a member; read it now if it is a label, or if there is no way back to it.

    Of a sparse file (`tar --sparse`) the shard holds no more than what lies between its holes.
    """
    data = None
    size = header.size
    is_label, is_here = _extension(header.name) in _LABELS, shard is None or header.issparse()
    if (is_label and size <= MAX_LABEL_BYTES) or (
        is_here and not is_label and 0 < size <= MAX_READ_BYTES
    ):
        data = cast(IO[bytes], archive.extractfile(header)).read()
    name = _text(header.name).removeprefix("./")
    return _Member(name, header.offset_data, size, data, shard)


def _text(name: str) -> str:
    """Turn a name of a shard or in one into text that UTF-8 can carry."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _open_stream(shard: Path) -> BinaryIO:
    """Open a shard's tar, decompressed as its name says."""
    openers: dict[str, Callable[[Path], object]] = {
        ".tar": lambda path: path.open("rb"),
        ".gz": gzip.open,
        ".tgz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
        ".zst": _open_zstd,
    }
    return cast(BinaryIO, openers[shard.suffix](shard))


def _open_zstd(shard: Path) -> object:
    """Open a zstd file through Arrow: the standard library has no zstd before 3.14."""
    import pyarrow as pa  # 100 ms that only zstd shards should pay

    return pa.input_stream(str(shard), compression="zstd")


def _matters(name: str) -> bool:
    """Tell whether a member is an image or a label; dot files are neither."""
    hidden = PurePosixPath(name).name.startswith(".")
    return not hidden and (_suffix(name) in IMAGE_SUFFIXES or _extension(name) in _LABELS)


def _stem(name: str) -> str:
    """Give a member's name up to the first dot of its file name: its sample."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".", 1)[0]


def _extension(name: str) -> str:
    """Give the first dot of a member's file name and all that follows it, lower-case."""
    _, dot, rest = name.rpartition("/")[2].partition(".")
    return (dot + rest).lower()


def _suffix(name: str) -> str:
    """Give what follows the last dot of a member's file name, lower-case."""
    return PurePosixPath(name).suffix.lower()
