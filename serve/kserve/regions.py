"""System shared memory: regions that callers on this machine register by name.

Rules:
    A region is a regular file directly in /dev/shm. Its key is a name, never a path; a link
    is not followed.
    Memory is read and written by pread and pwrite and never mapped: whoever owns a region
    may cut it off at any time, which would kill a process that has mapped it (SIGBUS). It
    costs one copy, which is needed anyway: what is checked must not change afterwards.
    Every access is held against the region's bounds, when it is asked for and, where the
    file has become smaller since, when it is made.
    A region stays open while a request uses it, also where it is unregistered meanwhile.
    No error names a path.
    A name belongs to who registered it: nobody else reads, writes, lists or forgets what it
    names. In Triton names are everybody's.

Belongs to one event loop.
"""

from __future__ import annotations

import os
import re
import stat
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.errors import reason_of
from serve.errors import QueueFullError, RequestError, UnknownNameError

DIRECTORY = Path("/dev/shm")
KEY = re.compile(r"/?([^/\0]{1,255})")
MAX_NAME_CHARACTERS = 256


class Region:
    """One registered region; its file is closed when nobody refers to it."""

    def __init__(self, name: str, key: str, descriptor: int, offset: int, byte_size: int) -> None:
        """Take over an open file.

        Args:
            name: what requests call it.
            key: its name in the system.
            descriptor: of its file.
            offset: where in the file it begins, in bytes.
            byte_size: how long it is.
        """
        self.name, self.key, self.offset, self.byte_size = name, key, offset, byte_size
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def __repr__(self) -> str:
        return f"<Region {self.name!r} {self.byte_size} bytes>"

    def slice(self, offset: int, byte_size: int) -> Slice:
        """Give a part of it.

        Raises:
            RequestError: the part is not within it.
        """
        if offset < 0 or byte_size < 0 or offset + byte_size > self.byte_size:
            raise RequestError(
                f"shared memory region {self.name!r}",
                expected=f"a part within its {self.byte_size} bytes",
                found=f"{byte_size} bytes at {offset}",
            )
        return Slice(self, offset, byte_size)

    def read(self, offset: int, byte_size: int) -> bytes:
        """Read some bytes of it.

        Raises:
            RequestError: its file has become too small.
        """
        data = os.pread(self._descriptor, byte_size, self.offset + offset)
        if len(data) != byte_size:
            raise self._cut_off()
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Write some bytes to it.

        Raises:
            RequestError: its file has become too small, or the system has no memory for it.
        """
        start = self.offset + offset
        if os.fstat(self._descriptor).st_size < start + len(data):
            raise self._cut_off()
        left = memoryview(data)
        try:
            while left:
                written = os.pwrite(self._descriptor, left, start)
                left, start = left[written:], start + written
        except OSError as error:  # its size is no promise of memory
            raise RequestError(
                f"shared memory region {self.name!r}",
                expected="memory that can be written",
                found=reason_of(error),
            ) from None

    def _cut_off(self) -> RequestError:
        """Say that the file is smaller than it was."""
        return RequestError(
            f"shared memory region {self.name!r}",
            expected=f"{self.byte_size} bytes, as it was registered",
            found="fewer",
        )


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a region, within its bounds."""

    region: Region
    offset: int
    byte_size: int

    def read(self) -> bytes:
        """Read all of it; see `Region.read`."""
        return self.region.read(self.offset, self.byte_size)

    def write(self, data: bytes) -> None:
        """Write to its beginning; see `Region.write`.

        Raises:
            RequestError: it is too small.
        """
        check_fits(self, len(data))
        self.region.write(self.offset, data)


class Regions:
    """The registered regions, by name."""

    def __init__(self, *, max_regions: int, directory: Path = DIRECTORY) -> None:
        """Start with none.

        Args:
            max_regions: how many there may be at once.
            directory: where the system keeps shared memory.
        """
        self._max_regions = max_regions
        self._directory = directory
        self._regions: dict[tuple[str, str], Region] = {}

    def __repr__(self) -> str:
        return f"<Regions {[name for _, name in self._regions]}>"

    def register(self, owner: str, name: str, key: str, offset: int, byte_size: int) -> None:
        """Register a region for a caller.

        Raises:
            RequestError: the name is taken or none, or there is no such memory, or not so much.
            QueueFullError: there are too many.
        """
        if not 1 <= len(name) <= MAX_NAME_CHARACTERS:
            expected = f"1 to {MAX_NAME_CHARACTERS} characters"
            raise RequestError("name of the region", expected=expected, found=f"{len(name)}")
        if (owner, name) in self._regions:
            raise RequestError(
                f"shared memory region {name!r}",
                expected="a name of its own",
                found="one that is registered",
                mend="unregister it first",
            )
        if len(self._regions) >= self._max_regions:
            raise QueueFullError(
                "shared memory regions",
                expected=f"at most {self._max_regions}",
                found="as many registered",
                mend="unregister some",
            )
        self._regions[owner, name] = self._open(name, key, offset, byte_size)

    def unregister(self, owner: str, name: str) -> None:
        """Forget one of a caller's regions, or all of them where the name is empty.

        Those that are not known are forgotten already.
        """
        for known in [known for known in self._regions if known[0] == owner]:
            if not name or known[1] == name:
                del self._regions[known]

    def find(self, owner: str, name: str) -> Region:
        """Find one of a caller's regions by name.

        Raises:
            UnknownNameError: there is none of that name.
        """
        if (owner, name) not in self._regions:
            raise UnknownNameError(
                "shared memory region",
                expected="one that is registered",
                found=f"{name[:80]!r}",
                mend="register it; of several workers only that of the connection knows it",
            )
        return self._regions[owner, name]

    def status(self, owner: str, name: str) -> list[Region]:
        """List one of a caller's regions, or all of them where the name is empty.

        Raises:
            UnknownNameError: there is none of that name.
        """
        if name:
            return [self.find(owner, name)]
        return [region for (its, _), region in self._regions.items() if its == owner]

    def _open(self, name: str, key: str, offset: int, byte_size: int) -> Region:
        """Open the memory that a key names."""
        match = KEY.fullmatch(key)
        if match is None or match[1] in (".", ".."):
            raise RequestError(
                f"key of shared memory region {name!r}",
                expected="a name, such as '/images', without other slashes",
                found=f"{key[:80]!r}",
            )
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(self._directory / match[1], flags)
        except OSError as error:
            raise RequestError(
                f"key of shared memory region {name!r}",
                expected="shared memory that this server may open",
                found=reason_of(error),
            ) from None
        region = Region(name, key, descriptor, offset, byte_size)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or byte_size < 1 or offset + byte_size > found.st_size:
            raise RequestError(
                f"shared memory region {name!r}",
                expected="a part of what its key names",
                found=f"{byte_size} bytes at {offset} of {found.st_size}",
            )
        return region


@dataclass(frozen=True, slots=True)
class OwnRegions:
    """The regions of one caller; who that is, is asked where a request names a region."""

    regions: Regions
    owner: Callable[[], str]

    def find(self, name: str) -> Region:
        """Find a region by name.

        Raises:
            UnknownNameError: the caller registered none of that name.
            PreconditionError: the caller may use none.
        """
        return self.regions.find(self.owner(), name)


def check_fits(part: Slice, byte_size: int) -> None:
    """Refuse a part that is too small for what is to be written to it.

    Raises:
        RequestError: it is.
    """
    if byte_size > part.byte_size:
        raise RequestError(
            f"output in shared memory region {part.region.name!r}",
            expected=f"room for {byte_size} bytes",
            found=str(part.byte_size),
        )
